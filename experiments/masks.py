"""What the main job adds for segmentation: IoU per class, anytime dense prediction, and a picture of masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import branchy_jax as bj
from branchy_jax.inference import ExitStatistics
from experiments.networks import TABLE, Choice, Networks

_PIXEL_THRESHOLDS = (0.01, 0.05, 0.2, 0.5)
"""Entropy in nats below which a pixel keeps its answer."""

_STILL_UNSURE = 0.01
"""Share of unsure pixels below which a whole image leaves."""

_PICTURED = 2
"""Images pictured per exit that answered."""


def write(
    workdir: Path,
    dataset: bj.data.Dataset,
    networks: Networks,
    choice: Choice,
    outputs: ExitStatistics,
    baseline_outputs: ExitStatistics,
    costs: bj.costs.StageCosts,
) -> None:
    """Adds to ``report.json`` and ``report.md`` what masks can tell, and draws ``masks.png``.

    Args:
        workdir: folder of the run, with both reports.
        dataset: whose test part was evaluated.
        networks: both.
        choice: the thresholds chosen.
        outputs: of the branchy network on test data.
        baseline_outputs: of the baseline.
        costs: MACs.
    """
    thresholds = choice.points[TABLE].thresholds
    classes = class_table(outputs, baseline_outputs, thresholds)
    pixels = [anytime(networks, dataset, costs, threshold) for threshold in _PIXEL_THRESHOLDS]
    report = {**bj.report.read_json(workdir / 'report.json'), 'class_iou': classes, 'pixelwise': pixels}
    bj.report.write_json(workdir / 'report.json', report)
    page = (workdir / 'report.md').read_text(encoding='utf-8')
    bj.report.write_text(workdir / 'report.md', f'{page}\n{_classes(classes, _names(dataset))}\n\n{_pixels(pixels)}')
    _picture(workdir / 'masks.png', dataset, networks, outputs, choice)


def class_table(
    outputs: ExitStatistics, baseline_outputs: ExitStatistics, thresholds: np.ndarray
) -> dict[str, list[float]]:
    """Returns IoU per class of the baseline, of every exit alone, and at the operating point.

    Args:
        outputs: of the branchy network.
        baseline_outputs: of the baseline.
        thresholds: ``[N - 1]``.
    """
    first = bj.thresholds.answering_exits(outputs.uncertainty, thresholds)
    answers = outputs.statistics[first, np.arange(len(first))]
    rows = {'baseline': baseline_outputs.statistics[0]}
    rows.update({f'exit {n + 1}': statistics for n, statistics in enumerate(outputs.statistics)})
    rows['operating point'] = answers
    return {name: bj.thresholds.iou_per_class(statistics.sum(axis=0)).tolist() for name, statistics in rows.items()}


def anytime(
    networks: Networks, dataset: bj.data.Dataset, costs: bj.costs.StageCosts, threshold: float
) -> dict[str, Any]:
    """Evaluates anytime dense prediction: pixels keep the first confident answer, images leave when nearly all do.

    Args:
        networks: both.
        dataset: whose test part is evaluated.
        costs: MACs.
        threshold: entropy below which a pixel keeps its answer, at every exit.
    """
    exits = networks.model.num_exits
    pixel_thresholds = (threshold,) * (exits - 1)

    found = bj.inference.exit_statistics(
        networks.model, networks.variables, dataset.test, bj.thresholds.iou_statistics,
        criterion=bj.criteria.pixelwise(pixel_thresholds), prepare=dataset.normalization, batch_size=64,
    )  # fmt: skip
    count = found.statistics.shape[1]
    unsure = [1.0, *found.uncertainty.mean(axis=1)[:-1].tolist()]
    leaving = bj.thresholds.evaluate(
        found.uncertainty,
        found.statistics,
        costs,
        np.full((1, exits - 1), _STILL_UNSURE),
        metric=bj.thresholds.mean_iou,
    ).point(0)
    return {
        'pixel_threshold': threshold,
        'pixel_fractions': [unsure[n] - (unsure[n + 1] if n + 1 < exits else 0.0) for n in range(exits)],
        'test_miou_of_mosaic': float(bj.thresholds.mean_iou(found.statistics[-1].sum(axis=0), count)),
        'test_miou_leaving': leaving.accuracy,
        'exit_fractions_leaving': leaving.exit_fractions.tolist(),
        'mac_gain_leaving': costs.trunk / leaving.cost,
    }


def _classes(classes: Mapping[str, list[float]], names: tuple[str, ...]) -> str:
    rows = [[name, *('–' if np.isnan(v) else f'{100 * v:.1f}' for v in values)] for name, values in classes.items()]
    table = bj.report.markdown_table(['IoU % on test', *names], rows)
    return f'## Classes\n\n{table}'


def _pixels(rows: list[dict[str, Any]]) -> str:
    table = bj.report.markdown_table(
        ['pixel threshold', 'pixels per exit %', 'mIoU %, no image leaves', 'mIoU %, images leave', 'images per exit %',
         'MAC gain'],
        [
            [
                f'{row["pixel_threshold"]:g}',
                ', '.join(f'{100 * share:.1f}' for share in row['pixel_fractions']),
                f'{100 * row["test_miou_of_mosaic"]:.2f}',
                f'{100 * row["test_miou_leaving"]:.2f}',
                ', '.join(f'{100 * share:.1f}' for share in row['exit_fractions_leaving']),
                f'{row["mac_gain_leaving"]:.2f}',
            ]
            for row in rows
        ],
    )  # fmt: skip
    return f"""## Anytime dense prediction

Pixels whose entropy is below the threshold keep the earlier answer (`criteria.pixelwise`). That alone saves nothing:
convolutions compute whole images, so with no image leaving the MAC gain is below 1, the side heads being extra. Time
is saved only where an image leaves, here once less than {_STILL_UNSURE:.0%} of its pixels are unsure.

{table}

![masks](masks.png)
"""


def _names(dataset: bj.data.Dataset) -> tuple[str, ...]:
    """Names classes: those of canvases are the background and the digits."""
    numbers = tuple(str(k) for k in range(dataset.num_classes))
    return ('background', *numbers[:-1]) if dataset.name.startswith('digit_canvases') else numbers


def _picture(path: Path, dataset: bj.data.Dataset, networks: Networks, outputs: ExitStatistics, choice: Choice) -> None:
    """Draws the operating point that uses the most exits; of several, the first."""
    answers = {
        name: bj.thresholds.answering_exits(outputs.uncertainty, point.thresholds)
        for name, point in choice.points.items()
    }
    name = max(answers, key=lambda name: len(np.unique(answers[name])))
    first = answers[name]
    shown = np.concatenate([np.flatnonzero(first == n)[:_PICTURED] for n in range(networks.model.num_exits)])
    images = dataset.test.image[shown]
    logits = networks.model.apply(networks.variables, dataset.normalization(images))
    bj.plots.masks(
        path, images, dataset.test.label[shown], np.stack([np.argmax(z, axis=-1) for z in logits]), first[shown],
        num_classes=dataset.num_classes, class_names=_names(dataset),
        title=f'The first test images that each exit answers (operating point: {name})',
    )  # fmt: skip
