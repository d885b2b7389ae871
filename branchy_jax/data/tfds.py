"""Data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from branchy_jax.data.sources import Arrays, cached, check_arrays

_MASK = 'segmentation_mask'


def read_tfds(name: str, cache: Path, *, task: str, image_size: tuple[int, int] | None, download: bool) -> Arrays:
    """Reads a prepared data set through `tfds.data_source`, and caches what was decoded.

    Args:
        name: of the data set.
        cache: folder for decoded arrays.
        task: ``'classification'`` reads the supervised label, ``'segmentation'`` the feature ``segmentation_mask``,
            whose classes are counted from 0.
        image_size: ``(H, W)`` to resize to, or ``None``.
        download: whether TFDS may fetch and prepare it.

    Raises:
        ValueError: unknown name, not prepared, without such labels, or images of several sizes and no ``image_size``.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f'name: {name!r} comes from TensorFlow Datasets; pip install tensorflow-datasets') from error
    try:
        # Given here, since TFDS itself reads the variable only when it is first imported.
        builder = tfds.builder(name, file_format='array_record', data_dir=os.environ.get('TFDS_DATA_DIR'))
    except tfds.core.DatasetNotFoundError as error:
        choices = ['mnist5k', *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, choices, n=3) or ['mnist5k', 'mnist', 'cifar10']
        raise ValueError(
            f'name: unknown data set {name!r}; did you mean {", ".join(close)}? '
            "Choose 'mnist5k', 'digit_canvases', a TFDS name, or a path ending in .npz"
        ) from error
    if not builder.is_prepared():
        _prepare(builder, name, download=download)
    features = _features(builder, task)
    if features is None or set(builder.info.splits) < {'train', 'test'}:
        raise ValueError(f'name: {name!r} is not an image {task} data set with train and test splits')
    key = hashlib.sha256(f'{builder.data_dir} {features} {image_size}'.encode()).hexdigest()[:12]
    file = re.sub(r'\W+', '-', builder.info.full_name)
    return cached(cache / f'{file}-{key}.npz', lambda: _decode(builder, *features, image_size))


def _features(builder: Any, task: str) -> tuple[str, str] | None:
    if task == 'classification':
        return builder.info.supervised_keys
    return ('image', _MASK) if {'image', _MASK} <= set(builder.info.features) else None


def _prepare(builder: Any, name: str, *, download: bool) -> None:
    place = f'{name!r} is not prepared in {builder.data_dir}'
    if not download:  # asked first: without a network TFDS takes minutes to say so
        raise ValueError(
            f'name: {place}; set TFDS_DATA_DIR to where it is, or pass download=True on a machine with a network'
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # network, disk, checksum, or TensorFlow missing: each its own kind
        raise ValueError(
            f'name: {place}, and preparing it failed ({type(error).__name__}: {str(error)[:200]}); check the network, '
            "or use 'mnist5k', which needs none"
        ) from error


def _decode(builder: Any, image_key: str, label_key: str, image_size: tuple[int, int] | None) -> Arrays:
    arrays = {}
    for split in ('train', 'test'):
        examples = [
            (_resized(example[image_key], image_size, smooth=True), _resized(example[label_key], image_size))
            for example in builder.as_data_source(split=split)
        ]
        sizes = {image.shape for image, _ in examples}
        if len(sizes) > 1:
            raise ValueError(
                f'image_size: images of {builder.info.full_name} differ in size ({min(sizes)} to {max(sizes)}); give '
                'the height and width to resize them to'
            )
        arrays[f'x_{split}'] = np.stack([image for image, _ in examples])
        arrays[f'y_{split}'] = np.array([label for _, label in examples], np.int32)
    if label_key == _MASK:  # the pets' classes, say, are 1, 2, 3
        lowest = min(arrays['y_train'].min(), arrays['y_test'].min())
        arrays.update({key: arrays[key] - lowest for key in ('y_train', 'y_test')})
    return check_arrays(arrays, builder.info.full_name)


def _resized(pixels: Any, size: tuple[int, int] | None, *, smooth: bool = False) -> Any:
    """Resizes an image; a mask keeps whole classes, and a label of one number stays as it is."""
    if size is None or np.ndim(pixels) < 2 or np.shape(pixels)[:2] == tuple(size):
        return pixels
    from PIL import Image

    grey = np.shape(pixels)[-1] == 1
    image = Image.fromarray(np.asarray(pixels)[..., 0] if grey else np.asarray(pixels))
    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)
    return np.asarray(image)[..., None] if grey else np.asarray(image)
