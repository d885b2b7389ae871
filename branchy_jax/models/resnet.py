"""ResNet for 32 × 32 images at any depth 6n + 2, with two or three side branches."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.models import layers
from branchy_jax.types import Array


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
        layers.check_placement(self.placement, ('text', 'released', 'tuned'))
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
