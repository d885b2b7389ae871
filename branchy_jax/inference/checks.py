"""What every executor refuses at its door."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.types import Array


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
