"""Pictures of accuracy against time and against cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from branchy_jax.plots.canvas import BASELINE, OURS, SERIES, new_axes, save

if TYPE_CHECKING:
    from branchy_jax.thresholds import Screen


def tradeoff(
    path: Path | str,
    frontier: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    chosen: Mapping[str, Any],
    *,
    knee: Mapping[str, Any] | None = None,
    title: str = '',
    metric: str = 'accuracy',
    label: str | None = None,
    batch: int = 1,
) -> None:
    """Draws the paper's Figure 3: accuracy against time per image as the thresholds vary.

    Args:
        path: the picture to write.
        frontier: points with ``latency_ms`` and ``test_<metric>``, by ascending latency.
        baseline: the one-exit network's row, with the same keys and ``network``.
        chosen: the branchy network's row, with the same keys and ``gain``.
        knee: the frontier's knee, with the same keys.
        title: above the picture.
        metric: of the vertical axis.
        label: name of the metric there, if another.
        batch: images in a call.

    Raises:
        ValueError: no points.

    References:
        BranchyNet, 2016, Figure 3.
    """
    if not frontier:
        raise ValueError('frontier: nothing to draw; give at least one point')

    def draw(records: Sequence[Mapping[str, Any]], mark: str, **style: Any) -> None:
        points = [(record['latency_ms'], 100 * record[f'test_{metric}']) for record in records]
        axes.plot(*zip(*points, strict=True), mark, **style)

    figure, axes = new_axes(title, x=f'time per image, batch {batch} (ms)', y=f'test {label or metric} (%)')
    draw(frontier, '-o', color=OURS, markersize=3.5, label='thresholds of the frontier')
    gain = f'chosen on validation data, {chosen["gain"]:.2f}× faster'
    draw([chosen], '*', color=OURS, markersize=17, label=gain)
    if knee is not None:
        draw([knee], 'o', markersize=14, markerfacecolor='none', markeredgecolor=OURS, label='knee')
    draw([baseline], 's', color=BASELINE, markersize=9, label=f'{baseline["network"]}, no exits')
    axes.axhline(100 * baseline[f'test_{metric}'], color=BASELINE, linewidth=0.8, linestyle=':')
    axes.set_xlim(left=0)
    save(figure, path, legend_columns=2)


def accuracy_against_cost(
    path: Path | str,
    screens: Mapping[str, Screen],
    *,
    title: str = '',
    unit: str = 'million multiply-accumulates',
    scale: float = 1e-6,
    metric: str = 'test accuracy',
) -> None:
    """Draws accuracy against expected cost, one line for each name: frontiers, protocols, searches.

    Args:
        path: the picture to write.
        screens: a screen for each name, such as a frontier; drawn by ascending cost.
        title: above the picture.
        unit: of the cost on the horizontal axis.
        scale: factor from the screens' own unit to that one.
        metric: name of the vertical axis.

    Raises:
        ValueError: no lines.

    Example:
        >>> accuracy_against_cost('frontier.png', {'entropy': table.screen().frontier()})  # doctest: +SKIP
    """
    if not screens:
        raise ValueError('screens: nothing to draw; give at least one')
    figure, axes = new_axes(title, x=f'expected cost of an input ({unit})', y=f'{metric} (%)')
    styles = itertools.cycle(zip('os^vDPX', SERIES, strict=True))
    for (name, screen), (mark, color) in zip(screens.items(), styles, strict=False):
        order = np.argsort(screen.cost, kind='stable')
        cost, accuracy = scale * np.asarray(screen.cost)[order], 100 * np.asarray(screen.accuracy)[order]
        axes.plot(cost, accuracy, f'-{mark}', color=color, markersize=4, linewidth=1.2, label=name)
    save(figure, path, legend_columns=3)
