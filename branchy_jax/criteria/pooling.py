"""How the uncertainty of many pixels becomes that of the image they make up."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from branchy_jax.types import Array

Pool = Callable[[Array], Array]
"""``uncertainty [B, …] → [B]``; an uncertainty that is ``[B]`` already stays as it is."""


def mean_over_pixels(uncertainty: Array) -> Array:
    """Averages over all pixels: blind to a small part that is wrong, where most of an image is easy.

    Example:
        >>> mean_over_pixels(jnp.array([[[0.0, 1.0], [0.0, 0.0]]])).tolist()
        [0.25]
    """
    return uncertainty.reshape(uncertainty.shape[0], -1).mean(axis=-1)


@functools.cache  # one object per setting: jit compares functions by identity
def quantile_over_pixels(quantile: float) -> Pool:
    """Builds the pool that returns a quantile of the pixels' uncertainty.

    Args:
        quantile: in [0, 1]; 0.95 asks how unsure the worst twentieth of the image is at least, which is the 5 %
            quantile of its confidence.

    Raises:
        ValueError: outside [0, 1].

    Example:
        >>> quantile_over_pixels(1.0)(jnp.array([[[0.0, 1.0], [0.0, 0.5]]])).tolist()
        [1.0]
    """
    _check_quantile(quantile)

    def pool(uncertainty: Array) -> Array:
        return jnp.quantile(uncertainty.reshape(uncertainty.shape[0], -1), quantile, axis=-1)

    return pool


@functools.cache  # as above
def quantile_over_patches(quantile: float, *, size: int) -> Pool:
    """Builds the pool that averages within square patches and returns a quantile of the patches.

    A patch that is unsure as a whole counts; a lone unsure pixel, as there are along every edge, does not.

    Args:
        quantile: in [0, 1], of the patches; 1 is the most unsure patch.
        size: side of a patch in pixels. Patches do not overlap; one that the border cuts averages what it has.

    Raises:
        ValueError: quantile outside [0, 1], size below 1; when applied, uncertainty that is not ``[B, H, W]``.

    Example:
        >>> quantile_over_patches(1.0, size=2)(jnp.array([[[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]]])).tolist()
        [0.5]
    """
    _check_quantile(quantile)
    if size < 1:
        raise ValueError(f'size: got {size}; a patch is at least one pixel wide')

    def pool(uncertainty: Array) -> Array:
        if uncertainty.ndim != 3:
            raise ValueError(f'uncertainty: patches need [B, H, W], got shape {uncertainty.shape}')
        edges = [(0, 0), *((0, -length % size) for length in uncertainty.shape[1:])]
        # Sums and counts of the same padded patches, so that padding counts for nothing.
        total, count = (_sum_patches(jnp.pad(x, edges), size) for x in (uncertainty, jnp.ones_like(uncertainty)))
        return jnp.quantile((total / count).reshape(len(uncertainty), -1), quantile, axis=-1)

    return pool


@functools.cache  # as above
def on_every(stride: int, uncertainty_of: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Builds the measure that looks at every so many pixels along each side only.

    The softmax of every pixel costs as much as a small convolution; an image is as unsure as a sample of its pixels.

    Args:
        stride: 2 looks at a quarter of the pixels.
        uncertainty_of: ``logits [B, H, W, K] → [B, H, W]``.

    Raises:
        ValueError: a stride below 1.

    Example:
        >>> on_every(2, lambda logits: logits[..., 0])(jnp.arange(9.0).reshape(1, 3, 3, 1)).tolist()
        [[[0.0, 2.0], [6.0, 8.0]]]
    """
    if stride < 1:
        raise ValueError(f'stride: got {stride}; expected at least 1')
    return lambda logits: uncertainty_of(logits[:, ::stride, ::stride])


def _sum_patches(values: Array, size: int) -> Array:
    batch, height, width = values.shape
    return values.reshape(batch, height // size, size, width // size, size).sum(axis=(2, 4))


def _check_quantile(quantile: float) -> None:
    if not 0 <= quantile <= 1:
        raise ValueError(f'quantile: got {quantile}; expected a share in [0, 1]')
