"""Pictures of answers: how far their confidence can be trusted, which inputs leave where, and masks exit by exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from branchy_jax.criteria.learned import Reliability
from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_grid, save
from branchy_jax.types import Array


def reliability_diagrams(path: Path | str, found: Mapping[str, Sequence[Reliability]], *, title: str = '') -> None:
    """Draws for every exit how often answers of a given confidence are right, before and after calibration for example.

    Args:
        path: the picture to write.
        found: name to what `branchy_jax.criteria.reliability` found of each exit: ``{'before': …, 'after': …}``.
        title: above the picture.

    Raises:
        ValueError: nothing to draw, or lines with other numbers of exits.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, Figure 1.
    """
    exits = {len(of_exits) for of_exits in found.values()}
    if len(exits) != 1 or 0 in exits:
        raise ValueError(f'found: expected one Reliability per exit under every name, got {sorted(exits)} exits')
    (count,) = exits
    figure, grid = new_grid(title, 1, count, size=(3.4 * count + 0.4, 4.4), sharey=True)
    colors = (BASELINE, OURS, *SERIES[1:])
    for n, axes in enumerate(grid[0]):
        axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='calibrated' if n == 0 else None)
        for (name, of_exits), color in zip(found.items(), colors, strict=False):
            bins = of_exits[n]
            full = bins.count > 0
            axes.plot(
                bins.confidence[full],
                bins.accuracy[full],
                '-o',
                color=color,
                markersize=4,
                label=name if n == 0 else None,
            )
        errors = ' → '.join(f'{100 * of_exits[n].error:.2f}' for of_exits in found.values())
        axes.set_title(f'exit {n + 1}: ECE {errors} %', fontsize=9, loc='left')
        axes.set_xlabel('confidence')
        axes.set_box_aspect(1)
        axes.spines[['top', 'right']].set_visible(False)
    grid[0, 0].set_ylabel('share of right answers')
    save(figure, path, legend_columns=3)


def images_by_exit(
    path: Path | str, images: Array, exit_index: Array, *, num_exits: int, columns: int = 16, title: str = ''
) -> None:
    """Shows images that left at each exit, two rows for each.

    Args:
        path: the picture to write.
        images: ``[B, H, W, C]`` uint8 with one channel or three, in the order to show.
        exit_index: ``[B]`` where they left.
        num_exits: N.
        columns: images in a row.
        title: above the picture.

    Raises:
        ValueError: other images, or not one exit for each.
    """
    images, exit_index = np.asarray(images), np.asarray(exit_index)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[:1] != exit_index.shape:
        raise ValueError(
            f'images: expected uint8 [B, H, W, C] and an exit for each, got {images.dtype} {images.shape} and '
            f'{exit_index.shape}'
        )
    figure, grid = new_grid(title, num_exits, 1, size=(8, 1.45 * num_exits + 0.4))
    for n, axes in enumerate(grid[:, 0]):
        shown = images[exit_index == n][: 2 * columns]
        axes.imshow(_tiled(shown, columns), cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axes.set_title(f'left at exit {n + 1}: {100 * np.mean(exit_index == n):.1f} %', fontsize=9, loc='left')
        axes.set_axis_off()
    save(figure, path)


def _tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays images out in two rows, white where there are none."""
    height, width, channels = images.shape[1:]
    sheet = np.full((2 * columns, height, width, channels), 255, np.uint8)
    sheet[: len(images)] = images
    rows = sheet.reshape(2, columns, height, width, channels).swapaxes(1, 2)
    tiled = rows.reshape(2 * height, columns * width, channels)
    return tiled[..., 0] if channels == 1 else tiled


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
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    images, labels, predictions, exit_index = map(np.asarray, (images, labels, predictions, exit_index))
    names = tuple(str(k) for k in range(num_classes)) if class_names is None else tuple(class_names)
    fitting = images.ndim == predictions.ndim == 4 and images.shape[:3] == labels.shape == predictions.shape[1:]
    if not fitting or len(names) != num_classes:
        raise ValueError(
            f'predictions: expected [N, M, H, W] for images [M, H, W, C], labels [M, H, W] and K names, got '
            f'{predictions.shape}, {images.shape}, {labels.shape} and {len(names)} for {num_classes} classes'
        )
    exits, rows = predictions.shape[:2]
    colors = ListedColormap(_colors(num_classes))
    figure, grid = new_grid(title, rows, exits + 2, size=(1.55 * (exits + 2), 1.62 * rows + 1.1))
    for row, line in enumerate(grid):
        line[0].imshow(images[row, ..., 0] if images.shape[-1] == 1 else images[row], cmap='gray', vmin=0, vmax=255)
        for axes, mask in zip(line[1:], [labels[row], *predictions[:, row]], strict=True):
            axes.imshow(mask, cmap=colors, vmin=-0.5, vmax=num_classes - 0.5, interpolation='nearest')
        for column, axes in enumerate(line):
            answered = column == exit_index[row] + 2
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=OURS if answered else 'none', linewidth=4)
            if answered:
                axes.set_xlabel('answers', color=OURS, fontsize=8, labelpad=2)
    for axes, name in zip(grid[0], ['input', 'truth', *(f'exit {n + 1}' for n in range(exits))], strict=True):
        axes.set_title(name, fontsize=10, color=INK)
    patches = [Patch(facecolor=colors(k), edgecolor=INK, linewidth=0.4, label=name) for k, name in enumerate(names)]
    save(
        figure,
        path,
        legend_columns=min(num_classes, 12),
        handles=patches,
        fontsize=8,
        handlelength=1,
        columnspacing=0.9,
    )


def _colors(count: int) -> list[tuple[float, ...]]:
    """Returns black for class 0, and as distinct a colour as there is for each of the others."""
    from matplotlib import colormaps

    palette = colormaps['tab10'] if count <= 11 else colormaps['turbo']
    return [(0.0, 0.0, 0.0, 1.0), *(palette(k if count <= 11 else k / max(1, count - 2)) for k in range(count - 1))]
