"""Pictures of trade-offs and of answers. Matplotlib is imported on use."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria.learned import Reliability
from branchy_jax.thresholds import Screen
from branchy_jax.types import Array

__all__ = ['accuracy_against_cost', 'images_by_exit', 'masks', 'reliability_diagrams', 'tradeoff']

INK, OURS, BASELINE = '#222222', '#0b6e99', '#c2410c'
SERIES = ('#0b6e99', '#2a9d5c', '#8e5ea2', '#b8860b', '#c2557a', '#4c566a', '#7a9a01')


def new_axes(title: str, *, x: str, y: str) -> tuple[Any, Any]:
    """Returns a figure and its one pair of axes, in the style of all pictures.

    Args:
        title: above the picture.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis.
    """
    figure, ((axes,),) = new_grid('', 1, 1, size=(7, 4.8))
    axes.set_title(title, color=INK, fontsize=11, loc='left')
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.grid(color='#e5e5e5', linewidth=0.6)
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
        figure.legend(loc='outside lower center', ncols=legend_columns, frameon=False, borderaxespad=0, **legend)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))


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
    figure, axes = new_axes(title, x=f'time per image, batch {batch} (ms)', y=f'test {label or metric} (%)')
    gain, ring = f'{chosen["gain"]:.2f}× faster', {'markerfacecolor': 'none', 'markeredgecolor': OURS}
    for records, mark, size, color, name, style in (
        (frontier, '-o', 3.5, OURS, 'thresholds of the frontier', {}),
        ([chosen], '*', 17, OURS, f'chosen on validation data, {gain}', {}),
        ([knee] if knee else [], 'o', 14, OURS, 'knee', ring),
        ([baseline], 's', 9, BASELINE, f'{baseline["network"]}, no exits', {}),
    ):
        points = [(record['latency_ms'], 100 * record[f'test_{metric}']) for record in records]
        if points:
            axes.plot(*zip(*points, strict=True), mark, markersize=size, color=color, label=name, **style)
    axes.axhline(100 * baseline[f'test_{metric}'], color=BASELINE, linewidth=0.8, linestyle=':')
    axes.set_xlim(left=0)
    save(figure, path, legend_columns=2)


def accuracy_against_cost(
    path: Path | str, screens: Mapping[str, Screen], *, title: str = '', unit: str = 'multiply-accumulates'
) -> None:
    """Draws accuracy against expected cost, one line for each name: frontiers, protocols, searches.

    Args:
        path: the picture to write.
        screens: a screen for each name, such as a frontier; drawn by ascending cost.
        title: above the picture.
        unit: of the screens' cost.

    Raises:
        ValueError: no lines.

    Example:
        >>> accuracy_against_cost('frontier.png', {'entropy': table.screen().frontier()})  # doctest: +SKIP
    """
    if not screens:
        raise ValueError('screens: nothing to draw; give at least one')
    splits = ', '.join(dict.fromkeys(screen.split for screen in screens.values()))
    figure, axes = new_axes(title, x=f'expected cost of an input ({unit})', y=f'accuracy on {splits} data (%)')
    for (name, screen), mark, color in zip(screens.items(), itertools.cycle('os^vDPX'), itertools.cycle(SERIES)):
        order = np.argsort(screen.cost, kind='stable')
        points = screen.cost[order], 100 * screen.accuracy[order]
        axes.plot(*points, f'-{mark}', color=color, markersize=4, linewidth=1.2, label=name)
    save(figure, path, legend_columns=3)


def reliability_diagrams(path: Path | str, measured: Mapping[str, Sequence[Reliability]], *, title: str = '') -> None:
    """Draws for every exit how often answers of a given confidence are right, before and after calibration for example.

    Args:
        path: the picture to write.
        measured: for each name, the `branchy_jax.criteria.reliability` of every exit: ``{'before': …, 'after': …}``.
        title: above the picture.

    Raises:
        ValueError: nothing to draw, or lines with other numbers of exits.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, Figure 1.
    """
    counts = {len(of_exits) for of_exits in measured.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f'measured: expected one Reliability per exit under every name, got {sorted(counts)} exits')
    (count,) = counts
    figure, grid = new_grid(title, 1, count, size=(3.4 * count + 0.4, 4.4), sharey=True)
    for n, axes in enumerate(grid[0]):
        axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='calibrated')
        for (name, of_exits), color in zip(measured.items(), (BASELINE, *SERIES), strict=False):
            full = of_exits[n].count > 0
            confidence, accuracy = of_exits[n].confidence[full], of_exits[n].accuracy[full]
            axes.plot(confidence, accuracy, '-o', color=color, markersize=4, label=name)
        errors = ' → '.join(f'{100 * of_exits[n].error:.2f}' for of_exits in measured.values())
        axes.set_title(f'exit {n}: ECE {errors} %', fontsize=9, loc='left')
        axes.set(xlabel='confidence', box_aspect=1)
        axes.spines[['top', 'right']].set_visible(False)
    grid[0, 0].set_ylabel('share of right answers')
    save(figure, path, legend_columns=3, handles=grid[0, 0].lines)


def images_by_exit(
    path: Path | str, images: Array, exit_index: Array, *, num_exits: int, columns: int = 16, title: str = ''
) -> None:
    """Shows images that left at each exit, two rows for each.

    Args:
        path: the picture to write.
        images: ``[B, H, W, C]`` uint8 with one channel or three, in the order to show.
        exit_index: ``[B]`` the exits that they left at.
        num_exits: N.
        columns: images in a row.
        title: above the picture.

    Raises:
        ValueError: other images, or not one exit for each.
    """
    images, exit_index = np.asarray(images), np.asarray(exit_index)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[:1] != exit_index.shape:
        given = f'{images.dtype} {images.shape} and {exit_index.shape}'
        raise ValueError(f'images: expected uint8 [B, H, W, C] and an exit for each, got {given}')
    _, height, width, channels = images.shape
    figure, grid = new_grid(title, num_exits, 1, size=(8, 1.45 * num_exits + 0.4))
    for n, axes in enumerate(grid[:, 0]):
        left = exit_index == n
        shown = images[left][: 2 * columns]
        missing = [(0, 2 * columns - len(shown)), (0, 0), (0, 0), (0, 0)]
        sheet = np.pad(shown, missing, constant_values=255).reshape(2, columns, height, width, channels)
        tiled = sheet.swapaxes(1, 2).reshape(2 * height, columns * width, channels)
        axes.imshow(tiled, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axes.set_title(f'left at exit {n}: {100 * left.mean():.1f} %', fontsize=9, loc='left')
        axes.set_axis_off()
    save(figure, path)


def masks(
    path: Path | str,
    images: Array,
    labels: Array,
    predictions: Array,
    exit_index: Array,
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    title: str = '',
) -> None:
    """Draws one image per row: input, truth, and the mask of each exit; the exit that answered is framed.

    Args:
        path: the picture to write.
        images: ``[M, H, W, C]`` uint8, with one channel or three.
        labels: ``[M, H, W]``.
        predictions: ``[N, M, H, W]`` classes, of every exit.
        exit_index: ``[M]`` the exit that answered.
        num_classes: K; class 0 is drawn black.
        class_names: K names for the legend; numbers if none are given.
        title: above the picture.

    Raises:
        ValueError: arrays that do not go together, or another number of names than classes.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    images, labels, predictions = map(np.asarray, (images, labels, predictions))
    names = class_names or [str(k) for k in range(num_classes)]
    fitting = images.ndim == predictions.ndim == 4 and images.shape[:3] == labels.shape == predictions.shape[1:]
    if not fitting or len(names) != num_classes:
        given = f'{predictions.shape}, {images.shape}, {labels.shape} and {len(names)} of {num_classes} names'
        raise ValueError(f'predictions: expected [N, M, H, W], images [M, H, W, C] and labels [M, H, W], got {given}')
    exits, rows = predictions.shape[:2]
    palette = colormaps['tab10'] if num_classes <= 11 else colormaps['turbo'].resampled(num_classes - 1)
    colors = ListedColormap(['black', *palette(range(num_classes - 1))])
    figure, grid = new_grid(title, rows, exits + 2, size=(1.55 * (exits + 2), 1.62 * rows + 1.1))
    for axes, name in zip(grid[0], ['input', 'truth', *(f'exit {n}' for n in range(exits))], strict=True):
        axes.set_title(name, fontsize=10, color=INK)
    for row, line in enumerate(grid):
        line[0].imshow(images[row], cmap='gray', vmin=0, vmax=255)
        for axes, mask in zip(line[1:], [labels[row], *predictions[:, row]], strict=True):
            axes.imshow(mask, cmap=colors, vmin=-0.5, vmax=num_classes - 0.5, interpolation='nearest')
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        answering = line[int(exit_index[row]) + 2]
        answering.spines[:].set(visible=True, color=OURS, linewidth=4)
        answering.set_xlabel('answers', color=OURS, fontsize=8, labelpad=2)
    patches = [Patch(facecolor=colors(k), edgecolor=INK, linewidth=0.4, label=name) for k, name in enumerate(names)]
    save(figure, path, legend_columns=min(num_classes, 12), handles=patches, fontsize=8, handlelength=1)
