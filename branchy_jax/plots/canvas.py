"""What all pictures share. Matplotlib is imported on use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically

INK, OURS, BASELINE = '#222222', '#0b6e99', '#c2410c'
SERIES = ('#0b6e99', '#2a9d5c', '#8e5ea2', '#b8860b', '#c2557a', '#4c566a', '#7a9a01')


def new_figure(title: str) -> tuple[Any, Any]:
    """Returns a figure and its axes, in the house's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    axes.set_title(title, color=INK, fontsize=11, loc='left')
    axes.grid(color='#e5e5e5', linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path | str) -> None:
    """Writes a figure as PNG, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))
