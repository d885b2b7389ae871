"""Exits on whole networks: modules left as they are, read at places inside them."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_variables
from flax import nnx
from flax.nnx import bridge
from test_program import run_parts

import branchy_jax as bj
from branchy_jax import calling
from branchy_jax.calling import check_inputs
from branchy_jax.models import attach


class Block(nn.Module):
    """Two convolutions, and a projection where shapes change; layers come as arguments, as in many networks."""

    filters: int
    strides: int
    norm: object

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(nn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)))
        y = self.norm(scale_init=nn.initializers.constant(0.5))(nn.Conv(self.filters, (1, 1))(y))
        return nn.relu(nn.Conv(self.filters, (1, 1), self.strides)(x) + y)


class ResNet(nn.Module):
    """One compact module with skips; trains by default."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name='stem')(x)), (2, 2), (2, 2))
        for n in range(3):
            x = Block(4 * 2**n, 2 if n else 1, norm, name=f'block{n}')(x)
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture(scope='module')
def resnet():
    network, images = ResNet(), jax.random.normal(jax.random.key(0), (7, 8, 8, 3))
    head = nn.Sequential([nn.Conv(4, (3, 3), 2), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(5)])
    model = attach(network, {'block1': None, 'block0': head}, inputs=images)
    return network, model, random_variables(model, images), images


def test_the_network_is_what_it_was(resnet):
    network, model, variables, images = resnet
    untouched = jax.jit(functools.partial(network.apply, train=False))
    outputs = bj.inference.exit_outputs(model, variables, images)
    np.testing.assert_allclose(outputs.logits[-1], untouched(model.trained(variables), images), atol=1e-5)
    policy = np.sort(outputs.uncertainty[:-1], axis=1)[:, 3:5].mean(1)
    answer = bj.inference.compacted(model, chunk_size=(4, 2, 3))(variables, images, policy)
    assert len(set(answer.exit_index.tolist())) > 1
    confident = [*(outputs.uncertainty[:-1] < policy[:, None]), np.ones(7, bool)]
    np.testing.assert_array_equal(answer.exit_index, np.argmax(confident, axis=0))
    np.testing.assert_allclose(answer.logits, outputs.logits[answer.exit_index, np.arange(7)], atol=1e-5)


def test_each_block_is_computed_once(resnet):
    network, model, variables, images = resnet
    macs, alone = (bj.costs.count_macs(m, inputs=images) for m in (model, network))
    assert macs.stages.sum() == alone.stages.sum()
    assert (macs.stages > 0).all()
    assert (macs.exits > 0).tolist() == [True, True, False]
    hidden = bj.program.stages(model, variables, images).run_stage(0, variables, images)
    assert [x.shape for x in hidden] == [(7, 4, 4, 4)]


class Chain(nn.Module):
    """Dense layers under given names, one in the other where a name has a slash; a name may come twice."""

    names: tuple

    @nn.compact
    def __call__(self, x):
        layers = {}
        for name in self.names:
            outer, _, inner = name.partition('/')
            if name not in layers:
                layers[name] = Chain((inner,), name=outer) if inner else nn.Dense(2, name=outer)
            x = layers[name](x)
        return x


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name='first')(x)
        return x - x.mean(0, keepdims=True)


class Function(nn.Module):
    """Dense layers around a function of all that a network may do in between."""

    function: object
    last: object = None

    @nn.compact
    def __call__(self, x, train=False, other=None):
        x = nn.Dense(8, name='first')(x)
        y = self.function(self, x, train) if other is None else x + nn.Dense(8)(other)
        y = nn.Dense(4, name='output')(y)
        return y if self.last is None else self.last(y)


class ByName(nn.Module):
    """Takes its arguments by name alone."""

    def __call__(self, *, x):
        return x


class Flagged(nn.Module):
    """Has a flag of another name than those that are recognised."""

    def __call__(self, x, mode):
        return x


class Unbound(nn.Module):
    """Has a constructor of its own, and no scope."""

    def __init__(self):
        pass

    def __call__(self, x):
        return x


class Encoder(nn.Module):
    """Is called by another method."""

    @nn.compact
    def encode(self, x):
        return nn.Dense(8, name='places')(x)


class Step(nn.Module):
    """One step of a loop."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, name='inside')(x), None


def sown(module, x, train):
    module.sow('losses', 'h', x.mean())
    return x


def remembering(module, x, train):
    return x + module.variable('cache', 'previous', jnp.zeros, x.shape).value


def dropped_paths(module, x, train):
    return x * jax.random.bernoulli(module.make_rng('drop_path'), 0.5, x.shape) if train else x


def looped(module, x, train):
    loop = nn.scan(Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
    return loop(name='loop')(x, None)[0]


def devices(module, x, train):
    x = nn.BatchNorm(not train, axis_name='batch')(x)
    return x - jax.lax.pmean(x.mean(), 'other') if train else x


DOINGS = {
    'a layer without a scope': (lambda module, x, train: Unbound()(x), 'first'),
    'another method': (lambda module, x, train: Encoder(name='encoder').encode(x), 'encoder'),
    'values of its own': (sown, 'first'),
    'a stream of its own': (dropped_paths, 'first'),
    'a loop': (looped, 'loop'),
    'axes of devices': (devices, 'first'),
    'weights that are normalised': (lambda module, x, train: nn.WeightNorm(nn.Dense(8))(x), 'first'),
    'perturbations': (lambda module, x, train: module.perturb('early', x), 'first'),
    'squeezing': (lambda module, x, train: jnp.squeeze(x[:, None]), 'first'),
}


@pytest.mark.parametrize('name', [*DOINGS, 'a flag between inputs'])
def test_what_networks_do_inside(name, getkey):
    """The last exit is the network's own result; training keeps the structure of the variables."""
    doing, place = DOINGS.get(name, (None, 'first'))
    network, x = Function(doing), jax.random.normal(getkey(), (3, 5))
    inputs = (x, x) if doing is None else x
    model = attach(network, {place: lambda value: jax.tree.leaves(value)[0]}, inputs=inputs)
    variables = model.init(getkey(), inputs)
    own = network.apply(model.trained(variables), x, other=None if doing else x)
    np.testing.assert_allclose(model.apply(variables, inputs)[-1], own, atol=1e-6)
    rngs = {'params': getkey(), 'dropout': getkey()}
    _, updates = model.apply(variables, inputs, train=True, rngs=rngs, mutable=True)
    assert jax.tree.structure({**variables, **updates}) == jax.tree.structure(variables)


class Columns(nn.Module):
    """Time-major: ``[T, B, 3]`` at the place and as the result."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name='last')(nn.Dense(4, name='first')(jnp.swapaxes(x, 0, 1)))


def test_heads_read_the_batch_first(getkey):
    x = jax.random.normal(getkey(), (2, 5, 4))
    model = attach(Columns(), {'first': lambda y: y[:, 1], '': lambda y: y.mean(1)}, inputs=x)
    variables = model.init(getkey(), x)
    early, late = model.apply(variables, x)
    kernel = variables['params']['first']['kernel']
    np.testing.assert_allclose(early, np.asarray(x)[:, 1] @ kernel, atol=1e-6)
    np.testing.assert_allclose(late, Columns().apply(model.trained(variables), x).mean(0), atol=1e-6)
    _, parts = run_parts(bj.program.stages(model, variables, x), variables, x)
    np.testing.assert_allclose(parts[0], early, atol=1e-6)


def test_probabilities_are_reported(getkey):
    for last in (nn.softmax, nn.sigmoid):
        with pytest.warns(UserWarning, match='network: its result is exp, sigmoid or softmax of logits'):
            attach(Function(sown, last), ['first'], inputs=jnp.ones((1, 5)))
    attach(Function(sown, nn.log_softmax), ['first'], inputs=jnp.ones((1, 5)))


@pytest.mark.parametrize(
    ('network', 'exits', 'message'),
    [
        (Chain(('a', 'b')), ['nowhere'], "no 'nowhere'; it passes 'a', 'b'"),
        (Chain(('a', 'b')), {'': lambda x: x.argmax(-1)}, 'logits'),
        (Chain(('a', 'b')), {'a': lambda x: x.sum()}, 'exit 0 returns'),
        (Chain(('a', 'b')), {'a': lambda x: (x, x)}, 'exit 0 returns tuple'),
        (Chain(('a', 'b')), {'a': (nn.relu, nn.Dense(5))}, 'exits: got a head of type tuple; give a Linen module'),
        (Chain(('a', 'b')), 'a', "exits: got 'a'; give a list of places"),
        (ByName(), [], r'inputs: do not fit the call of ByName .too many positional arguments.; give .* a dictionary'),
        (Flagged(), [], 'inputs: do not fit the call of Flagged .missing mode.; .* name other mode flags in attach'),
        (Chain(('a', 'a')), ['a'], "'a' 2 times"),
        (Chain(('a', 'exit_a')), ['a'], "already has a module 'exit_a'"),
        (Chain(('a/b', 'a_b', 'c')), ['a/b', 'a_b'], "heads at 'a/b' and 'a_b' would both be 'exit_a_b'"),
        (Chain(tuple(f'layer_{n}' for n in range(31))), ['layr_30'], "passes 'layer_30', .*, … .31 in all"),
        (Function(looped), ['loop/inside'], "'loop/inside' lies inside a loop.*around it: 'loop', 'first'"),
        (Function(sown, lambda y: {'logits': y}), ['first'], r"exits\[''\]: the result .* give a head"),
        (Function(sown, lambda y: jnp.repeat(y, 3, 0)), [], "exit 0 returns .*exits, from exit 0 on: ''"),
        (Function(lambda module, x, train: nn.Dropout(0.5)(x, deterministic=False)), [], 'names train, .*attach'),
        (Function(remembering), ['first'], 'incompatible shapes .* keep it out of every collection'),
        (Mixing(), ['first'], 'rows of a batch influence one another at Mixing'),
        (bridge.ToNNX(Chain(('a', 'b')), rngs=nnx.Rngs(0)), ['a'], 'give the Linen module itself, network.to_nnx__mod'),
        ('resnet', ['a'], 'network: got str'),
    ],
)
def test_impossible_exits_are_refused(network, exits, message):
    with pytest.raises(ValueError, match=message):
        attach(network, exits, inputs=jnp.ones((1, 2)))


def test_other_inputs_are_refused(resnet):
    _, model, variables, images = resnet
    for bad, message in (
        (images[:, :4], r'inputs: expected \[B, 8, 8, 3\], got shape \(7, 4, 8, 3\)'),
        (images.astype(jnp.uint8), 'expected a float dtype'),
        (images[0], r'inputs: expected \[B, 8, 8, 3\], got shape'),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, bad)
    inputs = {'a': jnp.ones((3, 2)), 'b': jnp.ones((3, 2), bool)}
    for bad, message in (
        ({**inputs, 'b': inputs['a']}, r"inputs\['b'\]: expected bool, got float32"),
        (inputs['a'], 'inputs: expected a pytree'),
        ({**inputs, 'b': inputs['b'][:2]}, 'all lead with B'),
    ):
        with pytest.raises(ValueError, match=message):
            check_inputs(bad, calling.specs(inputs))


def test_numpys_integers_are_those_of_jax():
    """They have 64 bits, and 32 once jax takes them, whichever the network was attached with."""
    network, head = nn.Sequential([nn.Embed(11, 4), nn.relu, nn.Dense(3)]), {'layers_0': nn.Dense(3)}
    both = np.zeros((2, 6), np.int64), np.zeros((2, 6), np.int32)
    specs = [attach(network, head, inputs=tokens).inputs for tokens in both]
    assert [spec.dtype for spec in specs] == [jnp.int32] * 2
    for spec, tokens in itertools.product(specs, both):
        check_inputs(tokens, spec)
        with pytest.raises(ValueError, match=r'inputs: expected int.*, got uint8; convert them'):
            check_inputs(tokens.astype(np.uint8), spec)


def test_training_moves_statistics_as_the_network_itself_does(resnet):
    network, model, variables, images = resnet
    batch, own = bj.Batch(images, jnp.arange(7) % 5), model.trained(variables)
    state = bj.training.create_train_state(model, variables, optax.sgd(0.1))
    after = model.trained(bj.training.train_step(state, batch, jnp.ones(3), jax.random.key(3))[0].variables)
    _, updates = jax.jit(functools.partial(network.apply, train=True, mutable=['batch_stats']))(own, images)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), after['batch_stats'], dict(updates['batch_stats'])
    )
    assert (after['params']['Dense_0']['kernel'] != own['params']['Dense_0']['kernel']).any()


def test_models_and_states_print_what_they_are(resnet):
    model, variables = resnet[1:3]
    expected = "Attached(ResNet, exits at 'block0', 'block1', '')"
    assert repr(model) == expected
    assert repr(bj.models.select_exits(model, [0, 2])) == f'SelectedExits({expected}, (0, 2))'
    assert repr(bj.training.create_train_state(model, variables)).endswith(f' parameters, model={expected})')


def test_equal_networks_attach_to_equal_models():
    first, second, other = (attach(Chain(('a', 'b')), ['a'], inputs=jnp.ones((1, n))) for n in (2, 2, 3))
    assert first == second != other
    assert bj.inference.staged(first) == bj.inference.staged(second)


def test_a_dense_prediction_gets_a_dense_head(getkey):
    class Segmenter(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), 2, name='down')(x))
            return nn.ConvTranspose(3, (2, 2), (2, 2), name='up')(x)

    images = jax.random.normal(getkey(), (2, 8, 8, 1))
    model = attach(Segmenter(), ['down'], inputs=images)
    early, late = jax.eval_shape(model.apply, jax.eval_shape(model.init, getkey(), images), images)
    assert early.shape == late.shape == (2, 8, 8, 3)


class NnxBlock(nnx.Module):
    """A residual block with everything that keeps state."""

    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.dropout(self.norm(self.linear(x))))


class NnxNetwork(nnx.Module):
    """A network in Flax's newer form."""

    def __init__(self, rngs):
        self.stem, self.head = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_nnx_networks_keep_their_weights_and_take_them_back(getkey):
    network, images = NnxNetwork(nnx.Rngs(0)), jax.random.normal(getkey(), (6, 3))
    network.train()
    network(images)  # statistics that are not those of any batch to come
    model = attach(network, ['blocks/0', 'blocks/1'], inputs=images)
    assert repr(model) == "Attached(NnxNetwork(22 arrays), exits at 'blocks/0', 'blocks/1', '')"
    variables = model.init(getkey(), images)
    network.eval()
    np.testing.assert_allclose(model.apply(variables, images)[-1], network(images), atol=1e-6)
    state = bj.training.create_train_state(model, variables, optax.sgd(0.1))
    state, _ = bj.training.train_step(state, bj.Batch(images, jnp.arange(6) % 4), jnp.ones(3), getkey())
    means = [tree['batch_stats']['blocks']['0']['norm']['mean'] for tree in (variables, state.model_state)]
    inside = network.blocks[0].linear(network.stem(images)).mean(0)
    np.testing.assert_allclose(means[1], 0.99 * means[0] + 0.01 * inside, atol=1e-5)
    nnx.update(network, model.trained(state.variables))
    np.testing.assert_allclose(model.apply(state.variables, images)[-1], network(images), atol=1e-6)
    with pytest.raises(ValueError, match=r"no 'blocks/9'; it passes .*'blocks/0'"):
        attach(network, ['blocks/9'], inputs=images)
    with pytest.raises(ValueError, match='variables: have no params/'):
        model.apply({'params': {}}, images)

    def logits(key):
        rngs = {'dropout': jax.random.key(key)}
        return model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])[0][-1]

    np.testing.assert_array_equal(logits(1), logits(1))
    assert (logits(1) != logits(2)).any()
