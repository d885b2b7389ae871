"""The data of a run, and what its task decides: loss, statistics, metric, and the criteria to compare."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.criteria import Criterion, as_criterion
from branchy_jax.losses import Loss, MetricsOf
from branchy_jax.thresholds.statistics import Metric, Statistics


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the main job.

    Attributes:
        key: of the metric in records: ``test_<key>``.
        label: of the metric in tables and pictures.
        statistics: what each answer adds to the metric's sums.
        metric: of these sums.
        criteria: to compare; a run takes the one whose thresholds are cheapest on validation data.
        loss: per exit.
        metrics: to look at while training.
    """

    key: str
    label: str
    statistics: Statistics
    metric: Metric
    criteria: tuple[Criterion, ...]
    loss: Loss = bj.losses.cross_entropy_per_exit
    metrics: MetricsOf = bj.losses.accuracy_per_exit

    def criterion(self, name: str) -> Criterion:
        """Returns the criterion of that name."""
        return {criterion.name: criterion for criterion in self.criteria}[name]


# Entropy of a quarter of the pixels: a patch of 8 pixels is 4 of them wide.
_ENTROPY = as_criterion(bj.criteria.entropy, stride=2, name='mean entropy')

TASKS = {
    'classification': Task(
        key='accuracy',
        label='accuracy',
        statistics=bj.thresholds.accuracy_statistics,
        metric=bj.thresholds.statistics.mean_of_statistic,
        criteria=(bj.criteria.entropy,),
    ),
    'segmentation': Task(
        key='miou',
        label='mIoU',
        statistics=bj.thresholds.iou_statistics,
        metric=bj.thresholds.mean_iou,
        criteria=(
            _ENTROPY,
            as_criterion(_ENTROPY, name='98 % quantile of entropy', quantile=0.98),
            as_criterion(_ENTROPY, name='most unsure 8 × 8 patch', quantile=1.0, patch=4),
        ),
    ),
}


def load(config: ConfigDict) -> bj.data.Dataset:
    """Loads what ``config.dataset`` names, the training images left on disk where ``config.in_memory`` is false.

    Where the environment variable ``BRANCHY_JAX_PACKS`` names a folder with ``NAME.npz``, as ``unpack.py`` writes them
    from ``shared/packs``, the arrays come from there: the same images in the same order as TFDS gives, on machines
    without TensorFlow Datasets.
    """
    unpacked = Path(os.environ.get('BRANCHY_JAX_PACKS', ''), f'{config.dataset}.npz')
    found = bj.data.load_dataset(
        str(unpacked) if unpacked.is_absolute() and unpacked.exists() else config.dataset,
        in_memory=config.in_memory,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        task=config.task,
        image_size=tuple(config.image_size) or None,
        workers=config.workers,
        prefetch=config.prefetch,
    )
    if config.most_examples:
        parts = {split: getattr(found, split) for split in ('train', 'validation', 'test')}
        found = found.replace(**jax.tree.map(lambda values: values[: config.most_examples], parts))
    return found.replace(name=config.dataset)
