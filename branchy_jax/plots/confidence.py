"""Pictures of confidence: how far it can be trusted, and what it decides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.criteria.learned import Reliability
from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_figure, save
from branchy_jax.types import Array


def reliability_diagrams(
    path: Path | str, before: Sequence[Reliability], after: Sequence[Reliability], *, title: str = ''
) -> None:
    """Draws for every exit how often answers of a given confidence are right, before and after calibration.

    Args:
        path: the picture to write.
        before: one per exit.
        after: one per exit.
        title: above the picture.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, Figure 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(before) + 0.4, 4.4), dpi=150, layout='constrained')
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha='left')
    for n, axes in enumerate(np.atleast_1d(figure.subplots(1, len(before), sharey=True))):
        axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='calibrated' if n == 0 else None)
        for name, found, color in (('before', before[n], BASELINE), ('after', after[n], OURS)):
            full = found.count > 0
            axes.plot(
                found.confidence[full], found.accuracy[full], '-o', color=color, markersize=4,
                label=name if n == 0 else None,
            )  # fmt: skip
        axes.set_title(
            f'exit {n + 1}: ECE {100 * before[n].error:.2f} → {100 * after[n].error:.2f} %', fontsize=9, loc='left'
        )
        axes.set_xlabel('confidence')
        axes.set_box_aspect(1)
        axes.spines[['top', 'right']].set_visible(False)
        if n == 0:
            axes.set_ylabel('share of right answers')
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


def curves(
    path: Path | str,
    found: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = '',
    unit: str = 'million multiply-accumulates',
    metric: str = 'test accuracy (%)',
) -> None:
    """Draws accuracy against cost, one line for each name.

    Args:
        path: the picture to write.
        found: name to costs and accuracies in percent.
        title: above the picture.
        unit: of the cost.
        metric: what is on the vertical axis.
    """
    figure, axes = new_figure(title)
    marks = itertools.cycle('os^vDPX')
    for (name, (cost, accuracy)), color in zip(found.items(), itertools.cycle(SERIES), strict=False):
        axes.plot(cost, accuracy, f'-{next(marks)}', color=color, markersize=4, linewidth=1.2, label=name)
    axes.set_xlabel(f'cost of an image ({unit})')
    axes.set_ylabel(metric)
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


def held(
    path: Path | str, values: Mapping[str, Array], target: float, shifts: Sequence[int], *, title: str = ''
) -> None:
    """Draws what a controller held while the data shifted.

    Args:
        path: the picture to write.
        values: name to moving averages, one per image.
        target: that was to be held.
        shifts: images at which the data changed.
        title: above the picture.
    """
    figure, axes = new_figure(title)
    for (name, line), color in zip(values.items(), SERIES, strict=False):
        axes.plot(np.arange(len(line)), line, color=color, linewidth=1.2, label=name)
    axes.axhline(target, color=INK, linewidth=0.8, linestyle=':', label='target')
    for n, shift in enumerate(shifts):
        axes.axvline(shift, color=BASELINE, linewidth=0.8, label='the data shift' if n == 0 else None)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('images')
    axes.set_ylabel("cost ÷ full network's")
    figure.legend(loc='outside lower center', ncols=4, frameon=False)
    save(figure, path)


def contact_sheet(
    path: Path | str, images: Array, exits: Array, *, num_exits: int, columns: int = 16, title: str = ''
) -> None:
    """Shows images that left at each exit, one block of rows for each.

    Args:
        path: the picture to write.
        images: ``[B, H, W, C]`` uint8, in the order to show.
        exits: ``[B]`` where they left.
        num_exits: N.
        columns: images in a row; two rows for each exit.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    images, exits = np.asarray(images), np.asarray(exits)
    figure = Figure(figsize=(8, 1.45 * num_exits + 0.4), dpi=150, layout='constrained')
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha='left')
    for n, axes in enumerate(np.atleast_1d(figure.subplots(num_exits, 1))):
        chosen = images[exits == n][: 2 * columns]
        axes.imshow(_tiled(chosen, columns), cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axes.set_title(f'left at exit {n + 1}: {100 * np.mean(exits == n):.1f} %', fontsize=9, loc='left')
        axes.set_axis_off()
    save(figure, path)


def _tiled(images: np.ndarray, columns: int) -> Any:
    """Lays images out in two rows, white where there are none."""
    height, width, channels = images.shape[1:]
    sheet = np.full((2 * columns, height, width, channels), 255, np.uint8)
    sheet[: len(images)] = images
    rows = sheet.reshape(2, columns, height, width, channels).swapaxes(1, 2)
    return rows.reshape(2 * height, columns * width, channels).squeeze()
