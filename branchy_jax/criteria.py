"""How unsure an exit is, and the one comparison that decides whether it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from branchy_jax.types import Array

Carry = Any
"""What a criterion remembers from exit to exit: any pytree whose leaves lead with B."""


@struct.dataclass
class Criterion:
    """A measure of uncertainty that may look back at the exits before.

    Executors call ``carry = init(logits)`` with the first exit's logits, then, at exit n,
    ``answer, uncertainty, carry = update(logits, carry, n)``. Whatever a criterion has learned (a temperature, a
    small network) is closed over.

    Attributes:
        init: ``logits [B, …, K] → carry``.
        update: ``(logits [B, …, K], carry, n) → (answer logits [B, …, K], uncertainty [B], carry)``; ``n`` is a
            Python int.
        name: how reports and operating points refer to it.
    """

    init: Callable[[Array], Carry] = struct.field(pytree_node=False)
    update: Callable[[Array, Carry, int], tuple[Array, Array, Carry]] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)


def from_logits(uncertainty_of: Callable[[Array], Array], *, name: str) -> Criterion:
    """Builds the criterion that looks at one exit's logits alone.

    Args:
        uncertainty_of: ``logits [B, …, K] → uncertainty [B, …]``; extra axes are averaged over.
        name: the criterion's name in reports.

    Example:
        >>> margin = from_logits(lambda logits: -jnp.ptp(logits, axis=-1), name='range')
        >>> answer, uncertainty, _ = margin.update(jnp.array([[0.0, 3.0]]), (), 0)
        >>> float(uncertainty[0])
        -3.0
    """

    def update(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        uncertainty = uncertainty_of(logits)
        return logits, uncertainty.reshape(uncertainty.shape[0], -1).mean(axis=-1), carry

    return Criterion(init=lambda logits: (), update=update, name=name)


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
    weights = jnp.exp(shifted)
    is_largest = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
    others = jnp.sum(jnp.where(is_largest, 0.0, weights), axis=-1)
    expected = jnp.sum(weights * jnp.where(weights > 0, shifted, 0.0), axis=-1) / (1 + others)
    return jnp.log1p(others) - expected


entropy = from_logits(entropy_of_logits, name='entropy')
"""The paper's criterion: entropy of the exit's softmax, in nats."""


def is_confident(uncertainty: Array, threshold: Array) -> Array:
    """Decides whether an exit answers: ``uncertainty < threshold``, strictly.

    The only comparison with a threshold in the library. ``-inf`` never exits, ``+inf`` exits on any finite
    uncertainty, and an uncertainty that is NaN goes on to the next exit.
    """
    return uncertainty < threshold
