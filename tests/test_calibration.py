"""Temperatures against SciPy's minimum, bins against counting, and a learned criterion on a case made for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special

from branchy_jax.criteria import brier_score, fit_learned, fit_temperatures, reliability


def overconfident(exits=2, count=600, classes=4, factor=3.0, seed=0):
    """Logits whose softmax at temperature ``factor`` is the true distribution of the labels."""
    generator = np.random.default_rng(seed)
    first = generator.normal(size=(count, classes))
    calm = np.stack([first, 2 * first + generator.normal(size=first.shape)])[:exits]
    labels = np.array([generator.choice(classes, p=p) for p in special.softmax(calm[0], axis=-1)])
    return (calm * factor).astype(np.float32), labels


def cross_entropy(logits, labels, temperature):
    return -special.log_softmax(logits.astype(np.float64) / temperature, axis=-1)[np.arange(len(labels)), labels].mean()


def test_temperatures_minimise_the_cross_entropy():
    logits, labels = overconfident()
    result, shared = fit_temperatures(logits, labels), fit_temperatures(logits, labels, shared=True)

    def best(exits):
        def loss(temperature):
            return sum(cross_entropy(logits[n], labels, temperature) for n in exits)

        return optimize.minimize_scalar(loss, bounds=(0.1, 50), method='bounded').x

    np.testing.assert_allclose(result, [best([0]), best([1])], rtol=1e-2)
    np.testing.assert_allclose(shared, [best([0, 1])] * 2, rtol=1e-2)
    assert 2.5 < result[0] < 3.6


def test_an_exit_no_better_than_chance_has_the_largest_temperature():
    logits, _ = overconfident()
    labels = np.random.default_rng(9).integers(0, 4, logits.shape[1])
    assert 1000 >= fit_temperatures(logits, labels)[0] > 10


def test_temperatures_lower_the_calibration_error():
    logits, labels = overconfident(count=3000)
    right = logits[0].argmax(-1) == labels

    def error(temperature):
        return reliability(special.softmax(logits[0] / temperature, axis=-1).max(-1), right).error

    assert error(fit_temperatures(logits, labels)[0]) < 0.03 < error(1.0)


@given(seed=st.integers(0, 100), bins=st.integers(1, 20), equal=st.booleans())
def test_reliability_is_counted_bin_by_bin(seed, bins, equal):
    generator = np.random.default_rng(seed)
    confidence, right = generator.random(50), generator.random(50) < 0.5
    result = reliability(confidence, right, bins=bins, equal_counts=equal)
    if equal:
        ordered, place = np.argsort(confidence), np.arange(50) * bins // 50
        groups = [ordered[place == k] for k in range(bins)]
        assert result.count.max() - result.count.min() <= 1
    else:
        edges = np.linspace(0, 1, bins + 1)
        groups = [np.flatnonzero((confidence > a) & (confidence <= b)) for a, b in itertools.pairwise(edges)]
    expected = sum(len(g) * abs(confidence[g].mean() - right[g].mean()) for g in groups if len(g)) / 50
    np.testing.assert_allclose(result.error, expected, atol=1e-12)
    assert result.count.sum() == 50


def test_scores_by_hand():
    assert reliability(np.ones(4), np.ones(4)).error == 0
    assert reliability(np.ones(4), np.zeros(4)).error == 1
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
    assert np.asarray(wrong)[even[400:]].max() < 0.2
    assert np.asarray(wrong)[~even[400:]].min() > 0.8
    reversed_classes = criterion(jnp.asarray(logits[0, 400:, ::-1]), None, 0)[1]
    np.testing.assert_allclose(wrong, reversed_classes, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='was learned on the 3 largest probabilities, this network has 7'):
        criterion(jnp.zeros((2, 7)), None, 0)


def test_impossible_data_and_settings_are_refused():
    logits, labels, key = np.random.default_rng(0).normal(size=(2, 6, 3)), np.arange(6) % 3, jax.random.key(0)
    for fit in (fit_temperatures, lambda *data: fit_learned(*data, key)):
        with pytest.raises(ValueError, match='logits: expected'):
            fit(logits, [0, 1])
        with pytest.raises(ValueError, match='labels: expected classes'):
            fit(logits, labels + 1)
    for name, bad in (('width', 0), ('steps', 0), ('learning_rate', -1.0)):
        with pytest.raises(ValueError, match=f'{name}: got {bad}'):
            fit_learned(logits, labels, key, **{name: bad})
    with pytest.raises(ValueError, match='steps: got -1'):
        fit_temperatures(logits, labels, steps=-1)
    for value in (-np.inf, np.nan):
        logits[1, 2, 0] = value
        with pytest.raises(ValueError, match='logits: got values that are not finite'):
            fit_temperatures(logits, labels)
    with pytest.raises(ValueError, match='confidence: expected'):
        reliability([0.5], [True, False])
