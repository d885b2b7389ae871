"""The ONNX form of each primitive of a traced program: a table of small functions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.translate.onnx_graph import Graph, Value, computed, is_size, known

Params = dict[str, Any]
Handler = Callable[[Graph, Params, list[Value], Any], Value | list[Value]]
"""``(graph, params, inputs, shape and dtype of the first output) → outputs``."""


def _elementwise(op: str, graph: Graph, params: Params, inputs: list[Value], spec: Any, **attributes: Any) -> Value:
    """Adds one node on values of one shape; broadcasting repeats scalars and axes of one element."""
    rank = len(spec.shape)
    ranked = [value for value in inputs if len(value.shape) == rank]
    varying = [value for value in ranked if value.array is None]
    orders = [value.order for value in varying if value.held == value.shape] + [value.order for value in varying]
    order = orders[0] if orders else tuple(range(rank))
    names = [graph.read(value, order if len(value.shape) == rank else None) for value in inputs]
    held = [next((v.held[axis] for v in ranked if v.held[axis] != 1), 1) for axis in range(rank)]
    return computed(graph.node(op, *names, **attributes), spec.shape, spec.dtype, order, held)


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


def _where(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    chosen = inputs[0].array
    if chosen is not None and chosen.all() and inputs[2].shape == tuple(spec.shape):
        return inputs[2]
    return _elementwise('Where', graph, params, [inputs[0], inputs[2], inputs[1]], spec)


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
    sizes = [edges[axis][side] for side in (0, 1) for axis in x.order]  # a negative one crops
    return x.made(graph.node('Pad', name, graph.integers(sizes), graph.read(inputs[1])), spec.shape)


def _cut(
    graph: Graph, x: Value, axes: Sequence[int], first: str, end: str, steps: Sequence[int], shape: Sequence[Any]
) -> Value:
    """Slices some axes; the names are of vectors, one number for each axis."""
    name, x = _in_place(graph, x)
    places = graph.integers(x.order.index(axis) for axis in axes)
    return x.made(graph.node('Slice', name, first, end, places, graph.integers(steps)), shape)


def _slice(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (x,), steps = inputs, params['strides']
    axes = [axis for axis, size in enumerate(spec.shape) if x.shape[axis] != size]
    if not axes:
        return x
    first, end = (graph.integers(params[name][axis] for axis in axes) for name in ('start_indices', 'limit_indices'))
    return _cut(graph, x, axes, first, end, [steps[axis] if steps else 1 for axis in axes], spec.shape)


def _reverse(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    axes = params['dimensions']
    first, end = (graph.integers([number] * len(axes)) for number in (-1, -(2**31)))
    return _cut(graph, inputs[0], axes, first, end, [-1] * len(axes), spec.shape)


def _gather(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    """Takes windows at numbers along some axes; numbers out of bounds are those of the nearest window."""
    x, indices = map(graph.full, inputs)
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    axes, batching = numbers.start_index_map, numbers.operand_batching_dims
    rest = [axis for axis in range(len(sizes)) if axis not in (*axes, *batching)]
    if not all(is_size(x.shape[axis]) for axis in axes) or any(sizes[axis] != x.shape[axis] for axis in rest):
        raise ValueError('it gathers rows of the batch, or a part of an axis without a number')
    starts = _within_bounds(graph, indices, [x.shape[axis] - sizes[axis] for axis in axes])
    last = len(starts.shape) - 1
    if last == 0:
        first = graph.read(starts)
        end = graph.node('Add', first, graph.integers(sizes[axis] for axis in axes))
        window = _cut(graph, x, axes, first, end, [1] * len(axes), sizes)
        return _reshape(graph, {'dimensions': None}, [window], spec)
    order = sorted(range(last), key=lambda axis: axis not in numbers.start_indices_batching_dims)
    offsets = [axis for axis in range(len(sizes)) if axis not in (*numbers.collapsed_slice_dims, *batching)]
    kept = [axis for axis in axes if axis in offsets]
    name = graph.read(starts, (*order, last))
    if kept:  # the numbers of all elements of a window
        name = graph.reshape(name, (), [*(starts.shape[axis] for axis in order), 1, len(axes)])
        within = np.indices([sizes[axis] for axis in axes]).reshape(len(axes), -1).T
        name = graph.node('Add', name, graph.constant(within))
    name = graph.node('GatherND', graph.read(x, (*batching, *axes, *rest)), name, batch_dims=len(batching))
    free = [axis for axis in range(len(spec.shape)) if axis not in numbers.offset_dims]
    places = [*(free[axis] for axis in order), *(numbers.offset_dims[offsets.index(axis)] for axis in (*kept, *rest))]
    if kept:
        name = graph.reshape(name, (), [spec.shape[axis] for axis in places])
    return computed(name, spec.shape, x.dtype, places)


def _within_bounds(graph: Graph, indices: Value, most: Sequence[int]) -> Value:
    """Returns numbers as int64, from 0 to the most of each axis."""
    if indices.array is not None:
        return known(indices.array.astype(np.int64).clip(0, most))
    name = graph.cast(graph.read(indices), np.int64)
    name = graph.node('Min', graph.node('Max', name, graph.integers([0])), graph.integers(most))
    return computed(name, indices.shape, np.int64)


def _concatenate(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    whole = [graph.full(value) for value in inputs]
    like = next(value for value in whole if value.array is None)
    names = [graph.read(value, like.order) for value in whole]
    return like.made(graph.node('Concat', *names, axis=like.order.index(params['dimension'])), spec.shape)


def _reduce(op: str, graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    (name, x), axes = _in_place(graph, inputs[0]), params['axes']
    if not axes:  # ONNX would reduce all
        return inputs[0]
    places = sorted(x.order.index(axis) for axis in axes)
    if op in ('ArgMax', 'ArgMin'):
        name = graph.cast(name, np.int32) if x.dtype == np.bool_ else name
        name = graph.cast(graph.node(op, name, axis=places[0], keepdims=0), spec.dtype)
    elif op == 'ReduceSum':  # the only one that takes its axes as an input in this opset
        name = graph.node(op, name, graph.integers(places), keepdims=0)
    else:
        name = graph.node(op, name, axes=places, keepdims=0)
    left = [axis for axis in range(len(x.shape)) if axis not in axes]
    return computed(name, spec.shape, spec.dtype, [left.index(axis) for axis in x.order if axis in left])


def _top_k(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> list[Value]:
    (name, x), outputs = _in_place(graph, inputs[0]), (graph.fresh('values'), graph.fresh('places'))
    place = x.order.index(params.get('axis', -1) % len(spec.shape))
    graph.node('TopK', name, graph.integers([params['k']]), outputs=outputs, axis=place)
    values = x.made(outputs[0], spec.shape)
    return [values, dataclasses.replace(values, name=graph.cast(outputs[1], np.int32), dtype=np.dtype(np.int32))]


def _cumsum(graph: Graph, params: Params, inputs: list[Value], spec: Any) -> Value:
    name, x = _in_place(graph, inputs[0])
    place = graph.constant(np.int64(x.order.index(params['axis'])))
    return x.made(graph.node('CumSum', name, place, reverse=int(params['reverse'])))


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
    if params['batch_group_count'] != 1:
        raise ValueError('it is grouped by images')
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
_UNARY = ('abs', 'ceil', 'erf', 'exp', 'floor', 'log', 'neg', 'round', 'sign', 'sqrt')
_ANGLES = ('acos', 'acosh', 'asin', 'asinh', 'atan', 'atanh', 'cos', 'cosh', 'sin', 'sinh', 'tan', 'tanh')
_BINARY = ('add', 'div', 'min', 'mul', 'pow', 'sub')
_COMPARISONS = {'eq': 'Equal', 'ge': 'GreaterOrEqual', 'gt': 'Greater', 'le': 'LessOrEqual', 'lt': 'Less'}
_UNCHANGED = ('copy', 'copy_p', 'stop_gradient', 'optimization_barrier')

TABLE: dict[str, Handler] = {
    **{
        name: functools.partial(_elementwise, name.capitalize()) for name in (*_UNARY, *_ANGLES, *_BINARY, *ON_BOOLEANS)
    },
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
    'cumsum': _cumsum,
    'dim_as_value': _dim_as_value,
    'dot_general': _product,
    'gather': _gather,
    'logistic': functools.partial(_elementwise, 'Sigmoid'),
    'max': _maximum,
    'pad': _pad,
    'reduce_window_max': functools.partial(_pool, 'MaxPool'),
    'reduce_window_sum': functools.partial(_pool, 'AveragePool'),
    'rem': functools.partial(_elementwise, 'Mod', fmod=1),
    'reshape': _reshape,
    'rev': _reverse,
    'select_n': _where,
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


def _dynamic_slice(x: Any, *starts: Any, slice_sizes: Sequence[Any]) -> Any:
    axes = tuple(axis for axis, size in enumerate(slice_sizes) if size != x.shape[axis])
    if not axes:
        return x
    numbers = lax.GatherDimensionNumbers(tuple(range(x.ndim)), (), axes)
    return lax.gather(x, jnp.stack([starts[axis] for axis in axes]), numbers, slice_sizes, mode='clip')


def _gather_or_fill(
    x: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, fill_value: Any, **params: Any
) -> Any:
    """Fills the windows that are out of bounds."""
    most = [x.shape[axis] - slice_sizes[axis] for axis in dimension_numbers.start_index_map]
    if mode != lax.GatherScatterMode.FILL_OR_DROP or not all(map(is_size, most)):
        return None
    indices = indices.astype(np.int32)
    last = lax.expand_dims(np.array(most, np.int32), range(indices.ndim - 1))
    inside = ((indices >= 0) & (indices <= last)).all(-1)
    taken = lax.gather(x, indices, dimension_numbers, slice_sizes, mode='clip')
    free = [axis for axis in range(taken.ndim) if axis not in dimension_numbers.offset_dims]
    return jnp.where(lax.broadcast_in_dim(inside, taken.shape, free), taken, np.array(fill_value, x.dtype))


def _scatter_add(x: Any, indices: Any, updates: Any, *, dimension_numbers: Any, mode: Any, **_: Any) -> Any:
    """Adds along one axis, by a product with ones and zeros: what is out of bounds adds nothing."""
    numbers, windows = dimension_numbers, dimension_numbers.update_window_dims
    axes, batch = numbers.scatter_dims_to_operand_dims, tuple(range(len(numbers.operand_batching_dims)))
    batches_lead = numbers.operand_batching_dims == numbers.scatter_indices_batching_dims == batch
    if mode == lax.GatherScatterMode.CLIP or x.dtype != np.float32 or not batches_lead:
        raise ValueError('it clips numbers, adds integers, or has rows behind other axes')
    if len(axes) != 1 or numbers.inserted_window_dims != axes or not is_size(x.shape[axes[0]]):
        raise ValueError('it adds windows, along several axes, or along the batch')
    places = np.arange(x.shape[axes[0]]).reshape(*[1] * (indices.ndim - 1), -1)
    chosen = (indices == places).astype(x.dtype)  # the axis of x is the last
    rows = [axis for axis in range(updates.ndim) if axis not in windows]
    summed = tuple(range(len(batch), len(rows)))
    added = lax.dot_general(chosen, updates.transpose(*rows, *windows), ((summed, summed), (batch, batch)))
    return x + jnp.moveaxis(added, len(batch), axes[0])


def _scan(*inputs: Any, jaxpr: Any, length: int, num_consts: int, num_carry: int, reverse: bool, **_: Any) -> list[Any]:
    """Repeats the body of a loop."""
    if not is_size(length):
        raise ValueError('it loops over the batch')
    consts, carry, xs = inputs[:num_consts], inputs[num_consts:][:num_carry], inputs[num_consts + num_carry :]
    rows: list[Any] = [None] * length
    for n in reversed(range(length)) if reverse else range(length):
        row = (lax.index_in_dim(x, n, keepdims=False) for x in xs)
        results = jax_core.jaxpr_as_fun(jaxpr)(*consts, *carry, *row)
        carry, rows[n] = results[:num_carry], results[num_carry:]
    return [*carry, *map(jnp.stack, zip(*rows, strict=True))]


def _select(which: Any, *cases: Any) -> Any:
    if which.dtype != np.bool_:
        return functools.reduce(lambda y, n: jnp.where(which == n, cases[n], y), range(1, len(cases)), cases[0])
    return which & cases[1] | ~which & cases[0] if cases[0].dtype == np.bool_ else None


def _sort(*operands: Any, dimension: int, num_keys: int, **_: Any) -> list[Any]:
    keys, *others = (jnp.moveaxis(x, dimension, -1) for x in operands)
    if num_keys != 1 or keys.dtype == np.bool_:
        raise ValueError('it sorts booleans, or by several keys')
    end = np.array(-1 if jnp.issubdtype(keys.dtype, np.integer) else 0).astype(keys.dtype)
    values, places = lax.top_k(end - keys, keys.shape[-1])
    moved: list[Any] = [jnp.take_along_axis(x, places, -1, mode='promise_in_bounds') for x in others]
    return [jnp.moveaxis(x, -1, dimension) for x in [end - values, *moved]]


def _pad_between(x: Any, value: Any, padding_config: Sequence[Any]) -> Any:
    low, high, between = zip(*padding_config, strict=True)
    if not any(between):
        return None
    edges = [edge for more in between for edge in ((0, 0, 0), (0, more, 0))]
    apart = lax.pad(x.reshape([n for size in x.shape for n in (size, 1)]), value, edges)
    wider = apart.reshape([size * (1 + more) for size, more in zip(x.shape, between, strict=True)])
    return lax.pad(wider, value, [(a, b - more, 0) for a, b, more in zip(low, high, between, strict=True)])


def _pad_before(x: Any, kernel: Any, *, padding: Sequence[Any], lhs_dilation: Sequence[int], **params: Any) -> Any:
    """Pads apart from a convolution what its ONNX form does not: between pixels, or less than nothing."""
    if max(lhs_dilation) == 1 and all(is_size(size) and size >= 0 for edge in padding for size in edge):
        return None
    edges = [(0, 0, 0)] * x.ndim
    for axis, edge, d in zip(params['dimension_numbers'].lhs_spec[2:], padding, lhs_dilation, strict=True):
        edges[axis] = (*edge, d - 1)
    params |= {'padding': ((0, 0),) * len(padding), 'lhs_dilation': (1,) * len(padding)}
    return lax.conv_general_dilated_p.bind(lax.pad(x, np.zeros((), x.dtype), edges), kernel, **params)


def _tile(x: Any, reps: Sequence[Any]) -> Any:
    repeated = [size for sizes in zip(reps, x.shape, strict=True) for size in sizes]
    apart = x.reshape([n for size in x.shape for n in (1, size)])
    return jnp.broadcast_to(apart, repeated).reshape([a * b for a, b in zip(reps, x.shape, strict=True)])


COMPOSED: dict[str, Callable[..., Any]] = {
    'clamp': lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    'conv_general_dilated': _pad_before,
    'dynamic_slice': _dynamic_slice,
    'erfc': lambda x: 1 - lax.erf(x),
    'exp2': lambda x, **_: lax.pow(lax.full_like(x, 2), x),
    'expm1': lambda x, **_: jnp.tanh(x / 2) * (jnp.exp(x) + 1),  # has all digits of a small x
    'gather': _gather_or_fill,
    'integer_pow': _integer_power,
    'iota': lambda *, dimension, shape, dtype, **_: lax.broadcast_in_dim(
        np.arange(shape[dimension], dtype=dtype), shape, (dimension,)
    ),
    'is_finite': lambda x: x - x == 0,  # NaN for all other numbers
    'log1p': _log1p,
    'ne': lambda x, y: ~(x == y),
    'reduce_and': lambda x, axes, **_: x.astype(np.int32).min(axes).astype(bool),
    'reduce_or': lambda x, axes, **_: x.astype(np.int32).max(axes).astype(bool),
    'pad': _pad_between,
    'round': lambda x, rounding_method: None if rounding_method else jnp.trunc(x) + jnp.trunc(2 * (x - jnp.trunc(x))),
    'rsqrt': lambda x, **_: 1 / jnp.sqrt(x),
    'scan': _scan,
    'scatter-add': _scatter_add,
    'select_n': _select,
    'sort': _sort,
    'split': _split,
    'stack': lambda *xs, axis: lax.concatenate([lax.expand_dims(x, [axis]) for x in xs], axis),
    'square': lambda x: x * x,
    'squeeze': lambda x, dimensions: x.reshape([n for axis, n in enumerate(x.shape) if axis not in dimensions]),
    'tile': _tile,
}
"""Primitives as functions of JAX that need primitives of `TABLE` alone; `None` where `TABLE` has the form itself."""
