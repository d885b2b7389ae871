"""How unsure an exit is, and the one comparison that decides whether it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    weights, is_largest = _weights(logits)
    others = jnp.sum(jnp.where(is_largest, 0.0, weights), axis=-1)
    expected = jnp.sum(weights * jnp.where(weights > 0, shifted, 0.0), axis=-1) / (1 + others)
    return jnp.log1p(others) - expected


def doubt_of_logits(logits: Array) -> Array:
    r"""Computes one minus the largest probability, :math:`1 - \max_k \hat y_k`, as a sum of the others.

    Args:
        logits: ``[..., K]``.

    Returns:
        ``[...]`` float32 in ``[0, 1 - 1/K]``, to full relative precision also near 0.

    Example:
        >>> float(doubt_of_logits(jnp.zeros(4)))
        0.75
    """
    weights, is_largest = _weights(logits)
    others = jnp.sum(jnp.where(is_largest, 0.0, weights), axis=-1)
    return others / (1 + others)


def closeness_of_logits(logits: Array) -> Array:
    r"""Computes one minus the margin between the two largest probabilities, :math:`1 - (\hat y_{(1)} - \hat y_{(2)})`.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, 1]``, to full relative precision also near 0.

    Example:
        >>> float(closeness_of_logits(jnp.zeros(4)))
        1.0
    """
    weights, is_largest = _weights(logits)
    others = jnp.where(is_largest, 0.0, weights)
    total = others.sum(axis=-1)
    return (total + others.max(axis=-1)) / (1 + total)


def _weights(logits: Array) -> tuple[Array, Array]:
    """Returns the softmax's numerators, the largest being 1, and which is the largest."""
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights, jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)


entropy = from_logits(entropy_of_logits, name='entropy')
"""The paper's criterion: entropy of the exit's softmax, in nats."""

max_probability = from_logits(doubt_of_logits, name='max probability')
"""One minus the largest probability."""

margin = from_logits(closeness_of_logits, name='margin')
"""One minus the difference between the two largest probabilities."""


def _never_asked(logits: Array) -> Carry:
    return jnp.full(logits.shape[:-1], -1, jnp.int32), jnp.zeros(logits.shape[:-1], jnp.float32)


def _agreement(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
    before, count = carry
    label = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    agrees = (label == before) & ~jnp.isnan(logits).any(axis=-1)
    count = jnp.where(agrees, count + 1, 0.0)
    return logits, -count.reshape(count.shape[0], -1).mean(axis=-1), (label, count)


patience = Criterion(init=_never_asked, update=_agreement, name='patience')
"""Minus the number of exits in a row that agreed with the one before: a threshold of −1.5 waits for two agreements.

References:
    Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, 2020.
"""


def ensemble(kind: str = 'arithmetic', *, uncertainty_of: Callable[[Array], Array] = entropy_of_logits) -> Criterion:
    r"""Builds the criterion that answers with the mean of all exits so far, and is as unsure as that mean.

    .. math:: \bar y_n = \frac1n \sum_{i \le n} \hat y_i \quad\text{or}\quad
        \bar y_n \propto \exp \frac1n \sum_{i \le n} \ln \hat y_i

    Args:
        kind: ``'arithmetic'`` or ``'geometric'`` mean of the probabilities.
        uncertainty_of: of the mean's logits.

    Raises:
        ValueError: another kind of mean.

    Example:
        >>> criterion, logits = ensemble(), jnp.log(jnp.array([[0.9, 0.1]]))
        >>> _, _, carry = criterion.update(logits, criterion.init(logits), 0)
        >>> answer, _, _ = criterion.update(jnp.log(jnp.array([[0.5, 0.5]])), carry, 1)
        >>> [round(float(p), 3) for p in jnp.exp(answer[0])]
        [0.7, 0.3]

    References:
        Qendro et al., Early Exit Ensembles for Uncertainty Quantification, 2021.
    """
    if kind not in ('arithmetic', 'geometric'):
        raise ValueError(f"kind: got {kind!r}; choose 'arithmetic' or 'geometric'")
    arithmetic = kind == 'arithmetic'

    def init(logits: Array) -> Carry:
        return jnp.full(logits.shape, -jnp.inf if arithmetic else 0.0, jnp.float32)

    def update(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
        total = jnp.logaddexp(carry, log_probability) if arithmetic else carry + log_probability
        answer = total - jnp.log(n + 1.0) if arithmetic else jax.nn.log_softmax(total / (n + 1))
        uncertainty = uncertainty_of(answer)
        return answer, uncertainty.reshape(uncertainty.shape[0], -1).mean(axis=-1), total

    return Criterion(init=init, update=update, name=f'{kind} ensemble')


def with_temperatures(temperatures: Array, criterion: Criterion = entropy) -> Criterion:
    """Builds a criterion on calibrated logits: those of exit n divided by its temperature.

    Args:
        temperatures: ``[N]`` positive, from `branchy_jax.calibration.fit_temperatures`.
        criterion: of the calibrated logits.

    Raises:
        ValueError: a temperature that is not positive and finite.

    Example:
        >>> calibrated = with_temperatures([2.0, 1.0])
        >>> calibrated.update(jnp.array([[2.0, 0.0]]), (), 0)[0].tolist()
        [[1.0, 0.0]]

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    values = np.asarray(temperatures, np.float32)
    if values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f'temperatures: got {values.tolist()}; give one positive number per exit')

    def update(logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_exit_number(n, len(values), 'temperatures')
        return criterion.update(logits / values[n], carry, n)

    def init(logits: Array) -> Carry:
        return criterion.init(logits / values[0])

    return Criterion(init=init, update=update, name=f'{criterion.name}, calibrated')


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
