"""Guarantees: p-values against brute force and simulation, procedures against hand-made cases."""

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
)
from branchy_jax.thresholds.guarantees import METHODS, betting, binomial, hoeffding_bentkus, last_passed, losses_along


def table_of(uncertainty):
    """A table of what guarantees read: who leaves under which threshold, and what exits cost."""
    exits, inputs = uncertainty.shape
    costs = StageCosts(stages=np.ones(exits), exits=np.zeros(exits))
    statistics = np.zeros((exits, inputs, 1))
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, criterion=margin, split='calibration')


def binomial_tail(count, most, epsilon):
    return sum(math.comb(count, k) * epsilon**k * (1 - epsilon) ** (count - k) for k in range(most + 1))


@given(count=st.integers(1, 30), wrong=st.integers(0, 30), seed=st.integers(0, 100), epsilon=st.floats(0.01, 0.99))
def test_p_values_by_their_formulas(count, wrong, seed, epsilon):
    wrong = min(wrong, count)
    assert binomial(np.arange(count) < wrong, epsilon) == pytest.approx(binomial_tail(count, wrong, epsilon), rel=1e-9)
    losses = np.random.default_rng(seed).random(count) * 0.5
    mean = losses.mean()
    a = min(mean, epsilon)
    h = (a * math.log(a / epsilon) if a else 0) + (1 - a) * math.log((1 - a) / (1 - epsilon))
    tail = binomial_tail(count, math.ceil(count * mean - 1e-9), epsilon)
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
    with pytest.raises(ValueError, match='labels: expected 4'):
        losses_against_full(logits, [0, 1])
    with pytest.raises(ValueError, match='logits: expected'):
        losses_against_full(right_answers)


def test_losses_bound_the_gap_in_error_rate():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 200, 4)), generator.integers(0, 4, 200)
    right = accuracy_statistics(logits, labels)[..., 0]
    gap = right[-1].mean() - right.mean(axis=1)
    assert (losses_against_full(logits, labels).mean(axis=1) >= gap - 1e-12).all()


def population(count, seed=0):
    """Three exits; the more confident an exit, the rarer it is wrong where the full network is right."""
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
    uncertainty = table.uncertainty.astype(np.float32).T
    for setting, result in zip(path().astype(np.float32), exits, strict=True):
        assert result.tolist() == [next((n for n in range(2) if u[n] < setting[n]), 2) for u in uncertainty]


BIG = population(400_000, seed=99)


def true_risk(thresholds):
    return losses_along(thresholds[None], *BIG)[0].mean()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('starts', [1, 2])
def test_the_guarantee_holds(method, starts):
    epsilon, delta, draws = 0.03, 0.2, 150
    paths = [path(), np.where(np.arange(2) == 0, path(), -np.inf)][:starts]
    broken, certified, risks = 0, 0, {}
    for seed in range(draws):
        result = learn_then_test(paths, *population(400, seed), epsilon=epsilon, delta=delta, method=method)
        key = result.thresholds.tobytes()
        risks.setdefault(key, true_risk(result.thresholds) if result.certified else 0.0)
        broken += risks[key] > epsilon
        certified += result.certified
    assert broken / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)
    assert certified > draws / 2


def test_conformal_risk_control_holds_in_expectation():
    epsilon = 0.05
    guarantees = [conformal_risk_control(path(), *population(200, seed), epsilon=epsilon) for seed in range(60)]
    risks = [true_risk(guarantee.thresholds) for guarantee in guarantees]
    assert np.mean(risks) <= epsilon + 2 * np.std(risks) / math.sqrt(60)
    assert np.mean(risks) > epsilon / 3


def test_many_starts_are_corrected_for():
    """Twelve exits, each a path of its own that loses a little too much: any that passes breaks the guarantee."""
    epsilon, delta, draws, starts = 0.05, 0.3, 300, 12
    never = np.full(starts, -np.inf)
    paths = [np.where(np.arange(starts) == k, np.inf, never)[None] for k in range(starts)]
    table, broken = table_of(np.zeros((starts + 1, 300))), 0
    for seed in range(draws):
        losses = np.random.default_rng(seed).random((starts + 1, 300)) < epsilon * 1.001
        losses[-1] = False
        broken += learn_then_test(paths, table, losses, epsilon=epsilon, delta=delta).certified
    assert broken / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)


def test_the_cheapest_of_the_paths_that_passed_is_by_the_costs_of_the_table():
    """Two exits, each a path of its own that loses nothing: leaving at the second costs more, unless the table says."""
    table, losses = population(400)
    paths = [np.array([[-np.inf, 2.0]]), np.array([[2.0, -np.inf]]), path(5)[:1]]
    result = learn_then_test(paths, table, losses * 0, epsilon=0.05, delta=0.1)
    assert result.exit_fractions.tolist() == [1, 0, 0]
    odd = table.replace(costs=StageCosts(stages=[5, -4, 5], exits=[0, 0, 0]))
    assert learn_then_test(paths, odd, losses * 0, epsilon=0.05, delta=0.1).exit_fractions.tolist() == [0, 1, 0]


def test_the_simulation_runs_the_procedure():
    """`experiments.study.promises` is vectorised; on single draws its results must be the library's."""
    from experiments.study.promises import Population

    table, losses = population(500, seed=3)
    simulated = Population(path(), table, losses, size=200, splits=20)
    for method in METHODS:
        stops = simulated.learn_then_test(method, 0.05, 0.1)
        for drawn, stop in zip(simulated.drawn, stops, strict=True):
            options = {'epsilon': 0.05, 'delta': 0.1, 'method': method}
            assert learn_then_test(path(), table.rows(drawn), losses[:, drawn], **options).index == stop
    for drawn, stop in zip(simulated.drawn, simulated.conformal(0.05), strict=True):
        assert conformal_risk_control(path(), table.rows(drawn), losses[:, drawn], epsilon=0.05).index == stop


def test_guarantees_from_few_and_from_many_inputs():
    table, losses = population(20)
    for result in (
        learn_then_test(path(), table, losses * 0, epsilon=0.01, delta=0.1),
        conformal_risk_control(path(), table, losses * 0, epsilon=0.01),
    ):
        assert not result.certified
        assert np.isneginf(result.thresholds).all()
        assert result.exit_fractions.tolist() == [0, 0, 1]
        assert 'Nothing but the full network' in result.statement
    table, losses = population(400)
    result = learn_then_test(path(), table, losses * 0, epsilon=0.01, delta=0.1)
    assert (result.certified, result.index) == (True, 20)
    np.testing.assert_allclose(result.thresholds, path()[-1])
    assert 'at least 0.9' in result.statement


def test_paths_begin_with_never_and_get_cheaper():
    table, losses = population(500)
    screen = table.replace(statistics=(1 - losses)[..., None]).screen()
    result = screen.path(size=15)
    assert np.isneginf(result[0]).all()
    assert (np.diff(table.evaluate(result).cost) < 1e-9).all()
    assert len(result) <= 16
    with pytest.raises(ValueError, match='size: got 0'):
        screen.path(size=0)


def test_a_guarantee_is_of_a_policy_of_the_tables_criterion():
    table, losses = population(400)
    for result in (
        learn_then_test(path(), table, losses, epsilon=0.05, delta=0.1),
        learn_then_test(path(), table, losses, epsilon=1e-4, delta=0.1),
        conformal_risk_control(path(), table, losses, epsilon=0.05),
    ):
        assert result.policy.criterion == margin
        np.testing.assert_array_equal(result.thresholds, result.policy.thresholds)
        np.testing.assert_allclose(table.evaluate(result).exit_fractions[0], result.exit_fractions)


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
        ({'losses': np.array([[0.5], [0], [0]]).repeat(50, 1)}, 'losses: the exact binomial'),
        ({'path': np.zeros((4, 3))}, 'path: expected'),
        ({'path': np.array([[np.nan, 0.0]])}, 'path: expected'),
    ],
)
def test_impossible_requests_are_refused(changes, message):
    table, losses = population(50)
    options = {'path': path(), 'losses': losses, 'epsilon': 0.1, 'delta': 0.1, **changes}
    along, losses, delta = options.pop('path'), options.pop('losses'), options.pop('delta')
    for paths in (along, [path(), along]):
        with pytest.raises(ValueError, match=message):
            learn_then_test(paths, table, losses, delta=delta, **options)
    if not {'delta', 'method'} & set(changes) and 'binomial' not in message:
        with pytest.raises(ValueError, match=message):
            conformal_risk_control(along, table, losses, epsilon=options['epsilon'])
    with pytest.raises(ValueError, match='paths: got none'):
        learn_then_test([], *population(50), epsilon=0.1, delta=0.1)
