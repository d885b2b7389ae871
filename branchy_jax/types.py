"""The nouns of the library: frozen pytrees that every other file passes around.

Shape legend, used in every docstring:

    N  exits, the last one being the trunk's own head
    B  batch
    K  classes
    H, W, C  height, width and channels of an image

``…`` stands for the extra axes of a dense prediction (none for classification, ``H, W`` for segmentation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, struct

if TYPE_CHECKING:
    from branchy_jax.criteria import Criterion

Array = jax.Array | np.ndarray
"""What computes with JAX takes NumPy's arrays as well, and returns JAX's."""
Variables = Any
"""Flax variable collections: ``{'params': …, 'batch_stats': …}``."""


class Replaceable:
    """A frozen pytree; declares the method that `flax.struct.dataclass` adds unseen by type checkers."""

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> Self:
            """Returns a copy with other values."""
            ...


class ByValue(Replaceable):
    """Equality and hash of a frozen pytree by its kind and the values of its leaves; two NaN are alike."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        structure: Any = jax.tree.structure(self)
        return structure == jax.tree.structure(other) and all(
            np.array_equal(ours, theirs, equal_nan=True)
            for ours, theirs in zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        )

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))


@struct.dataclass
class Batch(Replaceable):
    """Images with their labels, or inputs with their targets.

    Attributes:
        image: ``[B, H, W, C]``; uint8 as stored, float32 as fed to a network.
        label: ``[B, …]`` integers in ``[0, K)``, or whatever the loss takes.
    """

    image: Array
    label: Array

    def __len__(self) -> int:
        return len(self.label)


@struct.dataclass
class Normalization:
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


@struct.dataclass
class ExitPrediction:
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


@struct.dataclass(eq=False)
class ExitPolicy(ByValue):
    """Says when an input leaves: at the first exit whose uncertainty is below its threshold, else at the last.

    A frozen pytree: thresholds, and whatever the criterion has learned, are leaves; the criterion's kind is static.
    Thresholds mean nothing without the criterion whose uncertainties they are compared with: the two travel together.

    Attributes:
        criterion: how unsure an exit is (`branchy_jax.criteria`).
        thresholds: ``[N - 1]``, or ``[…, N - 1]`` under `jax.vmap`; −inf never exits, +inf always does.

    Example:
        >>> import branchy_jax as bj
        >>> policy = ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.array([0.5]))
        >>> policy == ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.array([0.5]))
        True
    """

    criterion: Criterion
    thresholds: Array


@struct.dataclass(eq=False)
class OperatingPoint(ByValue):
    """A policy, and what it gave on the data it was chosen on. Goes straight into an executor.

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


def spec_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of what a variable of a jaxpr stands for."""
    return variable.aval


def num_rows(tree: Any) -> int:
    """Returns B: with how many rows the leaves of a pytree lead.

    Raises:
        ValueError: no leaves, a scalar among them, or leaves that differ.

    Example:
        >>> num_rows({'tokens': jnp.ones((2, 5)), 'mask': jnp.ones(2)})
        2
    """
    if isinstance(tree, (jax.Array, np.ndarray)) and tree.shape:  # of what nearly every call brings, at once
        return tree.shape[0]
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f'images: expected arrays that all lead with B, got shapes {shapes}')
    return shapes[0][0]


def input_specs(image_shape: Any, size: Any) -> Any:
    """Returns shapes and types of a batch of inputs.

    Args:
        image_shape: ``(H, W, C)`` of float32 images, or a `jax.ShapeDtypeStruct` for each array of one input.
        size: B.

    Example:
        >>> input_specs((28, 28, 1), 2)
        ShapeDtypeStruct(shape=(2, 28, 28, 1), dtype=float32)
    """
    if _is_shape(image_shape):
        return jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    as_given = core.unfreeze(image_shape) if isinstance(image_shape, core.FrozenDict) else image_shape
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype), as_given)


def _is_shape(image_shape: Any) -> bool:
    return isinstance(image_shape, (tuple, list)) and all(isinstance(size, (int, np.integer)) for size in image_shape)


def check_inputs(inputs: Any, image_shape: Any) -> None:
    """Refuses inputs that a network was not built for, at trace time.

    Args:
        inputs: an array ``[B, …]`` or a pytree of them.
        image_shape: as for `input_specs`.

    Raises:
        ValueError: another structure, rank, size or kind of dtype; the message says what arrived and what to do.
    """
    if isinstance(inputs, (jax.Array, np.ndarray)) and inputs.shape[1:] == image_shape and inputs.dtype == np.float32:
        return  # what nearly every call brings: at batch 1 all that follows would cost as much as a small stage
    specs = input_specs(image_shape, 1)
    if isinstance(specs, jax.ShapeDtypeStruct):
        _check_input('images', inputs, specs)
        return
    structure: Any = jax.tree.structure(specs)
    found: Any = jax.tree.structure(inputs)
    if found != structure:
        raise ValueError(f'images: expected a pytree {structure}, got {found}')
    for (path, spec), value in zip(jax.tree.leaves_with_path(specs), jax.tree.leaves(inputs), strict=True):
        _check_input(f'images{jax.tree_util.keystr(path)}', value, spec)
    num_rows(inputs)


def _check_input(name: str, value: Any, spec: jax.ShapeDtypeStruct) -> None:
    floating, shape = jnp.issubdtype(spec.dtype, jnp.floating), spec.shape[1:]
    expected = f'[{", ".join(("B", *map(str, shape)))}]'
    if not hasattr(value, 'shape') or not hasattr(value, 'dtype'):
        raise ValueError(f'{name}: expected an array {expected} of {spec.dtype}, got {type(value).__name__}')
    if len(value.shape) != len(shape) + 1:
        raise ValueError(
            f'{name}: expected {expected}, got shape {tuple(value.shape)}; '
            'add or drop axes, a single image needs a leading batch axis of 1'
        )
    if tuple(value.shape[1:]) != tuple(shape):
        raise ValueError(f'{name}: expected {expected}, got shape {tuple(value.shape)}; resize or pad them')
    if floating and not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f'{name}: expected a float dtype, got {value.dtype}; normalise them first')
    # NumPy's integers have 64 bits until jax takes them.
    taken = jax.dtypes.canonicalize_dtype(value.dtype) if isinstance(value, np.ndarray) else value.dtype
    if not floating and taken != jax.dtypes.canonicalize_dtype(spec.dtype, allow_extended_dtype=True):
        raise ValueError(f'{name}: expected {spec.dtype}, got {value.dtype}; convert them')


def check_labels(labels: Array, num_classes: int) -> None:
    """Refuses labels that no class has, where values can be seen; inside `jax.jit` they cannot.

    Args:
        labels: integers of any shape.
        num_classes: K.

    Raises:
        ValueError: a label below 0 or not below K.

    Example:
        >>> check_labels(jnp.array([0, 9]), 10)
    """
    if isinstance(labels, jax.core.Tracer) or labels.size == 0:
        return
    values = np.asarray(labels)  # jnp would trace even concrete labels inside jit
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f'labels: expected classes in [0, {num_classes}), got {lowest} to {highest}; '
            'count classes from 0, and give the network as many as there are'
        )
