"""Augmentation, traced inside jit."""

import jax
import jax.numpy as jnp
from jax import lax

from branchy_jax.types import Array, Batch


def augment(key: Array, batch: Batch, *, crop_padding: int = 4, flip: bool = True) -> Batch:
    """Shifts each image by a random crop of its zero-padded copy and mirrors half of the images.

    Runs inside jit, in the function that `branchy_jax.training.fit` takes as ``augment``. A mask ``[B, H, W]`` moves
    with its image; pixels that move in are 0.

    Args:
        key: PRNG key.
        batch: images ``[B, H, W, C]`` with masks ``[B, H, W]``, or with labels or other targets, which do not change.
        crop_padding: width of the zero padding in pixels; 0 does not shift.
        flip: whether to mirror left and right. Not for digits.

    Returns:
        A batch of the same shapes and dtypes.

    Raises:
        ValueError: if the images do not have four axes, or ``crop_padding`` is below 0.

    Example:
        >>> batch = Batch(jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32))
        >>> augment(jax.random.key(0), batch, flip=False).image.shape
        (8, 28, 28, 1)
    """
    shape = batch.image.shape
    if len(shape) != 4 or crop_padding < 0:
        raise ValueError(f'batch: got images {shape} and crop_padding {crop_padding}; expected [B, H, W, C] and ≥ 0')
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (shape[0], 2), 0, 2 * crop_padding + 1)
    mirrored = jax.random.bernoulli(flip_key, shape=(shape[0], 1, 1, 1))

    def move(images: Array) -> Array:
        if crop_padding:
            edge = (crop_padding, crop_padding)
            padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
            crop = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))
            images = crop(padded, corners)
        return jnp.where(mirrored, images[:, :, ::-1], images) if flip else images

    is_mask = getattr(batch.label, 'shape', None) == shape[:3]
    return Batch(move(batch.image), move(batch.label[..., None])[..., 0] if is_mask else batch.label)
