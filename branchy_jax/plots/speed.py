"""Pictures of what early exit saves: accuracy, gain and time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_figure, save
from branchy_jax.report import Record


def tradeoff(
    path: Path | str,
    frontier: Sequence[Record],
    baseline: Record,
    chosen: Record,
    *,
    knee: Record | None = None,
    title: str = '',
    metric: str = 'accuracy',
    label: str | None = None,
    batch: int = 1,
) -> None:
    """Draws the paper's Figure 3: accuracy against time per image as the thresholds vary.

    Args:
        path: the picture to write.
        frontier: points with ``latency_ms`` and ``test_<metric>``, by ascending latency.
        baseline: the one-exit network's row, with the same keys.
        chosen: the branchy network's row, with the same keys and ``gain``.
        knee: the frontier's knee, with the same keys.
        title: above the picture.
        metric: what is on the vertical axis.
        label: what it is called there, if otherwise.
        batch: images in a call.

    References:
        BranchyNet, 2016, Figure 3.
    """
    key = f'test_{metric}'

    def at(record: Record) -> tuple[float, float]:
        return record['latency_ms'], 100 * record[key]

    figure, axes = new_figure(title)
    axes.plot(
        *zip(*map(at, frontier), strict=True), '-o', color=OURS, markersize=3.5, label='thresholds of the frontier'
    )
    axes.plot(
        *at(chosen), '*', color=OURS, markersize=17, label=f'chosen on validation data, {chosen["gain"]:.2f}× faster'
    )
    if knee is not None:
        axes.plot(*at(knee), 'o', markersize=14, markerfacecolor='none', markeredgecolor=OURS, label='knee')
    axes.plot(*at(baseline), 's', color=BASELINE, markersize=9, label=f'{baseline["network"]}, no exits')
    axes.axhline(at(baseline)[1], color=BASELINE, linewidth=0.8, linestyle=':')
    axes.set_xlim(left=0)
    axes.set_xlabel(f'time per image, batch {batch} (ms)')
    axes.set_ylabel(f'test {label or metric} (%)')
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    save(figure, path)


def gain_against_batch(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws the gain of planned execution against the batch size, with the MAC limit of each setting as a line.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``shares``, ``executor``, ``gain`` and ``mac_limit``.
        title: above the picture.
    """
    figure, axes = new_figure(title)
    for color, (name, found) in zip(itertools.cycle(SERIES), _planned_by_shares(cells).items(), strict=False):
        batches = [cell['batch'] for cell in found]
        axes.plot(batches, [cell['gain'] for cell in found], '-o', color=color, markersize=4, label=f'{name} % leave')
        axes.plot(batches, [cell['mac_limit'] for cell in found], ':', color=color, linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xscale('log')
    axes.set_yscale('log')
    _plain_ticks(axes, sorted({cell['batch'] for cell in cells}))
    axes.set_xlabel('batch size')
    axes.set_ylabel('gain over the plain baseline (dotted: MAC limit)')
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


def cost_against_batch(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws the time of a whole batch against the batch size, planned and baseline.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``shares``, ``executor``, ``ms`` and ``baseline_ms`` per image.
        title: above the picture.
    """
    figure, axes = new_figure(title)
    series = _planned_by_shares(cells)
    for color, (name, found) in zip(itertools.cycle(SERIES), series.items(), strict=False):
        batches = [cell['batch'] for cell in found]
        axes.plot(
            batches, [cell['ms'] * cell['batch'] for cell in found], '-o', color=color, markersize=4,
            label=f'{name} % leave',
        )  # fmt: skip
    for number, found in enumerate(series.values()):
        axes.plot(
            [cell['batch'] for cell in found], [cell['baseline_ms'] * cell['batch'] for cell in found], 's--',
            color=BASELINE, markersize=4, linewidth=0.8, label=None if number else 'plain baseline',
        )  # fmt: skip
    axes.set_xscale('log')
    axes.set_yscale('log')
    ends = np.array([min(cell['batch'] for cell in cells), max(cell['batch'] for cell in cells)])
    largest = max(cell['ms'] * cell['batch'] for cell in cells if cell['executor'] == 'planned')
    axes.plot(ends, largest * ends / ends[-1], ':', color=INK, linewidth=1, label='linear')
    _plain_ticks(axes, sorted({cell['batch'] for cell in cells}))
    axes.set_xlabel('batch size')
    axes.set_ylabel('time of a batch (ms)')
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


def time_against_macs(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws how far the clock follows the multiply-accumulates: both as shares of the baseline's, planned execution.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``executor``, ``gain`` and ``mac_limit``.
        title: above the picture.
    """
    figure, axes = new_figure(title)
    planned = [cell for cell in cells if cell['executor'] == 'planned']
    for color, batch in zip(itertools.cycle(SERIES), sorted({cell['batch'] for cell in planned}), strict=False):
        points = sorted((1 / cell['mac_limit'], 1 / cell['gain']) for cell in planned if cell['batch'] == batch)
        axes.plot(*zip(*points, strict=True), '-o', color=color, markersize=4, label=f'batch {batch:,}')
    axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='time follows MACs')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("expected MACs ÷ baseline's")
    axes.set_ylabel("time ÷ plain baseline's")
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


def _planned_by_shares(cells: Sequence[Record]) -> dict[str, list[Record]]:
    """Groups planned cells by the shares that were asked for; a small batch rounds what it gets."""
    found: dict[str, list[Record]] = {}
    for cell in cells:
        if cell['executor'] == 'planned':
            found.setdefault('/'.join(f'{100 * share:.0f}' for share in cell['shares']), []).append(cell)
    return {name: sorted(cells, key=lambda cell: cell['batch']) for name, cells in found.items()}


def _plain_ticks(axes: Any, batches: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xticks(batches, [f'{batch:,}' for batch in batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f'{value:g}' if f'{value:e}'[0] in '125' else ''))
