"""Picking one setting out of many: by accuracy, by cost, or at the knee."""

from __future__ import annotations

import numpy as np

from branchy_jax.thresholds.screening import Screen
from branchy_jax.types import OperatingPoint


def pareto_frontier(screened: Screen) -> Screen:
    """Keeps the settings that no other beats in accuracy without costing more, by ascending cost.

    Example:
        >>> accuracy, cost = np.array([0.9, 0.8, 0.95]), np.array([5, 6, 9])
        >>> pareto_frontier(Screen(np.zeros((3, 1)), accuracy, np.ones((3, 2)), cost, 'e', 'v')).accuracy.tolist()
        [0.9, 0.95]
    """
    order = np.lexsort((-screened.accuracy, screened.cost))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(screened.accuracy[order])[:-1]])
    kept = order[screened.accuracy[order] > best_before]
    return screened.replace(
        thresholds=screened.thresholds[kept],
        accuracy=screened.accuracy[kept],
        exit_fractions=screened.exit_fractions[kept],
        cost=screened.cost[kept],
    )


def for_accuracy(screened: Screen, at_least: float) -> OperatingPoint:
    """Picks the cheapest setting whose accuracy is at least the one asked for.

    Args:
        screened: settings to choose from.
        at_least: accuracy in the unit of ``screened.accuracy``.

    Raises:
        ValueError: no setting reaches it; the message says what can be reached.
    """
    frontier = pareto_frontier(screened)
    # Accuracies are counts over B: the tolerance admits 0.1 + 0.2 for 0.3, never one more wrong answer.
    reaching = np.flatnonzero(frontier.accuracy >= at_least - 1e-9)
    if len(reaching) == 0:
        raise ValueError(
            f'at_least: no thresholds reach {at_least}; the best accuracy is {frontier.accuracy.max():.6f}'
        )
    return frontier.point(reaching[0])


def for_cost(screened: Screen, at_most: float) -> OperatingPoint:
    """Picks the most accurate setting whose expected cost is at most the one asked for.

    Args:
        screened: settings to choose from.
        at_most: expected cost of one input, in the unit of ``screened.cost``.

    Raises:
        ValueError: every setting costs more; the message says what the cheapest costs.
    """
    frontier = pareto_frontier(screened)
    affordable = np.flatnonzero(frontier.cost <= at_most * (1 + 1e-9))
    if len(affordable) == 0:
        raise ValueError(f'at_most: no thresholds cost {at_most} or less; the cheapest cost {frontier.cost.min():.6g}')
    return frontier.point(affordable[-1])


def knee(screened: Screen) -> OperatingPoint:
    """Picks the knee of accuracy against cost: the frontier's point farthest above the line between its ends.

    Both axes are scaled to [0, 1] first, as in Satopää et al., Finding a "Kneedle" in a Haystack, 2011. A frontier
    that nowhere rises above that line has no knee: every further cost pays, and the most accurate setting is picked.

    References:
        BranchyNet, 2016, Figure 3: the knee is the operating point of Table I.
    """
    frontier = pareto_frontier(screened)

    def scaled(values: np.ndarray) -> np.ndarray:
        return (values - values[0]) / max(values[-1] - values[0], np.finfo(float).tiny)

    height = scaled(frontier.accuracy) - scaled(frontier.cost)
    return frontier.point(len(height) - 1 - int(np.argmax(height[::-1])))
