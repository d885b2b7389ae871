"""Augmentation, traced inside jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from branchy_jax.types import Array


def augment(key: Array, images: Array, *, crop_padding: int = 4, flip: bool = True) -> Array:
    """Shifts each image by a random crop of its zero-padded self and mirrors half of them; traced inside jit.

    Under the same key masks ``[B, H, W, 1]`` move as their images do; what moves in is class 0.

    Args:
        key: PRNG key.
        images: ``[B, H, W, C]``.
        crop_padding: zeros around an image before the crop; 0 leaves its place alone.
        flip: whether to mirror left and right. Not for digits.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: images without four axes, or fewer than no zeros around them.

    Example:
        >>> augment(jax.random.key(0), jnp.ones((8, 28, 28, 1)), flip=False).shape
        (8, 28, 28, 1)
    """
    if images.ndim != 4 or crop_padding < 0:
        raise ValueError(
            f'images, crop_padding: expected [B, H, W, C] and at least 0, got {images.shape} and {crop_padding}; '
            'give masks a last axis of 1'
        )
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        edge = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
        corners = jax.random.randint(crop_key, (images.shape[0], 2), 0, 2 * crop_padding + 1)
        crop = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))
        images = crop(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images
