"""What the main job adds for segmentation: IoU per class, anytime dense prediction, and a picture of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import branchy_jax as bj
from branchy_jax.thresholds import ExitTable
from experiments.run.networks import Networks
from experiments.run.records import Pixelwise

_PIXEL_THRESHOLDS = (0.01, 0.05, 0.2, 0.5)
"""Entropy in nats below which a pixel keeps its answer."""

STILL_UNSURE = 0.01
"""Share of unsure pixels below which a whole image leaves."""

_PICTURED = 2
"""Images pictured per exit that answered."""


def class_iou(table: ExitTable, baseline: ExitTable, point: bj.OperatingPoint) -> dict[str, tuple[float | None, ...]]:
    """Returns IoU per class of the baseline, of every exit alone, and at an operating point.

    Args:
        table: of the branchy network on test data.
        baseline: of its baseline.
        point: where inputs leave.
    """
    first = table.answering_exits(point)
    rows = {'baseline': baseline.statistics[0]}
    rows.update({f'exit {n + 1}': statistics for n, statistics in enumerate(table.statistics)})
    rows['operating point'] = table.statistics[first, np.arange(len(first))]
    found = {
        name: bj.thresholds.statistics.iou_per_class(statistics.sum(axis=0)).tolist()
        for name, statistics in rows.items()
    }
    return {name: tuple(None if math.isnan(value) else value for value in values) for name, values in found.items()}


def anytime(networks: Networks, test: bj.Batch, costs: bj.costs.StageCosts) -> tuple[Pixelwise, ...]:
    """Evaluates anytime dense prediction: pixels keep the first confident answer, images leave when nearly all do.

    Args:
        networks: both.
        test: images as stored, with masks.
        costs: MACs.
    """
    return tuple(_anytime(networks, test, costs, threshold) for threshold in _PIXEL_THRESHOLDS)


def _anytime(networks: Networks, test: bj.Batch, costs: bj.costs.StageCosts, threshold: float) -> Pixelwise:
    exits = networks.num_exits
    table = bj.inference.exit_table(
        networks.model,
        networks.variables,
        test,
        criterion=bj.criteria.pixelwise((threshold,) * (exits - 1)),
        statistics=bj.thresholds.iou_statistics,
        metric=bj.thresholds.mean_iou,
        costs=costs,
        split='test',
        preprocess=networks.normalization,
        batch_size=64,
    )
    unsure = [1.0, *np.asarray(table.uncertainty).mean(axis=1)[:-1].tolist(), 0.0]
    leaving = table.evaluate(np.full((1, exits - 1), STILL_UNSURE)).point(0)
    return Pixelwise(
        pixel_threshold=threshold,
        pixel_fractions=tuple(unsure[n] - unsure[n + 1] for n in range(exits)),
        test_miou_of_mosaic=float(table.anytime().accuracy[-1]),
        test_miou_leaving=float(leaving.accuracy),
        exit_fractions_leaving=tuple(np.asarray(leaving.exit_fractions).tolist()),
        mac_gain_leaving=float(costs.trunk / leaving.cost),
    )


def class_names(dataset: str, num_classes: int) -> tuple[str, ...]:
    """Names classes: those of canvases are the background and the digits."""
    numbers = tuple(str(k) for k in range(num_classes))
    return ('background', *numbers[:-1]) if dataset.startswith('digit_canvases') else numbers


def picture(
    path: Path, dataset: bj.data.Dataset, networks: Networks, table: ExitTable, points: Mapping[str, bj.OperatingPoint]
) -> None:
    """Draws the operating point that uses the most exits; of several, the first.

    Args:
        path: the picture to write.
        dataset: whose test part is shown.
        networks: both.
        table: of the branchy network on test data.
        points: by name.
    """
    answers = {name: table.answering_exits(point) for name, point in points.items()}
    name = max(answers, key=lambda name: len(np.unique(answers[name])))
    first = answers[name]
    shown = np.concatenate([np.flatnonzero(first == n)[:_PICTURED] for n in range(networks.num_exits)])
    images = dataset.test.image[shown]
    logits = networks.model.apply(networks.variables, networks.normalization(images))
    bj.plots.masks(
        path,
        images,
        dataset.test.label[shown],
        np.stack([np.argmax(z, axis=-1) for z in logits]),
        first[shown],
        num_classes=dataset.num_classes,
        class_names=class_names(dataset.name, dataset.num_classes),
        title=f'The first test images that each exit answers (operating point: {name})',
    )
