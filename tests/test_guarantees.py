"""Promises, kept: p-values against brute force and simulation, procedures against hand-made cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import margin
from branchy_jax.thresholds import (
    ExitTable,
    accuracy_statistics,
    conformal_risk_control,
    learn_then_test,
    losses_against_full,
    losses_along,
    threshold_path,
)
from branchy_jax.thresholds.guarantees import METHODS, betting, binomial, hoeffding_bentkus, last_passed


def table_of(uncertainty):
    """A table of what guarantees look at: who leaves under which threshold, and what exits cost."""
    exits, inputs = uncertainty.shape
    costs = StageCosts(stages=np.ones(exits), exits=np.zeros(exits))
    statistics = np.zeros((exits, inputs, 1))
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, criterion=margin, split='calibration')


@given(count=st.integers(1, 30), wrong=st.integers(0, 30), epsilon=st.floats(0.01, 0.99))
def test_binomial_p_value_is_the_sum_of_probabilities(count, wrong, epsilon):
    wrong = min(wrong, count)
    losses = np.arange(count) < wrong
    expected = sum(math.comb(count, k) * epsilon**k * (1 - epsilon) ** (count - k) for k in range(wrong + 1))
    assert binomial(losses, epsilon) == pytest.approx(expected, rel=1e-9)


@given(count=st.integers(1, 30), seed=st.integers(0, 100), epsilon=st.floats(0.01, 0.99))
def test_hoeffding_bentkus_by_its_formula(count, seed, epsilon):
    losses = np.random.default_rng(seed).random(count) * 0.5
    mean = losses.mean()
    a = min(mean, epsilon)
    h = (a * math.log(a / epsilon) if a else 0) + (1 - a) * math.log((1 - a) / (1 - epsilon))
    up = math.ceil(count * mean - 1e-9)
    tail = sum(math.comb(count, k) * epsilon**k * (1 - epsilon) ** (count - k) for k in range(up + 1))
    assert hoeffding_bentkus(losses, epsilon) == pytest.approx(min(1, math.exp(-count * h), math.e * tail))


def test_betting_by_a_slow_loop():
    losses, epsilon, delta = np.random.default_rng(0).random(40) * 0.3, 0.25, 0.05
    wealth, best, total, squares = 1.0, 1.0, 0.0, 0.0
    variance = 0.25
    for i, loss in enumerate(losses, start=1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)))
        wealth *= 1 - bet * (loss - epsilon)
        best = max(best, wealth)
        total += loss
        squares += (loss - (0.5 + total) / (1 + i)) ** 2
        variance = (0.25 + squares) / (1 + i)
    assert betting(losses, epsilon, delta=delta) == pytest.approx(1 / best, rel=1e-9)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('delta', [0.05, 0.2])
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(method, delta):
    """Where the risk is exactly epsilon, p ≤ delta happens at most with probability delta: 20,000 draws."""
    epsilon = 0.1
    losses = (np.random.default_rng(1).random((20_000, 80)) < epsilon).astype(float)
    refuted = (METHODS[method](losses, epsilon) <= delta).mean()
    assert refuted <= delta + 2 * math.sqrt(delta * (1 - delta) / 20_000)
    assert (METHODS[method](losses * 0, epsilon) <= 0.05).all()  # and they have power


def test_binomial_refuses_losses_between_zero_and_one():
    with pytest.raises(ValueError, match='losses: the exact binomial'):
        binomial(np.array([0.5]), 0.1)


def test_a_fixed_sequence_returns_the_last_that_passed():
    assert last_passed([True, True, False, True, True]) == 1  # not 2, the first that failed; not 4, behind a failure
    assert last_passed([False, True]) == -1
    assert last_passed([True, True]) == 1


def test_losses_by_hand():
    right_answers = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])  # two exits, four inputs
    logits = np.eye(2)[right_answers]
    labels = [0, 0, 0, 0]
    # Early wrong and full right: input 1. Both wrong: input 2. Early right, full wrong: input 3 loses nothing.
    assert losses_against_full(logits, labels).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert losses_against_full(logits).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]


def population(count, seed=0):
    """Three exits; the surer an exit, the rarer it is wrong where the full network is right."""
    generator = np.random.default_rng(seed)
    uncertainty = generator.random((3, count))
    losses = (generator.random((3, count)) < uncertainty * np.array([[0.3], [0.15], [0.0]])).astype(float)
    return table_of(uncertainty), losses


def path(size=20):
    """From never leaving to leaving most."""
    return np.concatenate([[[-np.inf, -np.inf]], np.repeat(np.linspace(0, 1.01, size)[:, None], 2, axis=1)])


def test_no_label_reaches_an_exit_decision():
    table, losses = population(100)
    _, exits = losses_along(path(), table, losses)
    _, with_others = losses_along(path(), table, 1 - losses)
    np.testing.assert_array_equal(exits, with_others)
    expected = [
        [next((n for n in range(2) if u[n] < t[n]), 2) for u in table.uncertainty.astype(np.float32).T]
        for t in path().astype(np.float32)
    ]
    np.testing.assert_array_equal(exits, expected)


BIG = population(400_000, seed=99)


def true_risk(thresholds):
    on_path, _ = losses_along(thresholds[None], *BIG)
    return on_path.mean()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('starts', [1, 2])
def test_the_promise_is_kept(method, starts):
    epsilon, delta, draws = 0.03, 0.2, 150
    paths = [path(), np.where(np.arange(2) == 0, path(), -np.inf)][:starts]
    broken, promised = 0, 0
    risks = {}
    for seed in range(draws):
        found = learn_then_test(paths, *population(400, seed), epsilon=epsilon, delta=delta, method=method)
        key = found.thresholds.tobytes()
        risks.setdefault(key, true_risk(found.thresholds) if found.promised else 0.0)
        broken += risks[key] > epsilon
        promised += found.promised
    assert broken / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)
    assert promised > draws / 2


def test_many_starts_are_corrected_for():
    """Twelve exits, each a path of its own that loses a little too much: any that passes breaks the promise."""
    epsilon, delta, draws, starts = 0.05, 0.3, 300, 12
    never = np.full(starts, -np.inf)
    paths = [np.where(np.arange(starts) == k, np.inf, never)[None] for k in range(starts)]
    table, broken = table_of(np.zeros((starts + 1, 300))), 0
    for seed in range(draws):
        losses = np.random.default_rng(seed).random((starts + 1, 300)) < epsilon * 1.001
        losses[-1] = False
        found = learn_then_test(paths, table, losses, epsilon=epsilon, delta=delta)
        broken += found.promised
    assert broken / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)


def test_paths_may_differ_in_length_and_must_be_there():
    table, losses = population(400)
    found = learn_then_test([path(20), path(5)], table, losses * 0, epsilon=0.05, delta=0.1)
    assert found.promised
    with pytest.raises(ValueError, match='paths: got none'):
        learn_then_test([], table, losses, epsilon=0.05, delta=0.1)


def test_the_cheapest_of_the_paths_that_passed_is_by_the_costs_of_the_table():
    """Two exits, each a path of its own that loses nothing: leaving at the second is dearer, however costs are told."""
    table, losses = population(400)
    paths = [np.array([[-np.inf, 2.0]]), np.array([[2.0, -np.inf]])]
    found = learn_then_test(paths, table, losses * 0, epsilon=0.05, delta=0.1)
    assert found.exit_fractions.tolist() == [1, 0, 0]
    odd = table.replace(costs=StageCosts(stages=[5, -4, 5], exits=[0, 0, 0]))
    assert learn_then_test(paths, odd, losses * 0, epsilon=0.05, delta=0.1).exit_fractions.tolist() == [0, 1, 0]


def test_the_simulation_runs_the_procedure():
    """`experiments.promises` vectorises; on single draws it must do what the library does."""
    from experiments.study.promises import Population

    table, losses = population(500, seed=3)
    simulated = Population(path(), table, losses, size=200, splits=20)
    for method in METHODS:
        stops = simulated.learn_then_test(method, 0.05, 0.1)
        for drawn, stop in zip(simulated.drawn, stops, strict=True):
            found = learn_then_test(path(), table.rows(drawn), losses[:, drawn], epsilon=0.05, delta=0.1, method=method)
            assert found.index == stop
    for drawn, stop in zip(simulated.drawn, simulated.conformal(0.05), strict=True):
        assert conformal_risk_control(path(), table.rows(drawn), losses[:, drawn], epsilon=0.05).index == stop


def test_conformal_risk_control_holds_in_expectation():
    epsilon = 0.05
    risks = [
        true_risk(conformal_risk_control(path(), *population(200, s), epsilon=epsilon).thresholds) for s in range(60)
    ]
    assert np.mean(risks) <= epsilon + 2 * np.std(risks) / math.sqrt(60)
    assert np.mean(risks) > epsilon / 3


def test_nothing_is_promised_from_too_few_inputs():
    table, losses = population(20)
    for found in (
        learn_then_test(path(), table, losses * 0, epsilon=0.01, delta=0.1),
        conformal_risk_control(path(), table, losses * 0, epsilon=0.01),
    ):
        assert not found.promised
        assert np.isneginf(found.thresholds).all()
        assert found.exit_fractions.tolist() == [0, 0, 1]
        assert 'Nothing but the full network' in found.statement


def test_enough_harmless_inputs_are_promised_to_the_end_of_the_path():
    table, losses = population(400)
    found = learn_then_test(path(), table, losses * 0, epsilon=0.01, delta=0.1)
    assert found.promised
    assert found.index == 20
    np.testing.assert_allclose(found.thresholds, path()[-1])
    assert 'at least 0.9' in found.statement


def test_paths_begin_with_never_and_get_cheaper():
    table, losses = population(500)
    kept = table.replace(statistics=(1 - losses)[..., None])
    found = threshold_path(kept.screen(), size=15)
    assert np.isneginf(found[0]).all()
    _, exits = losses_along(found, table, losses)
    cost = (exits + 1).mean(axis=1)
    assert (np.diff(cost) < 1e-9).all()
    assert len(found) <= 16
    with pytest.raises(ValueError, match='size: got 0'):
        threshold_path(kept.screen(), size=0)


def test_a_promise_is_of_a_policy_of_the_tables_criterion():
    table, losses = population(400)
    for found in (
        learn_then_test(path(), table, losses, epsilon=0.05, delta=0.1),
        learn_then_test(path(), table, losses, epsilon=1e-4, delta=0.1),
        conformal_risk_control(path(), table, losses, epsilon=0.05),
    ):
        assert found.policy.criterion == margin
        np.testing.assert_array_equal(found.thresholds, found.policy.thresholds)
        np.testing.assert_allclose(table.evaluate(found).exit_fractions[0], found.exit_fractions)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'epsilon': 0.0}, 'epsilon and delta'),
        ({'delta': 1.0}, 'epsilon and delta'),
        ({'method': 'luck'}, 'method: got'),
        ({'losses': np.full((3, 50), 2.0)}, 'losses: got'),
        ({'losses': np.zeros((2, 50))}, 'losses: expected'),
        ({'losses': np.ones((3, 50))}, 'losses: the last row'),
        ({'losses': np.full((3, 50), np.nan)}, 'losses: got'),
        ({'paths': np.zeros((4, 3))}, 'paths: expected'),
        ({'paths': np.array([[np.nan, 0.0]])}, 'paths: got NaN'),
        ({'paths': [path(), np.array([[np.nan, 0.0]])]}, 'paths: got NaN'),
    ],
)
def test_impossible_requests_are_refused(changes, message):
    table, losses = population(50)
    options = {'paths': path(), 'table': table, 'losses': losses, 'epsilon': 0.1, 'delta': 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        learn_then_test(**options)


def test_a_path_with_nan_is_refused_everywhere():
    """Its NaN never lets anyone leave: the promise would be of a setting that nobody meant."""
    table, losses = population(50)
    odd = np.concatenate([path(), [[np.nan, 0.5]]])
    with pytest.raises(ValueError, match='path: got NaN'):
        conformal_risk_control(odd, table, losses, epsilon=0.1)
    with pytest.raises(ValueError, match='path: got NaN'):
        losses_along(odd, table, losses)


def test_losses_need_logits_and_labels_that_fit():
    with pytest.raises(ValueError, match='labels: expected 3'):
        losses_against_full(np.zeros((2, 3, 4)), [0, 1])
    with pytest.raises(ValueError, match='logits: expected'):
        losses_against_full(np.zeros((2, 3)))


def test_statistics_and_losses_agree():
    """The loss bounds the gap in error rate from above."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 200, 4)), generator.integers(0, 4, 200)
    right = accuracy_statistics(logits, labels)[..., 0]
    gap = right[-1].mean() - right.mean(axis=1)
    assert (losses_against_full(logits, labels).mean(axis=1) >= gap - 1e-12).all()
