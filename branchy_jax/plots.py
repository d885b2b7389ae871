"""Pictures. Matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically
from branchy_jax.report import Record

_INK, _OURS, _BASELINE, _PAPER = '#222222', '#0b6e99', '#c2410c', '#8a8a8a'


def tradeoff(
    path: Path | str,
    frontier: Sequence[Record],
    baseline: Record,
    chosen: Record,
    *,
    knee: Record | None = None,
    title: str = '',
    metric: str = 'accuracy',
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

    References:
        BranchyNet, 2016, Figure 3.
    """
    key = f'test_{metric}'

    def at(record: Record) -> tuple[float, float]:
        return record['latency_ms'], 100 * record[key]

    figure, axes = _figure(title)
    axes.plot(
        *zip(*map(at, frontier), strict=True), '-o', color=_OURS, markersize=3.5, label='thresholds of the frontier'
    )
    axes.plot(
        *at(chosen), '*', color=_OURS, markersize=17, label=f'chosen on validation data, {chosen["gain"]:.2f}× faster'
    )
    if knee is not None:
        axes.plot(*at(knee), 'o', markersize=14, markerfacecolor='none', markeredgecolor=_OURS, label='knee')
    axes.plot(*at(baseline), 's', color=_BASELINE, markersize=9, label=f'{baseline["network"]}, no exits')
    axes.axhline(at(baseline)[1], color=_BASELINE, linewidth=0.8, linestyle=':')
    axes.set_xlim(left=0)
    axes.set_xlabel('time per image, batch 1 (ms)')
    axes.set_ylabel(f'test {metric} (%)')
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    _save(figure, path)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    axes.set_title(title, color=_INK, fontsize=11, loc='left')
    axes.grid(color='#e5e5e5', linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path | str) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))
