"""Pictures of answers: reliability diagrams, the images that leave at each exit, and masks exit by exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from branchy_jax.criteria.learned import Reliability
from branchy_jax.plots.canvas import BASELINE, INK, OURS, SERIES, new_grid, save
from branchy_jax.types import Array


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
    exits = {len(of_exits) for of_exits in measured.values()}
    if len(exits) != 1 or 0 in exits:
        raise ValueError(f'measured: expected one Reliability per exit under every name, got {sorted(exits)} exits')
    count = exits.pop()
    figure, grid = new_grid(title, 1, count, size=(3.4 * count + 0.4, 4.4), sharey=True)
    colors = (BASELINE, OURS, *SERIES[1:])
    for n, axes in enumerate(grid[0]):
        axes.plot([0, 1], [0, 1], ':', color=INK, linewidth=1, label='calibrated')
        for (name, of_exits), color in zip(measured.items(), colors, strict=False):
            full = of_exits[n].count > 0
            confidence, accuracy = of_exits[n].confidence[full], of_exits[n].accuracy[full]
            axes.plot(confidence, accuracy, '-o', color=color, markersize=4, label=name)
        errors = ' → '.join(f'{100 * of_exits[n].error:.2f}' for of_exits in measured.values())
        axes.set_title(f'exit {n + 1}: ECE {errors} %', fontsize=9, loc='left')
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
    figure, grid = new_grid(title, num_exits, 1, size=(8, 1.45 * num_exits + 0.4))
    for n, axes in enumerate(grid[:, 0]):
        left = exit_index == n
        axes.imshow(_tiled(images[left], columns), cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axes.set_title(f'left at exit {n + 1}: {100 * left.mean():.1f} %', fontsize=9, loc='left')
        axes.set_axis_off()
    save(figure, path)


def _tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays the first images out in two rows, white where there are none."""
    _, height, width, channels = images.shape
    sheet = np.full((2 * columns, height, width, channels), 255, np.uint8)
    sheet[: len(images)] = images[: 2 * columns]
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
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    images, labels, predictions, exit_index = map(np.asarray, (images, labels, predictions, exit_index))
    names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
    fitting = images.ndim == predictions.ndim == 4 and images.shape[:3] == labels.shape == predictions.shape[1:]
    if not fitting or len(names) != num_classes:
        given = f'{predictions.shape}, {images.shape}, {labels.shape} and {len(names)} for {num_classes} classes'
        raise ValueError(
            f'predictions: expected [N, M, H, W], images [M, H, W, C], labels [M, H, W], K names; got {given}'
        )
    exits, rows = predictions.shape[:2]
    palette = colormaps['tab10'] if num_classes <= 11 else colormaps['turbo'].resampled(num_classes - 1)
    colors = ListedColormap(['black', *palette(range(num_classes - 1))])
    figure, grid = new_grid(title, rows, exits + 2, size=(1.55 * (exits + 2), 1.62 * rows + 1.1))
    for row, line in enumerate(grid):
        line[0].imshow(images[row, ..., 0] if images.shape[-1] == 1 else images[row], cmap='gray', vmin=0, vmax=255)
        for axes, mask in zip(line[1:], [labels[row], *predictions[:, row]], strict=True):
            axes.imshow(mask, cmap=colors, vmin=-0.5, vmax=num_classes - 0.5, interpolation='nearest')
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        answering = line[exit_index[row] + 2]
        answering.spines[:].set(visible=True, color=OURS, linewidth=4)
        answering.set_xlabel('answers', color=OURS, fontsize=8, labelpad=2)
    for axes, name in zip(grid[0], ['input', 'truth', *(f'exit {n + 1}' for n in range(exits))], strict=True):
        axes.set_title(name, fontsize=10, color=INK)
    patches = [Patch(facecolor=colors(k), edgecolor=INK, linewidth=0.4, label=name) for k, name in enumerate(names)]
    style = {'fontsize': 8, 'handlelength': 1, 'columnspacing': 0.9}
    save(figure, path, legend_columns=min(num_classes, 12), handles=patches, **style)
