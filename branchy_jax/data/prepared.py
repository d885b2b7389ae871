"""Data sets of TensorFlow Datasets as they lie prepared on disk, found and checked without TensorFlow."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from typing import Any

MASK = 'segmentation_mask'


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set of images.

    Attributes:
        builder: of TFDS; ``builder.as_data_source(split=…)`` reads examples in any order.
        image_key: of the image in an example.
        label_key: of the label.
    """

    builder: Any
    image_key: str
    label_key: str

    @property
    def file_name(self) -> str:
        """A name for files derived from this very data set."""
        key = hashlib.sha256(f'{self.builder.data_dir} {self.label_key}'.encode()).hexdigest()[:12]
        return re.sub(r'\W+', '-', self.builder.info.full_name) + f'-{key}'


def open_prepared(name: str, *, download: bool, task: str = 'classification') -> Prepared:
    """Finds a data set of TFDS in ``TFDS_DATA_DIR``.

    Args:
        name: of the data set.
        download: lets TFDS fetch and prepare it where it is not.
        task: ``'classification'`` for the supervised label, ``'segmentation'`` for the feature ``segmentation_mask``.

    Raises:
        ValueError: unknown name, not prepared, or another kind of data set.
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
    return Prepared(builder, *features)


def _features(builder: Any, task: str) -> tuple[str, str] | None:
    if task == 'classification':
        return builder.info.supervised_keys
    return ('image', MASK) if {'image', MASK} <= set(builder.info.features) else None


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
