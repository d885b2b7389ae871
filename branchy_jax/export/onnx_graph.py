"""A graph of ONNX nodes under construction, and the values in it: where axes lie, what is known, what is repeated.

Nothing here imports onnx: nodes and weights are plain values, which `branchy_jax.export.onnx_file` writes.

A traced program lays images out as ``[B, H, W, C]``, ONNX's convolutions and poolings as ``[B, C, H, W]``. So a value
carries the order of its axes in the file: what convolutions hand to each other is never laid out anew, and whoever
needs another order asks for it. In the same way a repetition along an axis is left to ONNX's own broadcasting for as
long as nobody needs the repeated values themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Size = Any
"""Of an axis: an int, or `AnySize`."""


@dataclasses.dataclass(frozen=True)
class AnySize:
    """The size of an axis that grows with the batch.

    Attributes:
        times: its length for one image.
    """

    times: int = 1

    def __mul__(self, count: int) -> AnySize:
        return AnySize(self.times * count)

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and type of a value of the program."""

    shape: tuple[Size, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of the traced program, as the file holds it.

    Attributes:
        shape: in the program.
        dtype: in the program.
        name: in the file; ``''`` if it has no node yet.
        array: the value itself where it is known, of shape ``held``.
        held: ``shape`` with 1 where a repetition is left to broadcasting.
        order: axis i in the file is axis ``order[i]`` of the program.
        flattened: what this is a reshape of to ``[B, features]``, where that has no node yet.
    """

    shape: tuple[Size, ...]
    dtype: np.dtype
    name: str = ''
    array: np.ndarray | None = None
    held: tuple[Size, ...] = ()
    order: tuple[int, ...] = ()
    flattened: Value | None = None

    @property
    def is_known(self) -> bool:
        """Whether it is the same for every input."""
        return self.array is not None

    @property
    def known_array(self) -> np.ndarray:
        """``array`` of what is known."""
        if self.array is None:
            raise ValueError('value: depends on the input')
        return self.array

    @property
    def in_file(self) -> tuple[Size, ...]:
        """Its shape as the file holds it."""
        return tuple(self.held[axis] for axis in self.order)


def known(array: Any, shape: Sequence[Size] | None = None) -> Value:
    """Makes the value of an array, repeated to ``shape`` where that differs."""
    array = np.asarray(array)
    shape = array.shape if shape is None else tuple(shape)
    return Value(shape, array.dtype, array=array, held=array.shape, order=tuple(range(array.ndim)))


@dataclasses.dataclass(frozen=True)
class Node:
    """One ONNX node.

    Attributes:
        op: its operator.
        inputs: names.
        outputs: names.
        name: unique; it begins with the segment that the node belongs to.
        attributes: by name; a `Scope` stands for a graph.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Names:
    """Makes names that are unique in a file."""

    def __init__(self) -> None:
        self._count = 0

    def fresh(self, prefix: str, kind: str) -> str:
        """Returns a name that nothing in the file has."""
        self._count += 1
        return f'{prefix}{kind}_{self._count}'


class Scope:
    """The nodes of one graph: the file's own, or a branch of a conditional, which sees those around it.

    Weights lie in the graph that uses them, not all in the file's own: ONNX Runtime lays out the weights of
    convolutions anew, for speed, only where they are of the same graph (1.4 times faster on AlexNet's later stages).

    Attributes:
        names: of the whole file.
        outer: the graph around it.
        prefix: that names of new nodes begin with.
        arrays: the constants of this graph, by name, each once however often it is asked for.
        nodes: so far, in order.
        outputs: name and value of what the graph returns.
        any_size: name of an input whose first axis has any size; ``''`` if there is none.
    """

    def __init__(self, names: Names, outer: Scope | None = None, any_size: str = '') -> None:
        self.names, self.outer = names, outer
        self.prefix: str = '' if outer is None else outer.prefix
        self.arrays: dict[str, np.ndarray] = {}
        self.nodes: list[Node] = []
        self.outputs: list[tuple[str, Value]] = []
        self.any_size = any_size
        self._made: dict[Any, str] = {}
        self._constants: dict[Any, str] = {}

    def node(self, op: str, *inputs: str, outputs: Sequence[str] = (), count: int = 1, **attributes: Any) -> str:
        """Adds a node and returns the name of its first output; a node that is there already is not added again."""
        key = (op, inputs, count, str(sorted(attributes.items()))) if not outputs else None
        if key is not None and (found := self._found(key)) is not None:
            return found
        name = self.names.fresh(self.prefix, op)
        if key is not None:
            self._made[key] = name
        made = tuple(outputs) or tuple(name if n == 0 else f'{name}_{n}' for n in range(count))
        self.nodes.append(Node(op, inputs, made, name, attributes))
        return made[0]

    def constant(self, array: Any) -> str:
        """Returns the name of an array of this graph."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.names.fresh(self.prefix, 'constant')
            self.arrays[self._constants[key]] = array
        return self._constants[key]

    def integers(self, values: Sequence[int]) -> str:
        """Returns the name of a vector of int64, as ONNX takes axes and shapes."""
        return self.constant(np.array([int(value) for value in values], np.int64))

    def add_bias(self, output: str, bias: np.ndarray) -> bool:
        """Lets the convolution or matrix product that made an output add a value per feature, if it still can."""
        place = next((n for n, node in enumerate(self.nodes) if output in node.outputs), None)
        if place is None or self.nodes[place].op not in ('Conv', 'Gemm') or len(self.nodes[place].inputs) != 2:
            return False
        inputs = (*self.nodes[place].inputs, self.constant(bias))
        self.nodes[place] = dataclasses.replace(self.nodes[place], inputs=inputs)
        return True

    def read(self, value: Value, order: Sequence[int] | None = None) -> str:
        """Returns the name of a value whose axes lie in an order, by default the program's.

        Repetitions stay left to broadcasting: see `full`.
        """
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        if value.is_known:
            return self.constant(np.transpose(value.known_array, order))
        if value.flattened is not None:
            name = self.reshape(self.read(value.flattened), value.flattened.held, value.held)
            value = dataclasses.replace(value, name=name, flattened=None)
        if value.order == order:
            return value.name
        target = [value.held[axis] for axis in order]
        if _long(value.held, value.order) == _long(value.held, order):  # only axes of one element move
            return self.reshape(value.name, value.in_file, target)
        return self.node('Transpose', value.name, perm=[value.order.index(axis) for axis in order])

    def _found(self, key: Any) -> str | None:
        if key in self._made:
            return self._made[key]
        return None if self.outer is None else self.outer._found(key)

    def full(self, value: Value) -> Value:
        """Returns a value with nothing left to broadcasting."""
        if value.held == value.shape:
            return value
        if value.is_known and all(is_size(size) for size in value.shape):
            return known(np.broadcast_to(value.known_array, value.shape))
        name = self.node('Expand', self.read(value, value.order or None), self._sizes(value))
        return dataclasses.replace(value, name=name, array=None, held=value.shape)

    def _sizes(self, value: Value) -> str:
        """Returns the name of a vector of a value's sizes, of which the first may be any."""
        sizes = [value.shape[axis] for axis in value.order]
        if all(is_size(size) for size in sizes):
            return self.integers(sizes)
        if not self.any_size or sizes[0] != AnySize() or not all(is_size(size) for size in sizes[1:]):
            raise ValueError(f'it repeats a value to {value.shape}, whose axis of any size is not the first')
        shape = self.node('Shape', self.any_size, start=0, end=1)
        return self.node('Concat', shape, self.integers(sizes[1:]), axis=0) if sizes[1:] else shape

    def reshape(self, name: str, shape: Sequence[Size], target: Sequence[Size]) -> str:
        """Reshapes what the file holds."""
        if tuple(shape) == tuple(target):
            return name
        unknown = [axis for axis, size in enumerate(target) if not is_size(size)]
        if len(unknown) > 1:
            raise ValueError(f'it reshapes to {tuple(target)}, which has several axes of any size')
        sizes = tuple(int(size) if is_size(size) else -1 for size in target)
        return self.node('Reshape', name, self.integers(sizes))

    def made(self, like: Value, name: str, dtype: Any = None) -> Value:
        """Returns the value of a new node that lies as another value does."""
        dtype = like.dtype if dtype is None else np.dtype(dtype)
        return dataclasses.replace(like, name=name, array=None, dtype=dtype, flattened=None)

    def plain(self, name: str, shape: Sequence[Size], dtype: Any) -> Value:
        """Returns the value of a new node that lies as the program has it."""
        shape = tuple(shape)
        return Value(shape, np.dtype(dtype), name, held=shape, order=tuple(range(len(shape))))


def is_size(size: Size) -> bool:
    """Whether the size of an axis is a number."""
    return isinstance(size, (int, np.integer))


def feature_order(source: Value) -> tuple[int, ...]:
    """Returns for each feature of what a value is flattened from, as the file holds it, its number in the program."""
    numbers = np.arange(math.prod(source.shape[1:])).reshape(source.shape[1:])
    return tuple(np.transpose(numbers, [axis - 1 for axis in source.order[1:]]).ravel().tolist())


def _long(held: Sequence[Size], order: Sequence[int]) -> list[int]:
    """Returns the axes of more than one element, in an order."""
    return [axis for axis in order if not is_size(held[axis]) or held[axis] != 1]
