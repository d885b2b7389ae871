"""Fewer exits: the same trunk, the same names of leaves, whatever tree of variables is given."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import CLASSES, check_equal

import branchy_jax as bj
from branchy_jax.models import select_exits, without_branches


def names_of(variables):
    return {
        jax.tree_util.keystr(path[:2], simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(variables)
    }


@pytest.mark.parametrize('indices', [[2], [0, 2]])
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


def test_selected_exits_run_everywhere(network):
    model, variables, images = network
    fewer = select_exits(model, [1, 2])
    policy = [np.float32(np.median(bj.inference.exit_outputs(fewer, variables, images).uncertainty[0])) + 1e-4]
    oracle = bj.inference.dense(model)(variables, images, [-np.inf, policy[0]])
    answer = bj.inference.compacted(fewer, chunk_size=5)(variables, images, policy)
    np.testing.assert_array_equal(answer.exit_index + 1, oracle.exit_index)
    np.testing.assert_array_equal(answer.label, oracle.label)
    assert bj.costs.count_macs(fewer, inputs=images).stages.tolist() == [16 * 8 + 8 * 8, 8 * 8 + 8 * CLASSES]


def test_exits_of_an_object_with_init_and_apply_are_selected(network):
    model, variables, images = network

    class Plain:
        """Knows modes, and returns updates only where collections are to be updated."""

        init = staticmethod(model.init)

        def apply(self, variables, images, train=False, frozen_trunk=False, rngs=None, mutable=False):
            options = {'mutable': mutable} if mutable else {}
            return model.apply(variables, images, train=train, rngs=rngs, **options)

    expected = model.apply(variables, images)
    (logits,) = without_branches(Plain()).apply(variables, images)
    np.testing.assert_allclose(logits, expected[2], rtol=1e-5, atol=1e-6)
    options = {'train': True, 'rngs': {'dropout': jax.random.key(0)}, 'mutable': ['batch_stats']}
    _, updates = without_branches(Plain()).apply(variables, images, **options)
    assert set(updates) == {'batch_stats'}


def test_impossible_selections_are_refused(network):
    model, variables, images = network
    for indices in ([], [0, 1], [2, 0], [0, 0, 2], [-1, 2], [0, 3], [0.9, 2], ['0', 2], [False, 2]):
        with pytest.raises(ValueError, match='indices: got'):
            select_exits(model, indices).apply(variables, images)
    assert select_exits(model, np.array([0, 2])) == select_exits(model, [0, 2])
    for bad in ('b-lenet', None, model.bind(variables)):
        with pytest.raises(ValueError, match='model: got'):
            without_branches(bad)
