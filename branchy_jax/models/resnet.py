"""ResNet for 32 × 32 images at any depth 6n + 2, with two side branches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models.branchy import BranchyNet, choose_layout
from branchy_jax.models.compose import Layers
from branchy_jax.models.layers import (
    ResidualBlock,
    flatten,
    global_average_pool,
    he_normal,
    local_response_normalization,
)
from branchy_jax.types import Array

_average_6x6 = functools.partial(nn.avg_pool, window_shape=(6, 6))


def b_resnet(
    *,
    depth: int = 110,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    placement: str = 'text',
    heads: Sequence[Layers | None] | None = None,
    dtype: jnp.dtype = jnp.float32,
    convolution: Callable[..., Array] = lax.conv_general_dilated,
) -> BranchyNet:
    """Builds B-ResNet: 6n + 2 layers in three groups of 16, 32 and 64 features, and two or three side exits.

    ``'text'`` is He et al.'s network with branches after the first block and after the last block of 16 features.
    The paper's first branch leaves "after the 2nd convolution", which lies inside the first block; ours waits for
    that block's end. The heads have three and two convolutions and one dense layer, strided and averaged so that the
    first costs about 1 % of the trunk. ``'released'`` is the authors' network: an unpadded first convolution with the
    first branch right behind it, large heads (the first costs 20 % of the trunk), a 6 × 6 average pooling at the end.
    ``'tuned'`` has branches after the first block, after half of the blocks and after two thirds: harder data wants
    later branches, and the blocks of 16 features after the first teach an exit little. Its heads are wider; each costs
    at most 2 % of the trunk.

    Args:
        depth: 6n + 2; 110 in the paper.
        num_classes: K.
        image_shape: ``(H, W, C)``.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        heads: a replacement for each side head; ``None`` keeps one.
        dtype: of the computation; parameters, BatchNorm statistics and logits stay float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`.

    Returns:
        `BranchyNet` with N = 3, or N = 4 if ``'tuned'``.

    Raises:
        ValueError: a depth that is not 6n + 2, unknown placement or wrong number of heads.

    References:
        He et al., Deep Residual Learning, 2016, section 4.2. BranchyNet, 2016, section IV-A; released code.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f'depth: got {depth}; a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, …, 110')
    blocks = (depth - 2) // 6
    conv = functools.partial(
        nn.Conv, use_bias=False, kernel_init=he_normal, dtype=dtype, conv_general_dilated=convolution
    )
    dense = functools.partial(nn.Dense, dtype=dtype)
    block = functools.partial(ResidualBlock, dtype=dtype, convolution=convolution)

    def normalized_conv(name: str, features: int, **options: Any) -> tuple[Layers, ...]:
        norm = nn.BatchNorm(momentum=0.9, dtype=dtype, name=f'{name}_norm')
        return conv(features, (3, 3), name=name, **options), norm, nn.relu

    first, *others = [block(16, name=f'block{n + 1}') for n in range(blocks)]
    group2 = [block(32, stride=2 if n == 0 else 1, name=f'block{blocks + n + 1}') for n in range(blocks)]
    group3 = [block(64, stride=2 if n == 0 else 1, name=f'block{2 * blocks + n + 1}') for n in range(blocks)]
    classify1, classify2, classify3 = (dense(num_classes, name=f'exit{n}_fc') for n in (1, 2, 3))

    def head(name: str, *features: int, strides: int, classify: nn.Module) -> tuple[Layers, ...]:
        convolutions = (
            normalized_conv(f'{name}_conv{n}', width, strides=2 if n <= strides else 1, padding=1)
            for n, width in enumerate(features, 1)
        )
        return *itertools.chain(*convolutions), global_average_pool, classify

    half = -(-blocks // 2)  # the middle one of three goes to the earlier stage
    layouts = {
        'text': (
            ((*normalized_conv('conv1', 16, padding=1), first), tuple(others), (*group2, *group3, global_average_pool)),
            (
                head('exit1', 32, 32, 64, strides=2, classify=classify1),
                head('exit2', 32, 64, strides=2, classify=classify2),
            ),
        ),
        'released': (
            (normalized_conv('conv1', 16, padding=0), (first, *others), (*group2, *group3, _average_6x6, flatten)),
            (
                (
                    conv(64, (5, 5), padding=2, use_bias=True, name='exit1_conv1'),
                    nn.relu,
                    local_response_normalization,
                    conv(32, (3, 3), padding=1, use_bias=True, name='exit1_conv2'),
                    nn.relu,
                    conv(32, (3, 3), padding=1, use_bias=True, name='exit1_conv3'),
                    nn.relu,
                    flatten,
                    classify1,
                ),
                (block(16, name='exit2_block1'), flatten, classify2),
            ),
        ),
        'tuned': (
            (
                (*normalized_conv('conv1', 16, padding=1), first),
                (*others, *group2[:half]),
                tuple(group2[half:]),
                (*group3, global_average_pool),
            ),
            (
                head('exit1', 32, 64, 64, strides=2, classify=classify1),
                head('exit2', 64, 64, strides=1, classify=classify2),
                head('exit3', 64, 64, strides=1, classify=classify3),
            ),
        ),
    }
    stages, side_heads = choose_layout(layouts, placement=placement, heads=heads)
    return BranchyNet(stages=stages, exits=(*side_heads, dense(num_classes, name='fc')), image_shape=image_shape)
