"""The paper's networks: LeNet-5 for 28 × 28 digits, AlexNet and ResNet for 32 × 32 colour images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models import layers
from branchy_jax.types import Array


def _check_placement(placement: str) -> None:
    if placement not in ('text', 'released', 'tuned'):
        raise ValueError(f"placement: got {placement!r}; choose from 'text', 'released', 'tuned'")


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
        _check_placement(self.placement)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of both exits from float ``images [B, H, W, C]``."""
        layers.check_images(images, self.image_shape)
        conv = functools.partial(nn.Conv, dtype=self.dtype, conv_general_dilated=self.convolution)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        pool = functools.partial(layers.max_pool, window=2, stride=2)
        first = conv(5, (5, 5), padding=3, name='conv1')(images)
        x = nn.relu(pool(first))

        if self.placement == 'text':
            y = nn.relu(conv(16, (3, 3), strides=3, padding=0, name='exit1_conv1')(x))
        elif self.placement == 'released':
            y = nn.relu(pool(first))
            y = nn.relu(pool(conv(10, (3, 3), padding=1, name='exit1_conv1')(y)))
        else:
            y = nn.relu(conv(32, (6, 6), strides=3, padding=0, name='exit1_conv1')(images))
            y = nn.relu(conv(32, (3, 3), strides=2, padding=0, name='exit1_conv2')(y))
        early = dense(self.num_classes, name='exit1_fc')(layers.flatten(y))

        x = nn.relu(pool(conv(10, (5, 5), padding=3, name='conv2')(x)))
        x = nn.relu(pool(conv(20, (5, 5), padding=3, name='conv3')(x)))
        x = dense(84, name='fc1')(layers.flatten(x))
        return early, dense(self.num_classes, name='fc2')(x)


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
        _check_placement(self.placement)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of three exits from float ``images [B, H, W, C]``."""
        layers.check_images(images, self.image_shape)
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
        x = layers.flatten(layers.max_pool(x, window=3, stride=2))
        drop = functools.partial(nn.Dropout, 0.5, deterministic=not train or frozen_trunk)
        x = drop(name='dropout1')(nn.relu(dense(256, name='fc1')(x)))
        x = drop(name='dropout2')(nn.relu(dense(128, name='fc2')(x)))
        return early, middle, dense(self.num_classes, name='fc3')(x)

    def _branch(self, name: str, x: Array, strides: tuple[int, ...]) -> Array:
        features = 64 if self.placement == 'tuned' else 32
        for n, stride in enumerate(strides, 1):
            conv = nn.Conv(features, (3, 3), stride, padding=1, dtype=self.dtype, name=f'{name}_conv{n}')
            x = nn.relu(conv(x))
        x = layers.flatten(layers.max_pool(x, window=3, stride=2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name=f'{name}_fc')(x)


def _activate(x: Array) -> Array:
    return layers.local_response_normalization(layers.max_pool(nn.relu(x), window=3, stride=2))


class ResNet(nn.Module):
    """B-ResNet: 6n + 2 layers in three groups of 16, 32 and 64 features, and two or three side exits.

    ``'text'`` is He et al.'s network with branches after the first block and after the last block of 16 features.
    The paper's first branch leaves "after the 2nd convolution", which lies inside the first block; ours waits for
    the end of that block. The heads have three and two convolutions and one dense layer, strided and averaged so that
    the first costs about 1 % of the trunk. ``'released'`` is the authors' network: an unpadded first convolution with
    the first branch right behind it, large heads (the first costs 20 % of the trunk), a 6 × 6 average pooling at the
    end. ``'tuned'`` has branches after the first block, after half of the blocks and after two thirds: harder data
    wants later branches, and the blocks of 16 features after the first teach an exit little. Its heads are wider; each
    costs at most 2 % of the trunk.

    Attributes:
        depth: 6n + 2; 110 in the paper.
        num_classes: K.
        image_shape: ``(H, W, C)``; ``None`` takes images of any size.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        dtype: of the computation; parameters, BatchNorm statistics and logits are float32.

    References:
        He et al., Deep Residual Learning, 2016, section 4.2. BranchyNet, 2016, section IV-A; released code.
    """

    depth: int = 110
    num_classes: int = 10
    image_shape: tuple[int, int, int] | None = (32, 32, 3)
    placement: str = 'text'
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f'depth: got {self.depth}; a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, …, 110')
        _check_placement(self.placement)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of every exit from float ``images [B, H, W, C]``."""
        layers.check_images(images, self.image_shape)
        learns = train and not frozen_trunk
        blocks, released = (self.depth - 2) // 6, self.placement == 'released'
        logits = []
        x = self._conv(images, 16, 'conv1', train=learns, padding=0 if released else 1)
        if released:
            logits.append(self._released_head1(x))
        for n in range(1, 3 * blocks + 1):
            group = (n - 1) // blocks
            stride = 2 if group > 0 and (n - 1) % blocks == 0 else 1
            x = layers.ResidualBlock(16 * 2**group, stride, self.dtype, name=f'block{n}')(x, learns)
            for _ in range(self.branches_after().count(n)):  # of few blocks, one may have several branches
                logits.append(self._head(len(logits) + 1, x, train))
        x = layers.flatten(nn.avg_pool(x, (6, 6))) if released else x.mean((1, 2))
        return *logits, self._classify('fc')(x)

    def branches_after(self) -> tuple[int, ...]:
        """Returns the numbers of the blocks, from 1, that a branch follows."""
        blocks = (self.depth - 2) // 6
        half = -(-blocks // 2)  # the middle one of three belongs to the earlier stage
        return {'text': (1, blocks), 'released': (blocks,), 'tuned': (1, blocks + half, 2 * blocks)}[self.placement]

    def _head(self, n: int, x: Array, train: bool) -> Array:
        if self.placement == 'released':
            x = layers.ResidualBlock(16, dtype=self.dtype, name='exit2_block1')(x, train)
            return self._classify('exit2_fc')(layers.flatten(x))
        features, strides = {
            'text': (((32, 32, 64), 2), ((32, 64), 2)),
            'tuned': (((32, 64, 64), 2), ((64, 64), 1), ((64, 64), 1)),
        }[self.placement][n - 1]
        for i, width in enumerate(features, 1):
            stride = 2 if i <= strides else 1
            x = self._conv(x, width, f'exit{n}_conv{i}', train=train, strides=stride, padding=1)
        return self._classify(f'exit{n}_fc')(x.mean((1, 2)))

    def _released_head1(self, x: Array) -> Array:
        conv = functools.partial(nn.Conv, kernel_init=layers.he_normal, dtype=self.dtype)
        x = layers.local_response_normalization(nn.relu(conv(64, (5, 5), padding=2, name='exit1_conv1')(x)))
        x = nn.relu(conv(32, (3, 3), padding=1, name='exit1_conv2')(x))
        x = nn.relu(conv(32, (3, 3), padding=1, name='exit1_conv3')(x))
        return self._classify('exit1_fc')(layers.flatten(x))

    def _conv(self, x: Array, features: int, name: str, **options: Any) -> Array:
        return layers.conv_norm_relu(x, features, name, dtype=self.dtype, kernel_init=layers.he_normal, **options)

    def _classify(self, name: str) -> nn.Dense:
        return nn.Dense(self.num_classes, dtype=self.dtype, name=name)
