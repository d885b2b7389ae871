import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.types import check_labels, num_rows


def test_normalization_is_affine_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 2)).astype(np.uint8)
    mean, deviation = np.array([0.2, 0.6], np.float32), np.array([0.5, 0.25], np.float32)
    result = bj.Normalization(mean, deviation)(images)
    np.testing.assert_allclose(result, (images.astype(np.float64) / 255 - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert result.dtype == np.float32


def policy_of(temperature, *thresholds):
    return bj.ExitPolicy(bj.criteria.with_temperatures([temperature, 1.0]), jnp.array(thresholds))


def test_policies_are_frozen_pytrees_compared_by_value():
    policy = policy_of(2.0, 0.5)
    same = policy.replace(thresholds=np.float32([0.5]))
    result = {'accuracy': 0.9, 'split': 'test', 'exit_fractions': np.ones(2) / 2, 'cost': 3.0}
    point, same_point = (bj.OperatingPoint(policy=given, **result) for given in (policy, same))
    assert (policy, hash(policy), point) == (same, hash(same), same_point)
    for other in (policy_of(1.5, 0.5), policy_of(2.0, 0.25), policy_of(2.0, 0.5, 0.5), point):
        assert policy != other
    assert policy_of(1.0, jnp.nan) == policy_of(1.0, np.nan)
    doubled = jax.tree.map(lambda x: 2 * x, point)  # what a criterion has learned is a leaf
    assert doubled.policy.criterion == bj.criteria.with_temperatures([4.0, 2.0])
    assert (doubled.cost, doubled.split, doubled.thresholds.tolist()) == (6.0, 'test', [1.0])
    with pytest.raises(AttributeError):
        policy.thresholds = jnp.array([0.1])


def test_labels_and_inputs_that_do_not_fit_are_refused():
    for labels, range_of in (([0, 3], '0 to 3'), ([-1, 2], '-1 to 2')):
        with pytest.raises(ValueError, match=rf'labels: expected classes in \[0, 3\), got {range_of}'):
            check_labels(jnp.array(labels), 3)
    jax.jit(lambda values: check_labels(values, 3))(jnp.array([-1, 3]))  # inside jit they cannot be seen
    assert num_rows({'a': jnp.ones((2, 3)), 'b': (np.ones(2),)}) == 2
    for bad in ({}, 1.0, {'a': jnp.ones(2), 'b': jnp.ones(3)}, (jnp.ones(2), jnp.ones(()))):
        with pytest.raises(ValueError, match='inputs: expected arrays that all lead with B'):
            num_rows(bad)
    with pytest.raises(ValueError, match=r"got shape \(3,\) at inputs\['b'\] and \(2,\) at inputs\['a'\]"):
        num_rows({'a': jnp.ones(2), 'b': jnp.ones(3)})
    with pytest.raises(ValueError, match='got the dtype >f4 of another byte order; convert them'):
        num_rows(np.ones(2, '>f4'))
