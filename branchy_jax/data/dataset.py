"""What a data set is: three splits, the arrays they may be made of, and the normalisation of the first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.data.tfds import BLOCK, OnDisk
from branchy_jax.types import Array, Batch, Normalization

Arrays = dict[str, np.ndarray]
"""``x_train``, ``y_train``, ``x_test``, ``y_test``, as Keras names them."""


@struct.dataclass
class Dataset:
    """A data set with its three splits.

    Attributes:
        name: what `load_dataset` was asked for.
        train: images ``[M, H, W, C]`` uint8, labels ``[M]`` int32, or masks ``[M, H, W]`` uint8: in memory, or on disk
            (`OnDisk`), which `branchy_jax.training.fit` takes alike.
        validation: for thresholds and every other choice; in memory.
        test: for one evaluation, at the end; in memory.
        num_classes: K.
        normalization: from the training images.
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


def stratified_split(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples so that each class gives the same share.

    Args:
        labels: ``[M]``.
        fraction: share that goes to the second part, rounded per class.
        seed: which examples go there.

    Returns:
        Indices of the first and of the second part, each in a random order.

    Example:
        >>> first, second = stratified_split(np.repeat([0, 1], 10), fraction=0.2, seed=0)
        >>> len(first), np.repeat([0, 1], 10)[second].sum()
        (16, np.int64(2))
    """
    generator = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        taken = round(fraction * len(members))
        second.append(members[:taken])
        first.append(members[taken:])
    return generator.permutation(np.concatenate(first)), generator.permutation(np.concatenate(second))


def fit_normalization(images: Array) -> Normalization:
    """Computes mean and standard deviation per channel of images scaled to [0, 1].

    Args:
        images: ``[M, H, W, C]`` uint8.

    Raises:
        ValueError: something else, or no images.

    Example:
        >>> found = fit_normalization(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        >>> found.mean.item(), found.deviation.item()
        (0.5, 0.5)
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f'images: expected uint8 [M, H, W, C], got {images.dtype} {images.shape}')
    return normalization_of(images[start : start + BLOCK] for start in range(0, len(images), BLOCK))


def normalization_of(blocks: Iterable[Array]) -> Normalization:
    """Computes what `fit_normalization` does of images that come block by block: sums of integers, hence exact."""
    total: Any = 0
    square: Any = 0
    count = 0
    for block in blocks:
        images = np.asarray(block)  # jax would count in 32 bits, and overflow
        chex.assert_rank(images, 4)
        axes = (0, 1, 2)
        total = total + images.sum(axes, dtype=np.int64)
        square = square + np.square(images, dtype=np.uint16).sum(axes, dtype=np.int64)
        count += images[..., 0].size
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 1.0))  # an all-black channel must not divide by zero
    return Normalization(mean=jnp.float32(mean / 255), deviation=jnp.float32(deviation / 255))


def check_arrays(arrays: Arrays, source: Any) -> Arrays:
    """Returns arrays in the shapes that the library works with.

    Args:
        arrays: as a source gave them; labels are one integer per image, or a mask of its size.
        source: named in messages.

    Raises:
        ValueError: images that are not uint8, labels or masks that do not go with them, an empty split, or a test split
            of another kind than the training split.
    """
    result: Arrays = {}
    for split in ('train', 'test'):
        images = result[f'x_{split}'] = _checked_images(arrays[f'x_{split}'], split, source)
        result[f'y_{split}'] = _checked_labels(arrays[f'y_{split}'], images, split, source)
    check_alike(result['x_train'].shape[1:], result['x_test'].shape[1:], source)
    if result['y_train'].ndim != result['y_test'].ndim:
        kinds = {1: 'one class per image', 3: 'masks'}
        raise ValueError(
            f'name: y_train of {source} holds {kinds[result["y_train"].ndim]}, y_test {kinds[result["y_test"].ndim]}; '
            'expected the same of both'
        )
    return result


def check_alike(train: tuple[int, ...], test: tuple[int, ...], source: Any) -> None:
    """Refuses a test split whose images ``(H, W, C)`` are not as large as the training split's, or as many-coloured.

    Raises:
        ValueError: they differ.
    """
    differ = [name for name, a, b in zip(('height', 'width', 'channels'), train, test, strict=True) if a != b]
    if differ:
        raise ValueError(
            f'name: images of {source} differ between its splits in {" and ".join(differ)}: {train} in train, '
            f'{test} in test; a network takes one shape [H, W, C]'
        )


def _checked_images(images: np.ndarray, split: str, source: Any) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f'name: x_{split} of {source} must be uint8 [M, H, W] or [M, H, W, C]; got {images.dtype} {images.shape}'
        )
    if images.size == 0:
        raise ValueError(f'name: the {split} split of {source} is empty: images {images.shape}')
    return images


def _checked_labels(labels: np.ndarray, images: np.ndarray, split: str, source: Any) -> np.ndarray:
    labels = labels[..., 0] if labels.ndim in (2, 4) and labels.shape[-1] == 1 else labels  # as Keras stores them
    if labels.ndim > 0 and len(labels) != len(images):
        raise ValueError(f'name: y_{split} of {source} holds {len(labels)} labels for {len(images)} images')
    of_images = labels.shape == images.shape[:1]
    if not (of_images or labels.shape == images.shape[:3]) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'name: y_{split} of {source} must be one integer per image [{len(images)}], or a mask of its size '
            f'{images.shape[:3]}; got {labels.dtype} {labels.shape}'
        )
    if labels.min() < 0 or (not of_images and labels.max() > 255):
        raise ValueError(
            f'name: y_{split} of {source} holds labels from {labels.min()} to {labels.max()}; expected classes '
            'from 0, and of a mask at most 255'
        )
    return labels.astype(np.int32 if of_images else np.uint8)
