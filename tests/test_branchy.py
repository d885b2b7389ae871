import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_SHAPE

import branchy_jax as bj
from branchy_jax.models.branchy import select_exits, side_head_names, without_branches


def test_apply_is_the_chain_of_stages_and_exits(network):
    model, variables, images = network
    hidden, expected = images, []
    for n in range(model.num_exits):
        hidden = model.apply(variables, hidden, n, method='run_stage')
        expected.append(model.apply(variables, hidden, n, method='run_exit'))
    found = model.apply(variables, images, train=False)
    assert isinstance(found, tuple)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(expected))


def test_by_hand():
    """Two stages that add 1 and double, read out by the identity and by a sum: no parameters at all."""
    model = bj.BranchyNet(
        stages=(lambda x: x + 1, (lambda x: 2 * x, lambda x: x - 3)),
        exits=(lambda x: x, lambda x: x.sum(-1, keepdims=True)),
    )
    first, last = model.apply({}, jnp.array([[1.0, 2.0]]))
    assert first.tolist() == [[2.0, 3.0]]
    assert last.tolist() == [[1.0 + 3.0]]


def test_layers_are_told_whether_they_train(network, getkey):
    model, variables, images = network
    evaluated = model.apply(variables, images)
    trained, updates = model.apply(variables, images, train=True, rngs={'dropout': getkey()}, mutable=['batch_stats'])
    assert all((a != b).any() for a, b in zip(evaluated, trained, strict=True))
    assert not np.allclose(updates['batch_stats']['norm1']['mean'], variables['batch_stats']['norm1']['mean'])
    frozen, updates = model.apply(variables, images, train=True, frozen_trunk=True, mutable=['batch_stats'])
    jax.tree.map(np.testing.assert_array_equal, frozen, evaluated)
    jax.tree.map(np.testing.assert_array_equal, updates['batch_stats'], variables['batch_stats'])


def test_hidden_may_be_a_tree(getkey):
    """A trunk that carries two streams at once."""
    model = bj.BranchyNet(
        stages=(lambda x: {'left': x, 'right': -x}, lambda h: h['left'] + 2 * h['right']),
        exits=(lambda h: h['right'], lambda x: x),
    )
    images = jax.random.normal(getkey(), (2, 3))
    first, last = model.apply({}, images)
    np.testing.assert_array_equal(first, -images)
    np.testing.assert_array_equal(last, -images)


def test_logits_are_float32_whatever_the_computation(getkey):
    model = bj.BranchyNet(stages=(nn.Dense(4, dtype=jnp.bfloat16),), exits=(nn.Dense(2, dtype=jnp.bfloat16),))
    (logits,), _ = model.init_with_output(getkey(), jnp.ones((1, 3)))
    assert logits.dtype == jnp.float32


def test_works_under_transformations(network):
    model, variables, images = network
    direct = model.apply(variables, images)
    jitted = jax.jit(model.apply)(variables, images)
    mapped = jax.vmap(lambda image: model.apply(variables, image[None]))(images)
    for a, b, c in zip(direct, jitted, mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a, c[:, 0], rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda image: model.apply(variables, image)[2].sum())(images)
    assert gradient.shape == images.shape
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize('indices', [[2], [0, 2], [1, 2], [0, 1, 2]])
def test_selected_exits_keep_their_weights_and_logits(network, indices):
    model, variables, images = network
    thinned = select_exits(model, indices)
    everything = model.apply(variables, images)
    for index, logits in zip(indices, thinned.apply(variables, images), strict=True):
        np.testing.assert_array_equal(logits, everything[index])


@pytest.mark.parametrize('indices', [[], [0], [0, 1], [2, 0], [0, 0, 2], [-1, 2], [0, 3]])
def test_bad_selection_is_refused(network, indices):
    with pytest.raises(ValueError, match='indices: got'):
        select_exits(network[0], indices)


def test_side_heads_are_told_from_the_trunk(network):
    assert side_head_names(network[0]) == {'head1', 'head2'}
    assert side_head_names(without_branches(network[0])) == set()
    shared = nn.Dense(2, name='shared')
    assert side_head_names(bj.BranchyNet(stages=(nn.relu, nn.relu), exits=(shared, shared))) == set()


class Around(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='own')(self.inner(x))


@pytest.mark.parametrize(
    'exits_of',
    [
        lambda head: (head, head),
        lambda head: ((nn.relu, head), head),
        lambda head: (head, Around(head)),
        lambda head: (Around(head), Around(head)),
        lambda head: (Around(head), head),
        lambda head: (nn.Dense(2), head),
    ],
    ids=['same', 'in a tuple', 'inside the last', 'inside both', 'inside the first', 'not shared'],
)
def test_what_the_trunk_shares_with_a_side_head_is_the_trunk_s(exits_of):
    """A change of what belongs to side heads leaves the last exit as it was, with unnamed modules too."""
    model = bj.BranchyNet(stages=(nn.Dense(2), nn.relu), exits=exits_of(nn.Dense(2)))
    variables, images = model.init(jax.random.key(0), np.ones((1, 3), np.float32)), np.ones((1, 3), np.float32)
    names = side_head_names(model) & set(variables['params'])
    moved = {
        name: jax.tree.map(lambda x: x + 1, module) if name in names else module
        for name, module in variables['params'].items()
    }
    before, after = model.apply(variables, images), model.apply({'params': moved}, images)
    np.testing.assert_array_equal(before[-1], after[-1])
    assert (before[0] != after[0]).any() == bool(names)


def test_own_parameters_of_a_side_head_around_the_trunk_s_train():
    head = nn.Dense(2)
    assert side_head_names(bj.BranchyNet(stages=(nn.relu, nn.relu), exits=(Around(head), head))) == {'exits_0'}


@pytest.mark.parametrize('indices', [[0.9, 2], [0, 2.0], ['0', 2], [False, 2]])
def test_exits_that_are_no_integers_are_refused(network, indices):
    with pytest.raises(ValueError, match='exits: got .*; give the numbers of exits, which are integers'):
        bj.inference.dense(network[0], exits=indices)
    assert select_exits(network[0], np.array([0, 2])).num_exits == 2


def test_unequal_stages_and_exits_are_refused():
    with pytest.raises(ValueError, match='exits: .* got 2 stages and 1 exits'):
        bj.BranchyNet(stages=(nn.relu, nn.relu), exits=(nn.Dense(2),))
    with pytest.raises(ValueError, match='exits: '):
        bj.BranchyNet(stages=(), exits=())


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros(IMAGE_SHAPE, np.float32), 'leading batch axis'),
        (np.zeros((2, 5, 4, 1), np.float32), r'got shape \(2, 5, 4, 1\); resize'),
        (np.zeros((2, *IMAGE_SHAPE), np.uint8), 'got uint8; normalise'),
        ([[1.0]], 'got list'),
    ],
)
def test_bad_images_are_refused(network, images, message):
    model, variables, _ = network
    with pytest.raises(ValueError, match=rf'images: .*{message}'):
        model.apply(variables, images)
    with pytest.raises(ValueError, match='images: '):
        model.init(jax.random.key(0), images)


@pytest.fixture(scope='module')
def unnamed_heads():
    """A trunk with names, heads without: their parameters are named after their place."""
    model = bj.BranchyNet(
        stages=tuple((bj.models.layers.flatten, nn.Dense(6, name=f'layer{n}'), nn.relu) for n in range(3)),
        exits=(nn.Dense(3), (nn.relu, nn.Dense(3)), nn.Dense(3)),
        image_shape=IMAGE_SHAPE,
    )
    images = jax.random.normal(jax.random.key(0), (4, *IMAGE_SHAPE))
    return model, model.init(jax.random.key(1), images), images


def test_heads_without_names_keep_their_weights_when_exits_are_left_out(unnamed_heads):
    model, variables, images = unnamed_heads
    logits = model.apply(variables, images)
    for kept in ([1, 2], [0, 2], [2]):
        for ours, n in zip(select_exits(model, kept).apply(variables, images), kept, strict=True):
            np.testing.assert_array_equal(ours, logits[n])
    baseline = without_branches(model)
    assert set(baseline.init(jax.random.key(2), images)['params']) == {'layer0', 'layer1', 'layer2', 'exits_2'}
    trained = baseline.init(jax.random.key(3), images)
    start, _ = bj.training.initialize_from_baseline(variables, trained)
    np.testing.assert_array_equal(model.apply(start, images)[-1], baseline.apply(trained, images)[0])
    np.testing.assert_array_equal(start['params']['exits_0']['kernel'], variables['params']['exits_0']['kernel'])


def test_a_head_that_stands_twice_keeps_one_name(getkey):
    head = nn.Dense(3)
    model = bj.BranchyNet(stages=(nn.Dense(5), nn.Dense(5), nn.Dense(5)), exits=(head, nn.Dense(3), head))
    variables = model.init(getkey(), jnp.ones((2, 4)))
    for n, logits in zip((1, 2), select_exits(model, [1, 2]).apply(variables, jnp.ones((2, 4))), strict=True):
        np.testing.assert_array_equal(logits, model.apply(variables, jnp.ones((2, 4)))[n])


def test_networks_with_unnamed_heads_are_planned(unnamed_heads):
    model, variables, images = unnamed_heads
    planned = bj.inference.plan(model, variables, images, [0.5, 0.5], passes=1)
    answer = bj.inference.dense(model)(variables, images, planned.policy)
    np.testing.assert_array_equal(planned(images).exit_index, answer.exit_index)
