"""A small vision transformer with an exit after any block."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.models.layers import check_images
from branchy_jax.types import Array


class ViT(nn.Module):
    """B-ViT: a transformer on image patches, with side exits after the blocks asked for.

    Every exit normalises, takes the class token or the mean of all tokens, and ends in one dense layer.

    Attributes:
        num_classes: K.
        image_shape: ``(H, W, C)``.
        patch_size: side of a patch; must divide H and W.
        depth: number of blocks.
        width: features of a token.
        num_heads: attention heads; must divide ``width``.
        exits_after: numbers of the blocks, counted from 1 and ascending, that a side exit follows.
        pool: what a head reads: ``'token'``, the class token, or ``'mean'``, the mean over tokens.
        dropout: rate after attention and within the feed-forward layers.
        dtype: of the computation; parameters and logits are float32.

    Raises:
        ValueError: on construction, patches that do not tile the image, heads that do not divide the width, exits out
            of range.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int] = (28, 28, 1)
    patch_size: int = 7
    depth: int = 6
    width: int = 64
    num_heads: int = 4
    exits_after: Sequence[int] = (1, 3)
    pool: str = 'token'
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        if any(length % self.patch_size for length in self.image_shape[:2]):
            raise ValueError(f'patch_size: got {self.patch_size}, which does not tile images of {self.image_shape[:2]}')
        if self.width % self.num_heads:
            raise ValueError(f'num_heads: got {self.num_heads}, which does not divide width {self.width}')
        if list(self.exits_after) != sorted({int(n) for n in self.exits_after} & set(range(1, self.depth))):
            raise ValueError(f'exits_after: got {list(self.exits_after)}; give ascending blocks in [1, {self.depth})')
        if self.pool not in ('token', 'mean'):
            raise ValueError(f"pool: got {self.pool!r}; choose from 'token', 'mean'")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of every exit from float ``images [B, H, W, C]``."""
        check_images(images, self.image_shape)
        learns = train and not frozen_trunk
        logits: list[Array] = []
        x = PatchEmbedding(self.patch_size, self.width, self.dtype, name='embedding')(images)
        for n in range(1, self.depth + 1):
            x = EncoderBlock(self.num_heads, self.dropout, self.dtype, name=f'block{n}')(x, learns)
            if n in self.exits_after:
                logits.append(self._head(x, f'exit{len(logits) + 1}'))
        return *logits, self._head(x, 'head')

    def _head(self, tokens: Array, name: str) -> Array:
        tokens = nn.LayerNorm(dtype=self.dtype, name=f'{name}_norm')(tokens)
        read = tokens[:, 0] if self.pool == 'token' else tokens.mean(axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name=f'{name}_fc')(read)


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
