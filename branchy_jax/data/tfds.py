"""Data sets of TensorFlow Datasets: found as they lie prepared, decoded without TensorFlow, and read where they lie.

What is held in memory was read by the same code (`OnDisk.read`) as what stays on disk, so the two cannot differ.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import numpy as np

from branchy_jax.types import Batch

_MASK = 'segmentation_mask'

BLOCK = 512
"""Examples that are worked on at a time where all of them need not be in memory: 77 MB of 224 × 224 pixels."""

Transform = Callable[[np.ndarray], np.ndarray]
"""``image as decoded → image [H, W, C]`` uint8, of one size for all, on the host: a crop of the centre, for example."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What becomes of an example of TFDS: an image with its label or its mask.

    Attributes:
        image_key: of the image in an example.
        label_key: of the label.
        first_class: what the data set counts from, such as the 1 of the pets' masks; becomes 0.
        image_size: ``(H, W)`` that images and masks are resized to; ``None`` leaves them as they are.
        transform: of the image, last of all.
    """

    image_key: str
    label_key: str
    first_class: int = 0
    image_size: tuple[int, int] | None = None
    transform: Transform | None = None

    def __call__(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``[H, W, C]`` and an int32, or a mask ``[H, W]`` uint8."""
        image = _resized(example[self.image_key], self.image_size, smooth=True)
        if self.transform is not None:
            image = self.transform(image)
        label = _resized(np.asarray(example[self.label_key]), self.image_size)
        if label.ndim == 3:
            label = label[..., 0]
        return image, (label - self.first_class).astype(np.uint8 if label.ndim else np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class OnDisk:
    """Training examples that stay on disk, read in any order; `branchy_jax.data.load_dataset` makes them.

    Attributes:
        name: for messages.
        source: of TFDS, random access.
        decoding: of an example.
        rows: ``[M]`` which of the source's examples these are.
        image_shape: ``(H, W, C)``, of all of them.
        workers: processes that read and decode; 0 reads in a thread of this one.
        prefetch: batches read ahead.
    """

    name: str
    source: Any
    decoding: Decoding
    rows: np.ndarray
    image_shape: tuple[int, ...]
    workers: int = 0
    prefetch: int = 4

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> Batch:
        """Reads and decodes examples by their position, just as a training split in memory holds them.

        Args:
            rows: ``[B]`` positions below ``len(self)``.

        Returns:
            Images ``[B, H, W, C]`` uint8, and labels ``[B]`` int32 or masks ``[B, H, W]`` uint8.

        Raises:
            ValueError: an image of another size than the first, or a mask of another size than its image.
        """
        pairs = [self.decoding(example) for example in self.source.__getitems__(self.rows[np.asarray(rows)].tolist())]
        for image, label in pairs:
            if image.shape != self.image_shape or label.shape not in ((), self.image_shape[:2]):
                mask = f' with a mask {label.shape}' if label.ndim else ''
                raise ValueError(
                    f'image_size: images of {self.name} differ in size ({self.image_shape}, then {image.shape}{mask}); '
                    'give the height and width to resize them to, or a transform'
                )
        images, labels = (np.stack(part) for part in zip(*pairs, strict=True))
        chex.assert_type([images, labels], [np.uint8, np.int32 if labels.ndim == 1 else np.uint8])
        return Batch(images, labels)

    def blocks(self) -> Iterator[Batch]:
        """Reads everything once, in order, a few hundred examples at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.read(np.arange(start, min(start + BLOCK, len(self))))

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Reads the batches of an epoch, ahead of their use.

        Args:
            order: ``[steps, B]`` positions, as from `branchy_jax.training.epoch_order`; some of its columns, where
                several hosts share each batch.
            first_step: where to begin, in the middle of an epoch perhaps.
        """
        import grain
        from absl import flags

        steps = grain.MapDataset.source(_Steps(self, np.asarray(order)))[first_step:]
        options = grain.ReadOptions(num_threads=0 if self.workers else 1, prefetch_buffer_size=self.prefetch)
        stream = steps.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # in place of `absl.app.run`, without which grain's processes do not start
                flags.FLAGS.mark_as_parsed()
            ahead = max(1, self.prefetch // self.workers)
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead))
        for image, label in stream:
            # Copies: the arrays of other processes lie in shared memory, which is to be given back at once.
            yield Batch(np.array(image), np.array(label))


class _Steps:
    """Whole batches as grain's examples: however many workers read, the batches and their order stay the same."""

    def __init__(self, examples: OnDisk, order: np.ndarray) -> None:
        chex.assert_rank(order, 2)
        self._examples, self._order = examples, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        batch = self._examples.read(self._order[step])
        return np.asarray(batch.image), np.asarray(batch.label)


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
    def name(self) -> str:
        """With configuration and version."""
        return self.builder.info.full_name

    @property
    def file_name(self) -> str:
        """A name for files derived from this very data set."""
        key = hashlib.sha256(f'{self.builder.data_dir} {self.label_key}'.encode()).hexdigest()[:12]
        return re.sub(r'\W+', '-', self.name) + f'-{key}'

    def classes(self) -> dict[str, np.ndarray]:
        """Reads all labels once, and no image.

        Returns:
            ``train [M]`` int32, zeros for masks, which have no class to stratify by; ``first``, which the data set
            counts from, and ``number`` of classes.

        Raises:
            ValueError: labels below 0, as of test splits whose labels are secret, or more classes than a mask can hold.
        """
        train, test = (list(self._labels(split)) for split in ('train', 'test'))
        lowest = int(min(block.min() for block in (*train, *test)))
        highest = int(max(block.max() for block in (*train, *test)))
        masks = self.label_key == _MASK
        if lowest < 0 or (masks and highest - lowest > 255):
            raise ValueError(f'name: {self.name} holds labels from {lowest} to {highest}; expected classes from 0')
        first = lowest if masks else 0
        return {
            'train': np.concatenate([np.zeros(len(block)) if masks else block for block in train]).astype(np.int32),
            'first': np.array(first),
            'number': np.array(highest - first + 1),
        }

    def _labels(self, split: str) -> Iterator[np.ndarray]:
        """Yields labels block by block; of a mask, its lowest and highest class ``[B, 2]``."""
        import tensorflow_datasets as tfds

        undecoded = {self.image_key: tfds.decode.SkipDecoding()}
        source = self.builder.as_data_source(split=split, decoders=undecoded)
        for start in range(0, len(source), BLOCK):
            examples = source.__getitems__(list(range(start, min(start + BLOCK, len(source)))))
            labels = [np.asarray(example[self.label_key]) for example in examples]
            yield np.array([(label.min(), label.max()) if label.ndim else label for label in labels])

    def open(self, split: str, decoding: Decoding, *, workers: int = 0, prefetch: int = 4) -> OnDisk:
        """Returns the examples of a split.

        Raises:
            ValueError: no images, or such as are not uint8 ``[H, W, C]``.
        """
        source, name = self.builder.as_data_source(split=split), f'{self.name}, {split}'
        if len(source) == 0:
            raise ValueError(f'name: the {split} split of {self.name} is empty')
        first, _ = decoding(source[0])
        if np.ndim(first) != 3 or first.dtype != np.uint8:
            culprit = 'name' if decoding.transform is None else 'transform'
            raise ValueError(f'{culprit}: images must be uint8 [H, W, C], got {first.dtype} {first.shape} of {name}')
        return OnDisk(name, source, decoding, np.arange(len(source)), first.shape, workers=workers, prefetch=prefetch)


def find_prepared(name: str, *, task: str, download: bool) -> Prepared:
    """Finds a data set of TFDS in ``TFDS_DATA_DIR``.

    Args:
        name: of the data set.
        task: ``'classification'`` for the supervised label, ``'segmentation'`` for the feature ``segmentation_mask``.
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
            "Choose 'mnist5k', 'digit_canvases', a TFDS name, or a path ending in .npz"
        ) from error
    if not builder.is_prepared():
        _prepare(builder, name, download=download)
    keys = builder.info.supervised_keys if task == 'classification' else ('image', _MASK)
    if not ({'train', 'test'} <= set(builder.info.splits) and _is_image_task(builder.info.features, keys, task)):
        raise ValueError(f'name: {name!r} is not an image {task} data set with train and test splits')
    return Prepared(builder, *keys)


def _is_image_task(features: Mapping[str, Any], keys: Any, task: str) -> bool:
    import tensorflow_datasets as tfds

    if not isinstance(keys, tuple) or len(keys) != 2 or not all(key in features for key in keys):
        return False
    image, label = (features[key] for key in keys)
    if not isinstance(image, tfds.features.Image):
        return False
    return task == 'segmentation' or (label.shape == () and np.issubdtype(label.np_dtype, np.integer))


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


def _resized(pixels: np.ndarray, size: tuple[int, int] | None, *, smooth: bool = False) -> np.ndarray:
    """Resizes an image; a mask keeps whole classes, and a label of one number stays as it is."""
    if size is None or pixels.ndim < 2 or pixels.shape[:2] == tuple(size):
        return pixels
    from PIL import Image

    grey = pixels.ndim == 3 and pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    resized = np.asarray(image.resize((size[1], size[0]), resampling))
    return resized[..., None] if grey else resized
