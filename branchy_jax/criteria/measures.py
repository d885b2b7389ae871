"""How unsure a softmax is, to full relative precision also where it is nearly certain."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from branchy_jax.types import Array


def entropy_of_logits(logits: Array) -> Array:
    r"""Computes the entropy of the softmax, in nats.

    .. math:: e = -\sum_k \hat y_k \ln \hat y_k, \quad \hat y = \operatorname{softmax}(z)

    Computed in float32 as a sum of positive terms, so that tiny entropies keep their digits: thresholds of 1e-4 are
    common. With :math:`s = z - \max z` and :math:`m` the position of the maximum,

    .. math:: e = \ln\left(1 + \sum_{k \ne m} \exp s_k\right) - \sum_k \hat y_k s_k

    A probability of exactly 0 contributes 0.

    Args:
        logits: ``[..., K]``.

    Returns:
        ``[...]`` float32 in ``[0, ln K]``.

    Example:
        >>> bool(jnp.allclose(entropy_of_logits(jnp.zeros(10)), jnp.log(10.0)))
        True

    References:
        Teerapittayanon et al., BranchyNet, 2016, section III and Figure 2.
    """
    logits = logits.astype(jnp.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights, is_largest = _weights(logits)
    others = jnp.sum(jnp.where(is_largest, 0.0, weights), axis=-1)
    expected = jnp.sum(weights * jnp.where(weights > 0, shifted, 0.0), axis=-1) / (1 + others)
    return jnp.log1p(others) - expected


def doubt_of_logits(logits: Array) -> Array:
    r"""Computes one minus the largest probability, :math:`1 - \max_k \hat y_k`, as a sum of the others.

    Args:
        logits: ``[..., K]``.

    Returns:
        ``[...]`` float32 in ``[0, 1 - 1/K]``, to full relative precision also near 0.

    Example:
        >>> float(doubt_of_logits(jnp.zeros(4)))
        0.75
    """
    weights, is_largest = _weights(logits)
    others = jnp.sum(jnp.where(is_largest, 0.0, weights), axis=-1)
    return others / (1 + others)


def closeness_of_logits(logits: Array) -> Array:
    r"""Computes one minus the margin between the two largest probabilities, :math:`1 - (\hat y_{(1)} - \hat y_{(2)})`.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, 1]``, to full relative precision also near 0.

    Example:
        >>> float(closeness_of_logits(jnp.zeros(4)))
        1.0
    """
    weights, is_largest = _weights(logits)
    others = jnp.where(is_largest, 0.0, weights)
    total = others.sum(axis=-1)
    return (total + others.max(axis=-1)) / (1 + total)


def _weights(logits: Array) -> tuple[Array, Array]:
    """Returns the softmax's numerators, the largest being 1, and which is the largest."""
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights, jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
