"""EfficientNet-Lite0 as it was published, and the same network with exits, made by `attach`."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from branchy_jax.models import layers
from branchy_jax.models.attach import Attached, attach
from branchy_jax.types import Array

Convolution = Callable[..., Array]

# Of each row of blocks: how many, size of the depthwise kernel, first stride, expansion, features.
_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

_norm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1e-3)


class InvertedResidual(nn.Module):
    """A pointwise expansion, a depthwise convolution, and a pointwise projection, with a skip where shapes allow.

    Attributes:
        features: of the result.
        kernel: height and width of the depthwise kernel.
        stride: of the depthwise convolution.
        expansion: factor of the features between; 1 expands nothing.
        dtype: of the computation.
        convolution: drop-in for `jax.lax.conv_general_dilated` of all convolutions.
    """

    features: int
    kernel: int
    stride: int
    expansion: int
    dtype: jnp.dtype = jnp.float32
    convolution: Convolution = lax.conv_general_dilated

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, H ÷ stride, W ÷ stride, features]``."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=self.convolution)
        norm = functools.partial(_norm, use_running_average=not train, dtype=self.dtype)
        x, width = inputs, inputs.shape[-1] * self.expansion
        if self.expansion > 1:
            x = nn.relu6(norm(name='norm0')(conv(width, (1, 1), name='expand')(x)))
        size = (self.kernel, self.kernel)
        x = conv(width, size, self.stride, feature_group_count=width, name='depthwise')(x)
        x = nn.relu6(norm(name='norm1')(x))
        x = norm(name='norm2')(conv(self.features, (1, 1), name='project')(x))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: a mobile network of 16 blocks, without squeeze-and-excitation, with ReLU6.

    It has one exit; `efficientnet_lite0` gives it more.

    Attributes:
        num_classes: K.
        side: images of another height and width are resized to this number of pixels first; a multiple of 32.
        dtype: of the computation; parameters and logits are float32.
        convolution: drop-in for `jax.lax.conv_general_dilated` of all convolutions.

    References:
        Tan and Le, EfficientNet, ICML 2019; Liu, Higher accuracy on vision models with EfficientNet-Lite, 2020.
    """

    num_classes: int = 1000
    side: int = 224
    dtype: jnp.dtype = jnp.float32
    convolution: Convolution = lax.conv_general_dilated

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Computes logits ``[B, K]`` from float ``images [B, H, W, 3]``."""
        layers.check_images(images, None)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=self.convolution)
        norm = functools.partial(_norm, use_running_average=not train, dtype=self.dtype)
        x = images
        if x.shape[1:3] != (self.side, self.side):
            x = jax.image.resize(x, (x.shape[0], self.side, self.side, x.shape[-1]), 'bilinear')
        x = nn.relu6(norm(name='stem_norm')(conv(32, (3, 3), 2, name='stem')(x)))
        number = 0
        for blocks, kernel, first_stride, expansion, features in _BLOCKS:
            for n in range(blocks):
                stride, name = first_stride if n == 0 else 1, f'block{number}'
                block = InvertedResidual(features, kernel, stride, expansion, self.dtype, self.convolution, name=name)
                x = block(x, train)
                number += 1
        x = nn.relu6(norm(name='head_norm')(conv(1280, (1, 1), name='head')(x)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x.mean((1, 2)))


class ConvolutionHead(nn.Module):
    """A strided convolution, the mean over all positions, and a dense layer.

    Attributes:
        features: of the convolution.
        num_classes: K.
        dtype: of the computation.
    """

    features: int
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, activation: Array) -> Array:
        """Computes logits ``[B, K]`` from an activation ``[B, H, W, C]``."""
        x = nn.relu(nn.Conv(self.features, (3, 3), 2, dtype=self.dtype)(activation))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


def efficientnet_lite0(
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    side: int = 128,
    dtype: jnp.dtype = jnp.float32,
    convolution: Convolution = lax.conv_general_dilated,
) -> Attached:
    """Attaches three exits to EfficientNet-Lite0, after 31, 42 and 64 % of its multiply-accumulates.

    Args:
        num_classes: K.
        image_shape: ``(H, W, 3)`` of the images, which the network resizes.
        side: see `EfficientNetLite0`.
        dtype: likewise.
        convolution: likewise.
    """
    widths = {'block4': 96, 'block7': 192, 'block10': 192}
    heads = {place: ConvolutionHead(features, num_classes, dtype) for place, features in widths.items()}
    inputs = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return attach(EfficientNetLite0(num_classes, side, dtype, convolution), heads, inputs=inputs)
