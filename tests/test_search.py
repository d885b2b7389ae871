import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchy_jax.costs import StageCosts, expected_cost
from branchy_jax.criteria import entropy
from branchy_jax.thresholds import ExitTable, confusion, quantile_grid

COSTS = StageCosts(stages=[1, 4, 5], exits=[1, 1, 0])


def table_of(uncertainty, statistics=None, split='validation'):
    statistics = np.ones((*np.shape(uncertainty), 1)) if statistics is None else statistics
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=COSTS, criterion=entropy, split=split)


@given(
    weights=st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda found: sum(found) > 0.1),
    seed=st.integers(0, 100),
)
def test_shares_are_forced(weights, seed):
    shares = np.array(weights) / sum(weights)
    uncertainty = np.random.default_rng(seed).random((3, 200))
    first, second = table_of(uncertainty).for_shares(shares).thresholds
    leaves = np.where(uncertainty[0] < first, 0, np.where(uncertainty[1] < second, 1, 2))
    np.testing.assert_allclose(np.bincount(leaves, minlength=3) / 200, shares, atol=1 / 200 + 1e-9)


def test_nobody_and_everybody_are_infinite_thresholds():
    uncertainty = np.random.default_rng(0).random((3, 10))
    table = table_of(uncertainty)
    assert table.for_shares([0, 0, 1]).thresholds.tolist() == [-np.inf, -np.inf]
    assert table.for_shares([1, 0, 0]).thresholds.tolist()[0] == np.inf
    assert table.for_shares([0, 1, 0]).thresholds.tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize('odd', [np.nan, np.inf])
def test_shares_of_inputs_that_never_leave_are_no_nan(odd):
    uncertainty = np.array([[0.1, 0.2, odd, odd], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert table_of(uncertainty).for_shares([0.5, 0.5, 0.0]).thresholds.tolist() == [np.inf, np.inf]
    assert table_of(uncertainty).for_shares([0.75, 0.25, 0.0]).thresholds.tolist() == [np.inf, np.inf]


def test_neighbouring_numbers_are_told_apart():
    """Between two floats that follow each other there is no third: the threshold is the upper one, not the lower."""
    low = np.float32(0.5)
    for start in (low, np.nextafter(low, np.float32(1))):
        above = np.nextafter(start, np.float32(1))
        uncertainty = np.array([[start, above], [0, 0], [0, 0]], np.float32)
        table = table_of(uncertainty)
        assert table.answering_exits(table.for_shares([0.5, 0.5, 0])).tolist() == [0, 1]
        assert above in quantile_grid(uncertainty)[0]


@pytest.mark.parametrize('shares', [[0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.2, 0.2], [np.nan, 0.5, 0.5]])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match='shares: got'):
        table_of(np.zeros((3, 4))).for_shares(shares)


def outputs(count, seed=0):
    """Uncertain exits are wrong more often, later exits less."""
    generator = np.random.default_rng(seed)
    uncertainty = generator.random((3, count))
    right = generator.random((3, count)) > uncertainty * np.array([[0.8], [0.5], [0.2]])
    return uncertainty, right[..., None].astype(float)


@given(share=st.floats(0, 1), seed=st.integers(0, 20))
def test_budgets_are_met(share, seed):
    uncertainty, _ = outputs(1000, seed)
    budget = 2 + share * (12 - 2)
    table = table_of(uncertainty)
    found = table.evaluate(table.for_budget(budget))
    assert found.cost[0] == pytest.approx(budget, abs=0.02)


def test_budget_shares_are_geometric():
    table = table_of(*outputs(100_000))
    fractions = table.evaluate(table.for_budget(6.0)).exit_fractions[0]
    assert fractions[1] / fractions[0] == pytest.approx(fractions[2] / fractions[1], rel=1e-2)


@pytest.mark.parametrize('budget', [1.9, 12.1])
def test_budgets_out_of_reach_are_refused(budget):
    with pytest.raises(ValueError, match='budget: got'):
        table_of(np.zeros((3, 4))).for_budget(budget)


def brute_force(uncertainty, statistics, at_most, grid):
    best = (-1.0, 0.0)
    for setting in itertools.product(*grid.astype(np.float32)):
        right = total = 0.0
        for b in range(uncertainty.shape[1]):
            n = next((n for n in range(2) if np.float32(uncertainty[n, b]) < setting[n]), 2)
            right += statistics[n, b, 0]
            total += COSTS.to_exit[n]
        if total / uncertainty.shape[1] <= at_most * (1 + 1e-9):
            best = max(best, (right / uncertainty.shape[1], -total / uncertainty.shape[1]))
    return best


@given(seed=st.integers(0, 1000), at_most=st.floats(3, 12))
def test_exact_is_brute_force(seed, at_most):
    uncertainty, statistics = outputs(12, seed)
    grid = quantile_grid(uncertainty, size=6)
    point = table_of(uncertainty, statistics).exact(at_most, grid)
    assert (point.accuracy, -point.cost) == pytest.approx(brute_force(uncertainty, statistics, at_most, grid))


@given(seed=st.integers(0, 1000), at_most=st.floats(3, 12))
def test_exact_is_never_worse_than_any_other_search(seed, at_most):
    uncertainty, statistics = outputs(80, seed)
    grid = quantile_grid(uncertainty, size=12)
    table = table_of(uncertainty, statistics)
    point, greedy = table.exact(at_most, grid), table.coordinate_descent(at_most, grid)
    assert point.accuracy >= greedy.accuracy
    assert greedy.cost <= at_most * (1 + 1e-9)
    # Greedy is a setting that no single threshold improves.
    for n, value in itertools.product(range(2), range(grid.shape[1])):
        changed = greedy.thresholds.copy()
        changed[n] = grid[n, value]
        other = table.evaluate(changed[None])
        assert other.cost[0] > at_most * (1 + 1e-9) or other.accuracy[0] <= greedy.accuracy + 1e-12


def test_a_search_says_what_can_be_had():
    table = table_of(*outputs(20))
    for search in (table.exact, table.coordinate_descent):
        with pytest.raises(ValueError, match='at_most: no thresholds cost 1.0 or less; the cheapest cost 2'):
            search(1.0)


def test_anytime_is_each_exit_alone():
    uncertainty, statistics = outputs(500)
    found = table_of(uncertainty, statistics).anytime()
    assert found.cost.tolist() == [2, 7, 12]
    np.testing.assert_allclose(found.accuracy, statistics[..., 0].mean(axis=1))
    assert found.thresholds.tolist() == [[np.inf, -np.inf], [-np.inf, np.inf], [-np.inf, -np.inf]]


def test_budgeted_takes_thresholds_from_other_data():
    first, second = table_of(*outputs(2000, 1)), table_of(*outputs(2000, 2), split='test')
    found = second.budgeted(first, [3.0, 6.0, 11.0])
    np.testing.assert_allclose(found.cost, [3, 6, 11], atol=0.5)
    np.testing.assert_array_equal(found.thresholds[1], first.for_budget(6.0).thresholds)
    assert found.split == 'test'
    assert expected_cost(COSTS, [1, 0, 0]) == 2
    assert len(second.budgeted(first)) == 20
    # Budgets are in the unit of the table that is reported on.
    in_other_units = first.replace(costs=StageCosts(stages=[1e6, 4e6, 5e6], exits=[1e6, 1e6, 0]))
    np.testing.assert_array_equal(second.budgeted(in_other_units, [6.0]).thresholds, found.thresholds[1:2])


def test_confusion_counts_every_input_once():
    generator = np.random.default_rng(0)
    labels, answers, exits = generator.integers(0, 4, (3, 100))
    found = confusion(labels, answers, exits % 3, num_exits=3, num_classes=4)
    assert found.sum() == 100
    for b in range(100):
        found[exits[b] % 3, labels[b], answers[b]] -= 1
    assert not found.any()
