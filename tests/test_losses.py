import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from branchy_jax.losses import (
    cross_entropy_per_exit,
    distillation,
    ensemble_of_exits,
    last_exit,
    next_exit,
    weighted_sum,
)


def test_losses_of_bfloat16_logits_are_float32():
    logits = (jnp.array([[1.0, -2.0, 0.5]], jnp.bfloat16),)
    exact = -special.log_softmax(np.array([1.0, -2.0, 0.5]))
    for smoothing, expected in ((0.0, exact[2]), (0.3, 0.7 * exact[2] + 0.3 * exact.mean())):
        losses = cross_entropy_per_exit(logits, jnp.array([2]), label_smoothing=smoothing)
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, [expected], rtol=1e-6)


@pytest.mark.parametrize('extra', [(), (2, 3)])
def test_cross_entropy_is_the_float64_reference(getkey, extra):
    logits = tuple(5 * jax.random.normal(getkey(), (4, *extra, 5)) for _ in range(3))
    labels = jax.random.randint(getkey(), (4, *extra), 0, 5)
    exact = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    expected = -np.take_along_axis(exact, np.asarray(labels)[None, ..., None], axis=-1).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(cross_entropy_per_exit(logits, labels), expected, rtol=1e-5)


def test_bad_labels_are_refused():
    logits = (jnp.zeros((4, 5)),)
    with pytest.raises(ValueError, match='labels: expected integers'):
        cross_entropy_per_exit(logits, jnp.zeros(4))
    with pytest.raises(ValueError, match=r'labels: the logits of exit 0 .*\(4,\); got \(3,\)'):
        cross_entropy_per_exit(logits, jnp.zeros(3, jnp.int32))
    for smoothing in (-0.1, 1.0, float('nan')):
        with pytest.raises(ValueError, match='label_smoothing: got'):
            cross_entropy_per_exit(logits, jnp.zeros(4, jnp.int32), label_smoothing=smoothing)


def kl_divergence(teacher, student, temperature):
    """Float64, per exit: T² KL(teacher ‖ student)."""
    p, q = (special.log_softmax(np.asarray(z, np.float64) / temperature, -1) for z in (teacher, student))
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()


@pytest.mark.parametrize('extra', [(), (2, 2)])
@pytest.mark.parametrize(('teachers', 'taught_by'), [(last_exit, [2, 2, 2]), (next_exit, [1, 2, 2])])
def test_distillation_is_the_float64_reference(getkey, extra, teachers, taught_by):
    logits = tuple(3 * jax.random.normal(getkey(), (4, *extra, 5)) for _ in range(3))
    expected = [kl_divergence(logits[t], logits[n], 2.5) for n, t in enumerate(taught_by)]
    np.testing.assert_allclose(distillation(teachers, temperature=2.5)(logits, None), expected, rtol=1e-4, atol=1e-6)


def test_ensemble_teaches_the_mean_of_probabilities(getkey):
    logits = tuple(3 * jax.random.normal(getkey(), (4, 5)) for _ in range(3))
    mean = np.mean([special.softmax(np.asarray(z, np.float64), -1) for z in logits], axis=0)
    for teacher in ensemble_of_exits(logits):
        np.testing.assert_allclose(np.exp(teacher), mean, rtol=1e-5)


def test_no_gradient_reaches_a_teacher(getkey):
    logits = tuple(jax.random.normal(getkey(), (4, 5)) for _ in range(3))
    for teachers in (last_exit, next_exit):
        gradient = jax.grad(lambda z, teachers=teachers: distillation(teachers)(z, None)[0])(logits)
        assert jnp.abs(gradient[0]).max() > 1e-3
        assert jnp.abs(gradient[1]).max() == jnp.abs(gradient[2]).max() == 0
    itself = jax.grad(lambda z: distillation(last_exit)(z, None)[2])(logits)
    assert all(jnp.abs(g).max() < 1e-6 for g in itself)


def test_losses_add_up_and_are_values(getkey):
    logits = tuple(jax.random.normal(getkey(), (4, 5)) for _ in range(2))
    labels = jnp.array([0, 1, 2, 3])
    terms = (0.7, cross_entropy_per_exit), (0.2, distillation(last_exit, temperature=2.0))
    expected = 0.7 * terms[0][1](logits, labels) + 0.2 * terms[1][1](logits, labels)
    np.testing.assert_allclose(weighted_sum(*terms)(logits, labels), expected, rtol=1e-6)
    assert weighted_sum(*terms) == weighted_sum(*terms)
    assert hash(weighted_sum(*terms)) == hash(weighted_sum(*terms))
    assert distillation(last_exit, temperature=2.0) == distillation(last_exit, temperature=2.0)


def test_impossible_distillation_is_refused():
    with pytest.raises(ValueError, match='temperature: got 0'):
        distillation(last_exit, temperature=0)
    with pytest.raises(ValueError, match='terms: got none'):
        weighted_sum()


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_the_target(getkey, smoothing):
    logits, labels = np.asarray(jax.random.normal(getkey(), (2, 6, 5)), np.float64), np.array([0, 1, 2, 3, 4, 0])
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(target * log_probability).sum(-1).mean(-1)
    losses = cross_entropy_per_exit(tuple(jnp.float32(logits)), jnp.asarray(labels), label_smoothing=smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
