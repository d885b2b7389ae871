"""AlexNet for 32 × 32 colour images, with two side branches."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.models.layers import check_images, check_placement, flatten, local_response_normalization, max_pool
from branchy_jax.types import Array

_pool = functools.partial(max_pool, window=3, stride=2)


class AlexNet(nn.Module):
    """B-AlexNet: five convolutions, three dense layers, and two side exits.

    The trunk is the released one in every placement. ``'text'`` branches after the first and the second convolution
    (each with its pooling and normalisation, which branch and trunk share), with two and one strided convolutions and
    a dense layer. ``'released'`` branches one convolution later, before the pooling, which each branch repeats.
    ``'tuned'`` has the places of the text, before and after the convolution that costs most, and doubles the features
    of both heads: a first exit that is right more often saves more than it costs.

    Attributes:
        num_classes: K.
        image_shape: ``(H, W, C)``; ``None`` takes images of any size.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        dtype: of the computation; parameters and logits are float32.

    References:
        BranchyNet, 2016, section IV-A and Figure 1; released code.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] | None = (32, 32, 3)
    placement: str = 'text'
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        check_placement(self.placement, ('text', 'released', 'tuned'))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of three exits from float ``images [B, H, W, C]``."""
        check_images(images, self.image_shape)
        conv = functools.partial(nn.Conv, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        released = self.placement == 'released'

        conv1 = conv(32, (5, 5), padding=2, name='conv1')(images)
        pooled1 = _activate(conv1)
        conv2 = conv(64, (5, 5), padding=2, name='conv2')(pooled1)
        pooled2 = _activate(conv2)
        conv3 = conv(96, (3, 3), padding=1, name='conv3')(pooled2)
        early = self._branch('exit1', _activate(conv2) if released else pooled1, strides=(1 if released else 2, 1))
        middle = self._branch('exit2', _activate(conv3) if released else pooled2, strides=(1,))

        x: Array = nn.relu(conv(96, (3, 3), padding=1, name='conv4')(nn.relu(conv3)))
        x = nn.relu(conv(64, (3, 3), padding=1, name='conv5')(x))
        x = flatten(_pool(x))
        drop = functools.partial(nn.Dropout, 0.5, deterministic=not train or frozen_trunk)
        x = drop(name='dropout1')(nn.relu(dense(256, name='fc1')(x)))
        x = drop(name='dropout2')(nn.relu(dense(128, name='fc2')(x)))
        return early, middle, dense(self.num_classes, name='fc3')(x)

    def _branch(self, name: str, x: Array, strides: tuple[int, ...]) -> Array:
        features = 64 if self.placement == 'tuned' else 32
        for n, stride in enumerate(strides, 1):
            conv = nn.Conv(features, (3, 3), stride, padding=1, dtype=self.dtype, name=f'{name}_conv{n}')
            x = nn.relu(conv(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name=f'{name}_fc')(flatten(_pool(x)))


def _activate(x: Array) -> Array:
    return local_response_normalization(_pool(nn.relu(x)))
