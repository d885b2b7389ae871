"""Calibration: temperatures, a learned criterion, and measures of how far confidence is from accuracy.

All functions take cached logits ``[N, B, K]`` (`branchy_jax.inference.exit_outputs`) of validation data. On training
data a network is more confident than on new inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from branchy_jax.criteria.criterion import Carry, Criterion, check_classes, mean_over_pixels, static, value
from branchy_jax.types import Array, check_labels

_MOST_FEATURES = 10  # largest probabilities that the learned criterion reads
_SMALLEST_PROBABILITY = 1e-8  # keeps logarithms finite
_MOST_LOG_TEMPERATURE = float(np.log(1000))  # for an exit no better than chance the best temperature is infinite


def fit_temperatures(logits: Array, labels: Array, *, shared: bool = False, steps: int = 50) -> np.ndarray:
    r"""Fits a temperature per exit by L-BFGS, minimising the cross-entropy of ``logits / temperature``.

    .. math:: T_n = \arg\min_T \sum_b -\ln \operatorname{softmax}(z_{nb} / T)_{y_b}

    Args:
        logits: ``[N, B, K]`` on validation data.
        labels: ``[B]``.
        shared: one temperature for all exits.
        steps: of L-BFGS on the logarithm of the temperature.

    Returns:
        ``[N]`` float32 within a thousandth and a thousand, for `with_temperatures`.

    Raises:
        ValueError: arrays whose shapes do not agree, logits that are not finite, labels or settings out of range.

    Example:
        >>> logits = np.log([[[0.99, 0.01]] * 4])   # 99 % sure, right three times of four
        >>> temperature = fit_temperatures(logits, [0, 0, 0, 1])
        >>> round(float(jax.nn.softmax(logits[0, 0] / temperature[0])[0]), 2)
        0.75

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    logits, labels = _checked(logits, labels)
    if not jnp.isfinite(logits).all():
        advice = 'leave their inputs out, or put a large negative number in place of -inf'
        raise ValueError(f'logits: got values that are not finite, to which no temperature can be fitted; {advice}')
    if steps < 0:
        raise ValueError(f'steps: got {steps}; give a number from 0 up')

    def loss(log_temperature: Array) -> Array:
        scaled = logits * jnp.exp(-log_temperature)[:, None, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(scaled, jnp.broadcast_to(labels, scaled.shape[:2]))
        return losses.mean(axis=1).sum()

    log_temperature = _minimise(loss, jnp.zeros(1 if shared else len(logits)), optax.lbfgs(), steps)
    clipped = jnp.clip(log_temperature, -_MOST_LOG_TEMPERATURE, _MOST_LOG_TEMPERATURE)
    return np.asarray(jnp.broadcast_to(jnp.exp(clipped), len(logits)), np.float32)


def _minimise(loss: Callable[[Any], Array], start: Any, solver: optax.GradientTransformation, steps: int) -> Any:
    solver = optax.with_extra_args_support(solver)  # L-BFGS evaluates the loss along a line

    def step(carry: tuple[Any, optax.OptState], _: None) -> tuple[tuple[Any, optax.OptState], None]:
        point, state = carry
        value, gradient = jax.value_and_grad(loss)(point)
        update, state = solver.update(gradient, state, point, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(point, update), state), None

    (point, _), _ = jax.jit(lambda start: jax.lax.scan(step, (start, solver.init(start)), length=steps))(start)
    return point


@struct.dataclass
class Reliability:
    """How often answers of a given confidence are right.

    Attributes:
        confidence: ``[M]`` mean confidence in a bin.
        accuracy: ``[M]`` share of right answers in it.
        count: ``[M]`` how many fall into it; empty bins hold zeros.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence from accuracy, bins weighted by their count."""
        return float(np.sum(self.count * np.abs(self.confidence - self.accuracy)) / self.count.sum())


def reliability(confidence: Array, right: Array, *, bins: int = 15, equal_counts: bool = False) -> Reliability:
    """Sorts answers into bins of confidence.

    Args:
        confidence: ``[B]`` in ``[0, 1]``.
        right: ``[B]`` booleans.
        bins: M, their number.
        equal_counts: bins of equally many answers (adaptive calibration error) instead of equal width.

    Raises:
        ValueError: no answers, shapes that do not agree, fewer than one bin.

    Example:
        >>> reliability([0.9, 0.9, 0.6, 0.6], [True, True, True, False], bins=5).error
        0.09999999999999998

    References:
        Guo et al., 2017, section 2; Nixon et al., Measuring Calibration in Deep Learning, 2019 (adaptive).
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if confidence.ndim != 1 or confidence.shape != right.shape or not len(confidence) or bins < 1:
        given = f'{confidence.shape}, {right.shape} and {bins}'
        raise ValueError(f'confidence: expected two arrays [B] and at least one bin, got {given}')
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    if equal_counts:
        place[np.argsort(confidence, kind='stable')] = np.arange(len(confidence)) * bins // len(confidence)
    count = np.bincount(place, minlength=bins)
    means = [np.bincount(place, values, minlength=bins) / np.maximum(count, 1) for values in (confidence, right)]
    return Reliability(confidence=means[0], accuracy=means[1], count=count)


def brier_score(logits: Array, labels: Array) -> float:
    r"""Computes the mean squared distance of probabilities from the truth, :math:`\sum_k (\hat y_k - [k = y])^2`.

    Args:
        logits: ``[B, K]``.
        labels: ``[B]``.

    Example:
        >>> brier_score(np.log([[0.5, 0.5]]), [0])
        0.5
    """
    probability = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    truth = np.eye(probability.shape[-1])[np.asarray(labels)]
    return float(np.mean(np.sum((probability - truth) ** 2, axis=-1)))


@value
class _Learned(Criterion):
    """See `fit_learned`: one small network per exit that predicts from sorted probabilities whether the exit is right.

    Attributes:
        mean: ``[N, F]`` of the features on the data it was fitted on.
        deviation: ``[N, F]`` of the same.
        hidden: ``[N, F, M]``.
        hidden_bias: ``[N, M]``.
        output: ``[N, M]``.
        output_bias: ``[N]``.
    """

    mean: Array
    deviation: Array
    hidden: Array
    hidden_bias: Array
    output: Array
    output_bias: Array
    num_exits: int = static()

    name = 'learned'

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        features, of_exit = _features(logits), jax.tree.map(lambda values: values[n], self)
        if features.shape[-1] != self.mean.shape[-1]:
            sizes = f'{self.mean.shape[-1]} largest probabilities, this network has {features.shape[-1]}'
            raise ValueError(f'criterion: was learned on the {sizes}; fit it on this network')
        wrong = jax.nn.sigmoid(-_log_odds(of_exit, features))
        return logits, mean_over_pixels(wrong), carry


def fit_learned(
    logits: Array, labels: Array, key: Array, *, width: int = 32, steps: int = 1000, learning_rate: float = 3e-3
) -> Criterion:
    """Fits the paper's meta-recognition: per exit, a small network that predicts whether the exit is right.

    Each network has one hidden layer on the logarithms of the ten largest probabilities; AdamW trains it on the whole
    data at once.

    Args:
        logits: ``[N, B, K]`` on validation data.
        labels: ``[B]``.
        key: PRNG key of the initial weights.
        width: of the hidden layer.
        steps: of AdamW.
        learning_rate: of AdamW at first; it decays to zero.

    Returns:
        A `Criterion` whose uncertainty is the predicted probability of being wrong.

    Raises:
        ValueError: arrays whose shapes do not agree, labels or settings out of range.

    References:
        BranchyNet, 2016, section V: "meta-recognition", proposed there. Zhang et al., Predicting failures of vision
        systems, 2014.
    """
    logits, labels = _checked(logits, labels)
    for name, given in (('width', width), ('steps', steps), ('learning_rate', learning_rate)):
        if not given > 0:
            raise ValueError(f'{name}: got {given}; give a positive number')
    features = _features(logits)
    right = (logits.argmax(axis=-1) == labels[None]).astype(jnp.float32)
    exits, _, count = features.shape
    first, second = jax.random.split(key)
    start = _Learned(
        mean=features.mean(axis=1),
        deviation=features.std(axis=1) + 1e-3,
        hidden=jax.random.normal(first, (exits, count, width)) / jnp.sqrt(count),
        hidden_bias=jnp.zeros((exits, width)),
        output=jax.random.normal(second, (exits, width)) / jnp.sqrt(width),
        output_bias=jnp.zeros(exits),
        num_exits=exits,
    )
    solver = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-3)

    def loss(trained: _Learned) -> Array:
        learned = trained.replace(mean=start.mean, deviation=start.deviation)
        scores = jax.vmap(_log_odds)(learned, features)
        return optax.sigmoid_binary_cross_entropy(scores, right).mean(axis=1).sum()

    return _minimise(loss, start, solver, steps).replace(mean=start.mean, deviation=start.deviation)


def _log_odds(of_exit: _Learned, features: Array) -> Array:
    """Returns the log odds of being right ``[…]`` from ``features […, F]``, for one exit."""
    vectors = of_exit.mean, of_exit.deviation, of_exit.hidden_bias
    mean, deviation, bias = (jnp.expand_dims(values, range(features.ndim - 1)) for values in vectors)
    hidden = jax.nn.gelu((features - mean) / deviation @ of_exit.hidden + bias)
    return hidden @ of_exit.output + of_exit.output_bias


def _features(logits: Array) -> Array:
    """Returns logarithms of the largest probabilities, descending, ``[…, F]`` with F at most ten."""
    check_classes(logits)
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    largest = jax.lax.top_k(probability, min(_MOST_FEATURES, logits.shape[-1]))[0]
    return jnp.log(largest + _SMALLEST_PROBABILITY)


def _checked(logits: Array, labels: Array) -> tuple[Array, Array]:
    logits, labels = jnp.asarray(logits, jnp.float32), np.asarray(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[1:2] or 0 in logits.shape:
        raise ValueError(f'logits: expected [N, B, K] with labels [B], got {logits.shape} and {labels.shape}')
    check_labels(labels, logits.shape[-1])
    return logits, jnp.asarray(labels)
