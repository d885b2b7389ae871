"""The criteria of the literature: the paper's entropy, its rivals, and those that look back at earlier exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32

from branchy_jax.criteria.criterion import (
    Carry,
    Criterion,
    Pool,
    check_classes,
    check_exit_number,
    from_logits,
    is_confident,
    mean_over_pixels,
    most_likely_class,
    pooled,
    unless_nan,
    value,
)
from branchy_jax.types import Array


def entropy_of_logits(logits: Float[Array, '*inputs K']) -> Float32[Array, '*inputs']:
    r"""Computes the entropy of the softmax, in nats.

    .. math:: e = -\sum_k \hat y_k \ln \hat y_k, \quad \hat y = \operatorname{softmax}(z)

    Computed in float32 as a sum of positive terms, so that tiny entropies keep their digits: thresholds of 1e-4 are
    common. With :math:`s = z - \max z` and :math:`m` the position of the maximum,

    .. math:: e = \ln\left(1 + \sum_{k \ne m} \exp s_k\right) - \sum_k \hat y_k s_k

    A probability of exactly 0 contributes 0.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, ln K]``.

    Raises:
        ValueError: K is 1.

    Example:
        >>> bool(jnp.allclose(entropy_of_logits(jnp.zeros(10)), jnp.log(10.0)))
        True

    References:
        Teerapittayanon et al., BranchyNet, 2016, section III and Figure 2.
    """
    logits = logits.astype(jnp.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights, others = _weights(logits)
    others = others.sum(axis=-1)
    expected = jnp.sum(weights * jnp.where(weights > 0, shifted, 0.0), axis=-1) / (1 + others)
    return jnp.log1p(others) - expected


def max_probability_of_logits(logits: Float[Array, '*inputs K']) -> Float32[Array, '*inputs']:
    r"""Computes one minus the largest probability, :math:`1 - \max_k \hat y_k`, as a sum of the others.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, 1 - 1/K]``, to full relative precision also near 0.

    Raises:
        ValueError: K is 1.

    Example:
        >>> float(max_probability_of_logits(jnp.zeros(4)))
        0.75
    """
    others = _weights(logits)[1].sum(axis=-1)
    return others / (1 + others)


def margin_of_logits(logits: Float[Array, '*inputs K']) -> Float32[Array, '*inputs']:
    r"""Computes one minus the margin between the two largest probabilities, :math:`1 - (\hat y_{(1)} - \hat y_{(2)})`.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, 1]``, to full relative precision also near 0.

    Raises:
        ValueError: K is 1.

    Example:
        >>> float(margin_of_logits(jnp.zeros(4)))
        1.0
    """
    _, others = _weights(logits)
    total = others.sum(axis=-1)
    return (total + others.max(axis=-1)) / (1 + total)


def _weights(
    logits: Float[Array, '*inputs K'],
) -> tuple[Float32[Array, '*inputs K'], Float32[Array, '*inputs K']]:
    """Returns the softmax's numerators, the largest being 1, and the same with 0 in place of the largest."""
    check_classes(logits)
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights, jnp.where(jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool), 0.0, weights)


entropy = from_logits(entropy_of_logits, name='entropy')
"""The paper's criterion: entropy of the exit's softmax, in nats."""

max_probability = from_logits(max_probability_of_logits, name='max probability')
"""One minus the largest probability."""

margin = from_logits(margin_of_logits, name='margin')
"""One minus the difference between the two largest probabilities."""


@value
class _Patience(Criterion):
    name = 'patience'

    def init(self, logits: Array) -> Carry:
        return jnp.full(logits.shape[:-1], -1, jnp.int32), jnp.zeros(logits.shape[:-1], jnp.float32)

    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_classes(logits)
        before, count = carry
        # NaN's argmax is some class: it is no label that a later exit could agree with.
        label = jnp.where(jnp.isnan(logits).any(axis=-1), -1, most_likely_class(logits))
        count = jnp.where((label == before) & (label >= 0), count + 1, 0.0)
        return logits, unless_nan(-mean_over_pixels(count), logits), (label, count)


patience = _Patience()
"""Minus the number of exits in a row that agreed with the one before: a threshold of −1.5 waits for two agreements.

References:
    Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, 2020.
"""


@value
class _Ensemble(Criterion):
    kind: str = struct.field(pytree_node=False)
    uncertainty_of: Callable[[Array], Array] = struct.field(pytree_node=False)
    pool: Pool = struct.field(pytree_node=False)

    @property
    def name(self) -> str:
        return f'{self.kind} ensemble'

    def init(self, logits: Array) -> Carry:
        return jnp.full(logits.shape, -jnp.inf if self.kind == 'arithmetic' else 0.0, jnp.float32)

    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_classes(logits)
        log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
        if self.kind == 'arithmetic':
            total = jnp.logaddexp(carry, log_probability)
            answer = total - jnp.log(n + 1.0)
        else:
            total = carry + log_probability
            answer = jax.nn.log_softmax(total / (n + 1))
        return answer, pooled(self.uncertainty_of, self.pool, answer), total


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
    return _Ensemble(kind, uncertainty_of, pool)


@value
class _Calibrated(Criterion):
    temperatures: Array
    criterion: Criterion

    @property
    def name(self) -> str:
        return f'{self.criterion.name}, calibrated'

    @property
    def num_exits(self) -> int:
        return len(self.temperatures)

    def init(self, logits: Array) -> Carry:
        return self.criterion.init(logits / self.temperatures[0])

    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_exit_number(n, self.num_exits, 'temperatures')
        return self.criterion.update(logits / self.temperatures[n], carry, n)

    def decide(self, logits: Array) -> Array:
        return self.criterion.decide(logits)


def with_temperatures(temperatures: Any, criterion: Criterion = entropy) -> Criterion:
    """Builds a criterion on calibrated logits: those of exit n divided by its temperature.

    Args:
        temperatures: ``[N]`` positive, from `fit_temperatures`.
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
    return _Calibrated(jnp.asarray(values), criterion)


@value
class _Pixelwise(Criterion):
    pixel_thresholds: Array
    uncertainty_of: Callable[[Array], Array] = struct.field(pytree_node=False)

    name = 'pixelwise'

    @property
    def num_exits(self) -> int:
        return len(self.pixel_thresholds) + 1

    def init(self, logits: Array) -> Carry:
        return jnp.zeros_like(logits), jnp.zeros(logits.shape[:-1], bool)

    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_exit_number(n, self.num_exits, 'pixel_thresholds and the last exit')
        kept, answered = carry
        answer = jnp.where(answered[..., None], kept, logits)
        if n < len(self.pixel_thresholds):
            answered = answered | is_confident(self.uncertainty_of(logits), self.pixel_thresholds[n])
        return answer, unless_nan(mean_over_pixels(~answered), answer), (answer, answered)


def pixelwise(pixel_thresholds: Any, *, uncertainty_of: Callable[[Array], Array] = entropy_of_logits) -> Criterion:
    r"""Builds the criterion that lets each pixel answer at the first exit where it is confident.

    The answer of exit n is a mosaic: every pixel shows the logits of the exit that it left at, pixels that are still
    unsure those of exit n. The uncertainty of the image is the share of pixels that are still unsure, so a threshold of
    0.02 lets an image leave once at most 2 % of it, strictly less, would still change.

    **A pixel that is sure saves nothing by itself:** a convolution computes whole images, and so do all executors here.
    Time is saved when an image leaves, and counted then; `pixel_exits` says which exit answers which pixel.

    Args:
        pixel_thresholds: ``[N - 1]``, in the unit of ``uncertainty_of``, compared pixel by pixel as everywhere:
            strictly.
        uncertainty_of: ``logits [B, H, W, K] → [B, H, W]``.

    Raises:
        ValueError: thresholds that are not numbers in one dimension, or NaN; when run, another number of them than
            side exits.

    Example:
        >>> criterion, sure, unsure = pixelwise([0.5]), jnp.array([9.0, 0.0]), jnp.array([0.0, 0.0])
        >>> logits = jnp.stack([sure, unsure])[None, None]  # one image of 1 × 2 pixels
        >>> _, uncertainty, carry = criterion.update(logits, criterion.init(logits), 0)
        >>> answer, _, _ = criterion.update(-logits - 1, carry, 1)
        >>> uncertainty.tolist(), answer[0, 0].tolist()
        ([0.5], [[9.0, 0.0], [-1.0, -1.0]])

    References:
        Liu et al., Anytime Dense Prediction with Confidence Adaptivity, 2022.
    """
    thresholds = np.asarray(pixel_thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f'pixel_thresholds: expected one number per side exit, got {thresholds.tolist()}')
    return _Pixelwise(jnp.asarray(thresholds), uncertainty_of)


def pixel_exits(
    logits: Array,
    pixel_thresholds: Any,
    *,
    uncertainty_of: Callable[[Array], Array] = entropy_of_logits,
) -> Array:
    """Tells which exit answers each pixel if no image leaves early.

    Args:
        logits: ``[N, B, …, K]`` of every exit.
        pixel_thresholds: ``[N - 1]``.
        uncertainty_of: as in `pixelwise`.

    Returns:
        ``[B, …]`` int32 in ``[0, N)``.

    Raises:
        ValueError: not one threshold per side exit.

    Example:
        >>> pixel_exits(jnp.array([[[9.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]), [0.5]).tolist()
        [0, 1]
    """
    thresholds = np.asarray(pixel_thresholds, np.float32)
    if thresholds.shape != (len(logits) - 1,):
        raise ValueError(f'pixel_thresholds: expected {len(logits) - 1}, one per side exit, got {thresholds.tolist()}')
    confident = [is_confident(uncertainty_of(z), threshold) for z, threshold in zip(logits, thresholds, strict=False)]
    confident.append(jnp.ones(logits.shape[1:-1], bool))
    return jnp.argmax(jnp.stack(confident), axis=0).astype(jnp.int32)
