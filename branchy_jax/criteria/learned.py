"""Calibration: temperatures, a learned criterion, and measures of how far confidence is from accuracy.

All functions take cached logits ``[N, B, K]`` (`branchy_jax.inference.exit_outputs`) of validation data. On training
data a network is more confident than on new inputs.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from scipy import special

from branchy_jax.criteria.criterion import Carry, Criterion, check_classes, mean_over_pixels
from branchy_jax.types import Array, check_labels

_NETWORK: Any = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(1)])  # of the learned criterion, one for each exit
_LEARNING_RATE = 3e-3  # of that network, at first
_MOST_FEATURES = 10  # largest probabilities that the learned criterion reads
_SMALLEST_PROBABILITY = 1e-8  # keeps logarithms finite
_MOST_LOG_TEMPERATURE = 6.9  # of 992: for an exit no better than chance the best temperature is infinite


def fit_temperatures(logits: Array, labels: Array, *, shared: bool = False) -> np.ndarray:
    r"""Fits a temperature per exit: the one that minimises the cross-entropy of ``logits / temperature``.

    .. math:: T_n = \arg\min_T \sum_b -\ln \operatorname{softmax}(z_{nb} / T)_{y_b}

    Args:
        logits: ``[N, B, K]`` on validation data.
        labels: ``[B]``.
        shared: one temperature for all exits.

    Returns:
        ``[N]`` float32 within a thousandth and a thousand, for `with_temperatures`.

    Raises:
        ValueError: arrays whose shapes do not agree, logits that are not finite, or labels out of range.

    Example:
        >>> logits = np.log([[[0.99, 0.01]] * 4])   # 99 % sure, right three times of four
        >>> temperature = fit_temperatures(logits, [0, 0, 0, 1])
        >>> round(float(jax.nn.softmax(logits[0, 0] / temperature[0])[0]), 2)
        0.75

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    from scipy import optimize  # on use: the import is slow

    logits, labels = _checked(logits, labels)
    if not np.isfinite(logits).all():
        advice = 'leave their inputs out, or put a large negative number in place of -inf'
        raise ValueError(f'logits: got values that are not finite, to which no temperature can be fitted; {advice}')

    def loss(log_temperature: float, exits: np.ndarray) -> float:
        scores = special.log_softmax(exits * np.exp(-log_temperature), axis=-1)  # in float64
        return -scores[:, np.arange(len(labels)), labels].mean()

    # The loss falls, then rises: it is convex in 1 / T.
    options = {'bounds': (-_MOST_LOG_TEMPERATURE, _MOST_LOG_TEMPERATURE), 'method': 'bounded'}
    groups = logits[None] if shared else logits[:, None]
    best = [optimize.minimize_scalar(loss, args=(exits,), **options).x for exits in groups]
    return np.broadcast_to(np.exp(best), len(logits)).astype(np.float32)


class Reliability(struct.PyTreeNode):
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


class _Learned(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """See `fit_learned`: one small network per exit that predicts from sorted probabilities whether the exit is right.

    Attributes:
        mean: ``[N, F]`` of the features on the data it was fitted on.
        deviation: ``[N, F]`` of the same.
        params: of `_NETWORK`; leaves lead with N.
    """

    mean: Array
    deviation: Array
    params: dict[str, Any]
    num_exits: int = struct.field(pytree_node=False)

    name = 'learned'

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        features = _features(logits)
        if features.shape[-1] != self.mean.shape[-1]:
            sizes = f'{self.mean.shape[-1]} largest probabilities, this network has {features.shape[-1]}'
            raise ValueError(f'criterion: was learned on the {sizes}; fit it on this network')
        mean, deviation = (jnp.expand_dims(of[n], range(features.ndim - 1)) for of in (self.mean, self.deviation))
        params = jax.tree.map(lambda values: values[n], self.params)
        wrong = jax.nn.sigmoid(-_log_odds(params, (features - mean) / deviation))
        return logits, mean_over_pixels(wrong), carry


def fit_learned(logits: Array, labels: Array, key: Array, *, steps: int = 1000) -> Criterion:
    """Fits the paper's meta-recognition: per exit, a small network that predicts whether the exit is right.

    Each network has one hidden layer of 32 units on the logarithms of the ten largest probabilities; AdamW trains it on
    the whole data at once.

    Args:
        logits: ``[N, B, K]`` on validation data.
        labels: ``[B]``.
        key: PRNG key of the initial weights.
        steps: of AdamW, while its learning rate decays to zero.

    Returns:
        A `Criterion` whose uncertainty is the predicted probability of being wrong.

    Raises:
        ValueError: arrays whose shapes do not agree, labels out of range, or no steps.

    References:
        BranchyNet, 2016, section V: "meta-recognition", proposed there. Zhang et al., Predicting failures of vision
        systems, 2014.
    """
    logits, labels = _checked(logits, labels)
    if steps < 1:
        raise ValueError(f'steps: got {steps}; give a positive number')
    features = _features(logits)
    mean, deviation = features.mean(axis=1), features.std(axis=1) + 1e-3
    scaled = (features - mean[:, None]) / deviation[:, None]
    right = (logits.argmax(axis=-1) == labels[None]).astype(jnp.float32)
    params = jax.vmap(lambda key, x: _NETWORK.init(key, x)['params'])(jax.random.split(key, len(logits)), scaled)
    solver = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, steps), weight_decay=1e-3)

    def loss(params: Any) -> Array:
        return optax.sigmoid_binary_cross_entropy(jax.vmap(_log_odds)(params, scaled), right).mean(axis=1).sum()

    def step(_: int, carry: tuple[Any, optax.OptState]) -> tuple[Any, optax.OptState]:
        params, state = carry
        update, state = solver.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, update), state

    params, _ = jax.lax.fori_loop(0, steps, step, (params, solver.init(params)))
    return _Learned(mean, deviation, params, num_exits=len(logits))


def _log_odds(params: Any, features: Array) -> Array:
    """Returns the log odds of being right ``[…]`` from scaled ``features […, F]``, for one exit."""
    return _NETWORK.apply({'params': params}, features)[..., 0]


def _features(logits: Array) -> Array:
    """Returns logarithms of the largest probabilities, descending, ``[…, F]`` with F at most ten."""
    check_classes(logits)
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    largest = jax.lax.top_k(probability, min(_MOST_FEATURES, logits.shape[-1]))[0]
    return jnp.log(largest + _SMALLEST_PROBABILITY)


def _checked(logits: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[1:2] or 0 in logits.shape:
        raise ValueError(f'logits: expected [N, B, K] with labels [B], got {logits.shape} and {labels.shape}')
    check_labels(labels, logits.shape[-1])
    return logits, labels
