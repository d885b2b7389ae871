"""Networks of users: every executor gives what the plain module gives alone; what is freed, and when."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CLASSES, check_equal, equations, thresholds_between
from flax import nnx
from flax.nnx import bridge

import branchy_jax as bj
from branchy_jax.models import attach, from_nnx, select_exits
from experiments.study import random_networks


class Branches(nn.Module):
    """A side branch with a branch of its own, and a skip from the stem to the last exit."""

    @nn.compact
    def __call__(self, x):
        stem = jnp.tanh(nn.Dense(8, name='stem')(x))
        side = jnp.tanh(nn.Dense(6, name='side')(stem))
        twig = jnp.tanh(nn.Dense(8, name='twig')(side))
        trunk = jnp.tanh(nn.Dense(8, name='trunk')(nn.relu(nn.Dense(32)(stem)))) + stem
        return tuple(nn.Dense(CLASSES)(x) for x in (side, twig, trunk))


class TwoInputs(nn.Module):
    """Two arguments, the second not read before the second exit; named flags, keyword only."""

    @nn.compact
    def __call__(self, image, kind, *, deterministic=True):
        x = nn.Dropout(0.5)(nn.relu(nn.Dense(6)(image)), deterministic=deterministic)
        early = nn.Dense(CLASSES)(x)
        x = jnp.concatenate([x, nn.Embed(3, 4)(kind)], axis=-1)
        return early, nn.Dense(CLASSES)(nn.relu(nn.Dense(6)(x)))


class OneDictionary(nn.Module):
    """One argument that is a dictionary."""

    @nn.compact
    def __call__(self, inputs):
        x = nn.relu(nn.Dense(6)(inputs['image']) + nn.Embed(3, 6)(inputs['kind']))
        return nn.Dense(CLASSES)(x), nn.Dense(CLASSES)(nn.relu(nn.Dense(6)(x)))


class Norms(nn.Module):
    """BatchNorm and dropout before and behind the first exit; trains by default."""

    @nn.compact
    def __call__(self, x, train=True):
        logits = []
        for n in range(2):
            x = nn.relu(nn.BatchNorm(not train, name=f'norm{n}')(nn.Dense(6, name=f'layer{n}')(x)))
            x = nn.Dropout(0.5)(x, deterministic=not train)
            logits.append(nn.Dense(CLASSES)(x))
        return tuple(logits)


class NnxNorms(nnx.Module):
    """The same in Flax's newer form."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4 if n == 0 else 6, 6, rngs=rngs) for n in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(6, rngs=rngs) for _ in range(2)])
        self.heads = nnx.List([nnx.Linear(6, CLASSES, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        logits = []
        for layer, norm, head in zip(self.layers, self.norms, self.heads, strict=True):
            x = self.dropout(nnx.relu(norm(layer(x))))
            logits.append(head(x))
        return tuple(logits)


def trained_nnx():
    module = NnxNorms(nnx.Rngs(0))
    module.train()
    module(jax.random.normal(jax.random.key(9), (16, 4)))  # statistics that are not the first ones
    module.eval()
    return module


IMAGE = np.asarray(jax.random.normal(jax.random.key(0), (9, 4)))
KIND = np.arange(9) % 3
BOTH = {'kind': KIND, 'image': IMAGE}
NETWORKS = {  # the model, its inputs, and how its author would call it
    'branches': (Branches(), IMAGE, lambda model, variables: model.apply(variables, IMAGE)),
    'by name': (TwoInputs(), BOTH, lambda model, variables: model.apply(variables, **BOTH)),
    'a tuple': (TwoInputs(), (IMAGE, KIND), lambda model, variables: model.apply(variables, IMAGE, KIND)),
    'one dictionary': (OneDictionary(), BOTH, lambda model, variables: model.apply(variables, BOTH)),
    'norms': (Norms(), IMAGE, lambda model, variables: model.apply(variables, IMAGE, train=False)),
    'NNX': (from_nnx(trained_nnx()), IMAGE, lambda model, variables: trained_nnx()(IMAGE)),
}


def own(name):
    model, inputs, call = NETWORKS[name]
    variables = jax.jit(functools.partial(bj.calling.init, model))(jax.random.key(1), inputs)
    return model, variables, inputs, call(model, variables)


def products(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    return sum(equation.primitive.name == 'dot_general' for equation in equations(closed.jaxpr))


@pytest.mark.parametrize('name', NETWORKS)
def test_stages_and_heads_are_the_module(name):
    model, variables, inputs, expected = own(name)
    parts, hidden, counts = bj.program.stages(model, variables, inputs), inputs, []
    for n, logits in enumerate(expected):
        before, hidden = hidden, parts.run_stage(n, variables, hidden)
        np.testing.assert_allclose(parts.run_exit(n, variables, hidden), logits, atol=1e-5)
        counts.append(products(lambda v, h, n=n: parts.run_stage(n, v, h), variables, before))
        counts[-1] += products(lambda v, h, n=n: parts.run_exit(n, v, h), variables, hidden)
    assert sum(counts) == products(lambda v, x: bj.calling.apply(model, v, x), variables, inputs)
    one, thresholds = jax.tree.map(lambda x: x[0], inputs), np.zeros(len(expected) - 1, np.float32)
    assert sum(counts) == products(bj.inference.staged(model), variables, one, thresholds)


@pytest.mark.parametrize('name', ['branches', 'by name', 'norms', 'NNX'])
def test_every_executor_answers_as_the_module(name):
    model, variables, inputs, logits = own(name)
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    np.testing.assert_allclose(oracle.logits, jnp.stack(logits)[oracle.exit_index, jnp.arange(9)], atol=1e-5)
    assert len(set(oracle.exit_index.tolist())) > 1
    fast, weights = bj.inference.optimize(model, variables, inputs=inputs)
    answers = {
        'host': bj.inference.compacted(model, chunk_size=4, on_host=True)(variables, inputs, policy),
        'loop': bj.inference.compacted(model, chunk_size=4, on_host=False)(variables, inputs, policy),
        'optimized': bj.inference.dense(fast)(weights, inputs, policy),
    }
    for kind, answer in answers.items():
        np.testing.assert_array_equal(answer.exit_index, oracle.exit_index, err_msg=kind)
        np.testing.assert_array_equal(answer.label, oracle.label, err_msg=kind)
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-4, err_msg=kind)
    for n in range(9):
        answer = bj.inference.staged(model)(variables, jax.tree.map(lambda x, n=n: x[n], inputs), policy)
        assert (answer.exit_index, answer.label) == (oracle.exit_index[n], oracle.label[n])


def test_other_executors_take_dictionaries():
    model, variables, inputs, _ = own('by name')
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    supply = [jax.tree.map(lambda x: x[:3], inputs), jax.tree.map(lambda x: x[3:], inputs)]
    for part in bj.inference.stream(model, chunk_size=2)(variables, supply, policy):
        np.testing.assert_array_equal(part.prediction.exit_index, np.asarray(oracle.exit_index)[part.ids])
    sharded = bj.inference.sharded(model, chunk_size=2, mesh=bj.sharding.data_mesh(1))
    np.testing.assert_array_equal(sharded(variables, inputs, policy).exit_index, oracle.exit_index)
    table = bj.inference.exit_table(model, variables, bj.Batch(inputs, KIND), batch_size=4)
    np.testing.assert_array_equal(table.costs.stages, bj.costs.count_macs(model, inputs=inputs).stages)
    with pytest.raises(ValueError, match='all lead with B'):
        bj.inference.dense(model)(variables, {**inputs, 'kind': KIND[:2]}, policy)


def trained(model, **options):
    variables = bj.calling.init(model, jax.random.key(1), IMAGE)
    state = bj.training.create_train_state(model, variables, optax.sgd(0.1), **options)
    return variables, bj.training.train_step(state, bj.Batch(IMAGE, KIND), jnp.ones(2), jax.random.key(3))[0].variables


@pytest.mark.parametrize('name', ['norms', 'NNX'])
def test_a_frozen_trunk_stays_as_it_is(name):
    model, _, _ = NETWORKS[name]
    before, after = trained(model, frozen_trunk=True, inputs=IMAGE)
    read = bj.program.leaves_read(model, before, IMAGE, [1])
    assert 0 < len(read) < len(jax.tree.leaves(before))
    for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert (a != b).any() == (jax.tree_util.keystr(path) not in read), path


def run_everything(model, variables, policy, options=None):
    build = bj.inference
    jax.block_until_ready(build.staged(model, compiler_options=options)(variables, IMAGE[0], policy))
    compacted = functools.partial(build.compacted, model, chunk_size=4, compiler_options=options)
    for execute in (build.dense(model, compiler_options=options), compacted(on_host=True), compacted(on_host=False)):
        jax.block_until_ready(execute(variables, IMAGE, policy))
    build.exit_outputs(model, variables, IMAGE)
    list(build.stream(model, chunk_size=4)(variables, [IMAGE], policy))


@pytest.mark.parametrize('kind', ['Linen', 'NNX', 'selected from an attached NNX'])
def test_executors_keep_no_weights(kind):
    """Neither those of the variables nor those that an NNX module came with; nor thresholds."""
    module = trained_nnx()
    model = Norms() if kind == 'Linen' else from_nnx(module)
    if kind == 'selected from an attached NNX':
        model = select_exits(attach(nnx.Sequential(*module.layers), ['layers/0'], inputs=IMAGE), [0, 1])
    variables = jax.tree.map(lambda x: x + 0, bj.calling.init(model, jax.random.key(1), IMAGE))
    thresholds = jnp.full(1, 0.5)
    run_everything(model, variables, thresholds)
    freed = [weakref.ref(leaf) for leaf in jax.tree.leaves((variables, thresholds))]
    freed += [] if kind == 'Linen' else [weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    assert all(ref() is not None for ref in freed)
    del model, variables, module, thresholds
    gc.collect()
    assert [ref() for ref in freed if ref() is not None] == []


class WithList(nn.Module):
    """A module whose field is a list, which has no hash."""

    layers: list

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(CLASSES)(x), nn.Sequential(self.layers)(x)


@pytest.mark.parametrize('options', [None, {'xla_cpu_enable_fast_math': False}])
def test_equal_executors_compile_once(compilations, options):
    def make():
        return WithList([nn.Dense(7), nn.Dense(CLASSES)])

    variables, policy = make().init(jax.random.key(0), IMAGE), np.full(1, 0.5, np.float32)
    run_everything(make(), variables, policy, options)
    before = compilations.count
    run_everything(make(), variables, policy, options)
    assert compilations.count == before
    first, second = (bj.inference.dense(make(), compiler_options=options) for _ in range(2))
    assert first == second
    check_equal(first(variables, IMAGE, policy), second(variables, IMAGE, policy))


class Parts(nnx.Module):
    """A layer, a part to be tried and a last layer; ``call`` says how the part is called."""

    def __init__(self, part, call, first=None):
        rngs = nnx.Rngs(1)
        self.first = first or nnx.Linear(4, 4, rngs=rngs)
        self.part, self.last, self.dropout = part, nnx.Linear(4, CLASSES, rngs=rngs), nnx.Dropout(0.5)
        self.call, self.train = call, False

    def __call__(self, x, rngs):
        x = self.dropout(self.call(self, self.first(x)), rngs=rngs)
        self.sow(nnx.Intermediate, 'seen', x)
        return self.last(x)


def stacked(rngs):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    return make(rngs)


def linen(rngs):
    return bridge.lazy_init(bridge.ToNNX(nn.Dense(4), rngs=rngs), jnp.ones((1, 4)))


def in_scan(model, x):
    return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model.part, x)


def in_conditional(model, x):
    return nnx.cond(jnp.array(True), lambda m, x: m.part(x), lambda m, x: x, model, x)


def in_sequence(model, x):
    return model.part(jnp.stack([x, x], 1))[:, -1]


NNX_PARTS = {
    'RNN': (lambda rngs: nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs), rngs=rngs), in_sequence, 'first', 'part/cell'),
    'Bidirectional': (
        lambda rngs: nnx.Bidirectional(
            *(nnx.RNN(nnx.GRUCell(4, 2, rngs=rngs), rngs=rngs) for _ in range(2)), rngs=rngs
        ),
        in_sequence,
        'part',
        'part/forward_rnn/cell',
    ),
    'cond': (lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_conditional, 'first', 'part'),
    'ToNNX': (linen, lambda model, x: model.part(x), 'part', None),
    'keys in a stack': (stacked, in_scan, 'first', None),
    'vmap of a bound layer': (
        lambda rngs: nnx.Linear(4, 4, rngs=rngs),
        lambda model, x: jax.vmap(lambda row: model.part(row))(x),
        'first',
        'part',
    ),
}


@pytest.mark.parametrize('name', NNX_PARTS)
def test_nnx_parts(name):
    """Places are outside of loops; random streams come as an argument, and an attribute is called train."""
    make, call, place, inside = NNX_PARTS[name]
    module = Parts(make(nnx.Rngs(0)), call)
    model = attach(module, [place], inputs=IMAGE)
    before, after = trained(model)
    nnx.Module.eval(module)
    with pytest.warns(DeprecationWarning, match='sow'):
        np.testing.assert_allclose(model.apply(before, IMAGE)[-1], module(IMAGE, nnx.Rngs(0)), atol=1e-6)
    assert (after['params']['first']['kernel'] != before['params']['first']['kernel']).any()
    assert jax.tree.structure(before) == jax.tree.structure(after)
    if inside:
        with pytest.raises(ValueError, match=r'lie inside a loop or conditional|the network passes no'):
            attach(module, [inside], inputs=IMAGE)


def test_a_place_in_a_stack_has_every_layer():
    module = Parts(stacked(nnx.Rngs(0)), in_scan)
    model = attach(module, {'part': lambda y: y[:, -1, :CLASSES]}, inputs=IMAGE)
    early, late = model.apply(model.init(jax.random.key(0), IMAGE), IMAGE)
    np.testing.assert_allclose(module.last(jnp.pad(early, ((0, 0), (0, 1)))).shape, late.shape)


def test_float_types_and_byte_orders():
    model, variables, inputs, _ = own('norms')
    policy = thresholds_between(model, variables, inputs)
    build = bj.inference
    executors = build.dense(model), build.sequential(model), build.compacted(model, chunk_size=4), build.staged(model)
    oracle = executors[0](variables, inputs, policy)
    for executor in executors:
        rows = slice(None) if executor is not executors[-1] else 0
        np.testing.assert_array_equal(
            executor(variables, inputs.astype(np.float64)[rows], policy).exit_index, oracle.exit_index[rows]
        )
        with pytest.raises(ValueError, match='another byte order'):
            executor(variables, inputs.astype('>f4')[rows], policy)


def test_boxed_parameters_are_stored_and_started_from(tmp_path):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ('in', 'out'))
    network = nn.Sequential([nn.Dense(4, kernel_init=boxed), nn.relu, nn.Dense(CLASSES)])
    model = attach(network, ['layers_0'], inputs=IMAGE)
    baseline, variables = network.init(jax.random.key(1), IMAGE), model.init(jax.random.key(0), IMAGE)
    for given in (baseline, nn.meta.unbox(baseline)):
        start, report = bj.training.initialize_from_baseline(variables, given, strict=True)
        assert report.fresh == ('params/exit_layers_0/Dense_0/bias', 'params/exit_layers_0/Dense_0/kernel')
        np.testing.assert_array_equal(model.apply(start, IMAGE)[-1], network.apply(baseline, IMAGE))
    bj.checkpoint.save_weights(tmp_path / 'weights', start)
    check_equal(bj.checkpoint.load_weights(tmp_path / 'weights')[0], nn.meta.unbox(start))


def test_random_networks_cut_at_random_places_are_the_whole():
    """A place that a network does not pass, or one in a network whose rows influence one another, is refused."""
    answers = [random_networks.check(*random_networks.draw(seed)) for seed in range(60)]
    assert 35 < answers.count('') < 60
