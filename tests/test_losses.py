"""Losses of every exit against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from branchy_jax.losses import (
    accuracy_per_exit,
    cross_entropy_per_exit,
    distillation,
    ensemble_of_exits,
    last_exit,
    next_exit,
    weighted_sum,
)


@pytest.fixture(scope='module')
def logits():
    """Of three exits, four images of 2 × 3 pixels and five classes."""
    return tuple(jnp.float32(3 * np.random.default_rng(0).normal(size=(3, 4, 2, 3, 5))))


LABELS = np.arange(24).reshape(4, 2, 3) % 5


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_cross_entropy_is_the_float64_reference(logits, smoothing):
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    exact = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    expected = -(target * exact).sum(-1).reshape(3, -1).mean(-1)
    losses = cross_entropy_per_exit(logits, jnp.asarray(LABELS), label_smoothing=smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert cross_entropy_per_exit([z.astype(jnp.bfloat16) for z in logits], LABELS).dtype == jnp.float32


@pytest.mark.parametrize('ignored', [1, 255, -1])
def test_positions_to_ignore_leave_loss_and_accuracy(logits, ignored):
    labels = np.where(LABELS == 1, ignored, LABELS)
    labels = labels.astype(np.uint8 if ignored > 0 else np.int32)
    counted = labels != ignored
    exact = special.log_softmax(np.asarray(logits, np.float64), axis=-1)[:, counted]
    expected = -exact[:, np.arange(counted.sum()), labels[counted]].mean(-1)
    right = (exact.argmax(-1) == labels[counted]).mean(-1)
    for given in (labels, jnp.asarray(labels)):
        losses = jax.jit(cross_entropy_per_exit, static_argnames='ignore_label')(logits, given, ignore_label=ignored)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        np.testing.assert_allclose(cross_entropy_per_exit(logits, given, ignore_label=ignored), expected, rtol=1e-5)
        accuracy = accuracy_per_exit(logits, given, ignore_label=ignored)['exit_accuracy']
        np.testing.assert_allclose(accuracy, right, rtol=1e-6)
    nothing = np.full_like(labels, ignored)
    loss, gradient = jax.value_and_grad(lambda z: cross_entropy_per_exit(z, nothing, ignore_label=ignored).sum())(
        logits
    )
    assert loss == 0
    assert not np.any(gradient)


def kl_divergence(teacher, student, temperature):
    """Float64, per exit: T² KL(teacher ‖ student)."""
    p, q = (special.log_softmax(np.asarray(z, np.float64) / temperature, -1) for z in (teacher, student))
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(('teachers', 'taught_by'), [(last_exit, [2, 2, 2]), (next_exit, [1, 2, 2])])
def test_distillation_is_the_float64_reference(logits, teachers, taught_by):
    expected = [kl_divergence(logits[t], logits[n], 2.5) for n, t in enumerate(taught_by)]
    np.testing.assert_allclose(distillation(teachers, temperature=2.5)(logits, None), expected, rtol=1e-4, atol=1e-6)


def test_ensemble_teaches_the_mean_of_probabilities(logits):
    mean = np.mean([special.softmax(np.asarray(z, np.float64), -1) for z in logits], axis=0)
    for teacher in ensemble_of_exits(logits):
        np.testing.assert_allclose(np.exp(teacher), mean, rtol=1e-5)


def test_no_gradient_reaches_a_teacher(logits):
    gradient = jax.grad(lambda z: distillation(last_exit)(z, None)[0])(logits)
    assert [float(jnp.abs(g).max()) > 1e-3 for g in gradient] == [True, False, False]
    itself = jax.grad(lambda z: distillation(last_exit)(z, None)[2])(logits)
    assert all(jnp.abs(g).max() < 1e-6 for g in itself)


def test_losses_add_up_and_are_values(logits):
    def terms():
        return (0.7, cross_entropy_per_exit), (0.2, distillation(last_exit, temperature=2.0))

    expected = sum(factor * loss(logits, jnp.asarray(LABELS)) for factor, loss in terms())
    np.testing.assert_allclose(weighted_sum(*terms())(logits, jnp.asarray(LABELS)), expected, rtol=1e-6)
    assert weighted_sum(*terms()) == weighted_sum(*terms())
    assert hash(weighted_sum(*terms())) == hash(weighted_sum(*terms()))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda z: cross_entropy_per_exit(z, jnp.zeros((4, 2, 3))), 'labels: expected integers'),
        (lambda z: cross_entropy_per_exit(z, LABELS[:3]), r'labels: .* exit 0 .*\(4, 2, 3\); got \(3, 2, 3\)'),
        (lambda z: cross_entropy_per_exit(z, LABELS + 1), 'labels: expected classes'),
        (lambda z: cross_entropy_per_exit(z, LABELS + 1, ignore_label=4), 'labels: expected classes'),
        (lambda z: cross_entropy_per_exit([x[..., :1] for x in z], 0 * LABELS), 'logits: exit 0 has one logit'),
        (lambda z: cross_entropy_per_exit(z, LABELS, label_smoothing=1.0), 'label_smoothing: got 1.0'),
        (lambda z: cross_entropy_per_exit(z, LABELS, label_smoothing=float('nan')), 'label_smoothing: got nan'),
        (lambda z: distillation(last_exit, temperature=0), 'temperature: got 0'),
        (lambda z: weighted_sum(), 'terms: got none'),
    ],
)
def test_bad_labels_and_options_are_refused(logits, call, message):
    with pytest.raises(ValueError, match=message):
        call(logits)
