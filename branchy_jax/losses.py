"""Losses: one value per exit, from the logits of all of them and the targets. They add up and compose."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from branchy_jax.types import Array, check_labels

Loss = Callable[[tuple[Array, ...], Array], Array]
"""``(logits of N exits, targets) → losses [N]``."""

MetricsOf = Callable[[tuple[Array, ...], Array], Mapping[str, Array]]
"""``(logits of N exits, targets) → figures by name``, each scalar or [N]: what to look at while training."""

Teachers = Callable[[tuple[Array, ...]], tuple[Array, ...]]
"""``logits of N exits → logits of the teacher of each``."""


def cross_entropy_per_exit(logits: tuple[Array, ...], labels: Array, *, label_smoothing: float = 0.0) -> Array:
    r"""Computes the mean cross-entropy of every exit.

    .. math:: L_n = -\frac{1}{B} \sum_b \ln \operatorname{softmax}(z_{n, b})_{y_b}

    Args:
        logits: N arrays ``[B, …, K]``.
        labels: ``[B, …]`` integers in ``[0, K)``.
        label_smoothing: share of each target's probability that is spread over all K classes, in ``[0, 1)``.

    Returns:
        ``[N]`` float32, or float64 of such logits.

    Raises:
        ValueError: labels that are not integers, whose shape does not match the logits or, where values can be seen,
            that are out of range.

    Example:
        >>> losses = cross_entropy_per_exit((jnp.zeros((2, 10)), jnp.zeros((2, 10))), jnp.array([3, 7]))
        >>> bool(jnp.allclose(losses, jnp.log(10.0)))
        True

    References:
        BranchyNet, 2016, section III-B.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'labels: expected integers in [0, K), got dtype {labels.dtype}; one-hot labels need argmax')
    for n, exit_logits in enumerate(logits):
        if exit_logits.shape[:-1] != labels.shape:
            raise ValueError(
                f'labels: exit {n} gives logits of shape {exit_logits.shape}, so labels must have shape '
                f'{exit_logits.shape[:-1]}; got {labels.shape}'
            )
    check_labels(labels, logits[-1].shape[-1])
    if not 0 <= label_smoothing < 1:
        raise ValueError(f'label_smoothing: got {label_smoothing}; give a share in [0, 1)')
    logits = tuple(z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in logits)
    losses = jnp.stack([optax.softmax_cross_entropy_with_integer_labels(z, labels).mean() for z in logits])
    if not label_smoothing:
        return losses
    spread = jnp.stack([-jax.nn.log_softmax(z).mean() for z in logits])
    return (1 - label_smoothing) * losses + label_smoothing * spread


def accuracy_per_exit(logits: tuple[Array, ...], labels: Array) -> dict[str, Array]:
    """Computes the share of right answers of every exit: the metric of `branchy_jax.training.train_step` by default.

    Args:
        logits: N arrays ``[B, …, K]``.
        labels: ``[B, …]`` integers.

    Returns:
        ``{'exit_accuracy': [N]}``.

    Example:
        >>> accuracy_per_exit((jnp.array([[0.0, 1.0], [0.0, 1.0]]),), jnp.array([1, 0]))['exit_accuracy'].tolist()
        [0.5]
    """
    return {'exit_accuracy': jnp.stack([jnp.mean(z.argmax(-1) == labels) for z in logits])}


def weighted_exit_loss(exit_losses: Array, exit_weights: Array) -> Array:
    r"""Sums the exits' losses with their weights: :math:`L = \sum_n w_n L_n`.

    Args:
        exit_losses: ``[N]``.
        exit_weights: ``[N]``. The paper's best setting for two exits is 1.0 and 0.3: early exits regularise.

    Returns:
        Scalar.

    Raises:
        ValueError: not one weight per exit.

    Example:
        >>> float(weighted_exit_loss(jnp.array([2.0, 1.0]), jnp.array([1.0, 0.5])))
        2.5
    """
    exit_weights = jnp.asarray(exit_weights, exit_losses.dtype)
    if exit_weights.shape != exit_losses.shape:
        raise ValueError(
            f'exit_weights: expected one weight for each of the {exit_losses.shape[0]} exits, '
            f'got shape {exit_weights.shape}'
        )
    return jnp.sum(exit_weights * exit_losses)


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
    terms: tuple[tuple[float, Loss], ...]

    def __call__(self, logits: tuple[Array, ...], targets: Array) -> Array:
        return functools.reduce(operator.add, (factor * term(logits, targets) for factor, term in self.terms))


def weighted_sum(*terms: tuple[float, Loss]) -> Loss:
    r"""Builds the loss that adds others up: :math:`L_n = \sum_j \alpha_j L_n^{(j)}`.

    Args:
        *terms: pairs of a factor and a loss, such as ``(1.0, cross_entropy_per_exit)``.

    Raises:
        ValueError: no terms.

    Example:
        >>> loss = weighted_sum((0.9, cross_entropy_per_exit), (0.1, distillation(last_exit, temperature=2.0)))
        >>> loss((jnp.zeros((2, 10)), jnp.ones((2, 10))), jnp.array([3, 7])).shape
        (2,)
    """
    if not terms:
        raise ValueError('terms: got none; give pairs of a factor and a loss')
    return _WeightedSum(terms)


@dataclasses.dataclass(frozen=True)
class _Distillation:
    teachers: Teachers
    temperature: float

    def __call__(self, logits: tuple[Array, ...], targets: Array) -> Array:
        losses, warmth = [], self.temperature
        for own, teacher in zip(logits, jax.lax.stop_gradient(self.teachers(logits)), strict=True):
            student, wanted = jax.nn.log_softmax(own / warmth), jax.nn.log_softmax(teacher / warmth)
            losses.append(warmth**2 * optax.losses.kl_divergence_with_log_targets(student, wanted).mean())
        return jnp.stack(losses)


def distillation(teachers: Teachers, *, temperature: float = 1.0) -> Loss:
    r"""Builds the loss that draws each exit towards a teacher among the network's own exits.

    .. math:: L_n = \frac{T^2}{B} \sum_b \operatorname{KL}\left(\operatorname{softmax}(t_{n, b} / T) \,\middle\|\,
        \operatorname{softmax}(z_{n, b} / T)\right)

    No gradient flows into a teacher, so an exit that teaches itself has loss and gradient 0. Labels are not used.

    Args:
        teachers: `last_exit`, `next_exit`, `ensemble_of_exits`, or your own.
        temperature: T; above 1 the teacher's doubts weigh more.

    Raises:
        ValueError: a temperature that is not positive.

    Example:
        >>> logits = (jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0]]))
        >>> [round(float(loss), 3) for loss in distillation(last_exit)(logits, None)]
        [0.067, 0.0]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Phuong and Lampert, Distillation-Based
        Training for Multi-Exit Architectures, 2019.
    """
    if not temperature > 0:
        raise ValueError(f'temperature: got {temperature}; expected a positive number')
    return _Distillation(teachers, temperature)


def last_exit(logits: tuple[Array, ...]) -> tuple[Array, ...]:
    """Teachers for `distillation`: the last exit teaches all."""
    return (logits[-1],) * len(logits)


def next_exit(logits: tuple[Array, ...]) -> tuple[Array, ...]:
    """Teachers for `distillation`: each exit is taught by the one after it."""
    return (*logits[1:], logits[-1])


def ensemble_of_exits(logits: tuple[Array, ...]) -> tuple[Array, ...]:
    """Teachers for `distillation`: the mean of all exits' probabilities teaches all."""
    log_probabilities = jnp.stack([jax.nn.log_softmax(z) for z in logits])
    return (jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(len(logits) * 1.0),) * len(logits)
