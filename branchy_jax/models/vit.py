"""A small vision transformer with an exit after any block."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.models.branchy import BranchyNet, choose_heads
from branchy_jax.models.compose import Layers
from branchy_jax.types import Array


def b_vit(
    *,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    patch_size: int = 7,
    depth: int = 6,
    width: int = 64,
    num_heads: int = 4,
    exits_after: Sequence[int] = (1, 3),
    pool: str = 'token',
    dropout: float = 0.0,
    heads: Sequence[Layers | None] | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> BranchyNet:
    """Builds B-ViT: a transformer on image patches, with side exits after the blocks asked for.

    Every exit normalises, takes the class token or the mean of all tokens, and ends in one dense layer.

    Args:
        num_classes: K.
        image_shape: ``(H, W, C)``.
        patch_size: side of a patch; must divide H and W.
        depth: number of blocks.
        width: features of a token.
        num_heads: attention heads; must divide ``width``.
        exits_after: numbers of the blocks, counted from 1 and ascending, that a side exit follows.
        pool: what a head reads: ``'token'``, the class token, or ``'mean'``, the mean over tokens.
        dropout: rate after attention and within the feed-forward layers.
        heads: one replacement per side exit, reading tokens ``[B, T, width]``; ``None`` keeps the default.
        dtype: of the computation; parameters and logits stay float32.

    Returns:
        `BranchyNet` with N = len(exits_after) + 1.

    Raises:
        ValueError: patches that do not tile the image, heads that do not divide the width, exits out of range.

    Example:
        >>> b_vit(depth=4, exits_after=(2,)).num_exits
        2

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """
    if any(length % patch_size for length in image_shape[:2]):
        raise ValueError(f'patch_size: got {patch_size}, which does not tile images of {image_shape[:2]}')
    if width % num_heads:
        raise ValueError(f'num_heads: got {num_heads}, which does not divide width {width}')
    if list(exits_after) != sorted({int(n) for n in exits_after} & set(range(1, depth))):
        raise ValueError(f'exits_after: got {list(exits_after)}; give ascending blocks in [1, {depth})')
    if heads is not None and len(heads) != len(exits_after):
        raise ValueError(f'heads: got {len(heads)} for {len(exits_after)} side exits; None keeps a default')
    readers = {'token': class_token, 'mean': mean_token}
    if pool not in readers:
        raise ValueError(f'pool: got {pool!r}; choose from {", ".join(map(repr, readers))}')
    blocks = [
        EncoderBlock(num_heads=num_heads, dropout=dropout, dtype=dtype, name=f'block{n + 1}') for n in range(depth)
    ]
    embedding = PatchEmbedding(patch_size=patch_size, width=width, dtype=dtype, name='embedding')
    cuts = [0, *exits_after, depth]
    stages: list[Layers] = [tuple(blocks[start:end]) for start, end in itertools.pairwise(cuts)]
    stages[0] = (embedding, *stages[0])

    def head(name: str) -> Layers:
        norm = nn.LayerNorm(dtype=dtype, name=f'{name}_norm')
        return norm, readers[pool], nn.Dense(num_classes, dtype=dtype, name=f'{name}_fc')

    side = choose_heads([head(f'exit{n + 1}') for n in range(len(exits_after))], heads)
    return BranchyNet(stages=tuple(stages), exits=(*side, head('head')), image_shape=tuple(image_shape))


class PatchEmbedding(nn.Module):
    """Patches as tokens, a class token before them, and where each of them is.

    Attributes:
        patch_size: side of a patch in pixels.
        width: features of a token.
        dtype: of the computation.
    """

    patch_size: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[B, H, W, C]`` to tokens ``[B, 1 + H W / patch_size², width]``, the class token first."""
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(self.width, size, strides=size, padding='VALID', dtype=self.dtype, name='patches')(images)
        patches = patches.reshape(patches.shape[0], -1, self.width)
        small = nn.initializers.normal(0.02)
        first = self.param('class_token', small, (1, 1, self.width)).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first, (patches.shape[0], 1, self.width)), patches], axis=1)
        return tokens + self.param('position', small, (1, tokens.shape[1], self.width)).astype(self.dtype)


class EncoderBlock(nn.Module):
    """Attention, then a feed-forward layer of four times the width, each normalised before and added to its input.

    Attributes:
        num_heads: of the attention.
        dropout: rate.
        dtype: of the computation.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> Array:
        """Maps tokens ``[B, T, width]`` to tokens of the same shape."""
        width = tokens.shape[-1]
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name='attention')
        tokens = tokens + drop(attend(norm(name='norm1')(tokens)))
        hidden = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name='expand')(norm(name='norm2')(tokens)))
        return tokens + drop(nn.Dense(width, dtype=self.dtype, name='contract')(drop(hidden)))


def class_token(tokens: Array) -> Array:
    """Returns the first token: ``[B, T, F] → [B, F]``."""
    return tokens[:, 0]


def mean_token(tokens: Array) -> Array:
    """Averages over tokens: ``[B, T, F] → [B, F]``."""
    return tokens.mean(axis=1)
