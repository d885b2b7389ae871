"""LeNet-5 for 28 × 28 digits, with one side branch."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models.layers import check_images, check_placement, flatten, max_pool
from branchy_jax.types import Array

_pool = functools.partial(max_pool, window=2, stride=2)


class LeNet(nn.Module):
    """B-LeNet: three convolutions, two dense layers, and one exit after or before the first convolution.

    The trunk is the released one in every placement: convolutions of 5, 10 and 20 features, each pooled. The branch
    holds one convolution and one dense layer. ``'text'`` shares the trunk's first pooling and strides its convolution,
    which costs 2 % of the trunk; ``'released'`` leaves before the pooling and pools again after its convolution.
    ``'tuned'`` leaves before the trunk begins: the trunk's five first features take most of the time on the way to an
    exit behind them, and are too few for it. Two strided convolutions answer sooner and better.

    Attributes:
        num_classes: K.
        image_shape: ``(H, W, C)``; ``None`` takes images of any size.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        dtype: of the computation; parameters and logits are float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`, such as `branchy_jax.models.banded_convolution`.

    References:
        BranchyNet, 2016, section IV-A; released code.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] | None = (28, 28, 1)
    placement: str = 'text'
    dtype: jnp.dtype = jnp.float32
    convolution: Callable[..., Array] = lax.conv_general_dilated

    def __post_init__(self) -> None:
        check_placement(self.placement, ('text', 'released', 'tuned'))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of both exits from float ``images [B, H, W, C]``."""
        check_images(images, self.image_shape)
        conv = functools.partial(nn.Conv, dtype=self.dtype, conv_general_dilated=self.convolution)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        first = conv(5, (5, 5), padding=3, name='conv1')(images)
        x = nn.relu(_pool(first))

        if self.placement == 'text':
            y = nn.relu(conv(16, (3, 3), strides=3, padding=0, name='exit1_conv1')(x))
        elif self.placement == 'released':
            y = nn.relu(_pool(first))
            y = nn.relu(_pool(conv(10, (3, 3), padding=1, name='exit1_conv1')(y)))
        else:
            y = nn.relu(conv(32, (6, 6), strides=3, padding=0, name='exit1_conv1')(images))
            y = nn.relu(conv(32, (3, 3), strides=2, padding=0, name='exit1_conv2')(y))
        early = dense(self.num_classes, name='exit1_fc')(flatten(y))

        x = nn.relu(_pool(conv(10, (5, 5), padding=3, name='conv2')(x)))
        x = nn.relu(_pool(conv(20, (5, 5), padding=3, name='conv3')(x)))
        x = dense(84, name='fc1')(flatten(x))
        return early, dense(self.num_classes, name='fc2')(x)
