"""The ONNX form of each primitive of a traced program: a table of small functions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from branchy_jax.translate.onnx_graph import Graph, Value, computed, is_size, known

Params = dict[str, Any]
Handler = Callable[[Graph, Params, list[Value], Any], Value | list[Value]]
"""``(graph, params, inputs, shape and dtype of the first output) → outputs``."""


def _elementwise(op: str, graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    """Adds one node on values of one shape; broadcasting repeats scalars and axes of one element."""
    rank = len(spec.shape)
    ranked = [value for value in inputs if len(value.shape) == rank]
    varying = [value for value in ranked if value.array is None]
    orders = [value.order for value in varying if value.held == value.shape] + [value.order for value in varying]
    order = orders[0] if orders else tuple(range(rank))
    names = [graph.read(value, order if len(value.shape) == rank else None) for value in inputs]
    held = [next((v.held[axis] for v in ranked if v.held[axis] != 1), 1) for axis in range(rank)]
    return computed(graph.node(op, *names), spec.shape, spec.dtype, order, held)


def _maximum(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    for x, other in (inputs, inputs[::-1]):
        zero = other.array is not None and not other.array.any()
        if zero and x.dtype == np.float32 and x.held == x.shape:
            return _elementwise('Relu', graph, params, [x], spec)
    return _elementwise('Max', graph, params, inputs, spec)


def _cast(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (x,), dtype = inputs, np.dtype(spec.dtype)
    if x.dtype == dtype:
        return x
    return dataclasses.replace(x, name=graph.cast(graph.read(x, x.order), dtype), array=None, dtype=dtype)


def _select(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    which, *cases = inputs
    if len(cases) != 2 or which.dtype != np.bool_:
        raise ValueError('it selects among more than two')
    if spec.dtype != np.bool_:
        return _elementwise('Where', graph, params, [which, cases[1], cases[0]], spec)
    otherwise = _elementwise('Not', graph, params, [which], which)
    chosen = [_elementwise('And', graph, params, pair, spec) for pair in ([which, cases[1]], [otherwise, cases[0]])]
    return _elementwise('Or', graph, params, chosen, spec)


def _dim_as_value(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    scalar = graph.reshape(graph.size(params['dim']), (1,), ())
    return computed(graph.cast(scalar, spec.dtype), (), spec.dtype)


def _broadcast(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (x,), shape, axes = inputs, tuple(spec.shape), tuple(params['broadcast_dimensions'])
    held = [1] * len(shape)
    for axis, size in zip(axes, x.held, strict=True):
        held[axis] = size
    if x.array is not None:
        return known(x.array.reshape(held), shape)
    if axes == tuple(range(len(shape))):
        return dataclasses.replace(x, shape=shape)
    return computed(graph.reshape(graph.read(x), x.held, held), shape, x.dtype, held=held)


def _reshape(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (x,), axes = inputs, params['dimensions']
    x = graph.full(x if axes is None else _permuted(x, axes))
    if x.shape == tuple(spec.shape):
        return x
    return computed(graph.reshape(graph.read(x), x.shape, spec.shape), spec.shape, x.dtype)


def _permuted(x: Value, axes: Sequence[int]) -> Value:
    """Transposes a value without a node: the order of its axes in the file stays."""
    shape, held = (tuple(sizes[axis] for axis in axes) for sizes in (x.shape, x.held))
    if x.array is not None:
        return known(np.transpose(x.array, axes), shape)
    return dataclasses.replace(x, shape=shape, held=held, order=tuple(axes.index(axis) for axis in x.order))


def _in_place(graph: Graph, x: Value) -> tuple[str, Value]:
    """Returns the name of a value without repeated axes, in the order in which the file holds it, and that value."""
    x = graph.full(x)
    return graph.read(x, x.order), x


def _pad(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (name, x), edges = _in_place(graph, inputs[0]), params['padding_config']
    if any(inner for *_, inner in edges) or any(not is_size(size) or size < 0 for edge in edges for size in edge):
        raise ValueError('it pads between elements, crops, or pads by a symbolic size')
    sizes = [edges[axis][side] for side in (0, 1) for axis in x.order]
    return x.made(graph.node('Pad', name, graph.integers(sizes), graph.read(inputs[1])), spec.shape)


def _slice(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (x,), starts, limits = inputs, params['start_indices'], params['limit_indices']
    steps, axes = params['strides'], [axis for axis, size in enumerate(spec.shape) if x.shape[axis] != size]
    if not axes:
        return x
    name, x = _in_place(graph, x)
    places = [x.order.index(axis) for axis in axes]
    first, end, step = ([values[axis] if values else 1 for axis in axes] for values in (starts, limits, steps))
    return x.made(graph.node('Slice', name, *map(graph.integers, (first, end, places, step))), spec.shape)


def _gather(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    """Takes elements at known numbers, the same ones of every row: a symbolic trace has a gather for most slices."""
    x, indices = map(graph.full, inputs)
    if indices.array is None:
        return _lookup(graph, params, x, indices, spec)
    rows = [size for size in x.shape if not is_size(size)]
    if rows and not rows[0] == x.shape[0] == params['slice_sizes'][0] == spec.shape[0]:
        raise ValueError('it gathers rows of the batch, or the batch does not come first')
    # The same gather from the numbers of a row's elements.
    shape, sizes = ([size if is_size(size) else 1 for size in sizes] for sizes in (x.shape, params['slice_sizes']))
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    numbers = np.asarray(lax.gather_p.bind(numbers, indices.array, **{**params, 'slice_sizes': tuple(sizes)}))
    if (numbers < 0).any():
        raise ValueError('it takes elements out of bounds')
    if indices.array.ndim == 1:  # one window, whose corners are the first and the last number
        first, last = (np.unravel_index(number, shape) for number in (numbers.flat[0], numbers.flat[-1]))
        bounds = {'start_indices': first, 'limit_indices': [end + 1 for end in last], 'strides': None}
        window = _slice(graph, bounds, [x], jax.ShapeDtypeStruct(params['slice_sizes'], x.dtype))
        return _reshape(graph, {'dimensions': None}, [window], spec)
    flat = graph.reshape(graph.read(x), x.shape, [*rows, math.prod(shape)])
    name = graph.node('Gather', flat, graph.constant(numbers.reshape(-1)), axis=len(rows))
    return computed(graph.reshape(name, [*rows, numbers.size], spec.shape), spec.shape, x.dtype)


def _lookup(graph: Graph, params: Params, x: Value, indices: Value, spec: Any) -> Value:
    """Takes rows at computed numbers, as an embedding does. ONNX Runtime refuses numbers out of bounds."""
    numbers, rank = params['dimension_numbers'], len(spec.shape)
    rows_last = tuple(range(rank - len(x.shape) + 1, rank))
    first = numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
    if not first or numbers.offset_dims != rows_last or tuple(params['slice_sizes'][1:]) != x.shape[1:]:
        raise ValueError('it gathers at computed numbers, and not whole rows along the first axis')
    rows = graph.reshape(graph.read(indices), indices.shape, indices.shape[:-1])
    return computed(graph.node('Gather', graph.read(x), rows, axis=0), spec.shape, x.dtype)


def _concatenate(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    whole = [graph.full(value) for value in inputs]
    like = next(value for value in whole if value.array is None)
    names = [graph.read(value, like.order) for value in whole]
    return like.made(graph.node('Concat', *names, axis=like.order.index(params['dimension'])), spec.shape)


def _reduce(op: str, graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (name, x), axes = _in_place(graph, inputs[0]), params['axes']
    places = sorted(x.order.index(axis) for axis in axes)
    if op in ('ArgMax', 'ArgMin'):
        name = graph.cast(graph.node(op, name, axis=places[0], keepdims=0), spec.dtype)
    elif op == 'ReduceSum':  # the only one that takes its axes as an input in this opset
        name = graph.node(op, name, graph.integers(places), keepdims=0)
    else:
        name = graph.node(op, name, axes=places, keepdims=0)
    left = [axis for axis in range(len(x.shape)) if axis not in axes]
    return computed(name, spec.shape, spec.dtype, [left.index(axis) for axis in x.order if axis in left])


def _top_k(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> list[Value]:
    x, last = graph.full(inputs[0]), len(spec.shape) - 1
    if params.get('axis', last) not in (last, -1):
        raise ValueError('it looks along another axis than the last')
    highest, places = graph.fresh('highest'), graph.fresh('places')
    graph.node('TopK', graph.read(x), graph.integers([params['k']]), outputs=[highest, places], axis=last)
    numbers = computed(graph.cast(places, np.int32), spec.shape, np.int32)
    return [computed(highest, spec.shape, x.dtype), numbers]


def _pool(op: str, graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    x, last, dilations = graph.full(inputs[0]), len(spec.shape) - 1, params['window_dilation']
    windows, strides, padding = params['window_dimensions'], params['window_strides'], params['padding']
    if any((windows[axis], strides[axis], *padding[axis]) != (1, 1, 0, 0) for axis in (0, last)):
        raise ValueError('it pools over images or channels')
    if any(d != 1 for d in params['base_dilation']) or (op == 'AveragePool' and any(d != 1 for d in dilations)):
        raise ValueError('it is dilated')
    order, pads = (0, last, *range(1, last)), [edge[side] for side in (0, 1) for edge in padding[1:last]]
    options: Any = {'dilations': dilations[1:last]} if op == 'MaxPool' else {'count_include_pad': 1}
    options.update(kernel_shape=windows[1:last], strides=strides[1:last], pads=pads)
    pooled = computed(graph.node(op, graph.read(x, order), **options), spec.shape, x.dtype, order)
    if op == 'MaxPool':
        return pooled
    return _elementwise('Mul', graph, params, [pooled, known(np.array(math.prod(windows), x.dtype))], pooled)


def _convolution(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    numbers, padding = params['dimension_numbers'], params['padding']
    if params['batch_group_count'] != 1 or any(d != 1 for d in params['lhs_dilation']):
        raise ValueError('it is transposed (its input is dilated) or grouped by images')
    if any(not is_size(size) or size < 0 for edge in padding for size in edge):
        raise ValueError('it crops its input, or pads by a symbolic size')
    x, kernel = (graph.full(value) for value in inputs)
    name = graph.node(
        'Conv',
        graph.read(x, numbers.lhs_spec),
        graph.read(kernel, numbers.rhs_spec),
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=params['window_strides'],
        pads=[edge[side] for side in (0, 1) for edge in padding],
        dilations=params['rhs_dilation'],
        group=params['feature_group_count'],
    )
    return computed(name, spec.shape, spec.dtype, numbers.out_spec)


def _product(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (left_sum, right_sum), (left_batch, right_batch) = params['dimension_numbers']
    left, right = map(graph.full, inputs)
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_sum, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_sum, *right_batch)]
    summed, columns = (math.prod(right.shape[axis] for axis in axes) for axes in (right_sum, right_free))
    batch = [left.shape[axis] for axis in left_batch]
    rows = [left.shape[axis] for axis in left_free]
    if (batch and len(rows) != 1) or not rows:  # a matrix product has one axis of rows beside those of the batch
        rows = [math.prod(rows)]

    def arranged(value: Value, axes: Sequence[int], shape: list[Any]) -> str:
        if value.array is not None:
            return graph.constant(np.transpose(value.array, axes).reshape(shape))
        return graph.reshape(graph.read(value, axes), [value.shape[axis] for axis in axes], shape)

    name = graph.node(
        'MatMul',
        arranged(left, (*left_batch, *left_free, *left_sum), [*batch, *rows, summed]),
        arranged(right, (*right_batch, *right_sum, *right_free), [*batch, summed, columns]),
    )
    return computed(graph.reshape(name, [*batch, *rows, columns], spec.shape), spec.shape, spec.dtype)


ON_BOOLEANS = ('and', 'not', 'or', 'xor')
_UNARY = ('abs', 'ceil', 'cos', 'erf', 'exp', 'floor', 'log', 'neg', 'sign', 'sin', 'sqrt', 'tanh')
_BINARY = ('add', 'div', 'min', 'mul', 'pow', 'sub')
_COMPARISONS = {'eq': 'Equal', 'ge': 'GreaterOrEqual', 'gt': 'Greater', 'le': 'LessOrEqual', 'lt': 'Less'}
_UNCHANGED = ('copy', 'copy_p', 'stop_gradient', 'optimization_barrier')

TABLE: dict[str, Handler] = {
    **{name: functools.partial(_elementwise, name.capitalize()) for name in (*_UNARY, *_BINARY, *ON_BOOLEANS)},
    **{name: functools.partial(_elementwise, op) for name, op in _COMPARISONS.items()},
    **{
        f'reduce_{name}': functools.partial(_reduce, f'Reduce{name.capitalize()}')
        for name in ('max', 'min', 'prod', 'sum')
    },
    **dict.fromkeys(_UNCHANGED, lambda graph, params, inputs, spec: inputs[0]),
    'add_any': functools.partial(_elementwise, 'Add'),
    'argmax': functools.partial(_reduce, 'ArgMax'),
    'argmin': functools.partial(_reduce, 'ArgMin'),
    'broadcast_in_dim': _broadcast,
    'concatenate': _concatenate,
    'conv_general_dilated': _convolution,
    'convert_element_type': _cast,
    'dim_as_value': _dim_as_value,
    'dot_general': _product,
    'gather': _gather,
    'logistic': functools.partial(_elementwise, 'Sigmoid'),
    'max': _maximum,
    'pad': _pad,
    'reduce_window_max': functools.partial(_pool, 'MaxPool'),
    'reduce_window_sum': functools.partial(_pool, 'AveragePool'),
    'reshape': _reshape,
    'select_n': _select,
    'slice': _slice,
    'top_k': _top_k,
    'transpose': lambda graph, params, inputs, spec: _permuted(inputs[0], params['permutation']),
}


def _log1p(x: Any, **_: Any) -> Any:
    u = 1 + x
    return jnp.log(u) + (x - (u - 1)) / u  # the second term restores the digits of a small x that u lost


def _integer_power(x: Any, y: int) -> Any:
    return math.prod([x] * y) if y in (2, 3) else lax.pow(x, lax.full_like(x, y))


def _split(x: Any, sizes: Sequence[int], axis: int) -> list[Any]:
    ends = np.cumsum(sizes).tolist()
    return [lax.slice_in_dim(x, end - size, end, axis=axis) for size, end in zip(sizes, ends, strict=True)]


COMPOSED: dict[str, Callable[..., Any]] = {
    'clamp': lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    'erfc': lambda x: 1 - lax.erf(x),
    'exp2': lambda x, **_: lax.pow(lax.full_like(x, 2), x),
    'expm1': lambda x, **_: jnp.tanh(x / 2) * (jnp.exp(x) + 1),  # has all digits of a small x
    'integer_pow': _integer_power,
    'iota': lambda *, dimension, shape, dtype, **_: lax.broadcast_in_dim(
        np.arange(shape[dimension], dtype=dtype), shape, (dimension,)
    ),
    'is_finite': lambda x: x - x == 0,  # NaN for all other numbers
    'log1p': _log1p,
    'ne': lambda x, y: ~(x == y),
    'reduce_and': lambda x, axes, **_: x.astype(np.int32).min(axes).astype(bool),
    'reduce_or': lambda x, axes, **_: x.astype(np.int32).max(axes).astype(bool),
    'rsqrt': lambda x, **_: 1 / jnp.sqrt(x),
    'split': _split,
    'square': lambda x: x * x,
    'squeeze': lambda x, dimensions: x.reshape([n for axis, n in enumerate(x.shape) if axis not in dimensions]),
}
"""Primitives as functions of JAX that need primitives of `TABLE` alone."""
