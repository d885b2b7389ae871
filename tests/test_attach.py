"""Exits on whole networks: modules left as they are, cut where exits leave them."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import equations, thresholds_between
from hypothesis import given, settings
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.models import attach, select_exits, without_branches
from branchy_jax.models.branchy import run_segment, side_head_names
from branchy_jax.types import check_inputs


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


@pytest.fixture(scope='module')
def resnet():
    network, images = ResNet(), jax.random.normal(jax.random.key(0), (7, 8, 8, 3))
    model = attach(
        network,
        {'block1_1': None, 'block0_0': (nn.Conv(4, (3, 3), 2), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(5))},
        inputs=images,
    )
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


@pytest.mark.parametrize('name', ['resnet', 'encoder'])
def test_every_executor_answers_as_the_oracle(name, request):
    network, model, variables, inputs = request.getfixturevalue(name)
    logits = model.apply(variables, inputs)
    own = model.trained(variables)
    untouched = network.apply(own, inputs, train=False) if name == 'resnet' else network.apply(own, **inputs)
    np.testing.assert_allclose(logits[-1], untouched, atol=1e-5)
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    assert len(set(np.asarray(oracle.exit_index))) > 1
    np.testing.assert_allclose(oracle.logits, jnp.stack(logits)[oracle.exit_index, jnp.arange(7)], atol=1e-5)
    ways = [
        bj.inference.compacted(model, chunk_size=3, on_host=True),
        bj.inference.compacted(model, chunk_size=(4, 2, 3), on_host=False),
        bj.inference.sequential(model),
    ]
    answers = [way(variables, inputs, policy) for way in ways]
    staged = bj.inference.staged(model)
    singles = [staged(variables, jax.tree.map(lambda x, n=n: x[n], inputs), policy) for n in range(7)]
    answers.append(jax.tree.map(lambda *values: jnp.stack(values), *singles))
    fast, weights = bj.inference.optimize(model, variables)
    answers.append(bj.inference.dense(fast)(weights, inputs, policy))
    for answer in answers:
        assert (answer.exit_index == oracle.exit_index).all()
        assert (answer.label == oracle.label).all()
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-4)
    planned = bj.inference.plan(model, variables, inputs, policy, batch_size=1, skip_heads=False, passes=1)
    one = planned(jax.tree.map(lambda x: x[:1], inputs))
    assert one.exit_index == oracle.exit_index[:1]
    assert one.label == oracle.label[:1]


def test_plan_stream_and_mesh_take_dictionaries(encoder):
    _, model, variables, inputs = encoder
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    planned = bj.inference.plan(model, variables, inputs, policy, batch_size=3, skip_heads=False, passes=1)
    answer = planned(inputs)
    assert (answer.exit_index == oracle.exit_index).all()
    assert (answer.label == oracle.label).all()
    supply = [jax.tree.map(lambda x: x[:3], inputs), jax.tree.map(lambda x: x[3:], inputs)]
    for found in bj.inference.stream(model, chunk_size=2)(variables, supply, policy):
        assert (np.asarray(found.prediction.exit_index) == np.asarray(oracle.exit_index)[found.ids]).all()
    mesh = bj.sharding.data_mesh(1)
    answer = bj.inference.sharded(model, chunk_size=2, mesh=mesh)(variables, inputs, policy)
    assert (answer.exit_index == oracle.exit_index).all()
    assert (answer.label == oracle.label).all()
    table = bj.inference.exit_table(model, variables, bj.Batch(inputs, jnp.arange(7) % 3), batch_size=4)
    np.testing.assert_array_equal(table.costs.stages, bj.costs.count_macs(model, model.image_shape).stages)


def test_composed_networks_take_dictionaries_too(getkey):
    spec = {'image': jax.ShapeDtypeStruct((4,), jnp.float32), 'kind': jax.ShapeDtypeStruct((), jnp.int32)}

    def join(inputs):
        return jnp.concatenate([inputs['image'], jax.nn.one_hot(inputs['kind'], 3)], axis=-1)

    model = bj.BranchyNet(
        stages=((join, nn.Dense(6)), (nn.relu, nn.Dense(6))), exits=(nn.Dense(3), nn.Dense(3)), image_shape=spec
    )
    inputs = {'image': jax.random.normal(getkey(), (5, 4)), 'kind': jnp.array([0, 1, 2, 1, 0])}
    variables = model.init(getkey(), inputs)
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    planned = bj.inference.plan(model, variables, inputs, policy, passes=1, skip_heads=False)
    for answer in (planned(inputs), bj.inference.compacted(model, chunk_size=2)(variables, inputs, policy)):
        assert (answer.exit_index == oracle.exit_index).all()
    assert bj.costs.count_macs(model, spec).stages.tolist() == [7 * 6, 6 * 6]
    with pytest.raises(ValueError, match=r"images\['kind'\]: expected int32, got float32"):
        bj.inference.dense(model)(variables, {**inputs, 'kind': jnp.ones(5)}, policy)
    with pytest.raises(ValueError, match='images: expected a pytree'):
        bj.inference.dense(model)(variables, inputs['image'], policy)
    with pytest.raises(ValueError, match='all lead with B'):
        bj.inference.dense(model)(variables, {**inputs, 'kind': inputs['kind'][:2]}, policy)


def count(primitive, function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    return sum(equation.primitive.name == primitive for equation in equations(closed.jaxpr))


def test_a_stage_computes_what_its_exit_needs_and_nothing_else(resnet):
    network, model, variables, images = resnet
    hidden, found = images, []
    for n in range(model.num_exits):
        run = functools.partial(run_segment, model, 'stage', n)
        found.append(count('conv_general_dilated', run, variables, hidden))
        hidden = run(variables, hidden)
        if n < model.num_exits - 1:
            assert {leaf.shape[0] for leaf in jax.tree.leaves(hidden)} == {7}
    # Stem and a block with projection; two blocks, one of them with projection; the last with projection.
    assert found == [1 + 4, 4 + 3, 4]
    whole = count(
        'conv_general_dilated', lambda v, x: network.apply(v, x, train=False), model.trained(variables), images
    )
    assert sum(found) == whole


def test_dead_work_is_not_done_and_only_what_is_read_is_handed_on(getkey):
    class Split(nn.Module):
        @nn.compact
        def __call__(self, x):
            skip = nn.Dense(3, name='skip')(x)
            nn.Dense(50, name='unused')(x)
            y = nn.Dense(6, name='first')(x)
            nn.Dense(7, name='side')(y)
            return nn.Dense(3, name='last')(nn.tanh(y)) + skip

    images = jax.random.normal(getkey(), (4, 2))
    model = attach(Split(), ['side'], inputs=images)
    variables = model.init(getkey(), images)
    assert count('dot_general', lambda v, x: run_segment(model, 'stage', 0, v, x), variables, images) == 2
    hidden = run_segment(model, 'stage', 0, variables, images)
    # The skip starts from the images, which are handed on for it: it is not computed before it is needed.
    assert sorted(leaf.shape for leaf in hidden) == [(4, 2), (4, 6), (4, 7)]
    assert count('dot_general', lambda v, h: run_segment(model, 'stage', 1, v, h), variables, hidden) == 2
    np.testing.assert_allclose(
        run_segment(model, 'stage', 1, variables, hidden), Split().apply(model.trained(variables), images), atol=1e-6
    )
    with pytest.raises(ValueError, match='mixes the inputs of a batch'):
        attach(Mixing(), ['mean'], inputs=images)


class Mixing(nn.Module):
    """Computes one value from a whole batch."""

    @nn.compact
    def __call__(self, x):
        mean = Identity(name='mean')(x.mean(0, keepdims=True))
        return nn.Dense(3, name='last')(x - mean)


class Identity(nn.Module):
    """Gives a value a place."""

    def __call__(self, x):
        """Returns it."""
        return x


class TimeFirst(nn.Module):
    """Works on [T, B, D], and starts with a class token."""

    @nn.compact
    def __call__(self, x):
        token = jnp.broadcast_to(self.param('token', nn.initializers.normal(), (1, 1, 4)), (len(x), 1, 4))
        x = jnp.concatenate([token, x], axis=1).transpose(1, 0, 2)
        x = Identity(name='middle')(nn.relu(nn.Dense(4)(x)))
        return nn.Dense(3)(x[0])


def test_the_batch_may_lie_on_any_axis(getkey):
    inputs = jax.random.normal(getkey(), (5, 2, 4))
    model = attach(TimeFirst(), {'middle': (lambda x: x.sum(0), nn.Dense(3))}, inputs=inputs)
    variables = model.init(getkey(), inputs)
    assert [leaf.shape for leaf in run_segment(model, 'stage', 0, variables, inputs)] == [(5, 3, 4)]
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    np.testing.assert_allclose(model.apply(variables, inputs)[-1], TimeFirst().apply(model.trained(variables), inputs))
    for size in (1, 2, 5):  # a batch of one has another program: nothing is to be broadcast
        answer = bj.inference.compacted(model, chunk_size=size)(variables, inputs, policy)
        assert (answer.exit_index == oracle.exit_index).all()
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-6)


@pytest.mark.parametrize(
    ('exits', 'message'),
    [
        (['nowhere'], "no 'nowhere'; it passes 'conv_init', 'bn_init'"),
        ({'': lambda x: x.argmax(-1)}, 'logits'),
        ({'block0_0': lambda x: x.reshape(7, 7)}, 'block0_0'),
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
    with pytest.raises(ValueError, match=r'images: expected \[B, 8, 8, 3\], got shape \(7, 4, 8, 3\)'):
        bj.inference.dense(model)(variables, images[:, :4], [0.0, 0.0])
    with pytest.raises(ValueError, match='expected a float dtype'):
        model.apply(variables, images.astype(jnp.uint8))


def test_numpys_integers_are_those_of_jax():
    """They have 64 bits, and 32 once jax takes them, whichever the network was attached with."""
    network, head = nn.Sequential([nn.Embed(11, 4), nn.relu, nn.Dense(3)]), {'layers_0': nn.Dense(3)}
    both = np.zeros((2, 6), np.int64), np.zeros((2, 6), np.int32)
    specs = [attach(network, head, inputs=tokens).image_shape for tokens in both]
    assert [spec.dtype for spec in specs] == [jnp.int32] * 2
    for spec, tokens in itertools.product([*specs, jax.ShapeDtypeStruct((6,), np.int64)], both):
        check_inputs(tokens, spec)
        jax.eval_shape(lambda tokens, spec=spec: check_inputs(tokens, spec), tokens)
        with pytest.raises(ValueError, match=r'images: expected int.*, got uint8; convert them'):
            check_inputs(tokens.astype(np.uint8), spec)


def test_training_moves_statistics_but_not_those_of_a_frozen_trunk(resnet):
    network, model, variables, images = resnet
    start, _ = bj.training.initialize_from_baseline(variables, network.init(jax.random.key(7), images, train=False))
    batch = bj.Batch(images, jnp.arange(7) % 5)
    own = model.trained(start)

    def trained(**options):
        state = bj.training.create_train_state(model, start, optax.sgd(0.1), **options)
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
    assert side_head_names(model) == {'exit_block0_0', 'exit_block1_1'}
    assert (
        frozen['params']['exit_block1_1']['layers']['Dense_0']['kernel']
        != start['params']['exit_block1_1']['layers']['Dense_0']['kernel']
    ).any()


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
    logits = model.apply(variables, images)
    fewer = select_exits(model, [1, 2])
    for ours, theirs in zip(fewer.apply(variables, images), logits[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    hidden = run_segment(fewer, 'stage', 0, variables, images)
    np.testing.assert_allclose(run_segment(fewer, 'exit', 0, variables, hidden), logits[1], atol=1e-5)
    (alone,) = without_branches(model).apply(variables, images)
    np.testing.assert_allclose(alone, logits[-1], atol=1e-6)


def test_equal_networks_attach_to_equal_models():
    first, second = (attach(ResNet(), ['block0_0'], inputs=jnp.ones((1, 8, 8, 3))) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != attach(ResNet(), ['block0_0'], inputs=jnp.ones((1, 16, 16, 3)))
    assert bj.inference.staged(first) is bj.inference.staged(second)


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


def test_attached_networks_are_exported(encoder, resnet, tmp_path):
    _, model, variables, inputs = encoder
    manifest = bj.export.save(
        tmp_path / 'tokens', model, variables, thresholds=[0.5, 0.5], batch_size=3, platforms=['cpu']
    )
    assert {array['name']: array['dtype'] for array in manifest['input']['arrays']} == {
        "['mask']": 'bool',
        "['tokens']": 'int32',
    }
    assert manifest['programs']['staged']['conditionals'] == 2
    content = (tmp_path / 'tokens' / manifest['programs']['staged']['file']).read_bytes()
    program = jax.export.deserialize(bytearray(content))
    policy = thresholds_between(model, variables, inputs)
    for n in range(3):
        single = jax.tree.map(lambda x, n=n: x[n], inputs)
        ours = bj.inference.staged(model)(variables, single, policy)
        found = program.call({}, *jax.tree.leaves(single), jnp.asarray(policy))
        assert found[1] == ours.exit_index
        assert found[0] == ours.label


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
    whole, hidden = model.apply(variables, inputs), inputs
    np.testing.assert_allclose(whole[-1], network.apply(model.trained(variables), inputs), atol=1e-6)
    for n in range(model.num_exits):
        hidden = run_segment(model, 'stage', n, variables, hidden)
        np.testing.assert_allclose(run_segment(model, 'exit', n, variables, hidden), whole[n], atol=1e-5)
