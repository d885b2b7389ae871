"""The criteria of the literature: the paper's entropy, its rivals, and those that look back at earlier exits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.criteria.criterion import Carry, Criterion, check_exit_number, from_logits
from branchy_jax.criteria.measures import closeness_of_logits, doubt_of_logits, entropy_of_logits
from branchy_jax.criteria.pooling import Pool, mean_over_pixels
from branchy_jax.types import Array

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
    return logits, -mean_over_pixels(count), (label, count)


patience = Criterion(init=_never_asked, update=_agreement, name='patience')
"""Minus the number of exits in a row that agreed with the one before: a threshold of −1.5 waits for two agreements.

References:
    Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, 2020.
"""


def ensemble(
    kind: str = 'arithmetic',
    *,
    uncertainty_of: Callable[[Array], Array] = entropy_of_logits,
    pool: Pool = mean_over_pixels,
) -> Criterion:
    r"""Builds the criterion that answers with the mean of all exits so far, and is as unsure as that mean.

    .. math:: \bar y_n = \frac1n \sum_{i \le n} \hat y_i \quad\text{or}\quad
        \bar y_n \propto \exp \frac1n \sum_{i \le n} \ln \hat y_i

    Args:
        kind: ``'arithmetic'`` or ``'geometric'`` mean of the probabilities.
        uncertainty_of: of the mean's logits.
        pool: ``uncertainty [B, …] → [B]``, where an exit answers for many pixels.

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
        return answer, pool(uncertainty_of(answer)), total

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

    return criterion.replace(init=init, update=update, name=f'{criterion.name}, calibrated')
