"""Colours, axes, legend and file of all pictures. Matplotlib is imported on use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically

INK, OURS, BASELINE = '#222222', '#0b6e99', '#c2410c'
SERIES = ('#0b6e99', '#2a9d5c', '#8e5ea2', '#b8860b', '#c2557a', '#4c566a', '#7a9a01')


def new_axes(title: str, *, x: str, y: str) -> tuple[Any, Any]:
    """Returns a figure and its one pair of axes, in the style of all pictures.

    Args:
        title: above the picture.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), dpi=150, layout='constrained')
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(title, color=INK, fontsize=11, loc='left')
    axes.grid(color='#e5e5e5', linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def new_grid(title: str, rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Returns a figure and its axes ``[rows, columns]``.

    Args:
        title: above the picture.
        rows: number of rows of axes.
        columns: number of columns.
        size: width and height of the figure in inches.
        **options: for Matplotlib's ``subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout='constrained')
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha='left')
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Path | str, *, legend_columns: int | None = None, **legend: Any) -> None:
    """Writes a figure as PNG, atomically.

    Args:
        figure: from `new_axes` or `new_grid`.
        path: the picture to write.
        legend_columns: columns of a legend below the axes; ``None`` leaves the legend out.
        **legend: more options of that legend.
    """
    if legend_columns is not None:
        figure.legend(loc='outside lower center', ncols=legend_columns, frameon=False, **legend)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))
