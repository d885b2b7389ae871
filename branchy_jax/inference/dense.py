"""Every exit computed, then selected: saves nothing, and is what all other executors must agree with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from branchy_jax.criteria import Criterion, entropy, is_confident
from branchy_jax.inference.checks import threshold_checker
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
        answers = [answer_at(n, *found) for n, found in enumerate(every_answer(model, variables, images, criterion))]
        chosen = answers.pop()
        for answer, threshold in zip(reversed(answers), reversed(thresholds), strict=True):
            confident = is_confident(answer.uncertainty, threshold)
            chosen = jax.tree.map(functools.partial(_select, confident), answer, chosen)
        return chosen

    check = threshold_checker(model.num_exits)

    def execute(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        return run(variables, images, check(thresholds))

    return execute


def every_answer(
    model: BranchyNet, variables: Variables, images: Array, criterion: Criterion
) -> list[tuple[Array, Array]]:
    """Returns answer logits ``[B, …, K]`` and uncertainty ``[B]`` of every exit, earliest first."""
    carry, answers = None, []
    for n, logits in enumerate(model.apply(variables, images)):
        carry = criterion.init(logits) if n == 0 else carry
        answer, uncertainty, carry = criterion.update(logits, carry, n)
        answers.append((answer, uncertainty))
    return answers


def answer_at(n: int, logits: Array, uncertainty: Array) -> ExitPrediction:
    """Returns the prediction of a batch that all leaves at exit ``n``."""
    return ExitPrediction(
        label=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        exit_index=jnp.full(uncertainty.shape, n, jnp.int32),
        logits=logits,
        uncertainty=uncertainty,
    )


def _select(mask: Array, yes: Array, no: Array) -> Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)
