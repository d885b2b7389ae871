"""Thresholds with a promise: with probability 1 − δ, at most ε is lost against the full network.

Common assumptions, without which nothing is promised: the calibration inputs are independent draws from the
distribution of the inputs to come, and took no part in training the network, fitting its criterion or building the
path of settings. The promise is about the risk of the *distribution*; a finite test set scatters around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from flax import struct

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import is_confident
from branchy_jax.thresholds import p_values
from branchy_jax.thresholds.choice import pareto_frontier
from branchy_jax.thresholds.screening import Screen
from branchy_jax.types import Array

PValue = Callable[[np.ndarray, float], np.ndarray]
"""``(losses […, n], epsilon) → p-values […]`` for the hypothesis that the risk is above epsilon."""

METHODS: dict[str, PValue] = {
    'binomial': p_values.binomial,
    'hoeffding-bentkus': p_values.hoeffding_bentkus,
    'betting': p_values.betting,
}


@struct.dataclass
class Guarantee:
    """Thresholds and what is promised of them.

    The promise holds for exactly these thresholds. A `branchy_jax.inference.plan` that skips a head, or a controller
    that moves them, runs other thresholds: plan with ``skip_heads=False``.

    Attributes:
        thresholds: ``[N - 1]``; all −inf where nothing can be promised.
        promised: whether anything but the full network could be promised.
        index: of the setting on its path.
        risk: mean loss on the calibration data.
        exit_fractions: ``[N]`` on the calibration data.
        statement: the promise in words, with its assumptions.
    """

    thresholds: np.ndarray
    promised: bool = struct.field(pytree_node=False)
    index: int = struct.field(pytree_node=False)
    risk: float
    exit_fractions: np.ndarray
    statement: str = struct.field(pytree_node=False)


def losses_against_full(logits: Array, labels: Array | None = None) -> np.ndarray:
    """Computes what leaving at each exit loses against the full network, per input.

    With labels: 1 where the exit is wrong and the last exit right. The mean bounds the gap in error rate from above.
    Without labels: 1 where the exit's label differs from the last exit's.

    Args:
        logits: ``[N, B, K]`` answer logits of every exit.
        labels: ``[B]``, or ``None``.

    Returns:
        ``[N, B]``; the last row is zero.

    Example:
        >>> losses_against_full(np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]]), [0, 0]).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    answers = np.asarray(logits).argmax(axis=-1)
    if labels is None:
        return (answers != answers[-1]).astype(np.float64)
    right = answers == np.asarray(labels)
    return (~right & right[-1]).astype(np.float64)


def threshold_path(screened: Screen, *, size: int = 50) -> np.ndarray:
    """Picks a path of settings from never leaving to leaving most: the frontier of cost and risk, thinned in risk.

    The path must be fixed before the calibration data is looked at: ``screened`` is to come from other data.

    Args:
        screened: settings on separate data, screened for what is to be promised: give `screen` the statistics
            ``1 - losses[..., None]`` with `losses_against_full`. A screen for accuracy would do, but knows no settings
            between the full network and the most accurate one.
        size: settings taken from the frontier at most.

    Returns:
        ``[G, N - 1]``; the first never exits, cost falls along the path on the data it was screened on.
    """
    frontier = pareto_frontier(screened)
    # Evenly spaced in rank: the frontier is dense where risk is small, which is where promises are made.
    kept = np.unique(np.linspace(0, len(frontier) - 1, size).round().astype(int))[::-1]
    never = np.full((1, frontier.thresholds.shape[1]), -np.inf, np.float32)
    return np.concatenate([never, frontier.thresholds[kept]])


def losses_along(path: Array, uncertainty: Array, losses: Array) -> tuple[np.ndarray, np.ndarray]:
    """Computes the loss and the answering exit of every input under every setting of a path.

    Labels enter here only, through ``losses``, after the exits have been decided.

    Args:
        path: ``[G, N - 1]``.
        uncertainty: ``[N, B]``.
        losses: ``[N, B]`` in [0, 1].

    Returns:
        Losses ``[G, B]`` and exits ``[G, B]``.
    """
    uncertainty, losses = np.asarray(uncertainty, np.float32), np.asarray(losses, np.float64)
    everyone = np.arange(uncertainty.shape[1])
    found = []
    for setting in np.asarray(path, np.float32):
        confident = is_confident(uncertainty[:-1], setting[:, None])
        found.append(np.concatenate([confident, np.ones((1, len(everyone)), bool)]).argmax(axis=0))
    exits = np.array(found)
    return losses[exits, everyone], exits


def last_passed(passes: Array) -> int:
    """Fixed-sequence testing: returns the last setting before the first that fails; −1 if the first fails already.

    Example:
        >>> last_passed([True, True, False, True])
        1
    """
    passes = np.asarray(passes, bool)
    return int(len(passes) if passes.all() else passes.argmin()) - 1


def learn_then_test(
    paths: Array | Sequence[Array],
    uncertainty: Array,
    losses: Array,
    *,
    epsilon: float,
    delta: float,
    costs: StageCosts,
    method: str = 'binomial',
) -> Guarantee:
    r"""Finds thresholds with :math:`P(R(T) \le \epsilon) \ge 1 - \delta`, where R is the expected loss.

    Along a path that was fixed beforehand each setting's hypothesis "risk above ε" is tested at level δ, from never
    leaving on, until one is not refuted; the last refuted setting is the answer. No correction for many tests is
    needed, and the risk need not be monotone along the path. With several paths (multi-start) each is tested at δ
    divided by their number, and the cheapest setting of those that passed is the answer.

    Args:
        paths: ``[G, N - 1]`` from `threshold_path` on *separate* data, or several of them.
        uncertainty: ``[N, B]`` on calibration data.
        losses: ``[N, B]`` in [0, 1] against the full network, whose own row is 0 (`losses_against_full`); 0 or 1 for
            ``method='binomial'``.
        epsilon: the most that may be lost.
        delta: probability that the promise may break.
        costs: per stage and head, to choose among paths.
        method: ``'binomial'`` (exact, losses 0 or 1), ``'hoeffding-bentkus'`` or ``'betting'`` (Waudby-Smith–Ramdas).

    Returns:
        `Guarantee`. Where nothing could be promised its thresholds never exit, ``promised`` is false, and the
        statement says so.

    Raises:
        ValueError: an unknown method, ε or δ outside (0, 1), losses outside [0, 1], shapes that do not agree.

    References:
        Angelopoulos et al., Learn then Test, 2021 (fixed sequence, multi-start). Jazbec et al., Fast
        yet Safe: Early-Exiting with Risk Control, 2024 (early exit).
    """
    if method not in METHODS:
        raise ValueError(f'method: got {method!r}; choose from {", ".join(map(repr, METHODS))}')
    paths = [np.asarray(path) for path in ([paths] if getattr(paths, 'ndim', 0) == 2 else paths)]
    if not paths:
        raise ValueError('paths: got none; give one from threshold_path, or several')
    level = delta / len(paths)
    p_value = functools.partial(METHODS[method], delta=level) if method == 'betting' else METHODS[method]
    uncertainty, losses = _checked(uncertainty, losses, epsilon, delta, paths)
    found = []
    for path in paths:
        on_path, exits = losses_along(path, uncertainty, losses)
        index = last_passed(
            [_never(setting) or p_value(loss, epsilon) <= level for setting, loss in zip(path, on_path, strict=True)]
        )
        found.append(_guarantee(path, index, on_path, exits, len(costs.to_exit)))
    best = min(found, key=lambda guarantee: float(guarantee.exit_fractions @ costs.to_exit))
    words = (
        f'With probability at least {1 - delta:g} over the calibration data, the expected loss is at most {epsilon:g}'
        if best.promised
        else f'Nothing but the full network can be promised at epsilon {epsilon:g}, delta {delta:g}'
    )
    return best.replace(
        statement=f'{words} ({method}; {losses.shape[1]} calibration inputs, independent draws from the inputs to come '
        'that took no part in training, fitting a criterion or building the path).'
    )


def conformal_risk_control(path: Array, uncertainty: Array, losses: Array, *, epsilon: float) -> Guarantee:
    r"""Finds thresholds whose loss is at most ε *in expectation*, over calibration data and the next input together.

    .. math:: \max\left\{g : \frac{n}{n+1} \hat R_n(g) + \frac{1}{n+1} \le \epsilon\right\}

    where the loss of an input is first made monotone along the path: the largest at any setting up to g. Weaker than
    `learn_then_test`: a given calibration set may be unlucky. It needs no more than exchangeable inputs.

    Args:
        path: ``[G, N - 1]`` fixed beforehand on separate data.
        uncertainty: ``[N, B]`` on calibration data.
        losses: ``[N, B]`` in [0, 1] against the full network, whose own row is 0.
        epsilon: the most that may be lost on average.

    Returns:
        `Guarantee`.

    Raises:
        ValueError: ε outside (0, 1), losses outside [0, 1], shapes that do not agree.

    References:
        Angelopoulos et al., Conformal Risk Control, 2022: theorem 1, and the monotone envelope for general losses.
    """
    path = np.asarray(path)
    uncertainty, losses = _checked(uncertainty, losses, epsilon, 0.5, [path])
    on_path, exits = losses_along(path, uncertainty, losses)
    count = losses.shape[1]
    envelope = np.maximum.accumulate(on_path, axis=0).mean(axis=1)
    passes = [_never(setting) or count / (count + 1) * risk + 1 / (count + 1) <= epsilon
              for setting, risk in zip(path, envelope, strict=True)]  # fmt: skip
    found = _guarantee(path, last_passed(passes), on_path, exits, len(uncertainty))
    words = (
        f'In expectation over {count} exchangeable calibration inputs and the next, the loss is at most {epsilon:g}.'
        if found.promised
        else f'Nothing but the full network can be promised at epsilon {epsilon:g} with {count} calibration inputs.'
    )
    return found.replace(statement=words)


def _never(setting: np.ndarray) -> bool:
    """Whether a setting is the full network itself, whose loss is zero by definition and needs no test."""
    return bool(np.isneginf(setting).all())


def _guarantee(path: np.ndarray, index: int, on_path: np.ndarray, exits: np.ndarray, num_exits: int) -> Guarantee:
    promised = index >= 0 and not _never(path[index])
    return Guarantee(
        thresholds=path[index] if promised else np.full(num_exits - 1, -np.inf, np.float32),
        promised=promised,
        index=max(index, 0),
        risk=float(on_path[index].mean()) if promised else 0.0,
        exit_fractions=(
            np.bincount(exits[index], minlength=num_exits) / exits.shape[1] if promised else np.eye(num_exits)[-1]
        ),
        statement='',
    )


def _checked(
    uncertainty: Array, losses: Array, epsilon: float, delta: float, paths: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, losses = np.asarray(uncertainty, np.float32), np.asarray(losses, np.float64)
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise ValueError(f'epsilon and delta: got {epsilon} and {delta}; both lie strictly between 0 and 1')
    if uncertainty.ndim != 2 or losses.shape != uncertainty.shape or 0 in losses.shape:
        raise ValueError(f'losses: expected [N, B] as uncertainty has, got {losses.shape} and {uncertainty.shape}')
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f'losses: got values from {losses.min()} to {losses.max()}; they must lie in [0, 1]')
    if losses[-1].any():
        raise ValueError(
            'losses: the last row, of the full network against itself, must be 0; plain errors are not losses against '
            'it (losses_against_full makes them)'
        )
    for path in paths:
        if path.ndim != 2 or path.shape[1] != len(uncertainty) - 1 or len(path) == 0:
            raise ValueError(f'paths: expected [G, {len(uncertainty) - 1}] settings, got shape {path.shape}')
    return uncertainty, losses
