"""An ONNX graph under construction, and the values in it.

A traced program stores images as ``[B, H, W, C]``; ONNX's convolutions and poolings take ``[B, C, H, W]``. Each value
records the order of its axes in the file, so that a chain of convolutions needs no transposition; `Graph.read`
transposes a value for a node that needs another order. In the same way a value that is constant along an axis is stored
with one element there, and ONNX's broadcasting repeats it; `Graph.full` repeats it for a node that does not broadcast.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.program import BATCH

Size = Any
"""Of an axis: an int, or a symbolic size of JAX such as `branchy_jax.program.BATCH`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of the traced program, as the file holds it.

    Attributes:
        shape: in the program.
        dtype: in the program.
        name: in the file; ``''`` for a known value.
        array: of shape ``held``, if the value is known, that is, the same for every input.
        held: ``shape`` with 1 for the axes that broadcasting repeats.
        order: axis i in the file is axis ``order[i]`` of the program.
    """

    shape: tuple[Size, ...]
    dtype: np.dtype
    name: str
    array: np.ndarray | None
    held: tuple[Size, ...]
    order: tuple[int, ...]

    def made(self, name: str, shape: Sequence[Size] | None = None) -> 'Value':
        """Returns the value of a node whose result has the same order of axes."""
        shape = self.shape if shape is None else tuple(shape)
        return dataclasses.replace(self, name=name, array=None, shape=shape, held=shape)


def known(array: Any, shape: Sequence[Size] | None = None) -> Value:
    """Returns the value of an array, repeated to ``shape`` if that differs."""
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):  # these are no numbers
        array = np.asarray(array)
    shape = array.shape if shape is None else tuple(shape)
    return Value(shape, array.dtype, '', array, array.shape, tuple(range(array.ndim)))


def computed(
    name: str, shape: Sequence[Size], dtype: Any, order: Sequence[int] | None = None, held: Sequence[Size] | None = None
) -> Value:
    """Returns the value of a node, by default in the program's order of axes and without repetition."""
    order = range(len(shape)) if order is None else order
    return Value(tuple(shape), np.dtype(dtype), name, None, tuple(shape if held is None else held), tuple(order))


def is_size(size: Size) -> bool:
    """Whether the size of an axis is a number."""
    return isinstance(size, (int, np.integer))


class Graph:
    """The nodes of the file's main graph, or of a branch of a conditional, which can read the graphs around it.

    Every graph stores the weights that its own nodes read: ONNX Runtime rearranges the weights of a convolution, for
    speed, only if both are in one graph (1.4 times faster on AlexNet's later stages).

    Attributes:
        outer: the graph around this one.
        batch_of: name of an input, whose first axis is the batch.
        prefix: start of the names of new nodes.
        arrays: the constants of this graph by name.
        nodes: so far, in order.
    """

    def __init__(self, outer: 'Graph | None' = None) -> None:
        self.outer = outer
        self.batch_of: str = '' if outer is None else outer.batch_of
        self.prefix: str = '' if outer is None else outer.prefix
        self.arrays: dict[str, np.ndarray] = {}
        self.nodes: list[Any] = []
        self._numbers: Any = itertools.count(1) if outer is None else outer._numbers
        self._made: Any = collections.ChainMap() if outer is None else outer._made.new_child()
        self._constants: dict[Any, str] = {}

    def fresh(self, kind: str) -> str:
        """Returns a name that nothing else in the file has."""
        return f'{self.prefix}{kind}_{next(self._numbers)}'

    def node(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a node, unless this graph or one around it has an equal one, and returns the name of the node.

        Args:
            op: ONNX's operator.
            *inputs: names.
            outputs: names; by default one output, which has the name of the node.
            **attributes: of the operator.
        """
        from onnx import helper

        key = None if outputs else (op, inputs, str(sorted(attributes.items())))
        if key in self._made:
            return self._made[key]
        name = self.fresh(op)
        self.nodes.append(helper.make_node(op, inputs, outputs or [name], name=name, **attributes))
        if key is not None:
            self._made[key] = name
        return name

    def cast(self, name: str, dtype: Any) -> str:
        """Adds a conversion to another dtype."""
        return self.node('Cast', name, to=_onnx_dtype(dtype))

    def constant(self, array: Any) -> str:
        """Returns the name of an array of this graph."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.fresh('constant')
            self.arrays[self._constants[key]] = array
        return self._constants[key]

    def integers(self, values: Iterable[int]) -> str:
        """Returns the name of a vector of int64, ONNX's dtype of axes and shapes.

        Raises:
            ValueError: a symbolic size.
        """
        values = list(values)
        if not all(map(is_size, values)):
            raise ValueError(f'it computes with the sizes {values}')
        return self.constant(np.array(values, np.int64))

    def read(self, value: Value, order: Sequence[int] | None = None) -> str:
        """Returns the name of a value whose axes lie in an order, by default the program's; see `full`."""
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        if value.array is not None:
            return self.constant(np.transpose(value.array, order))
        if value.order == order:
            return value.name
        return self.node('Transpose', value.name, perm=[value.order.index(axis) for axis in order])

    def full(self, value: Value) -> Value:
        """Returns a value without axes that broadcasting repeats."""
        if value.held == value.shape:
            return value
        if value.array is not None and all(map(is_size, value.shape)):
            return known(np.broadcast_to(value.array, value.shape))
        sizes = [self.size(value.shape[axis]) for axis in value.order]
        target = self.node('Concat', *sizes, axis=0) if len(sizes) > 1 else sizes[0]
        return value.made(self.node('Expand', self.read(value, value.order), target))

    def size(self, size: Size) -> str:
        """Returns the name of a vector of one element, the size of an axis.

        Raises:
            ValueError: a symbolic size that is not a multiple of the batch size.
        """
        if is_size(size):
            return self.integers([size])
        times = size // BATCH
        if not is_size(times) or times * BATCH != size:
            raise ValueError(f'it computes with the size {size}')
        batch = self.node('Shape', self.batch_of, start=0, end=1)
        return batch if times == 1 else self.node('Mul', batch, self.integers([times]))

    def reshape(self, name: str, shape: Sequence[Size], target: Sequence[Size]) -> str:
        """Reshapes what the file holds.

        Raises:
            ValueError: several symbolic sizes in the target.
        """
        if tuple(shape) == tuple(target):
            return name
        if sum(not is_size(size) for size in target) > 1:
            raise ValueError(f'it reshapes to {tuple(target)}, which has several symbolic sizes')
        return self.node('Reshape', name, self.integers(size if is_size(size) else -1 for size in target))

    def rows(self, value: Value, rows: str) -> Value:
        """Returns some rows of a value, whose first axis is the batch."""
        if value.array is not None or is_size(value.held[0]):  # equal in all rows
            return value
        return dataclasses.replace(value, name=self.node('Gather', value.name, rows, axis=value.order.index(0)))

    def finish(self, name: str, results: Mapping[str, Value], inputs: Iterable[Value] = ()) -> Any:
        """Returns the graph as a protobuf of onnx.

        Args:
            name: of the graph, and start of the names of its last nodes.
            results: by name.
            inputs: of the main graph.
        """
        from onnx import helper, numpy_helper

        outputs = []
        self.prefix = f'{name}/'
        for output, value in results.items():
            unique = output if self.outer is None else self.fresh(output)
            self.node('Identity', self.read(self.full(value)), outputs=[unique])
            outputs.append(_described(unique, value, batch='batch' if self.outer is None else None))
        arrays = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        return helper.make_graph(self.nodes, name, [_described(v.name, v) for v in inputs], outputs, arrays)


def _described(name: str, value: Value, batch: str | None = 'batch') -> Any:
    from onnx import helper

    shape = [int(size) if is_size(size) else batch for size in value.shape]
    return helper.make_tensor_value_info(name, _onnx_dtype(value.dtype), shape)


def _onnx_dtype(dtype: Any) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
