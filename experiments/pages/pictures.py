"""Pictures that only experiments make: against the paper, against the batch size, and over time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_axes, save
from branchy_jax.report import Record
from branchy_jax.types import Array

Points = Sequence[tuple[float, float]]

_GREY = '#8a8a8a'
_MARKS = (('o', _GREY), ('o', OURS), ('*', INK), ('D', INK))


def against_paper(
    path: Path | str,
    ours: Mapping[str, Points],
    paper: Mapping[str, Points],
    *,
    x: str,
    y: str,
    title: str,
    note: str = '',
    marked: Mapping[str, tuple[float, float]] | None = None,
    log_x: bool = False,
) -> None:
    """Draws curves of ours and of a paper on one pair of axes.

    Args:
        path: the picture to write.
        ours: points by series; none where nothing was run, which the picture then says.
        paper: digitised points by series.
        x: what is on the horizontal axis.
        y: and on the vertical one.
        title: above the picture.
        note: below the title, such as what the data are.
        marked: single points by label, such as a knee.
        log_x: whether the horizontal axis is logarithmic.
    """
    figure, axes = new_axes(title, x=x, y=y)
    for color, (name, points) in zip((OURS, BASELINE, *SERIES[1:]), ours.items(), strict=False):
        style = '-o' if len(points) > 1 else 's'
        axes.plot(*zip(*points, strict=True), style, color=color, markersize=5, label=name)
    for line, (name, points) in zip(('--^', ':v', '-.d'), paper.items(), strict=False):
        axes.plot(*zip(*points, strict=True), line, color=_GREY, markersize=6, linewidth=1, label=f'{name} (paper)')
    for (marker, color), (name, point) in zip(_MARKS, (marked or {}).items(), strict=False):
        axes.plot(*point, marker, markersize=15, markerfacecolor='none', markeredgecolor=color, linewidth=0, label=name)
    if not ours:
        axes.text(0.5, 0.5, 'ours: not run', transform=axes.transAxes, ha='center', color=BASELINE, fontsize=14)
    if note:
        axes.set_title(title, color=INK, fontsize=11, loc='left', pad=16)  # the note has a line of its own below
        axes.text(0, 1.01, note, transform=axes.transAxes, va='bottom', color=INK, fontsize=7)
    if log_x:
        axes.set_xscale('log')
    elif all(float(place).is_integer() for points in (*ours.values(), *paper.values()) for place, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path, legend_columns=2)


def gradient_norms(path: Path | str, norms: Mapping[str, Array], *, steps: int, title: str = '') -> None:
    """Draws the gradient of each layer, with and without branches, before and after some training.

    Args:
        path: the picture to write.
        norms: ``[S, 2, layers]`` by network: seeds, before and after, layers.
        steps: how much training lies between.
        title: above the picture.
    """
    figure, axes = new_axes(title, x='layer of the trunk, from the input', y='root mean square gradient')
    for color, (name, values) in zip((OURS, BASELINE), norms.items(), strict=False):
        values = np.maximum(np.asarray(values), 1e-12)  # a gradient of 0 has no place on a logarithmic axis
        layers = np.arange(values.shape[-1]) + 1
        for moment, style, when in ((0, '-', 'at initialisation'), (1, ':', f'after {steps} steps')):
            middle = np.exp(np.log(values[:, moment]).mean(axis=0))
            axes.plot(layers, middle, style, color=color, label=f'{name}, {when}')
            lowest, highest = values[:, moment].min(axis=0), values[:, moment].max(axis=0)
            axes.fill_between(layers, lowest, highest, color=color, alpha=0.12, linewidth=0)
    axes.set_yscale('log')
    save(figure, path, legend_columns=2)


def controlled_cost(
    path: Path | str, costs: Mapping[str, Array], target: float, shifts: Sequence[int], *, title: str = ''
) -> None:
    """Draws the cost that a controller held while the data shifted.

    Args:
        path: the picture to write.
        costs: name to moving averages of the cost, one per image, as shares of the full network's.
        target: that was to be held.
        shifts: images at which the data changed.
        title: above the picture.
    """
    figure, axes = new_axes(title, x='images', y="cost ÷ full network's")
    for (name, line), color in zip(costs.items(), SERIES, strict=False):
        axes.plot(np.arange(len(line)), line, color=color, linewidth=1.2, label=name)
    axes.axhline(target, color=INK, linewidth=0.8, linestyle=':', label='target')
    for n, shift in enumerate(shifts):
        axes.axvline(shift, color=BASELINE, linewidth=0.8, label='the data shift' if n == 0 else None)
    axes.set_ylim(bottom=0)
    save(figure, path, legend_columns=4)


def gain_against_batch(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws the gain of planned execution against the batch size, with the MAC limit of each setting as a line.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``shares``, ``executor``, ``gain`` and ``mac_limit``.
        title: above the picture.
    """
    figure, axes = new_axes(title, x='batch size', y='gain over the plain baseline (dotted: MAC limit)')
    for color, (name, found) in zip(itertools.cycle(SERIES), _planned_by_shares(cells).items(), strict=False):
        batches = [cell['batch'] for cell in found]
        axes.plot(batches, [cell['gain'] for cell in found], '-o', color=color, markersize=4, label=f'{name} % leave')
        axes.plot(batches, [cell['mac_limit'] for cell in found], ':', color=color, linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.8)
    _logarithmic(axes, cells)
    save(figure, path, legend_columns=3)


def time_against_batch(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws the time of a whole batch against the batch size, planned and baseline.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``shares``, ``executor``, ``ms`` and ``baseline_ms`` per image.
        title: above the picture.
    """
    figure, axes = new_axes(title, x='batch size', y='time of a batch (ms)')
    series = _planned_by_shares(cells)
    for n, (color, (name, found)) in enumerate(zip(itertools.cycle(SERIES), series.items(), strict=False)):
        batches = np.array([cell['batch'] for cell in found])
        ours, baseline = (batches * [cell[key] for cell in found] for key in ('ms', 'baseline_ms'))
        axes.plot(batches, ours, '-o', color=color, markersize=4, label=f'{name} % leave')
        label = None if n else 'plain baseline'
        axes.plot(batches, baseline, 's--', color=BASELINE, markersize=4, linewidth=0.8, label=label)
    ends = np.array([min(cell['batch'] for cell in cells), max(cell['batch'] for cell in cells)])
    largest = max(cell['ms'] * cell['batch'] for cell in cells if cell['executor'] == 'planned')
    axes.plot(ends, largest * ends / ends[-1], ':', color=INK, linewidth=1, label='linear')
    _logarithmic(axes, cells)
    save(figure, path, legend_columns=3)


def time_against_macs(path: Path | str, cells: Sequence[Record], *, title: str = '') -> None:
    """Draws how far the clock follows the multiply-accumulates: both as shares of the baseline's, planned execution.

    Args:
        path: the picture to write.
        cells: with ``batch``, ``executor``, ``gain`` and ``mac_limit``.
        title: above the picture.
    """
    figure, axes = new_axes(title, x="expected MACs ÷ baseline's", y="time ÷ plain baseline's")
    planned = [cell for cell in cells if cell['executor'] == 'planned']
    for color, batch in zip(itertools.cycle(SERIES), sorted({cell['batch'] for cell in planned}), strict=False):
        points = sorted((1 / cell['mac_limit'], 1 / cell['gain']) for cell in planned if cell['batch'] == batch)
        axes.plot(*zip(*points, strict=True), '-o', color=color, markersize=4, label=f'batch {batch:,}')
    axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='time follows MACs')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    save(figure, path, legend_columns=3)


def _planned_by_shares(cells: Sequence[Record]) -> dict[str, list[Record]]:
    """Groups planned cells by the shares that were asked for; a small batch rounds what it gets."""
    found: dict[str, list[Record]] = {}
    for cell in cells:
        if cell['executor'] == 'planned':
            found.setdefault('/'.join(f'{100 * share:.0f}' for share in cell['shares']), []).append(cell)
    return {name: sorted(cells, key=lambda cell: cell['batch']) for name, cells in found.items()}


def _logarithmic(axes: Any, cells: Sequence[Record]) -> None:
    """Makes both axes logarithmic, with batch sizes and plain numbers as ticks."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    batches = sorted({cell['batch'] for cell in cells})
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_xticks(batches, [f'{batch:,}' for batch in batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f'{value:g}' if f'{value:e}'[0] in '125' else ''))
