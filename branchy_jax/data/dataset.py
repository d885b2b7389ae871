"""Data sets: three splits, checks of their arrays, normalisation, augmentation, and digits on canvases."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from branchy_jax.data.tfds import BLOCK, OnDisk
from branchy_jax.types import Array, Batch, Normalization

_INK = 96
"""Pixels at least this bright belong to a digit; fainter ones are the blur of its edge."""

_SCRAP = 8
"""Height and width of a piece of clutter."""


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


def augment(key: Array, batch: Batch, *, crop_padding: int = 4, flip: bool = True) -> Batch:
    """Shifts each image by a random crop of its zero-padded copy and mirrors half of the images.

    Runs inside jit, in the function that `branchy_jax.training.fit` takes as ``augment``. A mask ``[B, H, W]`` moves
    with its image; pixels that move in are 0.

    Args:
        key: PRNG key.
        batch: images ``[B, H, W, C]`` with masks ``[B, H, W]``, or with labels or other targets, which do not change.
        crop_padding: width of the zero padding in pixels; 0 does not shift.
        flip: whether to mirror left and right. Not for digits.

    Returns:
        A batch of the same shapes and dtypes.

    Raises:
        ValueError: if the images do not have four axes, or ``crop_padding`` is below 0.

    Example:
        >>> batch = Batch(jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32))
        >>> augment(jax.random.key(0), batch, flip=False).image.shape
        (8, 28, 28, 1)
    """
    shape = batch.image.shape
    if len(shape) != 4 or crop_padding < 0:
        raise ValueError(f'batch: got images {shape} and crop_padding {crop_padding}; expected [B, H, W, C] and ≥ 0')
    edge = (crop_padding, crop_padding)
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (shape[0], 2), 0, 2 * crop_padding + 1)
    mirrored = jax.random.bernoulli(flip_key, shape=(shape[0], 1, 1, 1))

    def move(images: Array) -> Array:
        if crop_padding:
            padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
            crop = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))
            images = crop(padded, corners)
        return jnp.where(mirrored, images[:, :, ::-1], images) if flip else images

    is_mask = getattr(batch.label, 'shape', None) == shape[:3]
    return Batch(move(batch.image), move(batch.label[..., None])[..., 0] if is_mask else batch.label)


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


def digit_canvases(
    digits: Dataset, *, side: int = 48, most_digits: int = 3, most_clutter: int = 8, seed: int = 0
) -> Dataset:
    """Puts digits on square canvases: each pixel is background (class 0) or belongs to a digit d (class d + 1).

    Canvases differ in difficulty: the number of digits is uniform in 1 to ``most_digits``. The number of pieces of
    clutter is uniform in 0 to ``most_clutter``; clutter is cut from other digits and counts as background. Later digits
    cover earlier ones.

    Each split uses its own digits only and has as many canvases as digits. The same digits, sizes and seed give the
    same canvases.

    Args:
        digits: such as ``load_dataset('mnist5k')``; one channel.
        side: height and width of a canvas in pixels.
        most_digits: the largest number of digits on a canvas.
        most_clutter: the largest number of pieces of clutter on a canvas.
        seed: decides everything random.

    Returns:
        `Dataset` with images ``[M, side, side, 1]`` uint8, masks ``[M, side, side]`` uint8, and one class more.

    Raises:
        ValueError: if a canvas is smaller than a digit, the digits have several channels or are on disk, or
            ``most_digits`` or ``most_clutter`` is too small.

    Example:
        >>> canvases = digit_canvases(load_dataset('mnist5k'))  # doctest: +SKIP
        >>> canvases.train.image.shape, canvases.train.label.shape  # doctest: +SKIP
        ((3600, 48, 48, 1), (3600, 48, 48))
    """
    if not isinstance(digits.train, Batch):
        raise ValueError('digits: their training images are on disk; load them with in_memory=True')
    height, width, channels = digits.image_shape
    if channels != 1 or side < max(height, width):
        raise ValueError(f'side: got {side} for digits of {digits.image_shape}; give at least their size, one channel')
    if most_digits < 1 or most_clutter < 0:
        raise ValueError(f'most_digits: got {most_digits}, and most_clutter {most_clutter}; expected at least 1 and 0')
    splits = {}
    for number, split in enumerate(('train', 'validation', 'test')):
        source: Batch = getattr(digits, split)
        generator = np.random.default_rng([seed, number])
        pairs = [_canvas(generator, source, side, most_digits, most_clutter) for _ in range(len(source))]
        images, masks = map(np.stack, zip(*pairs, strict=True))
        splits[split] = Batch(images[..., None], masks)
    name, normalization = f'digit_canvases/{digits.name}', fit_normalization(splits['train'].image)
    return Dataset(name, num_classes=digits.num_classes + 1, normalization=normalization, **splits)


def _canvas(
    generator: np.random.Generator, digits: Batch, side: int, most_digits: int, most_clutter: int
) -> tuple[np.ndarray, np.ndarray]:
    image, mask = np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8)
    for _ in range(generator.integers(0, most_clutter + 1)):
        digit = digits.image[generator.integers(len(digits)), ..., 0]
        scrap = min(_SCRAP, *digit.shape)
        row, column = (generator.integers(0, length - scrap + 1) for length in digit.shape)
        _paint(generator, image, digit[row : row + scrap, column : column + scrap])
    for _ in range(generator.integers(1, most_digits + 1)):
        chosen = generator.integers(len(digits))
        digit = digits.image[chosen, ..., 0]
        position = _paint(generator, image, digit)
        mask[position][digit >= _INK] = digits.label[chosen] + 1
    return image, mask


def _paint(generator: np.random.Generator, image: np.ndarray, piece: Array) -> tuple[slice, slice]:
    """Draws a piece at a random position, where the brighter pixel wins, and returns the position."""
    corner = [generator.integers(0, whole - part + 1) for whole, part in zip(image.shape, piece.shape, strict=True)]
    row, column = (slice(start, start + length) for start, length in zip(corner, piece.shape, strict=True))
    image[row, column] = np.maximum(image[row, column], piece)
    return row, column
