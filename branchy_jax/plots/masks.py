"""Pictures of dense prediction: inputs, truth, every exit's answer, and which exit answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from branchy_jax.plots.canvas import INK, OURS, save
from branchy_jax.types import Array


def masks(
    path: Path | str, images: Array, labels: Array, predictions: Array, exit_index: Array, *, num_classes: int,
    class_names: tuple[str, ...] | None = None, title: str = '',
) -> None:  # fmt: skip
    """Draws one image per row: input, truth, and the mask of each exit; the exit that answered is framed.

    Args:
        path: the picture to write.
        images: ``[M, H, W, C]`` uint8, with one channel or three.
        labels: ``[M, H, W]``.
        predictions: ``[N, M, H, W]`` classes, of every exit.
        exit_index: ``[M]`` the exit that answered.
        num_classes: K; class 0 is drawn black.
        class_names: for the legend; numbers if none are given.
        title: above the picture.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    exits, rows = predictions.shape[:2]
    colors = ListedColormap(_colors(num_classes))
    figure = Figure(figsize=(1.55 * (exits + 2), 1.62 * rows + 1.1), dpi=150, layout='constrained')
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha='left')
    grid = figure.subplots(rows, exits + 2, squeeze=False)
    for row, line in enumerate(grid):
        line[0].imshow(np.squeeze(images[row]), cmap='gray')
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
    names = class_names or tuple(str(k) for k in range(num_classes))
    patches = [Patch(facecolor=colors(k), edgecolor=INK, linewidth=0.4, label=names[k]) for k in range(num_classes)]
    figure.legend(handles=patches, loc='outside lower center', ncols=min(num_classes, 12), frameon=False, fontsize=8,
                  handlelength=1, columnspacing=0.9)  # fmt: skip
    save(figure, path)


def _colors(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    palette = colormaps['tab10'] if count <= 11 else colormaps['turbo']
    return [(0.0, 0.0, 0.0, 1.0), *(palette(k if count <= 11 else k / max(1, count - 2)) for k in range(count - 1))]
