"""The nouns of the library: frozen pytrees that every other file passes around.

Shape legend, used in every docstring:

    N  exits, the last one being the trunk's own head
    B  batch
    K  classes
    H, W, C  height, width and channels of an image

``…`` stands for the extra axes of a dense prediction (none for classification, ``H, W`` for segmentation).
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

if TYPE_CHECKING:
    from branchy_jax.criteria import Criterion

Array = jax.Array | np.ndarray
"""What computes with JAX takes NumPy's arrays as well, and returns JAX's."""
Variables = Any
"""Flax variable collections: ``{'params': …, 'batch_stats': …}``."""


def static() -> Any:
    """Returns a field that is no leaf of a pytree: JAX compares it, and a program compiles for each value."""
    return struct.field(pytree_node=False)


class ByValue:
    """Equality and hash of a frozen pytree by its kind and the values of its leaves; two NaN are alike."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        structure: Any = jax.tree.structure(self)
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return structure == jax.tree.structure(other) and all(np.array_equal(*pair, equal_nan=True) for pair in pairs)

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))


class Batch(struct.PyTreeNode):
    """Images with their labels, or inputs with their targets.

    Attributes:
        image: ``[B, H, W, C]``; uint8 as stored, float32 as fed to a network.
        label: ``[B, …]`` integers in ``[0, K)``, or whatever the loss takes.
    """

    image: Array
    label: Array

    def __len__(self) -> int:
        return len(self.label)


class Normalization(struct.PyTreeNode):
    """Affine map from stored pixels to network inputs, ``(x / 255 - mean) / deviation`` per channel.

    It belongs to the weights that were trained with it and is stored beside them.

    Attributes:
        mean: ``[C]`` mean of the training images scaled to ``[0, 1]``.
        deviation: ``[C]`` standard deviation of the same.
    """

    mean: Array
    deviation: Array

    def __call__(self, images: Array) -> Array:
        """Maps uint8 ``images [..., H, W, C]`` to float32."""
        images = jnp.asarray(images, jnp.float32)
        mean, deviation = (jnp.expand_dims(value, range(images.ndim - 1)) for value in (self.mean, self.deviation))
        return (images / 255.0 - mean) / deviation


class ExitPrediction(struct.PyTreeNode):
    """What an early-exit network answered, and where. Every executor returns one; ``staged`` without B.

    Attributes:
        label: ``[B, …]`` int32, argmax of the answering exit, or what the criterion decides.
        exit_index: ``[B]`` int32 in ``[0, N)``, the exit that answered.
        logits: ``[B, …, K]`` of the answering exit.
        uncertainty: ``[B]`` of the answering exit, in the unit of the criterion. NaN where the logits are, as
            images that are not finite make them: the label then means nothing.
    """

    label: Array
    exit_index: Array
    logits: Array
    uncertainty: Array


class ExitPolicy(ByValue, struct.PyTreeNode, eq=False):
    """Says when an input leaves: at the first exit whose uncertainty is below its threshold, else at the last.

    A frozen pytree: the thresholds and the arrays that a criterion has learned are leaves; all else is static. A policy
    holds both, because thresholds mean nothing for another criterion.

    Attributes:
        criterion: the uncertainty of an exit (`branchy_jax.criteria`): a criterion, or a function of logits.
        thresholds: ``[N - 1]``, or ``[…, N - 1]`` under `jax.vmap`; −inf never exits, +inf always does.

    Example:
        >>> import branchy_jax as bj
        >>> policy = ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.array([0.5]))
        >>> policy == ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.array([0.5]))
        True
    """

    criterion: 'Criterion'
    thresholds: Array


class OperatingPoint(ByValue, struct.PyTreeNode, eq=False):
    """A policy and its results on the data that it was chosen on. Accepted wherever a policy is.

    Attributes:
        policy: when an input leaves.
        accuracy: metric on ``split``, in ``[0, 1]``.
        split: the data that ``accuracy``, ``exit_fractions`` and ``cost`` were measured on.
        exit_fractions: ``[N]`` share of inputs that each exit answers; sums to 1.
        cost: expected cost of one input, in the unit of the costs given (usually multiply-accumulates).
    """

    policy: ExitPolicy
    accuracy: float
    split: str = struct.field(pytree_node=False)
    exit_fractions: Array
    cost: float

    @property
    def thresholds(self) -> Array:
        """``[N - 1]`` of the policy."""
        return self.policy.thresholds


def num_rows(tree: Any, argument: str = 'inputs') -> Any:
    """Returns B: the length of the first axis of every leaf of a pytree.

    Raises:
        ValueError: no leaves, a leaf whose first axis is none or has another length, or another byte order.

    Example:
        >>> num_rows({'tokens': jnp.ones((2, 5)), 'mask': jnp.ones(2)})
        2
    """
    if isinstance(tree, jax.Array) and tree.shape:  # most calls bring one array
        return tree.shape[0]
    expected = f'{argument}: expected arrays that all lead with B, got'
    shapes = [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not shapes:
        raise ValueError(f'{expected} none')
    place, first = shapes[0]
    for path, shape in shapes:
        if not shape or shape[:1] != first[:1]:
            arrived = f'{expected} shape {shape} at {argument}{path} and {first} at {argument}{place}'
            raise ValueError(f'{arrived}; what all rows share, such as a key, belongs in the module or its variables')
    check_byte_order(tree, argument)
    return first[0]


def check_byte_order(tree: Any, argument: str = 'inputs') -> None:
    """Refuses arrays of NumPy whose byte order is not the machine's, which JAX does not read.

    Raises:
        ValueError: the message says how to convert the array.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
            native = "convert them by x.astype(x.dtype.newbyteorder('='))"
            raise ValueError(f'{argument}: got the dtype {leaf.dtype.str} of another byte order; {native}')


class StageCosts(struct.PyTreeNode):
    """Cost of one input in every stage and every head.

    Attributes:
        stages: ``[N]`` cost of stage n alone.
        exits: ``[N]`` cost of head n alone; the last head is part of the last stage.
    """

    stages: np.ndarray
    exits: np.ndarray

    @property
    def to_exit(self) -> np.ndarray:
        """``[N]`` cost of an input that leaves at exit n: stages and heads 0…n, since every head on the way runs."""
        return np.cumsum(np.asarray(self.stages) + np.asarray(self.exits))

    @property
    def trunk(self) -> float:
        """Cost of the network without its side branches: all stages and the last head."""
        return float(np.sum(self.stages) + self.exits[-1])


def check_labels(labels: Array, num_classes: int, ignore_label: int | None = None) -> None:
    """Refuses labels that no class has, where values can be seen; inside `jax.jit` they cannot.

    Args:
        labels: integers of any shape.
        num_classes: K.
        ignore_label: a label that is accepted.

    Raises:
        ValueError: a label below 0 or not below K.

    Example:
        >>> check_labels(jnp.array([0, 9]), 10)
    """
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)  # jnp would trace even concrete labels inside jit
    values = values if ignore_label is None else values[values != ignore_label]
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
        got = f'got {values.min()} to {values.max()}'
        advice = 'count classes from 0, and give the network as many as there are'
        raise ValueError(f'labels: expected classes in [0, {num_classes}), {got}; {advice}')
