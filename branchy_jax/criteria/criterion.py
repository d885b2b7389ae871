"""What a criterion is, and the one comparison that decides whether an exit answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct

from branchy_jax.criteria.pooling import Pool, mean_over_pixels
from branchy_jax.types import Array

Carry = Any
"""What a criterion remembers from exit to exit: any pytree whose leaves lead with B."""


def most_likely_class(logits: Array) -> Array:
    """Returns the label of logits ``[B, …, K]``: their argmax ``[B, …]`` int32."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


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
        decide: ``answer logits [B, …, K] → label``; `most_likely_class` unless the task is another.
    """

    init: Callable[[Array], Carry] = struct.field(pytree_node=False)
    update: Callable[[Array, Carry, int], tuple[Array, Array, Carry]] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    decide: Callable[[Array], Array] = struct.field(pytree_node=False, default=most_likely_class)


def from_logits(
    uncertainty_of: Callable[[Array], Array],
    *,
    name: str,
    pool: Pool = mean_over_pixels,
    decide: Callable[[Array], Array] = most_likely_class,
) -> Criterion:
    """Builds the criterion that looks at one exit's logits alone.

    Args:
        uncertainty_of: ``logits [B, …, K] → uncertainty [B, …]``.
        name: the criterion's name in reports.
        pool: ``uncertainty [B, …] → [B]``, where an exit answers for many pixels; see `branchy_jax.criteria.pooling`.
        decide: ``logits → label``; for regression, say, ``lambda outputs: outputs[..., 0]``.

    Example:
        >>> margin = from_logits(lambda logits: -jnp.ptp(logits, axis=-1), name='range')
        >>> answer, uncertainty, _ = margin.update(jnp.array([[0.0, 3.0]]), (), 0)
        >>> float(uncertainty[0])
        -3.0
    """

    def update(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        return logits, pool(uncertainty_of(logits)), carry

    return Criterion(init=lambda logits: (), update=update, name=name, decide=decide)


def is_confident(uncertainty: Array, threshold: Array) -> Array:
    """Decides whether an exit answers: ``uncertainty < threshold``, strictly.

    The one rule of the library; searches and planners that work on arrays follow it. ``-inf`` never
    exits, ``+inf`` exits on any finite uncertainty, and an uncertainty that is NaN goes on to the next exit.
    """
    return uncertainty < threshold


def check_exit_number(n: int, count: int, argument: str) -> None:
    """Refuses an exit for which a criterion has nothing of its own.

    Raises:
        ValueError: n is beyond the last.
    """
    if not 0 <= n < count:
        raise ValueError(f'{argument}: there are {count}, one per exit, but the network asks for exit {n + 1}')


def replay(criterion: Criterion, logits: Array) -> tuple[Array, Array]:
    """Runs a criterion over cached logits of every exit, instead of over the network again.

    Args:
        criterion: how unsure an exit is.
        logits: ``[N, B, …, K]`` as the heads gave them.

    Returns:
        Answer logits ``[N, B, …, K]`` and uncertainty ``[N, B]``.

    Example:
        >>> from branchy_jax.criteria import entropy
        >>> replay(entropy, jnp.zeros((2, 3, 4)))[1].shape
        (2, 3)
    """
    logits = jnp.asarray(logits)
    carry, answers, uncertainties = criterion.init(logits[0]), [], []
    for n, one in enumerate(logits):
        answer, uncertainty, carry = criterion.update(one, carry, n)
        answers.append(answer)
        uncertainties.append(uncertainty)
    return jnp.stack(answers), jnp.stack(uncertainties)
