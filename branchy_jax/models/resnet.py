"""ResNet for 32 × 32 images at any depth 6n + 2, with two side branches."""

from __future__ import annotations

import functools
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
    """Builds B-ResNet: 6n + 2 layers in three groups of 16, 32 and 64 features, and two or four side exits.

    ``'text'`` is He et al.'s network with branches after the first block and after the last block of 16 features.
    The paper's first branch leaves "after the 2nd convolution", which lies inside the first block; ours waits for
    that block's end. The heads have three and two convolutions and one dense layer, strided and averaged so that the
    first costs about 1 % of the trunk. ``'released'`` is the authors' network: an unpadded first convolution with the
    first branch right behind it, large heads (the first costs 20 % of the trunk), a 6 × 6 average pooling at the end.
    ``'tuned'`` has the text's branches and two more, after a sixth and after two thirds of the blocks: harder data
    wants later branches, too. Each head costs at most 2 % of the trunk.

    Args:
        depth: 6n + 2; 110 in the paper.
        num_classes: K.
        image_shape: ``(H, W, C)``.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        heads: a replacement for each side head; ``None`` keeps one.
        dtype: of the computation; parameters, BatchNorm statistics and logits stay float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`.

    Returns:
        `BranchyNet` with N = 3, or N = 5 if ``'tuned'``.

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

    group1 = first, *others = [block(16, name=f'block{n + 1}') for n in range(blocks)]
    group2 = [block(32, stride=2 if n == 0 else 1, name=f'block{blocks + n + 1}') for n in range(blocks)]
    group3 = [block(64, stride=2 if n == 0 else 1, name=f'block{2 * blocks + n + 1}') for n in range(blocks)]
    classify1, classify2, classify3, classify4 = (dense(num_classes, name=f'exit{n}_fc') for n in (1, 2, 3, 4))
    first_head = (
        *normalized_conv('exit1_conv1', 32, strides=2, padding=1),
        *normalized_conv('exit1_conv2', 32, strides=2, padding=1),
        *normalized_conv('exit1_conv3', 64, padding=1),
        global_average_pool, classify1,
    )  # fmt: skip

    def second_head(name: str, classify: nn.Module) -> tuple[Layers, ...]:
        return (
            *normalized_conv(f'{name}_conv1', 32, strides=2, padding=1),
            *normalized_conv(f'{name}_conv2', 64, strides=2, padding=1),
            global_average_pool, classify,
        )  # fmt: skip

    half = -(-blocks // 2)  # the middle one of three goes to the earlier stage
    layouts = {
        'text': (
            ((*normalized_conv('conv1', 16, padding=1), first), tuple(others), (*group2, *group3, global_average_pool)),
            (first_head, second_head('exit2', classify2)),
        ),
        'released': (
            (normalized_conv('conv1', 16, padding=0), (first, *others), (*group2, *group3, _average_6x6, flatten)),
            (
                (
                    conv(64, (5, 5), padding=2, use_bias=True, name='exit1_conv1'), nn.relu,
                    local_response_normalization,
                    conv(32, (3, 3), padding=1, use_bias=True, name='exit1_conv2'), nn.relu,
                    conv(32, (3, 3), padding=1, use_bias=True, name='exit1_conv3'), nn.relu,
                    flatten, classify1,
                ),
                (block(16, name='exit2_block1'), flatten, classify2),
            ),
        ),
        'tuned': (
            (
                (*normalized_conv('conv1', 16, padding=1), first),
                tuple(group1[1:half]), tuple(group1[half:]), tuple(group2), (*group3, global_average_pool),
            ),
            (
                first_head,
                second_head('exit2', classify2),
                second_head('exit3', classify3),
                (*normalized_conv('exit4_conv1', 64, strides=2, padding=1), global_average_pool, classify4),
            ),
        ),
    }  # fmt: skip
    stages, side_heads = choose_layout(layouts, placement=placement, heads=heads)
    return BranchyNet(stages=stages, exits=(*side_heads, dense(num_classes, name='fc')), image_shape=image_shape)
