"""Exits on whole networks: modules left as they are, read at places inside them."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import thresholds_between
from hypothesis import given, settings
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.calling import check_inputs
from branchy_jax.models import attach, select_exits, without_branches


class Bottleneck(nn.Module):
    """As in residual networks for ImageNet: three convolutions, a projection where shapes change."""

    filters: int
    strides: int
    conv: object
    norm: object

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.constant(0.5))(self.conv(2 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name='norm_proj')(self.conv(2 * self.filters, (1, 1), self.strides, name='conv_proj')(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """One compact module with skips; trains unless told otherwise."""

    sizes: tuple = (1, 2, 1)
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.max_pool(nn.relu(norm(name='bn_init')(conv(4, (3, 3), name='conv_init')(x))), (2, 2), (2, 2))
        for i, blocks in enumerate(self.sizes):
            for j in range(blocks):
                x = Bottleneck(4 * 2**i, 2 if i > 0 and j == 0 else 1, conv, norm, name=f'block{i}_{j}')(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Encoder(nn.Module):
    """A transformer over tokens, of which a mask hides some."""

    depth: int = 3

    @nn.compact
    def __call__(self, tokens, mask, *, deterministic: bool = True):
        visible = mask[:, None, None, :]
        x = nn.Embed(11, 8)(tokens) + self.param('positions', nn.initializers.normal(0.1), (1, tokens.shape[1], 8))
        for n in range(self.depth):
            y = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1, name=f'attention{n}')(
                nn.LayerNorm()(x), mask=visible, deterministic=deterministic
            )
            x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
            x = Feed(name=f'feed{n}')(x)
        weights = mask[..., None].astype(x.dtype)
        return nn.Dense(3)((x * weights).sum(1) / weights.sum(1))


class Feed(nn.Module):
    """The second half of a block."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Head(nn.Module):
    """A head of its own kind."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Conv(4, (3, 3), 2)(x)).mean((1, 2)))


@pytest.fixture(scope='module')
def resnet():
    network, images = ResNet(), jax.random.normal(jax.random.key(0), (7, 8, 8, 3))
    model = attach(network, {'block1_1': None, 'block0_0': Head()}, inputs=images)
    return network, model, model.init(jax.random.key(1), images), images


@pytest.fixture(scope='module')
def encoder():
    network = Encoder()
    inputs = {
        'tokens': jax.random.randint(jax.random.key(0), (7, 6), 0, 11),
        'mask': jnp.arange(6)[None] < jnp.array([6, 2, 3, 1, 5, 4, 6])[:, None],
    }
    model = attach(network, ['feed0', 'feed1'], inputs=inputs)
    return network, model, model.init(jax.random.key(1), inputs), inputs


def run_parts(model, variables, inputs):
    """Returns what every stage hands on, and the logits of every exit."""
    parts, hidden, handed_on, logits = bj.program.stages(model, variables, inputs), inputs, [], []
    for n in range(parts.num_exits):
        hidden = parts.run_stage(n, variables, hidden)
        handed_on.append(hidden)
        logits.append(parts.run_exit(n, variables, hidden))
    return handed_on, logits


@pytest.mark.parametrize('name', ['resnet', 'encoder'])
def test_the_network_is_what_it_was(name, request):
    network, model, variables, inputs = request.getfixturevalue(name)
    logits, own = jax.jit(model.apply)(variables, inputs), model.trained(variables)
    untouched = network.apply(own, inputs, train=False) if name == 'resnet' else network.apply(own, **inputs)
    np.testing.assert_allclose(logits[-1], untouched, atol=1e-5)
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    assert len(set(oracle.exit_index.tolist())) > 1
    np.testing.assert_allclose(oracle.logits, jnp.stack(logits)[oracle.exit_index, jnp.arange(7)], atol=1e-5)
    fast, weights = bj.inference.optimize(model, variables, inputs=inputs)
    for answer in (
        bj.inference.compacted(model, chunk_size=(4, 2, 3))(variables, inputs, policy),
        bj.inference.dense(fast)(weights, inputs, policy),
    ):
        np.testing.assert_array_equal(answer.exit_index, oracle.exit_index)
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-4)


def test_each_block_is_computed_once(resnet):
    network, model, variables, images = resnet
    macs = bj.costs.count_macs(model, inputs=images)
    alone = bj.costs.count_macs(network, inputs=images)
    assert macs.stages.sum() == alone.stages.sum()
    assert (macs.stages > 0).all()
    assert (macs.exits > 0).tolist() == [True, True, False]
    handed_on, _ = run_parts(model, variables, images)
    assert [[x.shape for x in hidden] for hidden in handed_on[:2]] == [[(7, 4, 4, 8)], [(7, 2, 2, 16)]]


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name='first')(x)
        return nn.Dense(3)(x - x.mean(0, keepdims=True))


def test_rows_that_influence_one_another_are_refused():
    with pytest.raises(ValueError, match='rows of a batch influence one another at Mixing'):
        attach(Mixing(), ['first'], inputs=jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ('exits', 'message'),
    [
        (['nowhere'], "no 'nowhere'; it passes 'conv_init', 'bn_init'"),
        ({'': lambda x: x.argmax(-1)}, 'logits'),
        ({'block0_0': lambda x: x.sum()}, 'exit 0 returns'),
        ({'block0_0': (nn.relu, nn.Dense(5))}, 'exits: got a head of type tuple; give a Linen module'),
    ],
)
def test_impossible_exits_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        attach(ResNet(), exits, inputs=jnp.ones((1, 8, 8, 3)))


def test_places_passed_twice_and_taken_names_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(2, name='again')
            return layer(layer(x))

    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name='exit_first')(nn.Dense(2, name='first')(x))

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name='b')(x)

    class Alike(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name='last')(nn.Dense(2, name='a_b')(Inner(name='a')(x)))

    with pytest.raises(ValueError, match="'again' 2 times"):
        attach(Twice(), ['again'], inputs=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="already has a module 'exit_first'"):
        attach(Taken(), ['first'], inputs=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="heads at 'a/b' and 'a_b' would both be 'exit_a_b'"):
        attach(Alike(), ['a/b', 'a_b'], inputs=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="exits: got 'a_b'; give a list of places"):
        attach(Alike(), 'a_b', inputs=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match='network: got str'):
        attach('resnet', ['first'], inputs=jnp.ones((1, 2)))


def test_other_inputs_are_refused(resnet):
    _, model, variables, images = resnet
    with pytest.raises(ValueError, match=r'inputs: expected \[B, 8, 8, 3\], got shape \(7, 4, 8, 3\)'):
        bj.inference.dense(model)(variables, images[:, :4], [0.0, 0.0])
    with pytest.raises(ValueError, match='expected a float dtype'):
        model.apply(variables, images.astype(jnp.uint8))
    with pytest.raises(ValueError, match=r'inputs: expected \[B, 8, 8, 3\], got shape'):
        bj.inference.staged(model)(variables, images, [0.0, 0.0])


def test_other_dictionaries_are_refused(encoder):
    _, model, variables, inputs = encoder
    for bad, message in (
        ({**inputs, 'mask': inputs['mask'].astype(jnp.float32)}, r"inputs\['mask'\]: expected bool, got float32"),
        (inputs['tokens'], 'inputs: expected a pytree'),
        ({**inputs, 'mask': inputs['mask'][:2]}, 'all lead with B'),
    ):
        with pytest.raises(ValueError, match=message):
            bj.inference.dense(model)(variables, bad, [0.0, 0.0])


def test_numpys_integers_are_those_of_jax():
    """They have 64 bits, and 32 once jax takes them, whichever the network was attached with."""
    network, head = nn.Sequential([nn.Embed(11, 4), nn.relu, nn.Dense(3)]), {'layers_0': nn.Dense(3)}
    both = np.zeros((2, 6), np.int64), np.zeros((2, 6), np.int32)
    specs = [attach(network, head, inputs=tokens).inputs for tokens in both]
    assert [spec.dtype for spec in specs] == [jnp.int32] * 2
    for spec, tokens in itertools.product(specs, both):
        check_inputs(tokens, spec)
        jax.eval_shape(lambda tokens, spec=spec: check_inputs(tokens, spec), tokens)
        with pytest.raises(ValueError, match=r'inputs: expected int.*, got uint8; convert them'):
            check_inputs(tokens.astype(np.uint8), spec)


def test_training_moves_statistics_but_not_those_of_a_frozen_trunk(resnet):
    network, model, variables, images = resnet
    start, _ = bj.training.initialize_from_baseline(variables, network.init(jax.random.key(7), images, train=False))
    batch = bj.Batch(images, jnp.arange(7) % 5)
    own = model.trained(start)

    def trained(**options):
        state = bj.training.create_train_state(model, start, optax.sgd(0.1), inputs=images, **options)
        return model, bj.training.train_step(state, batch, jnp.ones(3), jax.random.key(3))[0].variables

    _, after = trained()
    _, updates = network.apply(own, images, train=True, mutable=['batch_stats'])
    for ours, theirs in zip(
        jax.tree.leaves(model.trained(after)['batch_stats']), jax.tree.leaves(updates['batch_stats']), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model.trained(after)['params'], own['params'])
    assert all(jax.tree.leaves(moved['block0_0']))
    assert all(jax.tree.leaves(moved['Dense_0']))
    _, frozen = trained(frozen_trunk=True)
    for a, b in zip(jax.tree.leaves(model.trained(frozen)), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ('exit_block0_0', 'exit_block1_1'):
        ours, theirs = (tree['params'][name]['Dense_0']['kernel'] for tree in (frozen, start))
        assert (ours != theirs).any()


def test_the_loss_of_the_last_exit_has_the_networks_own_gradient(resnet):
    network, model, variables, images = resnet
    own = model.trained(variables)

    def attached(params):
        return model.apply({**variables, 'params': params}, images)[-1].sum()

    def alone(params):
        return network.apply({**own, 'params': params}, images, train=False).sum()

    ours, theirs = jax.jit(jax.grad(attached))(variables['params']), jax.jit(jax.grad(alone))(own['params'])
    for name in theirs:
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(ours['exit_block0_0']))


def test_fewer_exits_share_the_variables(resnet):
    _, model, variables, images = resnet
    logits = jax.jit(model.apply)(variables, images)
    for chosen in (select_exits(model, [1, 2]), without_branches(model)):
        _, ours = run_parts(chosen, variables, images)
        for part, theirs in zip(ours, logits[-len(ours) :], strict=True):
            np.testing.assert_allclose(part, theirs, atol=1e-5)
    assert 'exit_block0_0' not in select_exits(model, [1, 2]).init(jax.random.key(0), images)['params']


def test_equal_networks_attach_to_equal_models():
    first, second = (attach(ResNet(), ['block0_0'], inputs=jnp.ones((1, 8, 8, 3))) for _ in range(2))
    assert first == second
    assert first != attach(ResNet(), ['block0_0'], inputs=jnp.ones((1, 16, 16, 3)))
    assert bj.inference.staged(first) == bj.inference.staged(second)


def test_a_dense_prediction_gets_a_dense_head(getkey):
    class Segmenter(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), 2, name='down')(x))
            return nn.ConvTranspose(3, (2, 2), (2, 2), name='up')(x)

    images = jax.random.normal(getkey(), (2, 8, 8, 1))
    model = attach(Segmenter(), ['down'], inputs=images)
    variables = model.init(getkey(), images)
    early, late = model.apply(variables, images)
    assert early.shape == late.shape == (2, 8, 8, 3)
    answer = bj.inference.dense(model)(variables, images, [jnp.inf])
    np.testing.assert_allclose(answer.logits, early, atol=1e-6)


def test_attached_networks_are_exported(encoder, tmp_path):
    _, model, variables, inputs = encoder
    policy = thresholds_between(model, variables, inputs)
    manifest = bj.export.save(
        tmp_path / 'tokens', model, variables, policy, inputs=inputs, batch_size=3, platforms=['cpu']
    )
    assert {array['name']: array['dtype'] for array in manifest['input']['arrays']} == {
        "['mask']": 'bool',
        "['tokens']": 'int32',
    }
    assert manifest['programs']['staged']['conditionals'] == 2
    content = (tmp_path / 'tokens' / manifest['programs']['staged']['file']).read_bytes()
    program = jax.export.deserialize(bytearray(content))
    for n in range(3):
        single = jax.tree.map(lambda x, n=n: x[n], inputs)
        ours = bj.inference.staged(model)(variables, single, policy)
        exported = program.call({}, *jax.tree.leaves(single), jnp.asarray(policy, jnp.float32))
        assert (exported[0], exported[1]) == (ours.label, ours.exit_index)


GRAPHS = st.lists(
    st.tuples(st.sets(st.integers(0, 6), min_size=1, max_size=3), st.sampled_from(['dense', 'tanh', 'norm'])),
    min_size=2,
    max_size=6,
)


class Graph(nn.Module):
    """Each layer reads a sum of earlier activations; two inputs."""

    layers: tuple

    @nn.compact
    def __call__(self, inputs):
        nodes = [nn.Dense(4, name='a')(inputs['a']), nn.Dense(4, name='b')(inputs['b'])]
        for n, (reads, kind) in enumerate(self.layers):
            x = sum(nodes[r % len(nodes)] for r in reads)
            layer = {'dense': functools.partial(nn.Dense, 4), 'tanh': Tanh, 'norm': nn.LayerNorm}[kind](name=f'n{n}')
            nodes.append(layer(x))
        return nn.Dense(3, name='last')(nodes[-1])


class Tanh(nn.Module):
    """A function at a place."""

    def __call__(self, x):
        """Returns tanh."""
        return jnp.tanh(x)


@settings(max_examples=5)
@given(layers=GRAPHS, data=st.data())
def test_any_graph_cut_anywhere_is_the_whole(layers, data):
    network = Graph(tuple((tuple(sorted(reads)), kind) for reads, kind in layers))
    names = ['a', 'b', *(f'n{n}' for n in range(len(layers)))]
    places = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = {'a': jax.random.normal(keys[0], (3, 2)), 'b': jax.random.normal(keys[1], (3, 5))}
    model = attach(network, places, inputs=inputs)
    variables = model.init(keys[2], inputs)
    whole, (_, parts) = model.apply(variables, inputs), run_parts(model, variables, inputs)
    np.testing.assert_allclose(whole[-1], network.apply(model.trained(variables), inputs), atol=1e-6)
    for part, logits in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, logits, atol=1e-5)
