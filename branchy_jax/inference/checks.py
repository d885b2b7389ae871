"""The door of every executor: what it refuses, and what it answers without running."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.models.branchy import BranchyNet, check_images
from branchy_jax.types import Array, ExitPrediction, Variables

Executor = Callable[[Variables, Array, Array], ExitPrediction]
"""``(variables, images, thresholds) → ExitPrediction``."""


def guarded(run: Executor, model: BranchyNet, *, traceable: Executor | None = None) -> Executor:
    """Puts the door before an executor of batches: input is checked, an empty batch is answered at once.

    Args:
        run: ``(variables, images [B, …], thresholds [N - 1]) → ExitPrediction``.
        model: whose input it is.
        traceable: of the same results, where ``run`` is not.
    """
    check, image_shape = threshold_checker(model.num_exits), model.image_shape

    def execute(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        thresholds = check(thresholds)
        if image_shape is not None:
            check_images(images, image_shape)
        if images.shape[0] == 0:
            return empty_answer(traceable or run, variables, images, thresholds)
        return run(variables, images, thresholds)

    return execute


def empty_answer(run: Executor, variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
    """Returns what an executor answers to no images, for which many layers have no shape."""
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    answer = jax.eval_shape(run, variables, one, thresholds)
    return jax.tree.map(lambda spec: jnp.zeros((0, *spec.shape[1:]), spec.dtype), answer)


def threshold_checker(num_exits: int) -> Callable[[Array], Array]:
    """Returns `check_thresholds` for one network, which remembers the last array that passed.

    At batch 1 the check costs as much as a small stage, and serving code gives the same thresholds again and again. A
    `jax.Array` cannot change, so the same object need not be looked at twice; anything else is.
    """
    passed = None

    def check(thresholds: Array) -> Array:
        nonlocal passed
        if thresholds is passed and passed is not None:
            return thresholds
        checked = check_thresholds(thresholds, num_exits)
        if isinstance(checked, jax.Array) and not isinstance(checked, jax.core.Tracer):
            passed = checked
        return checked

    return check


def check_thresholds(thresholds: Array, num_exits: int) -> Array:
    """Returns thresholds as a float32 array, or says what is wrong with them.

    NaN is refused where values can be seen; inside `jax.jit` they cannot, and NaN never exits.

    Args:
        thresholds: ``[N - 1]``.
        num_exits: N.

    Raises:
        ValueError: not numbers, not one per side exit, or NaN.
    """
    if not isinstance(thresholds, jax.Array):
        try:
            thresholds = np.asarray(thresholds, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f'thresholds: expected {num_exits - 1} numbers, got {thresholds!r}') from error
    if thresholds.shape != (num_exits - 1,):
        raise ValueError(
            f'thresholds: a network with {num_exits} exits takes {num_exits - 1} thresholds, shape '
            f'({num_exits - 1},); got shape {tuple(thresholds.shape)}; the last exit always answers and has none'
        )
    if not jnp.issubdtype(thresholds.dtype, jnp.floating):
        raise ValueError(f'thresholds: expected floats, got {thresholds.dtype}')
    if not isinstance(thresholds, jax.core.Tracer):
        _refuse_nan(thresholds)
    return thresholds


def _refuse_nan(thresholds: Array) -> None:
    values = np.asarray(thresholds)
    if np.isnan(values).any():
        raise ValueError(f'thresholds: got NaN in {values.tolist()}; use -inf to never exit and +inf to always do')
