import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.types import check_labels, num_rows


def test_normalization_is_affine_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 2)).astype(np.uint8)
    mean, deviation = np.array([0.2, 0.6], np.float32), np.array([0.5, 0.25], np.float32)
    expected = (images.astype(np.float64) / 255 - mean) / deviation
    result = bj.Normalization(mean, deviation)(images)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == np.float32


def test_batch_knows_its_length():
    assert len(bj.Batch(image=np.zeros((5, 2, 2, 1)), label=np.zeros(5))) == 5


def point_of(policy):
    return bj.OperatingPoint(policy=policy, accuracy=0.9, split='validation', exit_fractions=np.ones(2) / 2, cost=3.0)


def test_records_pass_through_transformations():
    point = point_of(bj.ExitPolicy(bj.criteria.margin, np.ones(1)))
    doubled = jax.tree.map(lambda x: 2 * x, point)
    assert (doubled.cost, doubled.split, doubled.policy.criterion) == (6.0, 'validation', bj.criteria.margin)
    assert doubled.thresholds.tolist() == doubled.policy.thresholds.tolist() == [2.0]


def test_what_a_criterion_has_learned_is_a_leaf_of_its_policy():
    policy = bj.ExitPolicy(bj.criteria.with_temperatures([2.0, 1.0]), jnp.array([0.5]))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(policy)) == [(1,), (2,)]
    assert len(jax.tree.leaves(bj.ExitPolicy(bj.criteria.entropy, jnp.array([0.5])))) == 1


def test_policies_are_compared_by_value():
    policy = bj.ExitPolicy(bj.criteria.with_temperatures([2.0, 1.0]), np.array([0.5], np.float32))
    same = bj.ExitPolicy(bj.criteria.with_temperatures([2.0, 1.0]), jnp.array([0.5]))
    assert policy == same
    assert hash(policy) == hash(same)
    assert point_of(policy) == point_of(same)
    for other in (
        bj.ExitPolicy(bj.criteria.with_temperatures([2.0, 1.5]), jnp.array([0.5])),
        bj.ExitPolicy(bj.criteria.entropy, jnp.array([0.5])),
        policy.replace(thresholds=jnp.array([0.25])),
        policy.replace(thresholds=jnp.array([0.5, 0.5])),
        point_of(policy),
    ):
        assert policy != other
    unknown = policy.replace(thresholds=jnp.array([jnp.nan]))
    assert unknown == unknown.replace(thresholds=np.array([np.nan], np.float32))


def test_policies_of_one_kind_compile_once():
    compiled = []

    @jax.jit
    def run(policy):
        compiled.append(policy)
        return policy.thresholds.sum()

    for temperature in (1.0, 2.0):
        run(bj.ExitPolicy(bj.criteria.with_temperatures([temperature, 1.0]), jnp.array([temperature])))
    assert len(compiled) == 1
    run(bj.ExitPolicy(bj.criteria.entropy, jnp.array([1.0])))
    assert len(compiled) == 2


def test_policies_are_frozen():
    policy = bj.ExitPolicy(bj.criteria.entropy, jnp.array([0.5]))
    with pytest.raises(AttributeError):
        policy.thresholds = jnp.array([0.1])


@pytest.mark.parametrize(('labels', 'range_of'), [([0, 3], '0 to 3'), ([-1, 2], '-1 to 2')])
def test_labels_that_no_class_has_are_refused(labels, range_of):
    with pytest.raises(ValueError, match=rf'labels: expected classes in \[0, 3\), got {range_of}'):
        check_labels(jnp.array(labels), 3)
    check_labels(jnp.array([0, 2]), 3)
    jax.jit(lambda values: check_labels(values, 3))(jnp.array(labels))  # inside jit they cannot be seen


def test_every_leaf_of_inputs_leads_with_b():
    assert num_rows({'a': jnp.ones((2, 3)), 'b': (np.ones(2),)}) == 2
    for bad in ({}, 1.0, {'a': jnp.ones(2), 'b': jnp.ones(3)}, (jnp.ones(2), jnp.ones(()))):
        with pytest.raises(ValueError, match='inputs: expected arrays that all lead with B'):
            num_rows(bad)
