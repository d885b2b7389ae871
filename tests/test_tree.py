"""Routes and trees: each path by hand, and all executors on a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, IMAGE_SHAPE
from flax import linen as nn

import branchy_jax as bj
from branchy_jax.models import Branch, Route, tree, without_branches
from branchy_jax.models.branchy import select_exits, side_head_names
from branchy_jax.models.layers import flatten


@pytest.fixture(scope='module')
def grown():
    """A stem, a side branch with a twig of its own, and the trunk; declared out of order."""
    branches = {
        'trunk': Branch((nn.Dense(32), nn.relu, nn.Dense(8), nn.tanh), after='stem', head=nn.Dense(CLASSES)),
        'twig': Branch((nn.Dense(8), nn.tanh), after='side', head=nn.Dense(CLASSES)),
        'stem': Branch((flatten, nn.Dense(8), nn.tanh)),
        'side': Branch((nn.Dense(6), nn.tanh), after='stem', head=nn.Dense(CLASSES)),
    }
    model = tree(branches, image_shape=IMAGE_SHAPE)
    images = jax.random.normal(jax.random.key(0), (24, *IMAGE_SHAPE))
    return model, model.init(jax.random.key(1), images), images


def dense(variables, name, x):
    layer = variables['params'][name]
    return np.asarray(x, np.float64) @ np.asarray(layer['kernel'], np.float64) + np.asarray(layer['bias'], np.float64)


def test_every_path_by_hand(grown):
    model, variables, images = grown
    stem = np.tanh(dense(variables, 'stem_1', images.reshape(24, -1)))
    side = np.tanh(dense(variables, 'side_0', stem))
    twig = np.tanh(dense(variables, 'twig_0', side))
    trunk = np.tanh(dense(variables, 'trunk_2', np.maximum(dense(variables, 'trunk_0', stem), 0)))
    expected = [('side', side), ('twig', twig), ('trunk', trunk)]  # in order of cost
    for logits, (name, activation) in zip(model.apply(variables, images), expected, strict=True):
        np.testing.assert_allclose(logits, dense(variables, f'{name}_head', activation), rtol=1e-4, atol=1e-5)


def test_stages_compute_what_is_new_and_carry_what_is_read(grown):
    model, variables, images = grown
    carried, hidden = [], images
    for n in range(3):
        hidden = model.apply(variables, hidden, n, method='run_stage')
        carried.append(set(hidden))
    assert carried == [{'stem', 'side'}, {'stem', 'twig'}, {'trunk'}]
    costs = bj.costs.count_macs(model, IMAGE_SHAPE)
    assert costs.stages.tolist() == [16 * 8 + 8 * 6, 6 * 8, 8 * 32 + 32 * 8]


def test_executors_agree_on_a_tree(grown):
    model, variables, images = grown
    dense, staged, compacted = (
        bj.inference.dense(model),
        bj.inference.staged(model),
        bj.inference.compacted(model, chunk_size=5),
    )
    uncertainty = bj.inference.exit_outputs(model, variables, images).uncertainty
    spread = np.quantile(uncertainty[:2], [0.4, 0.6], axis=1).diagonal()
    cases = [spread, [-np.inf, spread[1]], [spread[0], -np.inf], [np.inf, 0], [0, np.inf]]
    for thresholds in cases:
        expected, found = dense(variables, images, thresholds), compacted(variables, images, thresholds)
        np.testing.assert_array_equal(found.exit_index, expected.exit_index)
        np.testing.assert_array_equal(found.label, expected.label)
        for n in range(6):
            answer = staged(variables, images[n], thresholds)
            assert (answer.exit_index, answer.label) == (expected.exit_index[n], expected.label[n])
    assert set(dense(variables, images, spread).exit_index.tolist()) == {0, 1, 2}


def test_baseline_of_a_tree_is_its_trunk_alone(grown):
    model, variables, images = grown
    baseline = without_branches(model)
    params = baseline.init(jax.random.key(0), images)['params']
    assert set(params) == {'stem_1', 'trunk_0', 'trunk_2', 'trunk_head'}
    np.testing.assert_allclose(
        baseline.apply(variables, images)[0], model.apply(variables, images)[-1], rtol=1e-5, atol=1e-6
    )
    assert bj.costs.count_macs(baseline, IMAGE_SHAPE).stages.sum() == 16 * 8 + 8 * 32 + 32 * 8
    assert side_head_names(model) == {'side_0', 'side_head', 'twig_0', 'twig_head'}
    without_twig = select_exits(model, [0, 2])
    assert 'twig_0' not in without_twig.init(jax.random.key(0), images)['params']


def test_trained_baseline_starts_the_tree(grown):
    model, variables, images = grown
    trained = without_branches(model).init(jax.random.key(5), images)
    start, report = bj.training.initialize_from_baseline(variables, trained)
    assert {path.split('/')[1] for path in report.fresh} == {'side_0', 'side_head', 'twig_0', 'twig_head'}
    np.testing.assert_array_equal(start['params']['trunk_0']['kernel'], trained['params']['trunk_0']['kernel'])


@pytest.mark.parametrize(
    ('branches', 'message'),
    [
        ({}, 'got none'),
        ({'a': Branch(nn.relu, after='b', head=nn.relu)}, r"branches\['a'\].after: no branch 'b'"),
        ({'a': Branch(nn.relu)}, r"branches\['a'\].head: nothing leaves this branch"),
        ({'a': Branch(nn.relu, head=nn.relu), 'b': Branch(nn.relu, after='a')}, r"branches\['b'\].head"),
        (
            {'a': Branch(nn.relu, after='b', head=nn.relu), 'b': Branch(nn.relu, after='a')},
            r"branches\['b'\].after: a after b after a is a cycle",
        ),
        ({'images': Branch(nn.relu, head=nn.relu)}, "the name 'images'"),
    ],
)
def test_impossible_trees_are_refused(branches, message):
    with pytest.raises(ValueError, match=message):
        tree(branches, image_shape=IMAGE_SHAPE)


def test_routes_join_and_miss():
    model = bj.BranchyNet(
        stages=((Route(lambda x: x + 1, None, 'a'), Route(lambda x: 2 * x, 'a', 'b')),),
        exits=(Route(lambda pair: pair[0] * pair[1], ('a', 'b')),),
    )
    assert model.apply({}, jnp.array([[1.0, 2.0]]))[0].tolist() == [[8.0, 18.0]]
    lost = bj.BranchyNet(stages=(Route(nn.relu, None, 'a'),), exits=(Route(nn.relu, 'c'),))
    with pytest.raises(ValueError, match=r"exits\[0\]: .*no activation 'c' among \['a'\]"):
        lost.apply({}, jnp.ones((1, 2)))
