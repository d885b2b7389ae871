"""What trained exits answered on a part of the data, computed once and read by every section of a report."""

from __future__ import annotations

import numpy as np
from flax import struct

import branchy_jax as bj
from branchy_jax.criteria import Criterion


@struct.dataclass
class Outputs:
    """Cached logits of a part of the data.

    Attributes:
        logits: ``[N, B, K]``.
        labels: ``[B]``.
    """

    logits: np.ndarray
    labels: np.ndarray


def halves(part: Outputs) -> tuple[Outputs, Outputs]:
    """Splits cached outputs at random."""
    rows = np.random.default_rng(0).permutation(len(part.labels))
    middle = len(rows) // 2
    first, second = (Outputs(part.logits[:, chosen], part.labels[chosen]) for chosen in (rows[:middle], rows[middle:]))
    return first, second


def entropy_of(part: Outputs) -> np.ndarray:
    """Returns the entropy of every exit, ``[N, B]`` in nats."""
    return np.asarray(bj.criteria.replay(bj.criteria.entropy, part.logits)[1])


def screened(criterion: Criterion, part: Outputs, costs: bj.costs.StageCosts) -> bj.thresholds.Screen:
    """Screens the thresholds of a criterion for accuracy."""
    uncertainty, right = _uncertainty_and_accuracy(criterion, part)
    return bj.thresholds.screen(uncertainty, right, costs, criterion=criterion.name)


def evaluated(
    criterion: Criterion, settings: bj.thresholds.Screen, part: Outputs, costs: bj.costs.StageCosts
) -> bj.thresholds.Screen:
    """Evaluates settings that were found on other data."""
    uncertainty, right = _uncertainty_and_accuracy(criterion, part)
    return bj.thresholds.evaluate(uncertainty, right, costs, settings.thresholds)


def _uncertainty_and_accuracy(criterion: Criterion, part: Outputs) -> tuple[np.ndarray, np.ndarray]:
    answers, uncertainty = (np.asarray(found) for found in bj.criteria.replay(criterion, part.logits))
    return uncertainty, bj.thresholds.accuracy_statistics(answers, part.labels)
