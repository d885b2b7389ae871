"""Convolutions with few channels as one matrix product: the form that a CPU runs fastest.

XLA:CPU's convolution costs the same for one channel as for sixteen. With few channels windows of the image times a
banded matrix are cheaper, though some of its entries are zero: five times faster for LeNet's first convolution.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from branchy_jax.types import Array

DIMENSION_NUMBERS = ('NHWC', 'HWIO', 'NHWC')


def banded_convolution(
    inputs: Array,
    kernel: Array,
    window_strides: tuple[int, int],
    padding: Any,
    *,
    precision: lax.PrecisionLike = None,
    dimension_numbers: Any = DIMENSION_NUMBERS,
    **others: Any,
) -> Array:
    """Convolves by a banded matrix product; a drop-in for `jax.lax.conv_general_dilated` on images.

    Give it to Flax: ``nn.Conv(…, conv_general_dilated=banded_convolution)``. Exact up to the order of summation,
    and differentiable.

    Args:
        inputs: ``[B, H, W, I]``.
        kernel: ``[kh, kw, I, O]``.
        window_strides: vertical and horizontal stride.
        padding: ``'SAME'``, ``'VALID'`` or ``((top, bottom), (left, right))``.
        precision: of the matrix product.
        dimension_numbers: must mean NHWC, HWIO, NHWC.
        **others: dilations and numbers of groups, which must be 1.

    Returns:
        ``[B, H', W', O]``.

    Raises:
        ValueError: dilated, grouped or otherwise laid out convolutions, which have no banded form here.
    """
    numbers = lax.conv_dimension_numbers(inputs.shape, kernel.shape, dimension_numbers)
    plain = lax.conv_dimension_numbers(inputs.shape, kernel.shape, DIMENSION_NUMBERS)
    if numbers != plain or any(value is not None and np.any(np.not_equal(value, 1)) for value in others.values()):
        got = f'got dimension_numbers={dimension_numbers}, {others}'
        raise ValueError(f'banded_convolution: only undilated, ungrouped NHWC convolutions have a banded form; {got}')
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], window_strides, padding)
    band = band_matrix(kernel, stride=window_strides[1])
    return multiply_band(
        inputs, band, kernel_shape=kernel.shape, strides=window_strides, padding=padding, precision=precision
    )


def band_matrix(kernel: Array, *, stride: int) -> Array:
    """Spreads a kernel into the matrix that maps a window of an image to a few neighbouring output pixels.

    The few pixels are as many as come nearest to 32 numbers with their features: fewer leave the processor's vector
    units idle, more only add zeros.

    Args:
        kernel: ``[kh, kw, I, O]``.
        stride: horizontal stride.

    Returns:
        ``[kh * window * I, pixels * O]``, zero wherever an output pixel does not see an input pixel, and padded with
        zero columns to a multiple of 16.
    """
    rows, columns, features_in, features_out = kernel.shape
    pixels, window = _block(kernel.shape, stride)
    offset = np.arange(window)[:, None] - stride * np.arange(pixels)
    sees = (np.arange(columns)[:, None, None] == offset).astype(kernel.dtype)  # [kw, window, pixels]
    band = jnp.einsum('cwv,rcio->rwivo', sees, kernel, precision=lax.Precision.HIGHEST)
    band = band.reshape(rows * window * features_in, pixels * features_out)
    return jnp.pad(band, ((0, 0), (0, -band.shape[1] % 16)))


def multiply_band(
    inputs: Array,
    band: Array,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
) -> Array:
    """Convolves ``inputs [B, H, W, I]`` with a kernel already spread by `band_matrix`.

    Args:
        inputs: images.
        band: from `band_matrix`.
        kernel_shape: ``(kh, kw, I, O)``.
        strides: vertical and horizontal.
        padding: zeros ``((above, below), (left, right))``.
        precision: of the matrix product.
        preferred_element_type: that it accumulates in and returns; ``None`` keeps that of its arguments.

    Returns:
        ``[B, H', W', O]``.
    """
    rows, columns, _, features = kernel_shape
    (down, along), (pixels, window) = strides, _block(kernel_shape, strides[1])
    batch, height, width = (size + sum(pads) for size, pads in zip(inputs.shape, ((0, 0), *padding), strict=False))
    height_out, width_out = (height - rows) // down + 1, (width - columns) // along + 1
    blocks = -(-width_out // pixels)
    missing = along * (blocks * pixels - 1) + columns - width  # the last block may reach over the edge
    left, right = padding[1]
    padded = jnp.pad(inputs, ((0, 0), padding[0], (left, right + max(missing, 0)), (0, 0)))
    reach = down * (height_out - 1) + 1
    lines = jnp.stack([padded[:, row : row + reach : down] for row in range(rows)], axis=2)
    starts = range(0, along * pixels * blocks, along * pixels)
    windows = jnp.stack([lines[:, :, :, start : start + window] for start in starts], axis=2)
    windows = windows.reshape(batch * height_out * blocks, -1)
    product = jnp.matmul(windows, band, precision=precision, preferred_element_type=preferred_element_type)
    product = product[:, : pixels * features].reshape(batch, height_out, blocks * pixels, features)
    return product[:, :, :width_out]


def _block(kernel_shape: tuple[int, ...], stride: int) -> tuple[int, int]:
    """Returns how many output pixels a band covers, and how many input pixels they see along a row."""
    columns, features = kernel_shape[1], kernel_shape[3]
    overlap = stride < columns  # windows that share nothing are best taken one by one
    pixels = max(1, round(32 / features)) if overlap else 1
    return pixels, stride * (pixels - 1) + columns
