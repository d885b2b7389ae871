"""Metrics as functions of sums over inputs: the statistics of each answer, and the metrics of their sums.

A metric such as mIoU is no mean over images, but it is a function of sums over images. All searches for thresholds
work on statistics ``[N, M, S]`` and a ``metric(sums, count)``, so the same code serves all tasks.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from branchy_jax.types import Array, check_labels

Metric = Callable[[np.ndarray, int], np.ndarray]
"""``(sums of statistics [..., S], number of inputs) → metric [...]``, larger is better."""

Statistics = Callable[[Array, Array], Array]
"""``(answer logits [N, B, …, K], labels [B, …]) → statistics [N, B, S]``; traces under jit."""


def mean_of_statistic(sums: np.ndarray, count: int) -> np.ndarray:
    """The metric of classification: statistics are 0 or 1 per input, their mean is the accuracy.

    Args:
        sums: ``[..., 1]`` of `accuracy_statistics`.
        count: number of inputs.
    """
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
    pixels, classes = tuple(range(2, predicted.ndim)), range(logits.shape[-1])
    intersections = [((predicted == k) & (truth == k)).sum(axis=pixels) for k in classes]
    unions = [((predicted == k) | (truth == k)).sum(axis=pixels) for k in classes]
    return jnp.stack(intersections + unions, axis=-1).astype(float)


def mean_iou(sums: np.ndarray, count: int) -> np.ndarray:
    """The metric of segmentation: mean over the classes of their IoU over all pixels of all images.

    Classes that neither labels nor answers hold do not count.

    Args:
        sums: ``[..., 2 K]`` of `iou_statistics`.
        count: number of images, which this metric does not need.

    Example:
        >>> round(float(mean_iou(np.array([1.0, 2.0, 2.0, 3.0]), 1)), 4)
        0.5833
    """
    intersection, union = np.split(np.asarray(sums, np.float64), 2, axis=-1)
    return np.nanmean(np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0), axis=-1)


def _predictions(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns predicted classes ``[N, B, …]`` and labels ``[1, B, …]``."""
    labels, expected = jnp.asarray(labels), logits.shape[1:-1]
    if labels.shape != expected:
        raise ValueError(f'labels: answers have shape {expected}; give labels of that shape, got {labels.shape}')
    check_labels(labels, logits.shape[-1])
    return jnp.argmax(logits, axis=-1), labels[None]
