"""One image at a time, later stages truly not run: nested `lax.cond`."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from branchy_jax.criteria import Criterion, entropy, is_confident
from branchy_jax.inference.checks import threshold_checker
from branchy_jax.inference.dense import Executor, answer_at
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPrediction, Variables


def staged(model: BranchyNet, *, criterion: Criterion = entropy) -> Executor:
    """Builds the batch-1 executor: each stage after the first sits inside the `lax.cond` of the exit before it.

    One dispatch per image; what an exit makes superfluous is not executed. `jax.vmap` turns the conditionals into
    selects, which run everything: for batches use `branchy_jax.inference.compacted` or `dense`.

    Args:
        model: a network with N exits.
        criterion: how unsure an exit is.

    Returns:
        ``(variables, image [H, W, C], thresholds [N - 1]) → ExitPrediction`` without the batch axis. Raises
        ValueError on the wrong number of thresholds, NaN, or a bad image.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, image = bj.models.create('b-lenet'), jnp.ones((28, 28, 1))
        >>> variables = model.init(jax.random.key(0), image[None])
        >>> staged(model)(variables, image, [float('-inf')]).exit_index.item()
        1

    References:
        BranchyNet, 2016, Figure 2.
    """

    def from_stage(n: int, variables: Variables, hidden: Any, carry: Any, thresholds: Array) -> ExitPrediction:
        hidden = model.apply(variables, hidden, n, method='run_stage')
        logits = model.apply(variables, hidden, n, method='run_exit')
        carry = criterion.init(logits) if n == 0 else carry
        answer, uncertainty, carry = criterion.update(logits, carry, n)
        here = answer_at(n, answer, uncertainty)
        if n == model.num_exits - 1:
            return here
        return lax.cond(
            is_confident(uncertainty[0], thresholds[n]),
            lambda: here,
            lambda: from_stage(n + 1, variables, hidden, carry, thresholds),
        )

    @jax.jit
    def run(variables: Variables, image: Array, thresholds: Array) -> ExitPrediction:
        prediction = from_stage(0, variables, image[None], None, thresholds)
        return jax.tree.map(lambda values: values[0], prediction)

    check = threshold_checker(model.num_exits)

    def execute(variables: Variables, image: Array, thresholds: Array) -> ExitPrediction:
        return run(variables, image, check(thresholds))

    return execute
