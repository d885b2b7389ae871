"""A data set's splits and its normalisation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.types import Batch, Normalization


@struct.dataclass
class Dataset:
    """A data set with its three splits, in memory.

    Attributes:
        name: what `load_dataset` was asked for.
        train: images ``[M, H, W, C]`` uint8, labels ``[M]`` int32, or masks ``[M, H, W]``.
        validation: for thresholds and every other choice.
        test: for one evaluation, at the end.
        num_classes: K.
        normalization: from the training images.
    """

    name: str = struct.field(pytree_node=False)
    train: Batch
    validation: Batch
    test: Batch
    num_classes: int = struct.field(pytree_node=False)
    normalization: Normalization

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.train.image.shape[1:]


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
    return tuple(generator.permutation(np.concatenate(part)) for part in (first, second))


def fit_normalization(images: np.ndarray) -> Normalization:
    """Computes mean and standard deviation per channel of uint8 ``images [M, H, W, C]`` scaled to [0, 1]."""
    axes = tuple(range(images.ndim - 1))
    mean = images.mean(axis=axes, dtype=np.float64)
    square = np.square(images, dtype=np.float32).mean(axis=axes, dtype=np.float64)
    deviation = np.sqrt(np.maximum(square - mean**2, 1.0))  # an all-black channel must not divide by zero
    return Normalization(mean=jnp.float32(mean / 255), deviation=jnp.float32(deviation / 255))
