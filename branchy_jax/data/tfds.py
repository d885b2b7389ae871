"""Data sets of TensorFlow Datasets as arrays, read without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.data.prepared import MASK, Prepared, open_prepared
from branchy_jax.data.sources import Arrays, cached, check_arrays


def read_tfds(name: str, cache: Path, *, task: str, image_size: tuple[int, int] | None, download: bool) -> Arrays:
    """Reads a prepared data set through `tfds.data_source`, and caches what was decoded.

    Args:
        name: of the data set.
        cache: folder for decoded arrays.
        task: as in `open_prepared`; classes of masks are counted from 0.
        image_size: ``(H, W)`` to resize to, or ``None``.
        download: whether TFDS may fetch and prepare it.

    Raises:
        ValueError: as `open_prepared`, or images of several sizes and no ``image_size``.
    """
    prepared = open_prepared(name, download=download, task=task)
    size = '' if image_size is None else '-{}x{}'.format(*image_size)
    return cached(cache / f'{prepared.file_name}{size}.npz', lambda: decode(prepared, image_size))


def decode(prepared: Prepared, image_size: tuple[int, int] | None) -> Arrays:
    """Decodes both splits of a prepared data set, resized if asked."""
    name, arrays = prepared.builder.info.full_name, {}
    for split in ('train', 'test'):
        examples = [
            (
                _resized(example[prepared.image_key], image_size, smooth=True),
                _resized(example[prepared.label_key], image_size),
            )
            for example in prepared.builder.as_data_source(split=split)
        ]
        sizes = {image.shape for image, _ in examples}
        if len(sizes) > 1:
            raise ValueError(
                f'image_size: images of {name} differ in size ({min(sizes)} to {max(sizes)}); give the height and '
                'width to resize them to'
            )
        arrays[f'x_{split}'] = np.stack([image for image, _ in examples])
        arrays[f'y_{split}'] = np.array([label for _, label in examples], np.int32)
    if prepared.label_key == MASK:  # the pets' classes, say, are 1, 2, 3
        lowest = min(arrays['y_train'].min(), arrays['y_test'].min())
        arrays.update({key: arrays[key] - lowest for key in ('y_train', 'y_test')})
    return check_arrays(arrays, name)


def _resized(pixels: Any, size: tuple[int, int] | None, *, smooth: bool = False) -> Any:
    """Resizes an image; a mask keeps whole classes, and a label of one number stays as it is."""
    if size is None or np.ndim(pixels) < 2 or np.shape(pixels)[:2] == tuple(size):
        return pixels
    from PIL import Image

    grey = np.shape(pixels)[-1] == 1
    image = Image.fromarray(np.asarray(pixels)[..., 0] if grey else np.asarray(pixels))
    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)
    return np.asarray(image)[..., None] if grey else np.asarray(image)
