"""Convolutions as matrix products and as sums of shifted products: the forms that a CPU trains fastest."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_MOST_POSITIONS = 64
"""Positions of a depthwise convolution's input up to which a matrix product is faster than shifted products."""


def as_products(inputs: Array, kernel: Array, window_strides: tuple[int, int], padding: Any, **others: Any) -> Array:
    """Convolves; a drop-in for `jax.lax.conv_general_dilated` on images.

    A pointwise convolution is one matrix product. A depthwise convolution of a small image is a matrix product for each
    channel, that of a large image a sum of shifted products. All others stay as they are. Give it to Flax:
    ``nn.Conv(…, conv_general_dilated=as_products)``. Equal up to the order of summation.

    Args:
        inputs: ``[B, H, W, C]``.
        kernel: ``[kh, kw, C ÷ groups, O]``.
        window_strides: vertical and horizontal stride.
        padding: ``'SAME'``, ``'VALID'`` or ``((top, bottom), (left, right))``.
        **others: as Flax passes them.

    Returns:
        ``[B, H', W', O]``.
    """
    dilated = any(others.get(name) not in (None, (1, 1)) for name in ('lhs_dilation', 'rhs_dilation'))
    groups = others.get('feature_group_count', 1)
    if not dilated and groups == 1 and kernel.shape[:2] == window_strides == (1, 1):
        return (inputs.reshape(-1, inputs.shape[-1]) @ kernel[0, 0]).reshape(*inputs.shape[:3], kernel.shape[-1])
    if dilated or not groups == inputs.shape[-1] == kernel.shape[-1]:
        return lax.conv_general_dilated(inputs, kernel, window_strides, padding, **others)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], window_strides, padding)
    small = inputs.shape[1] * inputs.shape[2] <= _MOST_POSITIONS
    return (_as_matrices if small else _as_shifts)(inputs, kernel[:, :, 0], window_strides, padding)


def _as_shifts(inputs: Array, kernel: Array, strides: tuple[int, int], padding: Any) -> Array:
    """Adds the products of the shifted image with each entry of the kernels ``[kh, kw, C]``."""
    padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    rows, columns = _sizes(inputs, kernel, strides, padding)
    down, right = strides
    total = jnp.zeros((), inputs.dtype)
    for i, j in np.ndindex(kernel.shape[:2]):
        stop = (padded.shape[0], i + (rows - 1) * down + 1, j + (columns - 1) * right + 1, padded.shape[3])
        total += lax.slice(padded, (0, i, j, 0), stop, (1, down, right, 1)) * kernel[i, j][None, None, None]
    return total


def _as_matrices(inputs: Array, kernel: Array, strides: tuple[int, int], padding: Any) -> Array:
    """Multiplies the positions of each channel by a matrix ``[H W, H' W']`` of entries of its kernel."""
    _, height, width, channels = inputs.shape
    rows, columns = _sizes(inputs, kernel, strides, padding)
    vertical = _entries(height, rows, kernel.shape[0], strides[0], padding[0][0])
    horizontal = _entries(width, columns, kernel.shape[1], strides[1], padding[1][0])
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0)))  # the last row and column are zeros
    matrices = padded[vertical[:, None, :, None], horizontal[None, :, None, :]]  # [H, W, H', W', C]
    matrices = matrices.transpose(4, 0, 1, 2, 3).reshape(channels, height * width, rows * columns)
    pixels = inputs.reshape(-1, height * width, channels)
    return jnp.einsum('bpc,cpq->bqc', pixels, matrices).reshape(-1, rows, columns, channels)


def _entries(length: int, results: int, size: int, stride: int, before: int) -> np.ndarray:
    """Returns for each pixel and result of one axis the kernel's entry between them; ``size`` for none."""
    entries = np.arange(length)[:, None] + before - stride * np.arange(results)
    return np.where((entries >= 0) & (entries < size), entries, size)


def _sizes(inputs: Array, kernel: Array, strides: tuple[int, int], padding: Any) -> tuple[int, int]:
    rows, columns = ((inputs.shape[n + 1] + sum(padding[n]) - kernel.shape[n]) // strides[n] + 1 for n in range(2))
    return rows, columns
