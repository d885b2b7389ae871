"""Losses: one value per exit, from the logits of all exits and the targets. `weighted_sum` combines them."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from branchy_jax.types import Array, check_labels

# (logits of N exits, targets) → losses [N]
Loss = Callable[[tuple[Array, ...], Array], Array]

# (logits of N exits, targets) → metrics by name, each a scalar or [N]
MetricsOf = Callable[[tuple[Array, ...], Array], Mapping[str, Array]]

# logits of N exits → logits of the teacher of each exit
Teachers = Callable[[tuple[Array, ...]], tuple[Array, ...]]


def cross_entropy_per_exit(
    logits: tuple[Array, ...], labels: Array, *, label_smoothing: float = 0.0, ignore_label: int | None = None
) -> Array:
    r"""Computes the mean cross-entropy of every exit.

    .. math:: L_n = -\frac{1}{B} \sum_b \ln \operatorname{softmax}(z_{n, b})_{y_b}

    Args:
        logits: N arrays ``[B, …, K]``, of at least two classes.
        labels: ``[B, …]`` integers in ``[0, K)``.
        label_smoothing: share of each target's probability that is spread over all K classes, in ``[0, 1)``.
        ignore_label: label of the positions that the mean leaves out, such as 255 for the border of an object. Without
            a position left the loss is 0. Give the same to `accuracy_per_exit`.

    Returns:
        ``[N]`` float32, or float64 if the logits are. NaN under jit if a label is out of range.

    Raises:
        ValueError: if ``labels`` are not integers, do not match the shape of the logits or, outside jit, are out of
            range; if there is one logit for each input; or if ``label_smoothing`` is outside ``[0, 1)``.

    Example:
        >>> losses = cross_entropy_per_exit((jnp.zeros((2, 10)), jnp.zeros((2, 10))), jnp.array([3, 7]))
        >>> bool(jnp.allclose(losses, jnp.log(10.0)))
        True

    References:
        BranchyNet, 2016, section III-B.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'labels: expected integers in [0, K), got dtype {labels.dtype}; one-hot labels need argmax')
    for n, z in enumerate(logits):
        if z.shape[:-1] != labels.shape:
            raise ValueError(f'labels: the logits of exit {n} need labels {z.shape[:-1]}; got {labels.shape}')
        if z.shape[-1] == 1:
            raise ValueError(f'logits: exit {n} has one logit for each input; give two classes two logits')
    check_labels(labels, logits[-1].shape[-1], ignore_label)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f'label_smoothing: got {label_smoothing}; give a share in [0, 1)')
    logits = tuple(z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in logits)
    has_class, counted = _masks(logits, labels, ignore_label)
    losses = []
    for z in logits:
        values = optax.softmax_cross_entropy_with_integer_labels(z, jnp.where(has_class, labels, 0))
        if label_smoothing:
            values = (1 - label_smoothing) * values - label_smoothing * jax.nn.log_softmax(z).mean(-1)
        losses.append(_mean(jnp.where(has_class, values, jnp.nan), counted))
    return jnp.stack(losses)


def accuracy_per_exit(logits: tuple[Array, ...], labels: Array, *, ignore_label: int | None = None) -> dict[str, Array]:
    """Computes the accuracy of every exit. `branchy_jax.training.train_step` uses it as its metric by default.

    Args:
        logits: N arrays ``[B, …, K]``.
        labels: ``[B, …]`` integers.
        ignore_label: label of the positions that are left out, as are those whose label no class has.

    Returns:
        ``{'exit_accuracy': [N]}``.

    Example:
        >>> accuracy_per_exit((jnp.array([[0.0, 1.0], [0.0, 1.0]]),), jnp.array([1, 0]))['exit_accuracy'].tolist()
        [0.5]
    """
    has_class, counted = _masks(logits, labels, ignore_label)
    return {'exit_accuracy': jnp.stack([_mean(z.argmax(-1) == labels, has_class & counted) for z in logits])}


def _masks(logits: tuple[Array, ...], labels: Array, ignore_label: int | None) -> tuple[Array, Array]:
    """Returns where a label is one of a class, and where it is not to be ignored."""
    values = jnp.asarray(labels, jnp.int32)  # a small type might not hold K or the label to ignore
    counted = jnp.ones(values.shape, bool) if ignore_label is None else values != ignore_label
    return (values >= 0) & (values < logits[-1].shape[-1]), counted


def _mean(values: Array, counted: Array) -> Array:
    return jnp.sum(values, where=counted) / jnp.maximum(counted.sum(), 1)


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
    terms: tuple[tuple[float, Loss], ...]

    def __call__(self, logits: tuple[Array, ...], targets: Array) -> Array:
        return jnp.sum(jnp.stack([factor * term(logits, targets) for factor, term in self.terms]), axis=0)


def weighted_sum(*terms: tuple[float, Loss]) -> Loss:
    r"""Returns the weighted sum of losses: :math:`L_n = \sum_j \alpha_j L_n^{(j)}`.

    Sums of equal terms are equal, so a training step compiles once for them.

    Args:
        *terms: pairs of a factor and a loss, such as ``(1.0, cross_entropy_per_exit)``.

    Raises:
        ValueError: if there are no terms.

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
        losses = []
        for own, teacher in zip(logits, jax.lax.stop_gradient(self.teachers(logits)), strict=True):
            student, target = (jax.nn.log_softmax(z / self.temperature) for z in (own, teacher))
            divergence = optax.losses.kl_divergence_with_log_targets(student, target).mean()
            losses.append(self.temperature**2 * divergence)
        return jnp.stack(losses)


def distillation(teachers: Teachers, *, temperature: float = 1.0) -> Loss:
    r"""Returns the loss that trains each exit to match a teacher, which is made of the network's own exits.

    .. math:: L_n = \frac{T^2}{B} \sum_b \operatorname{KL}\left(\operatorname{softmax}(t_{n, b} / T) \,\middle\|\,
        \operatorname{softmax}(z_{n, b} / T)\right)

    No gradient flows into a teacher, so an exit that is its own teacher has loss and gradient 0. Labels are unused.

    Args:
        teachers: `last_exit`, `next_exit`, `ensemble_of_exits`, or any function of N logits that returns N logits.
        temperature: T; values above 1 give more weight to the teacher's less likely classes.

    Raises:
        ValueError: if ``temperature`` is not positive.

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
    """Returns the teachers for `distillation` where the last exit teaches every exit."""
    return (logits[-1],) * len(logits)


def next_exit(logits: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the teachers for `distillation` where each exit is taught by the exit after it."""
    return (*logits[1:], logits[-1])


def ensemble_of_exits(logits: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the teachers for `distillation` where the mean of all exits' probabilities teaches every exit."""
    log_probabilities = jnp.stack([jax.nn.log_softmax(z) for z in logits])
    return (jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(len(logits) * 1.0),) * len(logits)
