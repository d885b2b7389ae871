import jax
import numpy as np

import branchy_jax as bj


def test_normalization_is_affine_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 2)).astype(np.uint8)
    mean, deviation = np.array([0.2, 0.6], np.float32), np.array([0.5, 0.25], np.float32)
    expected = (images.astype(np.float64) / 255 - mean) / deviation
    found = bj.Normalization(mean, deviation)(images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_batch_knows_its_length():
    assert len(bj.Batch(image=np.zeros((5, 2, 2, 1)), label=np.zeros(5))) == 5


def test_records_pass_through_transformations():
    point = bj.OperatingPoint(
        thresholds=np.zeros(1), criterion='entropy', accuracy=0.9, split='validation',
        exit_fractions=np.ones(2) / 2, cost=3.0,
    )  # fmt: skip
    doubled = jax.tree.map(lambda x: 2 * x, point)
    assert (doubled.cost, doubled.criterion) == (6.0, 'entropy')
