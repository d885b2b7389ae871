import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from branchy_jax.losses import cross_entropy_per_exit, weighted_exit_loss


@pytest.mark.parametrize('extra', [(), (2, 3)])
def test_cross_entropy_is_the_float64_reference(getkey, extra):
    logits = tuple(5 * jax.random.normal(getkey(), (4, *extra, 5)) for _ in range(3))
    labels = jax.random.randint(getkey(), (4, *extra), 0, 5)
    expected = [
        -np.take_along_axis(
            special.log_softmax(np.asarray(z, np.float64), -1), np.asarray(labels)[..., None], -1
        ).mean()
        for z in logits
    ]
    np.testing.assert_allclose(cross_entropy_per_exit(logits, labels), expected, rtol=1e-5)


def test_weighted_sum_and_its_gradient():
    losses, weights = jnp.array([2.0, 3.0]), jnp.array([1.0, 0.3])
    assert float(weighted_exit_loss(losses, weights)) == pytest.approx(2.9)
    np.testing.assert_allclose(jax.grad(weighted_exit_loss)(losses, weights), weights)


def test_bad_labels_are_refused():
    logits = (jnp.zeros((4, 5)),)
    with pytest.raises(ValueError, match='labels: expected integers'):
        cross_entropy_per_exit(logits, jnp.zeros(4))
    with pytest.raises(ValueError, match=r'labels: exit 0 .*\(4,\); got \(3,\)'):
        cross_entropy_per_exit(logits, jnp.zeros(3, jnp.int32))


def test_wrong_number_of_weights_is_refused():
    with pytest.raises(ValueError, match='exit_weights: expected one weight for each of the 2 exits'):
        weighted_exit_loss(jnp.ones(2), jnp.ones(3))
