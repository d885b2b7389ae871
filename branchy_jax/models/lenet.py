"""LeNet-5 for 28 × 28 digits, with one side branch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models.branchy import BranchyNet, choose_layout
from branchy_jax.models.compose import Layers
from branchy_jax.models.layers import flatten, max_pool
from branchy_jax.types import Array

_pool = functools.partial(max_pool, window=2, stride=2)


def b_lenet(
    *,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    placement: str = 'text',
    heads: Sequence[Layers | None] | None = None,
    dtype: jnp.dtype = jnp.float32,
    convolution: Callable[..., Array] = lax.conv_general_dilated,
) -> BranchyNet:
    """Builds B-LeNet: three convolutions, two dense layers, and one exit after or before the first convolution.

    The trunk is the released one in either placement: convolutions of 5, 10 and 20 features, each pooled. The branch
    holds one convolution and one dense layer. ``'text'`` shares the trunk's first pooling and strides its convolution,
    which costs 2 % of the trunk; ``'released'`` leaves before the pooling and pools again after its convolution.
    ``'tuned'`` leaves before the trunk begins: its five first features take most of the time on the way to an exit
    behind them, and are too few for it. Two strided convolutions of its own answer sooner, and better.

    Args:
        num_classes: K.
        image_shape: ``(H, W, C)``.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        heads: one replacement for the side head; ``None`` keeps it.
        dtype: of the computation; parameters and logits stay float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`, such as `branchy_jax.models.banded_convolution`.

    Returns:
        `BranchyNet` with N = 2.

    Raises:
        ValueError: unknown placement or wrong number of heads.

    References:
        BranchyNet, 2016, section IV-A; released code.
    """
    conv = functools.partial(nn.Conv, dtype=dtype, conv_general_dilated=convolution)
    dense = functools.partial(nn.Dense, dtype=dtype)
    conv1 = conv(5, (5, 5), padding=3, name='conv1')
    rest = (
        conv(10, (5, 5), padding=3, name='conv2'),
        _pool,
        nn.relu,
        conv(20, (5, 5), padding=3, name='conv3'),
        _pool,
        nn.relu,
        flatten,
        dense(84, name='fc1'),
    )
    classify = dense(num_classes, name='exit1_fc')
    branch = functools.partial(conv, 32, padding=0)
    layouts = {
        'text': (
            ((conv1, _pool, nn.relu), rest),
            ((conv(16, (3, 3), strides=3, padding=0, name='exit1_conv1'), nn.relu, flatten, classify),),
        ),
        'released': (
            (conv1, (_pool, nn.relu, *rest)),
            ((_pool, nn.relu, conv(10, (3, 3), padding=1, name='exit1_conv1'), _pool, nn.relu, flatten, classify),),
        ),
        'tuned': (
            ((), (conv1, _pool, nn.relu, *rest)),
            (
                (
                    branch(kernel_size=(6, 6), strides=3, name='exit1_conv1'),
                    nn.relu,
                    branch(kernel_size=(3, 3), strides=2, name='exit1_conv2'),
                    nn.relu,
                    flatten,
                    classify,
                ),
            ),
        ),
    }
    stages, side_heads = choose_layout(layouts, placement=placement, heads=heads)
    return BranchyNet(stages=stages, exits=(*side_heads, dense(num_classes, name='fc2')), image_shape=image_shape)
