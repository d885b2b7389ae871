"""Every exit computed, then selected: saves nothing, and is what all other executors must agree with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.checks import Executor, guarded
from branchy_jax.inference.steps import build_steps, run_steps
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPrediction, Variables


def dense(model: BranchyNet, *, criterion: Criterion = entropy, exits: Sequence[int] | None = None) -> Executor:
    """Builds the oracle executor: runs all stages and heads on the whole batch and selects the first confident exit.

    Args:
        model: a network with N exits.
        criterion: how unsure an exit is.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf. With
            ``[N - 1]`` this is the network without its branches.

    Returns:
        ``(variables, images [B, H, W, C], thresholds [N - 1]) → ExitPrediction``. Works under `jax.jit` and
        `jax.vmap` (over thresholds, say). Raises ValueError on the wrong number of thresholds, NaN, or bad images.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> dense(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0]

    References:
        BranchyNet, 2016, Figure 2.
    """
    steps = build_steps(model, criterion, exits)

    @jax.jit
    def run(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        *earlier, last = run_steps(steps, variables, images, thresholds)
        chosen = last.prediction
        for step in reversed(earlier):
            chosen = jax.tree.map(functools.partial(_select, step.confident), step.prediction, chosen)
        return chosen

    return guarded(run, model)


def _select(mask: Array, yes: Array, no: Array) -> Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)
