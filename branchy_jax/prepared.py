"""Data sets of TensorFlow Datasets as they lie prepared on disk, found and checked without TensorFlow."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared image classification data set.

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
        key = hashlib.sha256(str(self.builder.data_dir).encode()).hexdigest()[:12]
        return re.sub(r'\W+', '-', self.builder.info.full_name) + f'-{key}'


def open_prepared(name: str, *, download: bool) -> Prepared:
    """Finds a data set of TFDS in ``TFDS_DATA_DIR``.

    Args:
        name: of an image classification data set.
        download: lets TFDS fetch and prepare it where it is not.

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
            "Choose 'mnist5k', a TFDS image classification name, or a path ending in .npz"
        ) from error
    if not builder.is_prepared():
        _prepare(builder, name, download=download)
    features = builder.info.supervised_keys
    if features is None or set(builder.info.splits) < {'train', 'test'}:
        raise ValueError(f'name: {name!r} is not an image classification data set with train and test splits')
    return Prepared(builder, *features)


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
