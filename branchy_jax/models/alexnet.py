"""AlexNet for 32 × 32 colour images, with two side branches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models.branchy import BranchyNet, choose_layout
from branchy_jax.models.compose import Layers
from branchy_jax.models.layers import flatten, local_response_normalization, max_pool
from branchy_jax.types import Array

_pool = functools.partial(max_pool, window=3, stride=2)
_pool_and_normalize = (nn.relu, _pool, local_response_normalization)


def b_alexnet(
    *,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    placement: str = 'text',
    heads: Sequence[Layers | None] | None = None,
    dtype: jnp.dtype = jnp.float32,
    convolution: Callable[..., Array] = lax.conv_general_dilated,
) -> BranchyNet:
    """Builds B-AlexNet: five convolutions, three dense layers, and two side exits.

    The trunk is the released one in either placement. ``'text'`` branches after the first and the second convolution
    (each with its pooling and normalisation, which branch and trunk share), with two and one strided convolutions and
    a dense layer. ``'released'`` branches one convolution later, before the pooling, which each branch repeats.
    ``'tuned'`` leaves where the text does, before and after the convolution that costs most, and doubles the features
    of both heads: a first exit that is right more often saves more than it costs.

    Args:
        num_classes: K.
        image_shape: ``(H, W, C)``.
        placement: ``'text'``, ``'released'`` or ``'tuned'``.
        heads: two replacements for the side heads; ``None`` keeps one.
        dtype: of the computation; parameters and logits stay float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`.

    Returns:
        `BranchyNet` with N = 3.

    Raises:
        ValueError: unknown placement or wrong number of heads.

    References:
        BranchyNet, 2016, section IV-A and Figure 1; released code.
    """
    conv = functools.partial(nn.Conv, dtype=dtype, conv_general_dilated=convolution)
    dense = functools.partial(nn.Dense, dtype=dtype)
    small = functools.partial(conv, 32, (3, 3), padding=1)
    wide = functools.partial(conv, 64, (3, 3), padding=1)
    conv1 = conv(32, (5, 5), padding=2, name='conv1')
    conv2 = conv(64, (5, 5), padding=2, name='conv2')
    conv3 = conv(96, (3, 3), padding=1, name='conv3')
    rest = (
        nn.relu,
        conv(96, (3, 3), padding=1, name='conv4'),
        nn.relu,
        conv(64, (3, 3), padding=1, name='conv5'),
        nn.relu,
        _pool,
        flatten,
    )
    classify1, classify2 = dense(num_classes, name='exit1_fc'), dense(num_classes, name='exit2_fc')
    as_in_text = (conv1, *_pool_and_normalize), (conv2, *_pool_and_normalize), (conv3, *rest)

    def strided_heads(conv: Callable[..., nn.Module]) -> tuple[Layers, Layers]:
        return (
            (
                conv(strides=2, name='exit1_conv1'),
                nn.relu,
                conv(name='exit1_conv2'),
                nn.relu,
                _pool,
                flatten,
                classify1,
            ),
            (conv(name='exit2_conv1'), nn.relu, _pool, flatten, classify2),
        )

    layouts = {
        'text': (as_in_text, strided_heads(small)),
        'released': (
            ((conv1, *_pool_and_normalize, conv2), (*_pool_and_normalize, conv3), rest),
            (
                (
                    *_pool_and_normalize,
                    small(name='exit1_conv1'),
                    nn.relu,
                    small(name='exit1_conv2'),
                    nn.relu,
                    _pool,
                    flatten,
                    classify1,
                ),
                (*_pool_and_normalize, small(name='exit2_conv1'), nn.relu, _pool, flatten, classify2),
            ),
        ),
        'tuned': (as_in_text, strided_heads(wide)),
    }
    stages, side_heads = choose_layout(layouts, placement=placement, heads=heads)
    last_head = (
        dense(256, name='fc1'),
        nn.relu,
        nn.Dropout(0.5, name='dropout1'),
        dense(128, name='fc2'),
        nn.relu,
        nn.Dropout(0.5, name='dropout2'),
        dense(num_classes, name='fc3'),
    )
    return BranchyNet(stages=stages, exits=(*side_heads, last_head), image_shape=image_shape)
