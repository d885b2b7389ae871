"""How the field reports early exit: anytime, budgeted batch, and who is confused where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import struct

from branchy_jax.costs import StageCosts
from branchy_jax.thresholds.screening import evaluate
from branchy_jax.thresholds.search import for_budget
from branchy_jax.types import Array


@struct.dataclass
class Curve:
    """Accuracy against cost.

    Attributes:
        cost: ``[M]`` of one input, in the unit of the costs given.
        accuracy: ``[M]`` in [0, 1].
        thresholds: ``[M, N - 1]``, where thresholds made the points.
    """

    cost: np.ndarray
    accuracy: np.ndarray
    thresholds: np.ndarray


def anytime(statistics: Array, costs: StageCosts) -> Curve:
    """Computes the accuracy of each exit against what it costs to get there, every input stopping at the same exit.

    Args:
        statistics: ``[N, B, 1]`` (`accuracy_statistics`).
        costs: per stage and head.

    References:
        Huang et al., Multi-Scale Dense Networks, 2018, section 4: anytime prediction.
    """
    exits = len(costs.to_exit)
    forced = np.where(np.arange(exits - 1) == np.arange(exits)[:, None], np.inf, -np.inf)
    return Curve(cost=costs.to_exit, accuracy=np.asarray(statistics)[..., 0].mean(axis=1), thresholds=forced)


def budgeted(
    chosen_on: Array,
    uncertainty: Array,
    statistics: Array,
    costs: StageCosts,
    *,
    budgets: Sequence[float] | None = None,
) -> Curve:
    """Computes accuracy against average cost, with thresholds that `for_budget` finds on other data.

    Args:
        chosen_on: ``[N, B']`` uncertainties of the data to find thresholds on.
        uncertainty: ``[N, B]`` of the data to report on.
        statistics: ``[N, B, 1]`` of the same.
        costs: per stage and head.
        budgets: average costs to aim at; twenty between the first exit's and the last's if none are given.

    References:
        Huang et al., Multi-Scale Dense Networks, 2018, section 4: budgeted batch classification.
    """
    ends = costs.to_exit[0], costs.to_exit[-1]
    budgets = np.linspace(*ends, 20) if budgets is None else budgets
    settings = np.array([for_budget(chosen_on, costs, budget) for budget in budgets])
    found = evaluate(uncertainty, statistics, costs, settings)
    return Curve(cost=found.cost, accuracy=found.accuracy, thresholds=settings)


def confusion(labels: Array, answers: Array, exits: Array, *, num_exits: int, num_classes: int) -> np.ndarray:
    """Counts, for each exit, which class was taken for which by the inputs that left there.

    Args:
        labels: ``[B]``.
        answers: ``[B]`` predicted labels.
        exits: ``[B]`` which exit answered.
        num_exits: N.
        num_classes: K.

    Returns:
        ``[N, K, K]``: exit, true class, answer.

    Example:
        >>> confusion([0, 1], [0, 0], [0, 1], num_exits=2, num_classes=2).tolist()
        [[[1, 0], [0, 0]], [[0, 0], [1, 0]]]
    """
    counts = np.zeros((num_exits, num_classes, num_classes), int)
    np.add.at(counts, (np.asarray(exits), np.asarray(labels), np.asarray(answers)), 1)
    return counts
