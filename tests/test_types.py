import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj


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
