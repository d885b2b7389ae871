"""What trained exits answered on a part of the data, computed once and read by every section of a report."""

from __future__ import annotations

import dataclasses

import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.thresholds import ExitTable


@dataclasses.dataclass(frozen=True)
class Cached:
    """Cached logits of a part of the data.

    Attributes:
        logits: ``[N, B, K]`` as the heads gave them.
        labels: ``[B]``.
        costs: per stage and head.
    """

    logits: np.ndarray
    labels: np.ndarray
    costs: bj.costs.StageCosts

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> tuple[Cached, Cached]:
        """Splits it at random."""
        rows = np.random.default_rng(0).permutation(len(self))
        parts = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
        first, second = (Cached(self.logits[:, part], self.labels[part], self.costs) for part in parts)
        return first, second

    def table(self, criterion: Criterion = bj.criteria.entropy, *, split: str = 'validation') -> ExitTable:
        """Replays a criterion over it."""
        return ExitTable.from_logits(self.logits, self.labels, self.costs, criterion=criterion, split=split)
