"""The few layers that the paper's networks need and Flax does not have."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from branchy_jax.types import Array

he_normal = jax.nn.initializers.he_normal()


def flatten(x: Array) -> Array:
    """Joins all axes but the first: ``[B, …] → [B, F]``.

    Example:
        >>> flatten(jnp.ones((2, 3, 4))).shape
        (2, 12)
    """
    return x.reshape(x.shape[0], -1)


def max_pool(x: Array, *, window: int, stride: int) -> Array:
    """Takes the maximum over square windows, rounding the output size up, as the released networks do.

    The output has ``ceil((H - window) / stride) + 1`` rows: a last window may hang over the edge.

    Args:
        x: ``[B, H, W, C]``.
        window: side of a window.
        stride: step between windows.

    Example:
        >>> max_pool(jnp.ones((1, 15, 15, 5)), window=2, stride=2).shape
        (1, 8, 8, 5)
    """
    overhang = [(0, (window - size) % stride) for size in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (stride, stride), overhang)


def space_to_depth(x: Array, *, size: int) -> Array:
    """Folds squares of pixels into channels: ``[B, H, W, C] → [B, H / size, W / size, size² C]``.

    Example:
        >>> space_to_depth(jnp.ones((1, 4, 6, 3)), size=2).shape
        (1, 2, 3, 12)
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: Array, *, size: int) -> Array:
    """Unfolds channels into squares of pixels, the inverse of `space_to_depth`.

    Example:
        >>> x = jnp.arange(24.0).reshape(1, 2, 4, 3)
        >>> bool((depth_to_space(space_to_depth(x, size=2), size=2) == x).all())
        True
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * size, width * size, channels // size**2)


def global_average_pool(x: Array) -> Array:
    """Averages over the image: ``[B, H, W, C] → [B, C]``."""
    return x.mean(axis=(1, 2))


def local_response_normalization(
    x: Array, *, size: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 2.0
) -> Array:
    r"""Divides each activation by a power of its neighbours' energy across channels.

    .. math:: y_c = x_c \left(k + \alpha \sum_{|d| \le \lfloor size / 2 \rfloor} x_{c + d}^2\right)^{-\beta}

    Args:
        x: ``[..., C]``.
        size: number of channels summed over, odd.
        alpha: weight of the sum (not divided by ``size``).
        beta: exponent.
        k: offset.

    References:
        Krizhevsky et al., ImageNet Classification with Deep CNNs, 2012, section 3.3; constants of the released
        B-AlexNet.
    """
    half = size // 2
    squares = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(half, half)])
    energy = sum(squares[..., shift : shift + x.shape[-1]] for shift in range(size))
    scale = k + alpha * energy
    if beta == 0.75:  # a general power costs a CPU as much as a convolution of few channels
        return x / jnp.sqrt(scale * jnp.sqrt(scale))
    return x * scale**-beta


class ResidualBlock(nn.Module):
    """Convolution, BatchNorm, ReLU, convolution, BatchNorm, plus the shortcut, ReLU.

    Where the block widens or strides, the shortcut strides and pads with zero channels: no parameters.

    Attributes:
        features: output channels.
        stride: stride of the first convolution.
        dtype: of the computation; parameters are float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`.

    References:
        He et al., Deep Residual Learning, 2016, section 4.2, option A.
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    convolution: Callable[..., Array] = lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, ceil(H / stride), ceil(W / stride), features]``."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        conv = functools.partial(
            nn.Conv,
            self.features,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=he_normal,
            dtype=self.dtype,
            conv_general_dilated=self.convolution,
        )
        y = nn.relu(norm(name='norm1')(conv(strides=self.stride, name='conv1')(x)))
        y = norm(name='norm2')(conv(name='conv2')(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, [(0, 0)] * 3 + [(0, self.features - x.shape[-1])])
        return nn.relu(y + shortcut.astype(y.dtype))
