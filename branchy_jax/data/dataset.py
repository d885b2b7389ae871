"""Data sets: three splits, the checks of the arrays that they hold, and the normalisation of the training images."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.data.tfds import BLOCK, OnDisk
from branchy_jax.types import Array, Batch, Normalization


@struct.dataclass
class Dataset:
    """A data set with its three splits.

    Attributes:
        name: the name given to `load_dataset`.
        train: images ``[M, H, W, C]`` uint8 with labels ``[M]`` int32 or masks ``[M, H, W]`` uint8. They are in memory,
            or on disk (`OnDisk`); `branchy_jax.training.fit` takes both.
        validation: in memory; for thresholds and every other choice.
        test: in memory; for one evaluation, at the end.
        num_classes: K.
        normalization: mean and deviation of the training images.
    """

    name: str = struct.field(pytree_node=False)
    train: Batch | OnDisk
    validation: Batch
    test: Batch
    num_classes: int = struct.field(pytree_node=False)
    normalization: Normalization

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.validation.image.shape[1:]


def fit_normalization(images: Array | Iterable[Array]) -> Normalization:
    """Computes mean and standard deviation per channel of images scaled to [0, 1].

    Args:
        images: ``[M, H, W, C]`` uint8, or an iterable of such blocks. The result does not depend on the blocks.

    Raises:
        ValueError: if ``images`` has another shape or dtype, or is empty.

    Example:
        >>> normalization = fit_normalization(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        >>> normalization.mean.item(), normalization.deviation.item()
        (0.5, 0.5)
    """
    if isinstance(images, Array):
        images = [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)] or [images]
    total, square, count = np.int64(0), np.int64(0), 0
    for given in images:
        block = np.asarray(given)  # JAX would add in 32 bits and overflow
        if block.ndim != 4 or block.dtype != np.uint8 or block.size == 0:
            raise ValueError(f'images: expected uint8 [M, H, W, C], got {block.dtype} {block.shape}')
        total = total + block.sum((0, 1, 2), dtype=np.int64)
        square = square + np.square(block, dtype=np.uint16).sum((0, 1, 2), dtype=np.int64)
        count += block[..., 0].size
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 1.0))  # an all-black channel must not divide by zero
    return Normalization(mean=jnp.float32(mean / 255), deviation=jnp.float32(deviation / 255))


def split_rows(classes: np.ndarray, *, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples so that each class gives the same share to the second part.

    Args:
        classes: ``[M]``.
        validation_fraction: share of the second part, rounded per class.
        seed: decides which examples go to the second part.

    Returns:
        Indices of the first and of the second part, each in a random order.

    Raises:
        ValueError: if a part is empty.
    """
    generator = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label))
        size = round(validation_fraction * len(members))
        second.append(members[:size])
        first.append(members[size:])
    parts = generator.permutation(np.concatenate(first)), generator.permutation(np.concatenate(second))
    if not min(map(len, parts)):
        raise ValueError(f'validation_fraction: {validation_fraction} of {len(classes)} leaves a split empty')
    return parts


def checked(images: np.ndarray, labels: np.ndarray, split: str, source: Any) -> Batch:
    """Returns images with labels or masks in the shapes and dtypes that the library works with.

    Args:
        images: ``[M, H, W]`` or ``[M, H, W, C]`` uint8.
        labels: one integer per image, or masks; a last axis of 1, as Keras stores it, is removed.
        split: for messages.
        source: for messages.

    Raises:
        ValueError: if images are not uint8, there are none, or labels do not fit the images.
    """
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[..., 0] if labels.ndim in (2, 4) and labels.shape[-1] == 1 else labels
    where, size = f'name: {split} split of {source}', images.shape[:3]
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f'{where}: expected nonempty uint8 images [M, H, W, C], got {images.dtype} {images.shape}')
    if labels.shape not in (size[:1], size) or not np.issubdtype(labels.dtype, np.integer):
        got = f'{labels.dtype} {labels.shape}'
        raise ValueError(f'{where}: expected integer labels {size[:1]} or masks {size}, got {got}')
    if labels.min() < 0 or (labels.ndim == 3 and labels.max() > 255):
        raise ValueError(f'{where}: expected classes from 0, in masks to 255, got {labels.min()} to {labels.max()}')
    return Batch(images, labels.astype(np.uint8 if labels.ndim == 3 else np.int32))


def check_alike(train: Batch, test: Batch, source: Any) -> None:
    """Raises ValueError if the two splits differ in image shape, or only one of them has masks."""
    for kind in ('image', 'label'):
        one, other = (getattr(split, kind).shape[1:] for split in (train, test))
        if one != other:
            raise ValueError(f'name: each {kind} of {source} has shape {one} in train and {other} in test')
