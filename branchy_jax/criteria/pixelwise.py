"""Anytime dense prediction: pixels that are sure keep the earlier answer while the rest are refined."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from branchy_jax.criteria.criterion import Carry, Criterion, is_confident
from branchy_jax.criteria.measures import entropy_of_logits
from branchy_jax.types import Array


def pixelwise(pixel_thresholds: Array, *, uncertainty_of: Callable[[Array], Array] = entropy_of_logits) -> Criterion:
    r"""Builds the criterion that lets each pixel answer at the first exit where it is confident.

    The answer of exit n is a mosaic: every pixel shows the logits of the exit that it left at, pixels that are still
    unsure those of exit n. The uncertainty of the image is the share of pixels that are still unsure, so a threshold of
    0.02 lets an image leave once at most 2 % of it, strictly less, would still change.

    **A pixel that is sure saves nothing by itself:** a convolution computes whole images, and so do all executors here.
    Time is saved when an image leaves, and counted then; `pixel_exits` says which exit answers which pixel.

    Args:
        pixel_thresholds: ``[N - 1]``, in the unit of ``uncertainty_of``, compared pixel by pixel as everywhere:
            strictly.
        uncertainty_of: ``logits [B, H, W, K] → [B, H, W]``.

    Raises:
        ValueError: thresholds that are not numbers in one dimension, or NaN; when run, another number of them than
            side exits.

    Example:
        >>> criterion, sure, unsure = pixelwise([0.5]), jnp.array([9.0, 0.0]), jnp.array([0.0, 0.0])
        >>> logits = jnp.stack([sure, unsure])[None, None]  # one image of 1 × 2 pixels
        >>> _, uncertainty, carry = criterion.update(logits, criterion.init(logits), 0)
        >>> answer, _, _ = criterion.update(-logits - 1, carry, 1)
        >>> uncertainty.tolist(), answer[0, 0].tolist()
        ([0.5], [[9.0, 0.0], [-1.0, -1.0]])

    References:
        Liu et al., Anytime Dense Prediction with Confidence Adaptivity, 2022.
    """
    thresholds = np.asarray(pixel_thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f'pixel_thresholds: expected one number per side exit, got {thresholds.tolist()}')

    def init(logits: Array) -> Carry:
        return jnp.zeros_like(logits), jnp.zeros(logits.shape[:-1], bool)

    def update(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        if not 0 <= n <= len(thresholds):
            raise ValueError(
                f'pixel_thresholds: there are {len(thresholds)}, one per side exit, but the network asks for '
                f'exit {n + 1}'
            )
        kept, answered = carry
        answer = jnp.where(answered[..., None], kept, logits)
        if n < len(thresholds):
            answered = answered | is_confident(uncertainty_of(logits), thresholds[n])
        unsure = (~answered).reshape(len(logits), -1).mean(axis=-1)
        return answer, unsure, (answer, answered)

    return Criterion(init=init, update=update, name='pixelwise')


def pixel_exits(
    logits: Array, pixel_thresholds: Array, *, uncertainty_of: Callable[[Array], Array] = entropy_of_logits
) -> Array:
    """Tells which exit answers each pixel if no image leaves early.

    Args:
        logits: ``[N, B, …, K]`` of every exit.
        pixel_thresholds: ``[N - 1]``.
        uncertainty_of: as in `pixelwise`.

    Returns:
        ``[B, …]`` int32 in ``[0, N)``.

    Raises:
        ValueError: not one threshold per side exit.

    Example:
        >>> pixel_exits(jnp.array([[[9.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]), [0.5]).tolist()
        [0, 1]
    """
    thresholds = np.asarray(pixel_thresholds, np.float32)
    if thresholds.shape != (len(logits) - 1,):
        raise ValueError(f'pixel_thresholds: expected {len(logits) - 1}, one per side exit, got {thresholds.tolist()}')
    confident = [is_confident(uncertainty_of(z), threshold) for z, threshold in zip(logits, thresholds, strict=False)]
    confident.append(jnp.ones(logits.shape[1:-1], bool))
    return jnp.argmax(jnp.stack(confident), axis=0).astype(jnp.int32)
