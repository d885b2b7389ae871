"""Searching thresholds: given shares, a given budget, greedily, or exactly over a grid."""

from __future__ import annotations

import numpy as np
from scipy import optimize

from branchy_jax.costs import StageCosts, expected_cost
from branchy_jax.thresholds.choice import for_cost
from branchy_jax.thresholds.screening import evaluate, grid_size, quantile_grid, screen
from branchy_jax.thresholds.statistics import Metric, mean_of_statistic
from branchy_jax.types import Array, OperatingPoint


def for_shares(uncertainty: Array, shares: Array) -> np.ndarray:
    """Finds thresholds at which given inputs leave in given shares, up to rounding and ties.

    Thresholds lie midway between the last input that leaves and the first that stays.

    Args:
        uncertainty: ``[N, B]``.
        shares: ``[N]``, summing to 1.

    Returns:
        ``[N - 1]`` float32.

    Raises:
        ValueError: shares that are negative, do not sum to 1 or are not one per exit.

    Example:
        >>> for_shares(np.array([[1, 2, 4, 8], [0, 0, 0, 0]]), [0.5, 0.5]).tolist()
        [3.0]
    """
    uncertainty, shares = np.asarray(uncertainty, np.float32), np.asarray(shares, np.float64)
    exits, count = uncertainty.shape
    if shares.shape != (exits,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f'shares: got {shares.tolist()}; give {exits} shares that sum to 1')
    waiting, thresholds = np.arange(count), []
    for n, left in enumerate(np.round(np.cumsum(shares[:-1]) * count).astype(int)):
        leaving, ordered = left - (count - len(waiting)), np.sort(uncertainty[n, waiting])
        if leaving <= 0:
            thresholds.append(-np.inf)
        elif leaving >= len(waiting):
            thresholds.append(np.inf)
        else:
            thresholds.append((ordered[leaving - 1].astype(np.float64) + ordered[leaving]) / 2)
        waiting = waiting[~(uncertainty[n, waiting] < thresholds[-1])]
    return np.array(thresholds, np.float32)


def for_budget(uncertainty: Array, costs: StageCosts, budget: float) -> np.ndarray:
    r"""Finds thresholds whose expected cost is a given budget, with shares that fall or rise geometrically.

    Exit n answers a share proportional to :math:`q^n`; the one q that costs the budget is found.

    Args:
        uncertainty: ``[N, B]`` on validation data.
        costs: per stage and head.
        budget: expected cost of one input.

    Returns:
        ``[N - 1]`` float32.

    Raises:
        ValueError: a budget below the first exit's cost or above the last's.

    Example:
        >>> for_budget(np.array([[1, 2, 4, 8], [0, 0, 0, 0]]), StageCosts([1, 9], [0, 0]), 5.5).tolist()
        [3.0]

    References:
        Huang et al., Multi-Scale Dense Networks, 2018, section 4: budgeted batch classification.
    """
    cheapest, dearest = costs.to_exit[0], costs.to_exit[-1]
    if not cheapest <= budget <= dearest:
        raise ValueError(f'budget: got {budget}; this network costs {cheapest:.6g} to {dearest:.6g}')
    exits = np.arange(len(costs.to_exit))

    def shares(log_ratio: float) -> np.ndarray:
        weights = exits * log_ratio
        return np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()

    def excess(log_ratio: float) -> float:
        return expected_cost(costs, shares(log_ratio)) - budget

    steepest = 100.0
    if excess(-steepest) >= 0 or excess(steepest) <= 0:
        ratio = -steepest if excess(-steepest) >= 0 else steepest
    else:
        ratio = optimize.brentq(excess, -steepest, steepest)
    return for_shares(uncertainty, shares(ratio))


def exact(
    uncertainty: Array,
    statistics: Array,
    costs: StageCosts,
    at_most: float,
    *,
    grid: Array | None = None,
    metric: Metric = mean_of_statistic,
) -> OperatingPoint:
    """Finds the most accurate setting of a grid whose expected cost is at most the one given: none is better.

    Args:
        uncertainty: ``[N, B]``.
        statistics: ``[N, B, S]`` (`accuracy_statistics`).
        costs: per stage and head; measured times (`branchy_jax.inference.segment_times`) or MACs.
        at_most: expected cost of one input.
        grid: ``[N - 1, V]``; `quantile_grid` of 100 values if none is given, fewer where there are too many settings.
        metric: turns summed statistics into the figure to maximise.

    Raises:
        ValueError: every setting costs more, or too many exits for a grid of their own.

    Example:
        >>> right = np.array([[[1.0], [0.0]], [[1.0], [1.0]]])
        >>> exact([[0.1, 0.9], [0, 0]], right, StageCosts([1, 9], [0, 0]), 6).accuracy
        1.0
    """
    grid = quantile_grid(uncertainty, size=min(100, grid_size(len(uncertainty)))) if grid is None else grid
    return for_cost(screen(uncertainty, statistics, costs, grid=grid, metric=metric), at_most)


def coordinate_descent(
    uncertainty: Array,
    statistics: Array,
    costs: StageCosts,
    at_most: float,
    *,
    grid: Array | None = None,
    metric: Metric = mean_of_statistic,
) -> OperatingPoint:
    """Searches greedily: one threshold at a time, the most accurate within the cost, until none changes.

    Linear in the number of exits where `exact` is exponential; stops at a setting that no single threshold improves.

    Args:
        uncertainty: ``[N, B]``.
        statistics: ``[N, B, S]``.
        costs: per stage and head.
        at_most: expected cost of one input.
        grid: ``[N - 1, V]``; `quantile_grid` of 100 values if none is given.
        metric: turns summed statistics into the figure to maximise.

    Raises:
        ValueError: even the cheapest setting costs more.
    """
    grid = np.asarray(quantile_grid(uncertainty) if grid is None else grid, np.float32)
    setting = grid[:, -1].copy()  # the last candidate lets the most leave first: the cheapest

    def point_of(settings: np.ndarray) -> OperatingPoint:
        return for_cost(evaluate(uncertainty, statistics, costs, settings, metric=metric), at_most)

    best = point_of(setting[None])
    while True:
        before = best
        for n in range(len(grid)):
            settings = np.repeat(best.thresholds[None], len(grid[n]) + 1, axis=0)
            settings[1:, n] = grid[n]
            found = point_of(settings)
            if (found.accuracy, -found.cost) > (best.accuracy, -best.cost):
                best = found
        if best is before:
            return best
