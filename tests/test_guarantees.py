"""Guarantees: p-values against brute force and simulation, procedures against hand-made cases."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import margin
from branchy_jax.thresholds import ExitTable, conformal_risk_control, learn_then_test, losses_against_full
from branchy_jax.thresholds.guarantees import METHODS, betting, binomial, hoeffding_bentkus, losses_along


def binomial_tail(count, most, epsilon):
    return sum(math.comb(count, k) * epsilon**k * (1 - epsilon) ** (count - k) for k in range(most + 1))


@given(count=st.integers(1, 30), wrong=st.integers(0, 30), seed=st.integers(0, 100), epsilon=st.floats(0.01, 0.99))
def test_p_values_by_their_formulas(count, wrong, seed, epsilon):
    wrong = min(wrong, count)
    assert binomial(np.arange(count) < wrong, epsilon) == pytest.approx(binomial_tail(count, wrong, epsilon), rel=1e-9)
    losses = np.random.default_rng(seed).random(count) * 0.5
    a = min(losses.mean(), epsilon)
    h = (a * math.log(a / epsilon) if a else 0) + (1 - a) * math.log((1 - a) / (1 - epsilon))
    tail = binomial_tail(count, math.ceil(count * losses.mean() - 1e-9), epsilon)
    assert hoeffding_bentkus(losses, epsilon) == pytest.approx(min(1, math.exp(-count * h), math.e * tail))


def test_betting_by_a_slow_loop():
    losses, epsilon, delta = np.random.default_rng(0).random(40) * 0.3, 0.25, 0.05
    wealth, best, total, squares, variance = 1.0, 1.0, 0.0, 0.0, 0.25
    for i, loss in enumerate(losses, start=1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)))
        wealth *= 1 - bet * (loss - epsilon)
        best = max(best, wealth)
        total += loss
        squares += (loss - (0.5 + total) / (1 + i)) ** 2
        variance = (0.25 + squares) / (1 + i)
    assert betting(losses, epsilon, delta=delta) == pytest.approx(1 / best, rel=1e-9)


def test_losses_by_hand():
    right_answers = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])  # two exits, four inputs
    logits = np.eye(2)[right_answers]
    # Early wrong and full right: input 1. Both wrong: input 2. Early right, full wrong: input 3 loses nothing.
    assert losses_against_full(logits, [0, 0, 0, 0]).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert losses_against_full(logits).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    for bad, message in (((logits, [0, 1]), 'labels: expected 4'), ((right_answers,), 'logits: expected')):
        with pytest.raises(ValueError, match=message):
            losses_against_full(*bad)


def table_of(uncertainty):
    """A table of what guarantees read: who leaves under which threshold, and what exits cost."""
    exits, inputs = uncertainty.shape
    costs, statistics = StageCosts(stages=np.ones(exits), exits=np.zeros(exits)), np.zeros((exits, inputs, 1))
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, criterion=margin, split='calibration')


def population(count, seed=0):
    """Three exits; the more confident an exit, the rarer it is wrong where the full network is right."""
    generator = np.random.default_rng(seed)
    uncertainty = generator.random((3, count))
    losses = (generator.random((3, count)) < uncertainty * np.array([[0.3], [0.15], [0.0]])).astype(float)
    return table_of(uncertainty), losses


# From never leaving to leaving most.
PATH = np.concatenate([[[-np.inf, -np.inf]], np.repeat(np.linspace(0, 1.01, 20)[:, None], 2, axis=1)])
TESTED = functools.partial(learn_then_test, PATH, epsilon=0.05, delta=0.1)
CONFORMAL = functools.partial(conformal_risk_control, PATH, epsilon=0.05)


@functools.cache
def true_risk(*thresholds):
    return losses_along(np.array([thresholds]), *population(400_000, seed=99))[0].mean()


@pytest.mark.parametrize('method', METHODS)
def test_the_guarantee_holds(method):
    epsilon, delta, draws = 0.03, 0.2, 150
    paths = [PATH, np.where(np.arange(2) == 0, PATH, -np.inf)]
    options = {'epsilon': epsilon, 'delta': delta, 'method': method}
    results = [learn_then_test(paths, *population(400, seed), **options) for seed in range(draws)]
    broken = [result.certified and true_risk(*result.thresholds) > epsilon for result in results]
    assert np.mean(broken) <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)
    assert np.mean([result.certified for result in results]) > 0.5


def test_conformal_risk_control_holds_in_expectation():
    risks = [true_risk(*CONFORMAL(*population(200, seed)).thresholds) for seed in range(60)]
    assert 0.05 / 3 < np.mean(risks) <= 0.05 + 2 * np.std(risks) / math.sqrt(60)


def test_many_starts_are_corrected_for():
    """Twelve exits, each a path of its own that loses a little too much: any that passes breaks the guarantee."""
    epsilon, delta, draws, starts = 0.05, 0.3, 300, 12
    paths = np.where(np.eye(starts, dtype=bool), np.inf, -np.inf)[:, None]
    table, broken = table_of(np.zeros((starts + 1, 300))), 0
    for seed in range(draws):
        losses = np.random.default_rng(seed).random((starts + 1, 300)) < epsilon * 1.001
        losses[-1] = False
        broken += learn_then_test(paths, table, losses, epsilon=epsilon, delta=delta).certified
    assert broken / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)


def test_the_cheapest_of_the_paths_that_passed_is_by_the_costs_of_the_table():
    """Two exits, each a path of its own that loses nothing: leaving at the second costs more, unless the table says."""
    table, losses = population(400)
    paths = [np.array([[-np.inf, 2.0]]), np.array([[2.0, -np.inf]]), PATH[:1]]
    odd = table.replace(costs=StageCosts(stages=[5, -4, 5], exits=[0, 0, 0]))
    for costed, fractions in ((table, [1, 0, 0]), (odd, [0, 1, 0])):
        result = learn_then_test(paths, costed, losses * 0, epsilon=0.05, delta=0.1)
        assert result.exit_fractions.tolist() == fractions


def test_the_simulation_runs_the_procedure():
    """`experiments.study.guarantees` is vectorised; on single draws its results must be the library's."""
    from experiments.study.guarantees import Population

    table, losses = population(500, seed=3)
    simulated = Population(PATH, table, losses, size=200, splits=20)
    stops = {method: simulated.learn_then_test(method, 0.05, 0.1) for method in METHODS}
    for n, drawn in enumerate(simulated.drawn):
        given = table.rows(drawn), losses[:, drawn]
        assert CONFORMAL(*given).index == simulated.conformal(0.05)[n]
        for method in METHODS:
            assert TESTED(*given, method=method).index == stops[method][n]


def test_guarantees_from_few_and_from_many_inputs():
    table, losses = population(400)
    for procedure in (TESTED, CONFORMAL):
        few = procedure(table.rows(slice(20)), losses[:, :20], epsilon=0.01)
        assert (few.certified, few.thresholds.tolist()) == (False, [-np.inf] * 2)
        assert few.exit_fractions.tolist() == [0, 0, 1]
        assert 'Nothing but the full network' in few.statement
        many = procedure(table, losses)
        assert (many.certified, many.policy.criterion) == (True, margin)
        np.testing.assert_allclose(table.evaluate(many).exit_fractions[0], many.exit_fractions)
    result = TESTED(table, losses * 0)
    assert (result.index, result.thresholds.tolist()) == (20, np.float32(PATH[-1]).tolist())
    assert 'at least 0.9' in result.statement
    # A fixed sequence ends at the first setting that fails: index 1, not 3, although setting 3 alone would pass.
    path, wrong = np.array([[-np.inf] * 2, [0.0, np.inf], [np.inf] * 2, [0.0, np.inf]]), np.zeros((3, 400))
    wrong[0] = 1
    assert learn_then_test(path, table, wrong, epsilon=0.05, delta=0.1).index == 1


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
        ({'losses': np.array([[0.5], [0], [0]]).repeat(50, 1), 'method': 'binomial'}, 'losses: the exact binomial'),
        ({'paths': np.zeros((4, 3))}, 'path: expected'),
        ({'paths': np.array([[np.nan, 0.0]])}, 'path: expected'),
        ({'paths': [PATH, np.zeros((4, 3))]}, 'path: expected'),
        ({'paths': []}, 'paths: got none'),
    ],
)
def test_bad_requests_are_refused(changes, message):
    table, losses = population(50)
    options = {'paths': PATH, 'losses': losses, 'epsilon': 0.1, 'delta': 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        learn_then_test(table=table, **options)
    if not {'delta', 'method'} & set(changes) and not isinstance(options['paths'], list):
        with pytest.raises(ValueError, match=message):
            conformal_risk_control(options['paths'], table, options['losses'], epsilon=options['epsilon'])
