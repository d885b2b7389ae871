"""Pictures of the commands: beside the paper, over the batch size, over the layers of a network."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from branchy_jax.plots import BASELINE, INK, OURS, SERIES, new_axes, save
from branchy_jax.report import Record
from branchy_jax.types import Array

Points = Sequence[tuple[float, float]]

_GREY = '#8a8a8a'
_MARKS = (('o', _GREY), ('o', OURS), ('*', INK), ('D', INK))


def against_paper(
    path: Path | str,
    ours: Mapping[str, Points],
    theirs: Mapping[str, Points],
    *,
    x: str,
    y: str,
    title: str,
    note: str = '',
    marked: Mapping[str, tuple[float, float]] | None = None,
    log_x: bool = False,
) -> None:
    """Draws our curves and published ones on one pair of axes.

    Args:
        path: the picture to write.
        ours: points by series; if there are none, the picture says so.
        theirs: published points by series.
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
    for line, (name, points) in zip(('--^', ':v', '-.d'), theirs.items(), strict=False):
        axes.plot(*zip(*points, strict=True), line, color=_GREY, markersize=6, linewidth=1, label=name)
    for (marker, color), (name, point) in zip(_MARKS, (marked or {}).items(), strict=False):
        axes.plot(*point, marker, markersize=15, markerfacecolor='none', markeredgecolor=color, linewidth=0, label=name)
    if not ours:
        axes.text(0.5, 0.5, 'ours: not run', transform=axes.transAxes, ha='center', color=BASELINE, fontsize=14)
    if note:
        axes.set_title(title, color=INK, fontsize=11, loc='left', pad=16)  # the note has a line of its own below
        axes.text(0, 1.01, note, transform=axes.transAxes, va='bottom', color=INK, fontsize=7)
    if log_x:
        axes.set_xscale('log')
    elif all(float(place).is_integer() for points in (*ours.values(), *theirs.values()) for place, _ in points):
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


def gain_against_batch(path: Path | str, rows: Sequence[Record], *, title: str = '') -> None:
    """Draws the gain against the batch size, with the MAC limit of each operating point as a line.

    Args:
        path: the picture to write.
        rows: with ``batch``, ``operating_point``, ``gain`` and ``mac_limit``.
        title: above the picture.
    """
    figure, axes = new_axes(title, x='batch size', y='gain over the baseline (dotted, bars: MAC limit)')
    names = dict.fromkeys(row['operating_point'] for row in rows)
    for color, name in zip(itertools.cycle(SERIES), names, strict=False):
        own = sorted((row for row in rows if row['operating_point'] == name), key=lambda row: row['batch'])
        batches = [row['batch'] for row in own]
        axes.plot(batches, [row['gain'] for row in own], '-o', color=color, markersize=4, label=f'{name} % leave')
        axes.plot(batches, [row['mac_limit'] for row in own], ':_', color=color, linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set(xscale='log', yscale='log')
    sizes = sorted({row['batch'] for row in rows})
    axes.set_xticks(sizes, map(str, sizes))
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.minorticks_off()
    save(figure, path, legend_columns=3)
