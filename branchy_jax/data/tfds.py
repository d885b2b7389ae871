"""Data sets of TensorFlow Datasets: opened where they are prepared, decoded without TensorFlow, read in any order.

`OnDisk.read` decodes for data in memory and for data on disk, so both are equal.
"""

import dataclasses
import difflib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from branchy_jax.types import Batch

_MASK = 'segmentation_mask'

BLOCK = 512
"""Number of examples to decode at a time where not all need to be in memory: 77 MB of 224 × 224 pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class OnDisk:
    """Training examples that stay on disk, readable in any order; `branchy_jax.data.load_dataset` returns them.

    Attributes:
        name: for messages.
        source: random access to the examples.
        keys: the features of the image, and of the label or mask.
        first_class: the lowest class of the data set, such as the 1 of the pets' masks; it becomes 0.
        image_size: ``(H, W)`` that images and masks are resized to; ``None`` does not resize.
        rows: ``[M]`` indices into ``source``.
        workers: number of processes that read and decode; 0 reads in a thread of this process.
        prefetch: number of batches to read ahead.
    """

    name: str
    source: Any
    keys: tuple[str, str]
    first_class: int
    image_size: tuple[int, int] | None
    rows: np.ndarray
    workers: int = 0
    prefetch: int = 4

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> Batch:
        """Reads and decodes examples, as a training split in memory holds them.

        Args:
            rows: ``[B]`` positions below ``len(self)``.

        Returns:
            Images ``[B, H, W, C]`` uint8 with labels ``[B]`` int32 or masks ``[B, H, W]`` uint8.

        Raises:
            ValueError: if an image has another size than the first, or a mask another size than its image.
        """
        examples = self.source.__getitems__(self.rows[np.asarray(rows)].tolist())
        images, labels = zip(*map(self._decoded, examples), strict=True)
        sizes = {self.image_shape[:2], *(image.shape[:2] for image in images)}
        sizes |= {label.shape for label in labels if label.ndim}
        if len(sizes) > 1:
            raise ValueError(f'image_size: images of {self.name} differ in size: {sizes}; give one size for all')
        return Batch(np.stack(images), np.stack(labels))

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)`` of the first image, and of every other."""
        return self._decoded(self.source[0])[0].shape

    def _decoded(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns an image ``[H, W, C]`` with an int32 label, or with a mask ``[H, W]`` uint8."""
        image, label = (np.asarray(example[key]) for key in self.keys)
        image, label = _resized(image, self.image_size, smooth=True), _resized(label, self.image_size)
        label = label[..., 0] if label.ndim == 3 else label
        return image, (label - self.first_class).astype(np.uint8 if label.ndim else np.int32)

    def read_all(self) -> Batch:
        """Reads and decodes all examples."""
        return self.read(np.arange(len(self)))

    def blocks(self) -> Iterator[Batch]:
        """Yields all examples once, in order, a few hundred at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.read(np.arange(start, min(start + BLOCK, len(self))))

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch and reads ahead of their use.

        Args:
            order: ``[steps, B]`` positions, the batches of an epoch. Of several hosts, each gives its own columns.
            first_step: the step to begin with, for an epoch that resumes.
        """
        import grain
        from absl import flags

        # One element is a whole batch, so the batches do not depend on the number of workers.
        steps = grain.MapDataset.source(np.asarray(order)).map(self.read)[first_step:]
        options = grain.ReadOptions(num_threads=0 if self.workers else 1, prefetch_buffer_size=self.prefetch)
        stream = steps.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # grain starts no process before absl has parsed its flags
                flags.FLAGS.mark_as_parsed()
            ahead = max(1, self.prefetch // self.workers)
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead))
        for batch in stream:
            # Copies: arrays of other processes are in shared memory, which must be released at once.
            yield jax.tree.map(np.array, batch)


def find_builder(name: str, *, task: str, download: bool) -> tuple[Any, tuple[str, str]]:
    """Finds a prepared data set in ``TFDS_DATA_DIR``.

    Args:
        name: of the data set.
        task: ``'classification'`` for the supervised label, ``'segmentation'`` for the feature ``segmentation_mask``.
        download: lets TFDS download and prepare a data set that is missing.

    Returns:
        The builder of TFDS, and the features of image and label.

    Raises:
        ValueError: if the name is unknown, the data set is not prepared, or it is of another kind.
    """
    import tensorflow_datasets as tfds

    try:
        # TFDS reads the variable only when it is first imported, so the folder is an argument.
        builder = tfds.builder(name, file_format='array_record', data_dir=os.environ.get('TFDS_DATA_DIR'))
    except tfds.core.DatasetNotFoundError as error:
        choices = ['mnist5k', 'digit_canvases', *tfds.list_builders(with_community_datasets=False)]
        close = ', '.join(difflib.get_close_matches(name, choices)) or "'mnist5k', a TFDS name, or a path of an .npz"
        raise ValueError(f'name: unknown data set {name!r}; did you mean {close}?') from error
    if not builder.is_prepared():
        missing = f'name: {name!r} is not prepared in {builder.data_dir}'
        if not download:  # checked first: without a network TFDS takes minutes to fail
            raise ValueError(f'{missing}; set TFDS_DATA_DIR to its folder, or pass download=True if there is a network')
        try:
            builder.download_and_prepare()
        except Exception as error:  # network, disk, checksum or missing TensorFlow: each has its own class
            raise ValueError(f'{missing}, and preparing it failed ({error!r:.200}); check the network') from error
    features = builder.info.features
    keys = builder.info.supervised_keys if task == 'classification' else ('image', _MASK)
    known = isinstance(keys, tuple) and len(keys) == 2 and all(key in features for key in keys)
    splits = {split for split, info in builder.info.splits.items() if info.num_examples}
    if known and isinstance(features[keys[0]], tfds.features.Image) and {'train', 'test'} <= splits:
        image, label = (features[key] for key in keys)
        is_class = label.shape == () and np.issubdtype(label.np_dtype, np.integer)
        if image.np_dtype == np.uint8 and (task == 'segmentation' or is_class):
            return builder, keys
    raise ValueError(f'name: {name!r} is not an image {task} data set of uint8 with nonempty train and test splits')


def read_classes(builder: Any, keys: tuple[str, str]) -> dict[str, np.ndarray]:
    """Reads all labels once, and no image.

    Returns:
        ``train [M]`` int32, the classes to stratify by (zeros for masks); ``first``, the lowest class; and ``number``
        of classes.

    Raises:
        ValueError: if a label is below 0, as in test splits with secret labels, or masks have more than 256 classes.
    """
    import tensorflow_datasets as tfds

    ranges: dict[str, np.ndarray] = {}
    for split in ('train', 'test'):
        source = builder.as_data_source(split=split, decoders={keys[0]: tfds.decode.SkipDecoding()})
        blocks = np.split(np.arange(len(source)), range(BLOCK, len(source), BLOCK))  # each is read in parallel
        examples = itertools.chain.from_iterable(source.__getitems__(block.tolist()) for block in blocks)
        ranges[split] = np.array([(np.min(example[keys[1]]), np.max(example[keys[1]])) for example in examples])
    both = np.concatenate([*ranges.values()])
    lowest, highest = int(both.min()), int(both.max())
    masks = keys[1] == _MASK
    if lowest < 0 or (masks and highest - lowest > 255):
        name = builder.info.full_name
        raise ValueError(f'name: {name} holds labels from {lowest} to {highest}; expected classes from 0')
    first = lowest if masks else 0
    classes = np.zeros(len(ranges['train']), np.int32) if masks else ranges['train'][:, 0]
    return {'train': classes, 'first': np.array(first), 'number': np.array(highest - first + 1)}


def _resized(pixels: np.ndarray, size: tuple[int, int] | None, *, smooth: bool = False) -> np.ndarray:
    """Resizes an image or a mask; masks keep whole classes, and a single number stays as it is."""
    if size is None or pixels.ndim < 2 or pixels.shape[:2] == tuple(size):
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(image.resize((size[1], size[0]), resampling)).reshape(*size, *pixels.shape[2:])
