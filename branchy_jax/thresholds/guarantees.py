"""Thresholds with a guarantee: with probability 1 − δ, at most ε is lost against the full network.

All guarantees assume that the calibration inputs are independent draws from the distribution of the inputs to come,
and took no part in training the network, fitting its criterion or building the path of settings. They bound the risk
of the *distribution*; a finite test set scatters around it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import struct
from numpy.typing import ArrayLike
from scipy import special

from branchy_jax.thresholds.screen import answering_exits
from branchy_jax.thresholds.table import ExitTable, checked_arrays, checked_settings
from branchy_jax.types import Array, ByValue, ExitPolicy


class Guarantee(ByValue, struct.PyTreeNode, eq=False):
    """A policy and what is guaranteed of it. Goes wherever a policy goes.

    The guarantee holds for exactly this policy. A `branchy_jax.inference.plan` that skips a head, or a controller that
    moves thresholds, runs another: plan with ``skip_heads=False``.

    Attributes:
        policy: when an input leaves; thresholds all −inf where nothing can be guaranteed.
        certified: whether anything but the full network could be guaranteed.
        index: of the setting on its path.
        risk: mean loss on the calibration data.
        exit_fractions: ``[N]`` on the calibration data.
        statement: the guarantee in words, with its assumptions.
    """

    policy: ExitPolicy
    certified: bool = struct.field(pytree_node=False)
    index: int = struct.field(pytree_node=False)
    risk: float
    exit_fractions: np.ndarray
    statement: str = struct.field(pytree_node=False)

    @property
    def thresholds(self) -> Array:
        """``[N - 1]`` of the policy."""
        return self.policy.thresholds


def losses_against_full(logits: Array, labels: Array | None = None) -> np.ndarray:
    """Computes what leaving at each exit loses against the full network, per input.

    With labels: 1 where the exit is wrong and the last exit right. The mean bounds the gap in error rate from above.
    Without labels: 1 where the exit's label differs from the last exit's.

    Args:
        logits: ``[N, M, K]`` answer logits of every exit.
        labels: ``[M]``, or ``None``.

    Returns:
        ``[N, M]``; the last row is zero.

    Raises:
        ValueError: logits of another shape, or not one label per input.

    Example:
        >>> losses_against_full(np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]]), [0, 0]).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    if np.ndim(logits) != 3:
        raise ValueError(f'logits: expected [N, M, K], got shape {np.shape(logits)}')
    answers = np.asarray(logits).argmax(axis=-1)
    truth = answers[-1] if labels is None else np.asarray(labels)
    if truth.shape != answers.shape[1:]:
        raise ValueError(f'labels: expected {answers.shape[1]}, one per input, got shape {truth.shape}')
    right = answers == truth
    return (~right & right[-1]).astype(np.float64)


def losses_along(path: ArrayLike, table: ExitTable, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Computes the loss and the answering exit of every input under every setting of a path.

    Labels enter here only, through ``losses``, after the exits have been decided.

    Args:
        path: ``[G, N - 1]`` thresholds of the table's criterion.
        table: of the inputs.
        losses: ``[N, M]``.

    Returns:
        Losses ``[G, M]`` and exits ``[G, M]``.

    Raises:
        ValueError: arrays whose shapes do not agree, or NaN in the path.
    """
    (uncertainty, _), losses = checked_arrays(table), np.asarray(losses, np.float64)
    if losses.shape != uncertainty.shape:
        raise ValueError(f'losses: expected [N, M] as the table has, {uncertainty.shape}, got {losses.shape}')
    exits = np.array([answering_exits(uncertainty, setting) for setting in checked_settings(table, path, 'path')])
    return losses[exits, np.arange(losses.shape[1])], exits


def last_passed(passes: Sequence[bool] | np.ndarray) -> int:
    """Returns the last setting before the first that fails (fixed-sequence testing); −1 if the first fails.

    Example:
        >>> last_passed([True, True, False, True])
        1
    """
    return int(np.argmin([*passes, False])) - 1


PValue = Callable[..., np.ndarray]
"""``(losses […, M], epsilon) → p-values […]`` for the hypothesis that the risk is above epsilon.

Valid for any number of inputs; losses lie in [0, 1] and are independent draws.
"""


def binomial(losses: np.ndarray, epsilon: float) -> np.ndarray:
    r"""Computes exact p-values for losses that are 0 or 1: :math:`P(\operatorname{Bin}(n, \epsilon) \le \sum_i L_i)`.

    Args:
        losses: ``[…, M]`` zeros and ones.
        epsilon: risk to be refuted.

    Returns:
        ``[…]``.

    Raises:
        ValueError: losses other than 0 and 1.

    Example:
        >>> float(binomial(np.zeros(2), 0.5))
        0.25

    References:
        Clopper and Pearson, 1934. Angelopoulos et al., Learn then Test, 2021.
    """
    losses = np.asarray(losses)
    if not np.isin(losses, (0, 1)).all():
        raise ValueError("losses: the exact binomial test needs 0 and 1; use 'hoeffding-bentkus' or 'betting'")
    return special.bdtr(losses.sum(axis=-1), losses.shape[-1], epsilon)


def hoeffding_bentkus(losses: np.ndarray, epsilon: float) -> np.ndarray:
    r"""Computes p-values for losses in [0, 1] from their mean alone: the smaller of Hoeffding's and Bentkus's.

    .. math:: \min\left(e^{-n\, h(\min(\hat R, \epsilon), \epsilon)},\;
        e\, P(\operatorname{Bin}(n, \epsilon) \le \lceil n \hat R \rceil)\right), \quad
        h(a, b) = a \ln\tfrac ab + (1 - a) \ln\tfrac{1 - a}{1 - b}

    Args:
        losses: ``[…, M]`` in [0, 1].
        epsilon: risk to be refuted.

    Returns:
        ``[…]``, at most 1.

    References:
        Bates et al., Distribution-Free, Risk-Controlling Prediction Sets, 2021, section 3.1.
    """
    losses = np.asarray(losses, np.float64)
    count, risk = losses.shape[-1], losses.mean(axis=-1)
    below = np.minimum(risk, epsilon)
    divergence = special.rel_entr(below, epsilon) + special.rel_entr(1 - below, 1 - epsilon)
    # The sum of losses is a float: 3.0000000001 is 3, not 4.
    bentkus = np.e * special.bdtr(np.ceil(count * risk - 1e-9), count, epsilon)
    return np.minimum(1.0, np.minimum(np.exp(-count * divergence), bentkus))


def betting(losses: np.ndarray, epsilon: float, *, delta: float = 0.1) -> np.ndarray:
    r"""Computes p-values for losses in [0, 1] by betting that they fall below ε, one after the other.

    .. math:: p = \left(\max_i \prod_{j \le i} (1 - \nu_j (L_j - \epsilon))\right)^{-1}

    with bets :math:`\nu_j` that depend on earlier losses only. Uses the variance: the best where losses are small but
    not 0 or 1. Refuting at δ is the same as the Waudby-Smith–Ramdas upper confidence bound lying below ε.

    Args:
        losses: ``[…, M]`` in [0, 1], in an order that does not depend on them.
        epsilon: risk to be refuted.
        delta: level that the bets are tuned for; any is valid.

    Returns:
        ``[…]``, at most 1.

    References:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2020. Bates et al., 2021,
        section 3.1.3.
    """
    losses = np.asarray(losses, np.float64)
    count = losses.shape[-1]
    numbers = np.arange(1, count + 1)
    mean = (0.5 + np.cumsum(losses, axis=-1)) / (1 + numbers)
    variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=-1)) / (1 + numbers)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], axis=-1)
    bets = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (count * before)))
    wealth = np.cumsum(np.log1p(-bets * (losses - epsilon)), axis=-1)
    return np.exp(-np.maximum(0.0, wealth.max(axis=-1)))


Paths = Array | Sequence[Array]
"""One path of settings ``[G, N - 1]``, or several."""

METHODS: dict[str, PValue] = {'binomial': binomial, 'hoeffding-bentkus': hoeffding_bentkus, 'betting': betting}


def learn_then_test(
    paths: Paths, table: ExitTable, losses: Array, *, epsilon: float, delta: float, method: str = 'binomial'
) -> Guarantee:
    r"""Computes thresholds with :math:`P(R(T) \le \epsilon) \ge 1 - \delta`, where R is the expected loss.

    Along a path that was fixed beforehand each setting's hypothesis "risk above ε" is tested at level δ, from never
    leaving on, until one is not refuted; the last refuted setting is the answer. No correction for many tests is
    needed, and the risk need not be monotone along the path. With several paths (multi-start) each is tested at δ
    divided by their number, and the cheapest setting of those that passed is the answer.

    Args:
        paths: ``[G, N - 1]`` from `Screen.path` on *separate* data, or several of them; thresholds of the table's
            criterion.
        table: of the calibration data. Its uncertainties decide who leaves, its costs choose among paths; its
            statistics are not used.
        losses: ``[N, M]`` in [0, 1] against the full network, whose own row is 0 (`losses_against_full`); 0 or 1 for
            ``method='binomial'``.
        epsilon: the most that may be lost.
        delta: probability that the guarantee may fail.
        method: ``'binomial'`` (exact, losses 0 or 1), ``'hoeffding-bentkus'`` or ``'betting'`` (Waudby-Smith–Ramdas).

    Returns:
        `Guarantee`. Where nothing could be guaranteed its thresholds never exit, ``certified`` is false, and the
        statement says so.

    Raises:
        ValueError: an unknown method, ε or δ outside (0, 1), losses outside [0, 1], shapes that do not agree, or
            NaN in a path.

    Example:
        >>> from branchy_jax.costs import StageCosts
        >>> from branchy_jax.criteria import entropy
        >>> table = ExitTable(uncertainty=np.zeros((2, 100)), statistics=np.ones((2, 100, 1)),
        ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='calibration')
        >>> path, losses = np.array([[-np.inf], [0.5]]), np.zeros((2, 100))
        >>> guarantee = learn_then_test(path, table, losses, epsilon=0.05, delta=0.1)
        >>> guarantee.certified, guarantee.thresholds.tolist(), guarantee.policy.criterion.name
        (True, [0.5], 'entropy')

    References:
        Angelopoulos et al., Learn then Test, 2021 (fixed sequence, multi-start). Jazbec et al., Fast
        yet Safe: Early-Exiting with Risk Control, 2024 (early exit).
    """
    if method not in METHODS:
        raise ValueError(f'method: got {method!r}; choose from {", ".join(map(repr, METHODS))}')
    _check_risk(losses, epsilon, delta)
    several: list[Any] = [paths] if getattr(paths, 'ndim', 0) == 2 else list(paths)
    if not several:
        raise ValueError('paths: got none; give one from Screen.path, or several')
    level = delta / len(several)
    options = {'delta': level} if method == 'betting' else {}

    def passes(on_path: np.ndarray) -> np.ndarray:
        return METHODS[method](on_path, epsilon, **options) <= level

    statement = (
        f'With probability at least {1 - delta:g} over the calibration data, the expected loss is at most {epsilon:g} '
        f'({method}; {len(table)} calibration inputs, independent draws from the inputs to come that took no part in '
        'training, fitting a criterion or building the path).'
    )
    guarantees = [_last_that_passes(path, table, losses, passes, statement) for path in several]
    return min(guarantees, key=lambda guarantee: float(guarantee.exit_fractions @ table.costs.to_exit))


def conformal_risk_control(path: Array, table: ExitTable, losses: Array, *, epsilon: float) -> Guarantee:
    r"""Computes thresholds whose loss is at most ε *in expectation*, over calibration data and the next input together.

    .. math:: \max\left\{g : \frac{M}{M+1} \hat R_M(g) + \frac{1}{M+1} \le \epsilon\right\}

    where the loss of an input is first made monotone along the path: the largest at any setting up to g. Weaker than
    `learn_then_test`: a given calibration set may be unlucky. It needs no more than exchangeable inputs.

    Args:
        path: ``[G, N - 1]`` fixed beforehand on separate data; thresholds of the table's criterion.
        table: of the calibration data.
        losses: ``[N, M]`` in [0, 1] against the full network, whose own row is 0.
        epsilon: the most that may be lost on average.

    Returns:
        `Guarantee`.

    Raises:
        ValueError: ε outside (0, 1), losses outside [0, 1], shapes that do not agree, or NaN in the path.

    References:
        Angelopoulos et al., Conformal Risk Control, 2022: theorem 1, and the monotone envelope for general losses.
    """
    _check_risk(losses, epsilon, 0.5)
    count = len(table)

    def passes(on_path: np.ndarray) -> np.ndarray:
        envelope = np.maximum.accumulate(on_path, axis=0).mean(axis=1)
        return count / (count + 1) * envelope + 1 / (count + 1) <= epsilon

    over = f'{count} exchangeable calibration inputs and the next'
    statement = f'In expectation over {over}, the loss is at most {epsilon:g}.'
    return _last_that_passes(path, table, losses, passes, statement)


def _last_that_passes(
    path: ArrayLike, table: ExitTable, losses: ArrayLike, passes: Callable[[np.ndarray], np.ndarray], statement: str
) -> Guarantee:
    """Returns the guarantee of the last setting before the first whose losses ``[G, M]`` do not pass."""
    if np.ndim(path) != 2:
        raise ValueError(f'path: expected [G, {table.num_exits - 1}] settings, got shape {np.shape(path)}')
    # The full network comes first: it loses nothing by definition and needs no test.
    settings = np.pad(checked_settings(table, path, 'path'), [(1, 0), (0, 0)], constant_values=-np.inf)
    on_path, exits = losses_along(settings, table, losses)
    is_full = (settings == -np.inf).all(axis=1)
    index = last_passed(is_full | passes(on_path))
    certified = not is_full[index]
    if not certified:
        statement = f'Nothing but the full network can be guaranteed. Not shown: {statement}'
    policy = ExitPolicy(table.criterion, settings[index])
    fractions = np.bincount(exits[index], minlength=table.num_exits) / len(table)
    return Guarantee(policy, certified, max(index - 1, 0), float(on_path[index].mean()), fractions, statement)


def _check_risk(losses: ArrayLike, epsilon: float, delta: float) -> None:
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise ValueError(f'epsilon and delta: got {epsilon} and {delta}; both lie strictly between 0 and 1')
    losses = np.asarray(losses, np.float64)
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f'losses: got values from {losses.min()} to {losses.max()}; they must lie in [0, 1]')
    if losses[-1].any():
        raise ValueError('losses: the last row must be 0, as losses_against_full makes it; plain errors do not serve')
