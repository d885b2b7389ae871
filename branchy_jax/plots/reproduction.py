"""Pictures of a reproduction: our measured points beside a paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_figure, save

_MARKS = (('o', '#8a8a8a'), ('o', OURS), ('*', INK), ('D', INK))
Points = Sequence[tuple[float, float]]


def beside(
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
        note: above the picture, such as what the data are.
        marked: single points by label, such as a knee.
        log_x: whether the horizontal axis is logarithmic.
    """
    figure, axes = new_figure(title)
    for color, (name, points) in zip((OURS, BASELINE, *SERIES[1:]), ours.items(), strict=False):
        style = '-o' if len(points) > 1 else 's'
        axes.plot(*zip(*points, strict=True), style, color=color, markersize=5, label=name)
    for line, (name, points) in zip(('--^', ':v', '-.d'), paper.items(), strict=False):
        axes.plot(*zip(*points, strict=True), line, color='#8a8a8a', markersize=6, linewidth=1, label=f'{name} (paper)')
    for (marker, color), (name, point) in zip(_MARKS, (marked or {}).items(), strict=False):
        axes.plot(*point, marker, markersize=15, markerfacecolor='none', markeredgecolor=color, linewidth=0, label=name)
    if not ours:
        axes.text(0.5, 0.5, 'ours: not run', transform=axes.transAxes, ha='center', color=BASELINE, fontsize=14)
    if note:
        axes.text(1, 1.01, note, transform=axes.transAxes, ha='right', va='bottom', color=INK, fontsize=7)
    if log_x:
        axes.set_xscale('log')
    elif all(float(place).is_integer() for points in (*ours.values(), *paper.values()) for place, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    save(figure, path)


def gradient_norms(path: Path | str, norms: Mapping[str, Any], *, steps: int, title: str = '') -> None:
    """Draws the gradient of each layer, with and without branches, before and after some training.

    Args:
        path: the picture to write.
        norms: ``[S, 2, layers]`` by network: seeds, before and after, layers.
        steps: how much training lies between.
        title: above the picture.
    """
    figure, axes = new_figure(title)
    for color, (name, values) in zip((OURS, BASELINE), norms.items(), strict=False):
        values = np.maximum(np.asarray(values), 1e-12)
        layers = np.arange(values.shape[-1]) + 1
        for moment, style, when in ((0, '-', 'at initialisation'), (1, ':', f'after {steps} steps')):
            middle = np.exp(np.log(values[:, moment]).mean(axis=0))
            axes.plot(layers, middle, style, color=color, label=f'{name}, {when}')
            axes.fill_between(
                layers, values[:, moment].min(axis=0), values[:, moment].max(axis=0), color=color, alpha=0.12,
                linewidth=0,
            )  # fmt: skip
    axes.set_yscale('log')
    axes.set_xlabel('layer of the trunk, from the input')
    axes.set_ylabel('root mean square gradient')
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    save(figure, path)
