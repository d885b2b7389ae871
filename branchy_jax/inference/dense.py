"""Every exit computed, then selected: saves nothing, and is what all other executors must agree with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from branchy_jax.criteria import Criterion, entropy, is_confident
from branchy_jax.inference.checks import check_thresholds
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPrediction, Variables

Executor = Callable[[Variables, Array, Array], ExitPrediction]
"""``(variables, images, thresholds) → ExitPrediction``, jitted."""


def dense(model: BranchyNet, *, criterion: Criterion = entropy) -> Executor:
    """Builds the oracle executor: runs all stages and heads on the whole batch and selects the first confident exit.

    Args:
        model: a network with N exits.
        criterion: how unsure an exit is.

    Returns:
        ``(variables, images [B, H, W, C], thresholds [N - 1]) → ExitPrediction``. Works under `jax.jit` and
        `jax.vmap` (over thresholds, say). Raises ValueError on the wrong number of thresholds, NaN, or bad images.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> dense(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0]

    References:
        BranchyNet, 2016, Figure 2.
    """

    @jax.jit
    def run(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        carry, chosen = None, None
        for n, logits in enumerate(model.apply(variables, images)):
            carry = criterion.init(logits) if n == 0 else carry
            answer, uncertainty, carry = criterion.update(logits, carry, n)
            here = answer_at(n, answer, uncertainty)
            if n == 0:
                chosen, answered = here, jnp.zeros(uncertainty.shape, bool)
            chosen = jax.tree.map(lambda old, new: jnp.where(_like(answered, old), old, new), chosen, here)
            if n < model.num_exits - 1:
                answered |= is_confident(uncertainty, thresholds[n])
        return chosen

    def execute(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        return run(variables, images, check_thresholds(thresholds, model.num_exits))

    return execute


def answer_at(n: int, logits: Array, uncertainty: Array) -> ExitPrediction:
    """Returns the prediction of a batch that all leaves at exit ``n``."""
    return ExitPrediction(
        label=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        exit_index=jnp.full(uncertainty.shape, n, jnp.int32),
        logits=logits,
        uncertainty=uncertainty,
    )


def _like(mask: Array, values: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
