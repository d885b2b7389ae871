"""Searches on a table against brute force, and the protocols of the literature by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import entropy
from branchy_jax.thresholds import ExitTable
from branchy_jax.thresholds.statistics import confusion

COSTS = StageCosts(stages=[1, 4, 5], exits=[1, 1, 0])


def table_of(uncertainty, statistics=None, split='validation'):
    statistics = np.ones((*np.shape(uncertainty), 1)) if statistics is None else statistics
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=COSTS, criterion=entropy, split=split)


def outputs(count, seed=0):
    """Uncertain exits are wrong more often, later exits less."""
    generator = np.random.default_rng(seed)
    uncertainty = generator.random((3, count))
    right = generator.random((3, count)) > uncertainty * np.array([[0.8], [0.5], [0.2]])
    return uncertainty, right[..., None].astype(float)


@given(
    weights=st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda result: sum(result) > 0.1),
    seed=st.integers(0, 100),
)
def test_inputs_leave_in_the_shares_asked(weights, seed):
    shares = np.array(weights) / sum(weights)
    uncertainty = np.random.default_rng(seed).random((3, 200))
    first, second = table_of(uncertainty).for_shares(shares).thresholds
    leaves = np.where(uncertainty[0] < first, 0, np.where(uncertainty[1] < second, 1, 2))
    np.testing.assert_allclose(np.bincount(leaves, minlength=3) / 200, shares, atol=1 / 200 + 1e-9)


def test_shares_at_the_ends():
    table = table_of(np.random.default_rng(0).random((3, 10)))
    assert table.for_shares([0, 0, 1]).thresholds.tolist() == [-np.inf, -np.inf]
    assert table.for_shares([1, 0, 0]).thresholds.tolist()[0] == np.inf
    assert table.for_shares([0, 1, 0]).thresholds.tolist() == [-np.inf, np.inf]
    for odd in (np.nan, np.inf):  # inputs that never leave
        table = table_of(np.array([[0.1, 0.2, odd, odd], [0.0] * 4, [0.0] * 4]))
        for shares in ([0.5, 0.5, 0.0], [0.75, 0.25, 0.0]):
            assert table.for_shares(shares).thresholds.tolist() == [np.inf, np.inf]
    for bad in ([0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.2, 0.2], [np.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match='shares: got'):
            table.for_shares(bad)


def test_neighbouring_numbers_are_separated():
    """Between two floats that follow each other there is no third: the threshold is the upper one, not the lower."""
    low = np.float32(0.5)
    for start in (low, np.nextafter(low, np.float32(1))):
        above = np.nextafter(start, np.float32(1))
        table = table_of(np.array([[start, above], [0, 0], [0, 0]], np.float32))
        assert table.answering_exits(table.for_shares([0.5, 0.5, 0])).tolist() == [0, 1]
        assert above in table.screen(3).thresholds


@given(share=st.floats(0, 1), seed=st.integers(0, 20))
def test_budgets_are_met(share, seed):
    budget, table = 2 + share * (12 - 2), table_of(*outputs(1000, seed))
    assert table.evaluate(table.for_budget(budget)).cost[0] == pytest.approx(budget, abs=0.02)


def test_budget_shares_are_geometric():
    table = table_of(*outputs(100_000))
    fractions = table.evaluate(table.for_budget(6.0)).exit_fractions[0]
    assert fractions[1] / fractions[0] == pytest.approx(fractions[2] / fractions[1], rel=1e-2)


def brute_force(uncertainty, statistics, at_most, settings):
    best = (-1.0, 0.0)
    for setting in settings:
        right = total = 0.0
        for b in range(uncertainty.shape[1]):
            n = next((n for n in range(2) if np.float32(uncertainty[n, b]) < setting[n]), 2)
            right += statistics[n, b, 0]
            total += COSTS.to_exit[n]
        if total / uncertainty.shape[1] <= at_most * (1 + 1e-9):
            best = max(best, (right / uncertainty.shape[1], -total / uncertainty.shape[1]))
    return best


@given(seed=st.integers(0, 1000), at_most=st.floats(3, 12))
def test_the_best_of_a_screen_is_brute_force(seed, at_most):
    uncertainty, statistics = outputs(12, seed)
    screen = table_of(uncertainty, statistics).screen(6)
    point = screen.for_cost(at_most)
    expected = brute_force(uncertainty, statistics, at_most, screen.thresholds)
    assert (point.accuracy, -point.cost) == pytest.approx(expected)


@given(seed=st.integers(0, 1000), at_most=st.floats(3, 12))
def test_coordinate_descent_ends_where_no_single_threshold_improves(seed, at_most):
    table = table_of(*outputs(80, seed))
    screen, greedy = table.screen(12), table.coordinate_descent(at_most, 12)
    assert screen.for_cost(at_most).accuracy >= greedy.accuracy
    assert greedy.cost <= at_most * (1 + 1e-9)
    for n, candidates in enumerate(screen.thresholds.T):
        for value in np.unique(candidates):
            changed = greedy.thresholds.copy()
            changed[n] = value
            other = table.evaluate(changed[None])
            assert other.cost[0] > at_most * (1 + 1e-9) or other.accuracy[0] <= greedy.accuracy + 1e-12


def test_costs_out_of_reach_are_refused():
    table = table_of(*outputs(20))
    for search in (table.screen(5).for_cost, table.coordinate_descent):
        with pytest.raises(ValueError, match='at_most: no thresholds cost 1.0 or less; the cheapest cost 2'):
            search(1.0)
    for budget in (1.9, 12.1):
        with pytest.raises(ValueError, match='budget: got'):
            table.for_budget(budget)


def test_anytime_is_each_exit_alone():
    uncertainty, statistics = outputs(500)
    result = table_of(uncertainty, statistics).anytime()
    assert result.cost.tolist() == [2, 7, 12]
    np.testing.assert_allclose(result.accuracy, statistics[..., 0].mean(axis=1))
    assert result.thresholds.tolist() == [[np.inf, -np.inf], [-np.inf, np.inf], [-np.inf, -np.inf]]


def test_budgeted_takes_thresholds_from_other_data():
    first, second = table_of(*outputs(2000, 1)), table_of(*outputs(2000, 2), split='test')
    result = second.budgeted(first, [3.0, 6.0, 11.0])
    np.testing.assert_allclose(result.cost, [3, 6, 11], atol=0.5)
    np.testing.assert_array_equal(result.thresholds[1], first.for_budget(6.0).thresholds)
    assert (result.split, len(second.budgeted(first))) == ('test', 20)
    # Budgets are in the unit of the table that is reported on.
    in_other_units = first.replace(costs=StageCosts(stages=[1e6, 4e6, 5e6], exits=[1e6, 1e6, 0]))
    np.testing.assert_array_equal(second.budgeted(in_other_units, [6.0]).thresholds, result.thresholds[1:2])


def test_confusion_counts_every_input_once():
    labels, answers, exits = np.random.default_rng(0).integers(0, 3, (3, 100))
    result = confusion(labels, answers, exits, num_exits=3, num_classes=3)
    for n, label, answer in itertools.product(range(3), repeat=3):
        assert result[n, label, answer] == ((exits == n) & (labels == label) & (answers == answer)).sum()
    with pytest.raises(ValueError, match=r'labels: expected numbers in \[0, 2\)'):
        confusion([0, -1], [0, 0], [0, 0], num_exits=1, num_classes=2)
    with pytest.raises(ValueError, match='exits: expected one per input'):
        confusion([0, 1], [0, 0], [0], num_exits=1, num_classes=2)
