"""Fewer exits: the same trunk, the same names of leaves, whatever tree of variables is given."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, check_equal

import branchy_jax as bj
from branchy_jax.models import select_exits, without_branches


def names_of(variables):
    return {
        jax.tree_util.keystr(path[:2], simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(variables)
    }


@pytest.mark.parametrize('indices', [[2], [0, 2], [1, 2], [0, 1, 2]])
def test_selected_exits_have_the_logits_and_leaves_of_the_whole(network, indices):
    model, variables, images = network
    fewer, logits = select_exits(model, indices), model.apply(variables, images)
    own = fewer.init(jax.random.key(2), images)  # the key of the whole
    heads = {f'params/head{n + 1}' for n in indices}
    assert names_of(own) == {f'params/{name}' for name in ('layer1', 'norm1', 'layer2', 'layer3')} | heads | {
        'batch_stats/norm1'
    }
    for tree in (variables, own):  # leaves are matched by path
        for index, selected in zip(indices, fewer.apply(tree, images), strict=True):
            np.testing.assert_allclose(selected, logits[index], rtol=1e-5, atol=1e-6)


def test_leaves_that_an_exit_reads_may_not_be_missing(network):
    model, variables, images = network
    fewer = select_exits(model, [0, 2])
    for missing in ('layer2', 'head1'):
        params = {name: leaf for name, leaf in variables['params'].items() if name != missing}
        with pytest.raises(ValueError, match=f'variables: have no params/{missing}/.*, which a chosen exit reads'):
            fewer.apply({**variables, 'params': params}, images)
    for bad in ({}, None, variables['params']):
        with pytest.raises(ValueError, match='variables: '):
            fewer.apply(bad, images)


def test_updates_of_leaves_that_no_exit_reads_are_dropped():
    class Norms(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(not train, name='shared')(x)
            y = nn.BatchNorm(not train, name='side')(nn.relu(x))
            return nn.Dense(3, name='early')(y), nn.Dense(3, name='late')(x)

    images = jax.random.normal(jax.random.key(0), (6, 4))
    baseline, model = without_branches(Norms()), Norms()
    own, whole = (m.init(jax.random.key(1), images) for m in (baseline, model))
    assert set(own['batch_stats']) == {'shared'}
    logits, updates = baseline.apply(own, images, train=True, mutable=['batch_stats'])
    expected, all_updates = model.apply(whole, images, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(logits[0], expected[1], atol=1e-6)
    assert set(updates['batch_stats']) == {'shared'}
    check_equal(updates['batch_stats']['shared'], all_updates['batch_stats']['shared'])


def test_a_baseline_trains_and_starts_the_whole(network, small_data, train):
    model, variables, images = network
    baseline = without_branches(model)
    state = bj.training.create_train_state(baseline, baseline.init(jax.random.key(3), images))
    before = jax.tree.map(np.asarray, state.variables)
    trained = train(state, epochs=1, exit_weights=jnp.ones(1)).variables
    assert jax.tree.structure(trained) == jax.tree.structure(before)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True))
    start, report = bj.training.initialize_from_baseline(variables, trained)
    np.testing.assert_allclose(model.apply(start, images)[-1], baseline.apply(trained, images)[0], rtol=1e-5, atol=1e-6)
    check_equal(start['params']['head1'], variables['params']['head1'])
    assert {path.split('/')[1] for path in report.fresh} == {'head1', 'head2'}


def test_selected_exits_run_everywhere(network):
    model, variables, images = network
    fewer = select_exits(model, [1, 2])
    policy = [np.float32(np.median(bj.inference.exit_outputs(fewer, variables, images).uncertainty[0])) + 1e-4]
    oracle = bj.inference.dense(model)(variables, images, [-np.inf, policy[0]])
    for tree in (variables, fewer.init(jax.random.key(2), images)):
        answer = bj.inference.compacted(fewer, chunk_size=5)(tree, images, policy)
        np.testing.assert_array_equal(answer.exit_index + 1, oracle.exit_index)
        np.testing.assert_array_equal(answer.label, oracle.label)
    assert bj.costs.count_macs(fewer, inputs=images).stages.tolist() == [16 * 8 + 8 * 8, 8 * 8 + 8 * CLASSES]


@pytest.mark.parametrize('indices', [[], [0, 1], [2, 0], [0, 0, 2], [-1, 2], [0, 3]])
def test_impossible_selections_are_refused(network, indices):
    model, variables, images = network
    with pytest.raises(ValueError, match='indices: got'):
        select_exits(model, indices).apply(variables, images)


@pytest.mark.parametrize('indices', [[0.9, 2], [0, 2.0], ['0', 2], [False, 2]])
def test_exits_that_are_no_integers_are_refused(network, indices):
    for build in (select_exits, lambda model, exits: bj.inference.dense(model, exits=exits)):
        with pytest.raises(ValueError, match='got .*; give the numbers of exits, which are integers'):
            build(network[0], indices)
    assert select_exits(network[0], np.array([0, 2])) == select_exits(network[0], [0, 2])


def test_what_is_no_model_is_refused(network):
    model, variables, _ = network
    for bad in ('b-lenet', None, model.bind(variables)):
        with pytest.raises(ValueError, match='model: got'):
            without_branches(bad)
