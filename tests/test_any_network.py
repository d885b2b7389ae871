"""Networks of users: every executor gives what the plain module gives alone; what is freed, and when."""

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
from jax.extend import core as jax_core

import branchy_jax as bj
from branchy_jax.models import attach, from_nnx, select_exits


class Skips(nn.Module):
    """What the first stage computes is read again behind the second exit."""

    @nn.compact
    def __call__(self, x):
        first = x = nn.relu(nn.Dense(6)(x))
        a = nn.Dense(CLASSES)(x)
        x = nn.relu(nn.Dense(6)(x))
        b = nn.Dense(CLASSES)(x)
        return a, b, nn.Dense(CLASSES)(nn.relu(nn.Dense(6)(x)) + first)


class Twig(nn.Module):
    """A stem, a side branch with a branch of its own, and the trunk."""

    @nn.compact
    def __call__(self, x):
        stem = jnp.tanh(nn.Dense(8, name='stem')(x))
        side = jnp.tanh(nn.Dense(6, name='side')(stem))
        twig = jnp.tanh(nn.Dense(8, name='twig')(side))
        trunk = jnp.tanh(nn.Dense(8, name='trunk')(nn.relu(nn.Dense(32)(stem))))
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
    """BatchNorm and dropout before and behind the first exit; trains unless told otherwise."""

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


IMAGE = jax.random.normal(jax.random.key(0), (9, 4))
KIND = jnp.arange(9) % 3
NETWORKS = {
    'skips': (Skips(), IMAGE),
    'a branch of a branch': (Twig(), IMAGE),
    'a tuple': (TwoInputs(), (IMAGE, KIND)),
    'by name': (TwoInputs(), {'kind': KIND, 'image': IMAGE}),
    'one dictionary': (OneDictionary(), {'kind': KIND, 'image': IMAGE}),
    'BatchNorm and dropout': (Norms(), IMAGE),
    'NNX': (from_nnx(trained_nnx()), IMAGE),
}


def alone(name, model, variables, inputs):
    """Calls the module as its author would."""
    if name == 'NNX':
        return trained_nnx()(inputs)
    if name == 'a tuple':
        return model.apply(variables, *inputs)
    if name == 'by name':
        return model.apply(variables, **inputs)
    return model.apply(variables, inputs, **({'train': False} if name == 'BatchNorm and dropout' else {}))


@pytest.fixture(scope='module', params=NETWORKS)
def own(request):
    model, inputs = NETWORKS[request.param]
    variables = bj.calling.init(model, jax.random.key(1), inputs)
    return model, variables, inputs, alone(request.param, model, variables, inputs)


def products_by_depth(jaxpr, depth=0):
    """How many matrix products lie under how many conditionals."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield depth
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (jax_core.Jaxpr, jax_core.ClosedJaxpr)):
                    inner = inner.jaxpr if isinstance(inner, jax_core.ClosedJaxpr) else inner
                    yield from products_by_depth(inner, depth + (equation.primitive.name == 'cond'))


def products(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    return sum(equation.primitive.name == 'dot_general' for equation in equations(closed.jaxpr))


def test_stages_and_heads_are_the_module(own):
    model, variables, inputs, expected = own
    parts, hidden, counts = bj.program.stages(model, variables, inputs), inputs, []
    for n, logits in enumerate(expected):
        before, hidden = hidden, parts.run_stage(n, variables, hidden)
        np.testing.assert_allclose(parts.run_exit(n, variables, hidden), logits, atol=1e-5)
        counts.append(products(lambda v, h, n=n: parts.run_stage(n, v, h), variables, before))
        counts[-1] += products(lambda v, h, n=n: parts.run_exit(n, v, h), variables, hidden)
    assert sum(counts) == products(lambda v, x: bj.calling.apply(model, v, x), variables, inputs)
    one = jax.tree.map(lambda x: x[0], inputs)
    staged = jax.make_jaxpr(bj.inference.staged(model))(variables, one, np.zeros(len(expected) - 1, np.float32))
    depths = list(products_by_depth(staged.jaxpr))
    assert [depths.count(n) for n in range(len(expected))] == counts  # a stage and its head under each conditional


def test_every_executor_answers_as_the_module(own):
    model, variables, inputs, logits = own
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    np.testing.assert_allclose(oracle.logits, jnp.stack(logits)[oracle.exit_index, jnp.arange(9)], atol=1e-5)
    assert len(set(oracle.exit_index.tolist())) > 1
    staged = bj.inference.staged(model)
    singles = [staged(variables, jax.tree.map(lambda x, n=n: x[n], inputs), policy) for n in range(9)]
    fast, weights = bj.inference.optimize(model, variables, inputs=inputs)
    answers = {
        'host': bj.inference.compacted(model, chunk_size=4, on_host=True)(variables, inputs, policy),
        'loop': bj.inference.compacted(model, chunk_size=4, on_host=False)(variables, inputs, policy),
        'staged': jax.tree.map(lambda *values: jnp.stack(values), *singles),
        'optimized': bj.inference.dense(fast)(weights, inputs, policy),
        'planned': bj.inference.plan(model, variables, inputs, policy, skip_heads=False, passes=1)(inputs),
    }
    for name, answer in answers.items():
        np.testing.assert_array_equal(answer.exit_index, oracle.exit_index, err_msg=name)
        np.testing.assert_array_equal(answer.label, oracle.label, err_msg=name)
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-4, err_msg=name)


def test_other_executors_take_dictionaries():
    model, inputs = NETWORKS['by name']
    variables = bj.calling.init(model, jax.random.key(1), inputs)
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


def trained(model, images, **options):
    variables = bj.calling.init(model, jax.random.key(1), images)
    state = bj.training.create_train_state(model, variables, optax.sgd(0.1), **options)
    return variables, bj.training.train_step(state, bj.Batch(images, KIND), jnp.ones(2), jax.random.key(3))[0].variables


def test_the_newer_form_trains_as_the_older():
    """Statistics of the first layer move by the batch, whatever drops; weights move."""
    (linen, images), module = NETWORKS['BatchNorm and dropout'], trained_nnx()
    before, after = trained(linen, images)
    inside = (images @ before['params']['layer0']['kernel']).mean(0)  # the bias starts at zero
    np.testing.assert_allclose(after['batch_stats']['norm0']['mean'], 0.01 * inside, atol=1e-6)
    before, after = trained(from_nnx(module), images)
    mean = before['batch_stats']['norms']['0']['mean']
    inside = module.layers[0](images).mean(0)
    np.testing.assert_allclose(after['batch_stats']['norms']['0']['mean'], 0.99 * mean + 0.01 * inside, atol=1e-6)
    assert (after['params']['layers']['1']['kernel'] != before['params']['layers']['1']['kernel']).any()
    nnx.update(module, from_nnx(module).trained(after))
    np.testing.assert_allclose(module(images)[1], bj.calling.apply(from_nnx(module), after, images)[1], atol=1e-6)


@pytest.mark.parametrize('name', ['BatchNorm and dropout', 'NNX'])
def test_a_frozen_trunk_stays_as_it_is(name):
    model, images = NETWORKS[name]
    before, after = trained(model, images, frozen_trunk=True, inputs=images)
    read = bj.program.leaves_read(model, before, images, [1])
    assert 0 < len(read) < len(jax.tree.leaves(before))
    for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert (a != b).any() == (jax.tree_util.keystr(path) not in read), path


def test_regression_end_to_end(getkey):
    """A task that is neither classification nor segmentation: mean and log variance, own loss and metric."""

    class Regression(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4)(x))
            early, x = nn.Dense(2)(x), nn.tanh(nn.Dense(32)(x))
            return early, nn.Dense(2)(nn.tanh(nn.Dense(32)(x)))

    def no_metrics(outputs, targets):  # one function: another at every step would be compiled at every step
        return {}

    def negative_log_likelihood(outputs, targets):
        return jnp.stack([0.5 * jnp.mean(z[:, 1] + (targets - z[:, 0]) ** 2 / jnp.exp(z[:, 1])) for z in outputs])

    variance = bj.criteria.as_criterion(
        lambda z: jnp.exp(z[..., 1]), name='predicted variance', decide=lambda z: z[..., 0]
    )
    inputs = jax.random.uniform(getkey(), (256, 2), minval=-1)
    targets = jnp.where(inputs[:, 1] > 0, jnp.sin(4 * inputs[:, 0]), 0.0)  # half of it needs no deep network
    model = Regression()
    state = bj.training.create_train_state(model, model.init(getkey(), inputs), bj.training.paper_adam(1e-2))
    batch, key, losses = bj.Batch(inputs, targets), getkey(), []
    for _ in range(150):
        state, metrics = bj.training.train_step(
            state, batch, jnp.ones(2), key, loss=negative_log_likelihood, metrics=no_metrics
        )
        losses.append(float(metrics['loss']))
    assert losses[-1] < losses[0]
    outputs = bj.inference.exit_outputs(model, state.variables, inputs, criterion=variance)
    errors = (outputs.logits[..., 0] - np.asarray(targets)) ** 2
    table = bj.thresholds.ExitTable(
        uncertainty=outputs.uncertainty,
        statistics=errors[..., None],
        costs=bj.costs.StageCosts([1, 9], [0, 0]),
        criterion=variance,
        metric=lambda sums, n: -sums[..., 0] / n,
        split='train',
    )
    chosen = table.screen().for_cost(6.0)
    expected = bj.inference.dense(model)(state.variables, inputs, chosen)
    assert -np.mean((expected.label - targets) ** 2) == pytest.approx(chosen.accuracy, rel=1e-4)
    compacted = bj.inference.compacted(model, chunk_size=64)(state.variables, inputs, chosen)
    np.testing.assert_allclose(compacted.label, expected.label, rtol=1e-5, atol=1e-6)
    assert compacted.label.dtype == jnp.float32


def run_everything(model, variables, images, policy):
    jax.block_until_ready(
        [
            bj.inference.dense(model)(variables, images, policy),
            bj.inference.staged(model)(variables, images[0], policy),
            bj.inference.compacted(model, chunk_size=4, on_host=True)(variables, images, policy),
            bj.inference.compacted(model, chunk_size=4, on_host=False)(variables, images, policy),
            bj.inference.dense(model, compiler_options={'xla_cpu_enable_fast_math': False})(variables, images, policy),
        ]
    )
    list(bj.inference.stream(model, chunk_size=4)(variables, [images], policy))


@pytest.mark.parametrize('kind', ['Linen', 'NNX', 'attached NNX', 'selected NNX'])
def test_executors_keep_no_weights(kind):
    """Neither those of the variables nor those that an NNX module came with."""
    module, images = trained_nnx(), np.asarray(IMAGE)
    if kind == 'Linen':
        model = Norms()
    elif kind == 'attached NNX':
        model = attach(nnx.Sequential(*module.layers), ['layers/0'], inputs=images)
    else:
        model = select_exits(from_nnx(module), [0, 1]) if kind == 'selected NNX' else from_nnx(module)
    variables = bj.calling.init(model, jax.random.key(1), images)
    variables = jax.tree.map(lambda x: x + 0, variables) if kind != 'Linen' else variables
    run_everything(model, variables, images, [0.5])
    freed = [weakref.ref(leaf) for leaf in jax.tree.leaves(variables)]
    freed += [] if kind == 'Linen' else [weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    assert all(ref() is not None for ref in freed)
    del model, variables, module
    gc.collect()
    assert [ref() for ref in freed if ref() is not None] == []


def test_many_policies_and_weights_leave_memory_where_it_was():
    model, images = Skips(), np.asarray(IMAGE)
    policy = bj.ExitPolicy(bj.criteria.entropy, np.float32([0.5, 0.5]))
    run_everything(model, model.init(jax.random.key(0), images), images, policy)
    execute = bj.inference.dense(model)
    gc.collect()
    before = len(jax.live_arrays())
    for n in range(50):
        variables = model.init(jax.random.key(n), images)
        for thresholds in (jnp.full(2, n / 50), np.full(2, n / 50, np.float32)):
            execute(variables, images, thresholds)
            execute(variables, images, bj.ExitPolicy(bj.criteria.entropy, thresholds))
    del variables, thresholds
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_a_plan_frees_what_it_owns():
    """Weights, rewritten weights, policy and compiled programs go with the plan."""
    images, refs = np.asarray(IMAGE), []
    for width in (5, 6, 7):

        class Wide(nn.Module):
            width: int

            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(self.width)(x))
                return nn.Dense(CLASSES)(x), nn.Dense(CLASSES)(nn.relu(nn.Dense(5)(x)))

        model = Wide(width)
        variables = model.init(jax.random.key(0), images)
        fast, weights = bj.inference.optimize(model, variables, inputs=images)
        planned = bj.inference.plan(fast, weights, images, [0.5], batch_size=4, passes=1)
        planned(images[:4])
        arrays = jax.tree.leaves((variables, weights))
        refs += [weakref.ref(thing) for thing in (model, planned, *arrays)]
        del model, variables, fast, weights, planned, arrays
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


class WithList(nn.Module):
    """A module whose field is a list, which has no hash."""

    layers: list

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(CLASSES)(x), nn.Sequential(self.layers)(x)


@pytest.mark.parametrize('options', [None, {'xla_cpu_enable_fast_math': False}])
@pytest.mark.parametrize('make', [Skips, lambda: WithList([nn.Dense(7), nn.Dense(CLASSES)]), Norms])
def test_equal_executors_compile_once(compilations, make, options):
    model, images = make(), np.asarray(IMAGE)
    variables = bj.calling.init(model, jax.random.key(0), images)
    policy = np.full(2 if isinstance(model, Skips) else 1, 0.5, np.float32)

    def run(model):
        build = bj.inference
        build.dense(model, compiler_options=options)(variables, images, policy)
        build.sequential(model, compiler_options=options)(variables, images, policy)
        build.staged(model, compiler_options=options)(variables, images[0], policy)
        for on_host in (True, False):
            build.compacted(model, chunk_size=4, on_host=on_host, compiler_options=options)(variables, images, policy)
        build.exit_outputs(model, variables, images)

    run(model)
    before = compilations.count
    run(model)
    run(make())
    assert compilations.count == before
    first, second = bj.inference.dense(model), bj.inference.dense(make())
    assert first == second
    check_equal(first(variables, images, policy), second(variables, images, policy))
