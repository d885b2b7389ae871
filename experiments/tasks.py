"""What a run's task decides: what is counted, which metric, and which criteria may let an input leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import branchy_jax as bj
from branchy_jax.criteria import (
    Criterion,
    entropy_of_logits,
    from_logits,
    on_every,
    quantile_over_patches,
    quantile_over_pixels,
)
from branchy_jax.thresholds import Metric, Statistics


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the main job.

    Attributes:
        key: of the metric in records: ``test_<key>``.
        label: of the metric in tables and pictures.
        statistics: what each answer adds.
        metric: of their sums.
        criteria: by name; the one whose thresholds are cheapest on validation data is taken.
    """

    key: str
    label: str
    statistics: Statistics
    metric: Metric
    criteria: Mapping[str, Criterion]


_ENTROPY = on_every(2, entropy_of_logits)
"""Of a quarter of the pixels: a patch of 8 pixels is 4 of them wide."""


def _by_name(*criteria: Criterion) -> dict[str, Criterion]:
    return {criterion.name: criterion for criterion in criteria}


TASKS = {
    'classification': Task(
        'accuracy', 'accuracy', bj.thresholds.accuracy_statistics, bj.thresholds.mean_of_statistic,
        _by_name(bj.criteria.entropy),
    ),
    'segmentation': Task(
        'miou', 'mIoU', bj.thresholds.iou_statistics, bj.thresholds.mean_iou,
        _by_name(
            from_logits(_ENTROPY, name='mean entropy'),
            from_logits(_ENTROPY, name='98 % quantile of entropy', pool=quantile_over_pixels(0.98)),
            from_logits(_ENTROPY, name='most unsure 8 × 8 patch', pool=quantile_over_patches(1.0, size=4)),
        ),
    ),
}  # fmt: skip
