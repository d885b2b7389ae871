"""Temperatures where the cross-entropy is smallest, bins against counting, a learned criterion on a made-up case."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from branchy_jax.criteria import brier_score, fit_learned, fit_temperatures, reliability


@pytest.fixture(scope='module')
def overconfident():
    """Logits of two exits and labels; the softmax of the first at temperature 3 is the true distribution."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=(600, 4))
    calm = np.stack([first, 2 * first + generator.normal(size=first.shape)])
    labels = np.array([generator.choice(4, p=p) for p in special.softmax(first, axis=-1)])
    return (3 * calm).astype(np.float32), labels


def slope(logits, labels, temperature):
    """Derivative of the cross-entropy by 1 / T: the mean logit that the softmax expects, less that of the labels."""
    z = logits.astype(np.float64)
    expected = (special.softmax(z / temperature, axis=-1) * z).sum(-1)
    return np.mean(expected - z[np.arange(len(labels)), labels])


def test_temperatures_minimise_the_cross_entropy(overconfident):
    logits, labels = overconfident
    each, shared = fit_temperatures(logits, labels), fit_temperatures(logits, labels, shared=True)
    slopes = [slope(logits[n], labels, each[n]) for n in range(2)]
    slopes.append(sum(slope(logits[n], labels, shared[n]) for n in range(2)))
    np.testing.assert_allclose(slopes, 0, atol=1e-3)
    assert slope(logits[0], labels, 1.01 * each[0]) < -1e-3 < 1e-3 < slope(logits[0], labels, 0.99 * each[0])
    assert 2.5 < each[0] < 3.6
    assert shared[0] == shared[1]
    unrelated = np.random.default_rng(9).integers(0, 4, 600)  # the exit is no better than chance
    assert 1000 >= fit_temperatures(logits[:1], unrelated)[0] > 10


@given(seed=st.integers(0, 100), bins=st.integers(1, 20), equal=st.booleans())
def test_reliability_is_counted_bin_by_bin(seed, bins, equal):
    generator = np.random.default_rng(seed)
    confidence, right = generator.random(50), generator.random(50) < 0.5
    result = reliability(confidence, right, bins=bins, equal_counts=equal)
    if equal:
        groups = [np.argsort(confidence)[np.arange(50) * bins // 50 == k] for k in range(bins)]
        assert result.count.max() - result.count.min() <= 1
    else:
        edges = np.linspace(0, 1, bins + 1)
        groups = [np.flatnonzero((confidence > a) & (confidence <= b)) for a, b in itertools.pairwise(edges)]
    expected = sum(len(g) * abs(confidence[g].mean() - right[g].mean()) for g in groups if len(g)) / 50
    np.testing.assert_allclose(result.error, expected, atol=1e-12)
    assert result.count.sum() == 50


def test_scores_by_hand():
    assert (reliability(np.ones(4), np.ones(4)).error, reliability(np.ones(4), np.zeros(4)).error) == (0, 1)
    # Probabilities (.8, .2): squared distance from class 0 .04 + .04, from class 1 .64 + .64.
    assert brier_score(np.log([[0.8, 0.2], [0.8, 0.2]]), [0, 1]) == pytest.approx((0.08 + 1.28) / 2, rel=1e-6)


def test_a_learned_criterion_recognises_what_entropy_cannot():
    """An exit that is right exactly where its second and third probability are equal: entropy hardly differs."""
    generator = np.random.default_rng(0)
    even = generator.random(800) < 0.5
    rest = np.where(even[:, None], [0.2, 0.2], [0.3, 0.1])
    probability = np.concatenate([np.full((800, 1), 0.6), rest], axis=1) + generator.uniform(0, 0.01, (800, 3))
    logits = np.log(probability)[None].astype(np.float32)
    criterion = fit_learned(logits[:, :400], np.where(even, 0, 1)[:400], jax.random.key(0), steps=400)
    _, wrong, _ = criterion(jnp.asarray(logits[0, 400:]), None, 0)
    assert np.asarray(wrong)[even[400:]].max() < 0.2 < 0.8 < np.asarray(wrong)[~even[400:]].min()
    reversed_classes = criterion(jnp.asarray(logits[0, 400:, ::-1]), None, 0)[1]
    np.testing.assert_allclose(wrong, reversed_classes, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='was learned on the 3 largest probabilities, this network has 7'):
        criterion(jnp.zeros((2, 7)), None, 0)


LOGITS, LABELS, KEY = np.random.default_rng(0).normal(size=(2, 6, 3)), np.arange(6) % 3, jax.random.key(0)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: fit_temperatures(LOGITS, [0, 1]), 'logits: expected'),
        (lambda: fit_temperatures(LOGITS, LABELS + 1), 'labels: expected classes'),
        (lambda: fit_temperatures(np.where(LOGITS > 1, -np.inf, LOGITS), LABELS), 'logits: got values .* not finite'),
        (lambda: fit_learned(LOGITS, [0, 1], KEY), 'logits: expected'),
        (lambda: fit_learned(LOGITS, LABELS, KEY, steps=0), 'steps: got 0'),
        (lambda: reliability([0.5], [True, False]), 'confidence: expected'),
    ],
)
def test_bad_data_and_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
