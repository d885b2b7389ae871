"""An encoder–decoder for segmentation, with two early exits that predict masks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from branchy_jax.models.branchy import BranchyNet, choose_heads
from branchy_jax.models.compose import Layers, Route
from branchy_jax.models.layers import depth_to_space, space_to_depth
from branchy_jax.types import Array


def b_unet(
    *,
    num_classes: int = 11,
    image_shape: tuple[int, int, int] = (48, 48, 1),
    width: int = 16,
    patch_size: int = 2,
    head_width: int = 32,
    heads: Sequence[Layers | None] | None = None,
    dtype: jnp.dtype = jnp.float32,
    convolution: Callable[..., Array] = lax.conv_general_dilated,
) -> BranchyNet:
    """Builds B-U-Net: four levels down, three up, and masks after the encoder and after the first level up.

    All levels work on patches of pixels, and every head ends by unfolding features into pixels, so that the finest
    level costs no more than the others. A side head adds up the levels so far at the finest resolution, after a
    projection each, and unfolds: a twentieth of the trunk. The first has seen the whole
    image, as a digit's class needs; what it lacks is the decoder, two thirds of the trunk.

    Args:
        num_classes: K, the background included.
        image_shape: ``(H, W, C)``; H and W must be divisible by ``8 * patch_size``.
        width: features of the finest level; each level down has twice as many.
        patch_size: side of the pixels that are one position of the finest level.
        head_width: features of the side heads; below K plus the pixels of a patch they cannot tell all masks apart.
        heads: one replacement per side exit, reading the hidden dictionary; ``None`` keeps the default.
        dtype: of the computation; parameters and logits stay float32.
        convolution: drop-in for `jax.lax.conv_general_dilated`, for the 3 × 3 convolutions.

    Returns:
        `BranchyNet` with N = 3; exits return logits ``[B, H, W, K]``.

    Raises:
        ValueError: an image that four levels do not divide, or wrong number of heads.

    Example:
        >>> import jax
        >>> model, images = b_unet(width=4, head_width=4, image_shape=(16, 16, 1)), jnp.ones((1, 16, 16, 1))
        >>> [logits.shape for logits in model.init_with_output(jax.random.key(0), images)[0]]
        [(1, 16, 16, 11), (1, 16, 16, 11), (1, 16, 16, 11)]

    References:
        Ronneberger et al., U-Net, 2015; heads after Kirillov et al., Panoptic Feature Pyramid Networks, 2019.
    """
    if any(length % (8 * patch_size) for length in image_shape[:2]):
        raise ValueError(
            f'image_shape: got {tuple(image_shape)}; four levels on patches of {patch_size} need multiples of '
            f'{8 * patch_size}; pad or resize the images'
        )
    conv = functools.partial(nn.Conv, dtype=dtype, conv_general_dilated=convolution)

    def layer(features: int, name: str) -> Layers:
        norm = nn.BatchNorm(momentum=0.9, dtype=dtype, name=f'{name}_norm')
        return conv(features, (3, 3), use_bias=False, name=name), norm, nn.relu

    def block(features: int, name: str) -> Layers:
        return *layer(features, f'{name}_conv1'), *layer(features, f'{name}_conv2')

    def unfold(name: str) -> Layers:
        return conv(num_classes * patch_size**2, (1, 1), name=name), _pixels(depth_to_space, patch_size)

    def side_head(levels: tuple[str, ...], name: str) -> Route:
        gather = AddLevels(head_width, dtype=dtype, name=f'{name}_levels')
        norm = nn.BatchNorm(momentum=0.9, dtype=dtype, name=f'{name}_norm')
        return Route((gather, norm, nn.relu, *unfold(f'{name}_logits')), levels)

    fold = _pixels(space_to_depth, patch_size)
    down = [Route((fold, *block(width, 'down0')), None, 'down0')]
    for n in (1, 2, 3):
        down.append(Route((_halve, *block(width * 2**n, f'down{n}')), f'down{n - 1}', f'down{n}'))
    up = [
        Route((_join, *block(width * 2**n, f'up{n}')), (f'up{n + 1}' if n < 2 else 'down3', f'down{n}'), f'up{n}')
        for n in (2, 1, 0)
    ]
    own = [side_head(('down0', 'down1', 'down2', 'down3'), 'exit1'), side_head(('down0', 'down1', 'up2'), 'exit2')]
    return BranchyNet(
        stages=(tuple(down), (up[0],), tuple(up[1:])),
        exits=(*choose_heads(own, heads), Route(unfold('head'), 'up0')),
        image_shape=tuple(image_shape),
    )


@functools.cache  # equal networks have equal layers, and two partials are never equal
def _pixels(function: Callable[..., Array], size: int) -> Callable[[Array], Array]:
    return functools.partial(function, size=size)


class AddLevels(nn.Module):
    """Projects each level to the same features and adds all at the resolution of the first.

    Attributes:
        features: of the sum.
        dtype: of the computation.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: tuple[Array, ...]) -> Array:
        """Maps arrays ``[B, H / 2^i, W / 2^i, C_i]``, the first being the finest, to ``[B, H, W, features]``."""
        projected = [
            nn.Conv(self.features, (1, 1), dtype=self.dtype, name=f'level{n}')(level) for n, level in enumerate(levels)
        ]
        return functools.reduce(operator.add, (_enlarge(level, levels[0].shape) for level in projected))


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (2, 2), (2, 2))


def _join(pair: tuple[Array, Array]) -> Array:
    """Enlarges the coarse level to the fine one and puts both side by side: the skip connection."""
    coarse, fine = pair
    return jnp.concatenate([_enlarge(coarse, fine.shape), fine], axis=-1)


def _enlarge(x: Array, shape: tuple[int, ...]) -> Array:
    for axis in (1, 2):
        x = jnp.repeat(x, shape[axis] // x.shape[axis], axis=axis)
    return x
