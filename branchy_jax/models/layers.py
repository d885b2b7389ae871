"""The few layers that the paper's networks need and Flax does not have."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from branchy_jax import calling
from branchy_jax.types import Array


def check_images(images: Array, image_shape: tuple[int, int, int] | None) -> None:
    """Refuses images that a network was not built for.

    Args:
        images: ``[B, H, W, C]`` float.
        image_shape: ``(H, W, C)``; ``None`` takes images of any size.

    Raises:
        ValueError: another rank, size or kind of dtype; the message says what arrived and what to do.
    """
    calling.check_array('images', images, image_shape or 'HWC', jnp.dtype('float32'))


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


def local_response_normalization(x: Array) -> Array:
    r"""Divides each activation by a power of its neighbours' energy across channels.

    .. math:: y_c = x_c \left(2 + \alpha (x_{c - 1}^2 + x_c^2 + x_{c + 1}^2)\right)^{-3/4}, \alpha = 5 \cdot 10^{-5}

    Args:
        x: ``[..., C]``.

    References:
        Krizhevsky et al., ImageNet Classification with Deep CNNs, 2012, section 3.3; constants of the released
        B-AlexNet.
    """
    squares = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(1, 1)])
    scale = 2.0 + 5e-5 * (squares[..., :-2] + squares[..., 1:-1] + squares[..., 2:])
    return x / jnp.sqrt(scale * jnp.sqrt(scale))  # a general power costs a CPU as much as a small convolution


def conv_norm_relu(x: Array, features: int, name: str, *, train: bool, dtype: Any, **options: Any) -> Array:
    """Applies a 3 × 3 convolution, BatchNorm and ReLU; called inside `flax.linen.compact`.

    Args:
        x: ``[B, H, W, C]``.
        features: output channels.
        name: of the convolution; the BatchNorm's is ``{name}_norm``.
        train: whether BatchNorm uses the batch's statistics.
        dtype: of the computation.
        **options: of `flax.linen.Conv`.
    """
    x = nn.Conv(features, (3, 3), use_bias=False, dtype=dtype, name=name, **options)(x)
    return nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f'{name}_norm')(x))


class ResidualBlock(nn.Module):
    """Convolution, BatchNorm, ReLU, convolution, BatchNorm, plus the shortcut, ReLU.

    Where the block widens or strides, the shortcut strides and pads with zero channels: no parameters.

    Attributes:
        features: output channels.
        stride: stride of the first convolution.
        dtype: of the computation; parameters are float32.

    References:
        He et al., Deep Residual Learning, 2016, section 4.2, option A.
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, ceil(H / stride), ceil(W / stride), features]``."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        conv = functools.partial(
            nn.Conv, self.features, (3, 3), padding=1, use_bias=False, kernel_init=he_normal, dtype=self.dtype
        )
        y = nn.relu(norm(name='norm1')(conv(strides=self.stride, name='conv1')(x)))
        y = norm(name='norm2')(conv(name='conv2')(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, [(0, 0)] * 3 + [(0, self.features - x.shape[-1])])
        return nn.relu(y + shortcut.astype(y.dtype))
