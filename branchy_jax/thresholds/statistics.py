"""What each answer adds to a metric: additive statistics per input, the metrics of their sums, and who erred where.

A metric such as mIoU is no mean over images, but it is a function of sums over images. Everything that chooses
thresholds works on such statistics ``[N, M, S]`` and a ``metric(sums, count)``, so one tuner serves all tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from branchy_jax.types import Array, check_labels

Metric = Callable[[np.ndarray, int], np.ndarray]
"""``(sums of statistics [..., S], number of inputs) → metric [...]``, larger is better."""

Statistics = Callable[[Array, Array], Array]
"""``(answer logits [N, B, …, K], labels [B, …]) → statistics [N, B, S]``; NumPy in, NumPy out; traces under jit."""


def mean_of_statistic(sums: np.ndarray, count: int) -> np.ndarray:
    """The metric of classification: statistics are 0 or 1 per input, their mean is the accuracy."""
    return sums[..., 0] / count


def accuracy_statistics(logits: Array, labels: Array) -> Array:
    """Returns ``[N, B, 1]``: 1 where exit n's answer to input b is right.

    Args:
        logits: ``[N, B, K]``.
        labels: ``[B]``.

    Raises:
        ValueError: labels out of range or of another shape.
    """
    predicted, labels = _predictions(logits, labels)
    return (predicted == labels)[..., None].astype(float)


def iou_statistics(logits: Array, labels: Array) -> Array:
    """Returns ``[N, B, 2 K]``: per class, the pixels in the intersection of answer and truth, then those in the union.

    Args:
        logits: ``[N, B, H, W, K]``.
        labels: ``[B, H, W]``.

    Raises:
        ValueError: labels out of range or of another size than the answers.

    Example:
        >>> logits = np.eye(2)[[[[[0, 0], [1, 1]]]]]  # one exit, one image, 2 × 2 pixels
        >>> iou_statistics(logits, np.array([[[0, 1], [1, 1]]])).tolist()
        [[[1.0, 2.0, 2.0, 3.0]]]
    """
    predicted, truth = _predictions(logits, labels)
    numpy = jax.numpy if isinstance(predicted, jax.Array) else np
    axes = tuple(range(2, predicted.ndim))
    intersections, unions = [], []
    for k in range(logits.shape[-1]):
        ours, theirs = predicted == k, truth == k
        intersections.append((ours & theirs).sum(axis=axes))
        unions.append((ours | theirs).sum(axis=axes))
    return numpy.stack(intersections + unions, axis=-1).astype(float)


def iou_per_class(sums: np.ndarray) -> np.ndarray:
    """Computes intersection over union of each class from summed `iou_statistics`.

    Args:
        sums: ``[..., 2 K]``.

    Returns:
        ``[..., K]``; NaN for a class that is neither there nor answered.
    """
    intersection, union = np.split(np.asarray(sums, np.float64), 2, axis=-1)
    return np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(sums: np.ndarray, count: int) -> np.ndarray:
    """The metric of segmentation: mean over the classes of their IoU over all pixels of all images.

    Classes that are neither there nor answered do not count.

    Args:
        sums: ``[..., 2 K]`` of `iou_statistics`.
        count: number of images, which this metric does not need.

    Example:
        >>> round(float(mean_iou(np.array([1.0, 2.0, 2.0, 3.0]), 1)), 4)
        0.5833
    """
    return np.nanmean(iou_per_class(sums), axis=-1)


def standard_error(statistics: np.ndarray, metric: Metric = mean_of_statistic) -> float:
    r"""Computes the standard error of any metric over inputs, by the jackknife.

    .. math:: s^2 = \frac{M - 1}{M} \sum_b (m_{-b} - \bar m)^2,

    where :math:`m_{-b}` is the metric without input b. For an accuracy p it is :math:`\sqrt{p (1 - p) / (M - 1)}`.

    Args:
        statistics: ``[M, S]`` of the answers given, as `ExitTable.standard_error` looks them up.
        metric: of their sums.

    Raises:
        ValueError: fewer than two inputs, or another number of dimensions.

    Example:
        >>> round(standard_error(np.array([[1.0], [1.0], [0.0], [1.0], [0.0]])), 4)
        0.2449

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
    """
    statistics = np.asarray(statistics, np.float64)
    if statistics.ndim != 2 or len(statistics) < 2:
        raise ValueError(f'statistics: a standard error needs [M, S] of at least 2 inputs, got {statistics.shape}')
    count = len(statistics)
    without_one = np.asarray(metric(statistics.sum(axis=0) - statistics, count - 1))
    return float(np.sqrt((count - 1) / count * np.square(without_one - without_one.mean()).sum()))


def confusion(labels: Array, answers: Array, exits: Array, *, num_exits: int, num_classes: int) -> np.ndarray:
    """Counts, for each exit, which class was taken for which by the inputs that left there.

    Args:
        labels: ``[M]``.
        answers: ``[M]`` predicted labels.
        exits: ``[M]`` which exit answered.
        num_exits: N.
        num_classes: K.

    Returns:
        ``[N, K, K]``: exit, true class, answer.

    Raises:
        ValueError: arrays of different shapes, or numbers that no class or exit has.

    Example:
        >>> confusion([0, 1], [0, 0], [0, 1], num_exits=2, num_classes=2).tolist()
        [[[1, 0], [0, 0]], [[0, 0], [1, 0]]]
    """
    labels, answers, exits = (np.asarray(values) for values in (labels, answers, exits))
    for name, values, count in (
        ('labels', labels, num_classes),
        ('answers', answers, num_classes),
        ('exits', exits, num_exits),
    ):
        if values.shape != labels.shape:
            raise ValueError(f'{name}: expected one per input, shape {labels.shape}, got {values.shape}')
        if values.size and not 0 <= values.min() <= values.max() < count:
            raise ValueError(f'{name}: expected numbers in [0, {count}), got {values.min()} to {values.max()}')
    counts = np.zeros((num_exits, num_classes, num_classes), int)
    np.add.at(counts, (exits, labels, answers), 1)
    return counts


def _predictions(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns predicted classes ``[N, B, …]`` and labels ``[1, B, …]``, on the host unless traced."""
    if not isinstance(logits, jax.core.Tracer):
        logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.shape[1:-1] != labels.shape:
        raise ValueError(
            f'labels: answers have shape {logits.shape[1:-1]}, so labels must have it too; got {labels.shape}'
        )
    check_labels(labels, logits.shape[-1])
    return logits.argmax(axis=-1), labels[None]
