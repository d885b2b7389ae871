"""Digits on canvases: a segmentation task made of handwritten digits, with overlap and clutter."""

import numpy as np

from branchy_jax.data.dataset import Dataset, fit_normalization
from branchy_jax.types import Array, Batch

_INK = 96
"""Pixels at least this bright belong to a digit; fainter ones are the blur of its edge."""

_SCRAP = 8
"""Height and width of a piece of clutter."""


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
