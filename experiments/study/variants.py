"""The paper's trunks with a branch anywhere and of any depth, and a deep trunk without shortcuts."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import branchy_jax as bj
from branchy_jax.models.compose import flatten_layers
from branchy_jax.models.layers import ResidualBlock, flatten, max_pool

_LARGEST_MAP = 8


def with_branch(network: str, *, after: int, convolutions: int, **options: Any) -> bj.BranchyNet:
    """Builds a trunk with one branch: so many 3 × 3 convolutions of 32 features, then a dense layer.

    Args:
        network: the one-exit network, such as ``'alexnet'``.
        after: layers (parts with weights, a residual block being one) before the branch; with their activation,
            pooling and normalisation.
        convolutions: in the branch; 0 leaves pooling and the dense layer.
        **options: of `branchy_jax.models.create`.

    Raises:
        ValueError: the trunk has not so many layers.
    """
    trunk = bj.models.create(network, **options)
    layers = flatten_layers(trunk.stages)
    weighted = [n for n, layer in enumerate(layers) if isinstance(layer, (nn.Conv, nn.Dense, ResidualBlock))]
    if not 0 < after < len(weighted):
        raise ValueError(f'after: got {after}; {network} has {len(weighted)} layers before its head, give fewer')
    cut = weighted[after]  # right before the next layer with weights, and before what only prepares a dense one
    cut -= layers[cut - 1] is flatten
    convolution = options.get('convolution', jax.lax.conv_general_dilated)
    dtype = options.get('dtype', jnp.float32)
    conv = functools.partial(nn.Conv, 32, (3, 3), padding=1, conv_general_dilated=convolution, dtype=dtype)
    branch: list[Any] = []
    for n in range(convolutions):
        branch += [conv(name=f'exit1_conv{n + 1}'), nn.relu]
    head = (*branch, _pool_to_small, flatten, nn.Dense(options.get('num_classes', 10), name='exit1_fc'))
    return bj.BranchyNet(
        stages=(layers[:cut], layers[cut:]), exits=(head, trunk.exits[-1]), image_shape=trunk.image_shape
    )


def deep_plain(*, depth: int, branches: int, image_shape: tuple[int, int, int], num_classes: int = 10) -> bj.BranchyNet:
    """Builds a deep network without shortcuts or normalisation: strided once a third, with branches evenly between.

    Args:
        depth: convolutions.
        branches: side exits; 0 for the plain network.
        image_shape: ``(H, W, C)``.
        num_classes: K.
    """
    places = [round((n + 1) * depth / (branches + 1)) for n in range(branches + 1)]
    strided = {depth // 3, 2 * depth // 3}
    layers = [
        (nn.Conv(16, (3, 3), strides=2 if n in strided else 1, padding=1, name=f'conv{n + 1}'), nn.relu)
        for n in range(depth)
    ]
    starts = [0, *places[:-1]]
    heads = [
        (bj.models.layers.global_average_pool, nn.Dense(num_classes, name=f'exit{n + 1}_fc')) for n in range(branches)
    ]
    return bj.BranchyNet(
        stages=tuple(tuple(layers[a:b]) for a, b in zip(starts, places, strict=True)),
        exits=(*heads, (bj.models.layers.global_average_pool, nn.Dense(num_classes, name='fc'))),
        image_shape=image_shape,
    )


def trunk_layers(model: bj.BranchyNet) -> list[str]:
    """Returns the names of the trunk's layers with weights, in order."""
    return [layer.name for layer in flatten_layers(model.stages) if isinstance(layer, nn.Module)]


def _pool_to_small(x: jax.Array) -> jax.Array:
    """Halves a map by maxima until its side is at most 8, so that dense layers stay small."""
    while x.shape[1] > _LARGEST_MAP:
        x = max_pool(x, window=2, stride=2)
    return x
