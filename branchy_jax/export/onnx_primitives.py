"""What each primitive of a traced program is in ONNX: a table of small functions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from branchy_jax.export.onnx_graph import Scope, Spec, Value, feature_order, is_size, known

Params = dict[str, Any]
Handler = Callable[[Scope, Params, list[Value], Spec], Value | list[Value]]
"""``(scope, params, inputs, spec of the first output) → outputs``."""


def _elementwise(scope: Scope, op: str, inputs: list[Value], spec: Spec | Value, **attributes: Any) -> Value:
    """One node on values of one shape; scalars and repetitions are left to broadcasting."""
    unknown = [value for value in inputs if not value.is_known] or inputs
    whole = [value for value in unknown if value.held == value.shape and len(value.shape) == len(spec.shape)]
    order = next((value.order for value in whole or unknown if len(value.shape) == len(spec.shape)), None)
    order = tuple(range(len(spec.shape))) if order is None else order
    names = [scope.read(value, order if len(value.shape) == len(order) else None) for value in inputs]
    ranked = [value for value in inputs if len(value.shape) == len(order)]
    held = tuple(
        next((value.held[axis] for value in ranked if not (is_size(value.held[axis]) and value.held[axis] == 1)), 1)
        for axis in range(len(order))
    )
    name = scope.node(op, *names, **attributes)
    return Value(tuple(spec.shape), np.dtype(spec.dtype), name, held=held, order=order)


def _simple(op: str) -> Handler:
    return lambda scope, params, inputs, spec: _elementwise(scope, op, inputs, spec)


def _composed(*steps: Callable[[Scope, Value], Value]) -> Handler:
    return lambda scope, params, inputs, spec: functools.reduce(lambda x, step: step(scope, x), steps, inputs[0])


def _unary(op: str) -> Callable[[Scope, Value], Value]:
    return lambda scope, x: _elementwise(scope, op, [x], x)


def _with_number(op: str, number: float, *, first: bool = False) -> Callable[[Scope, Value], Value]:
    def step(scope: Scope, x: Value) -> Value:
        scalar = known(np.array(number, x.dtype))
        return _elementwise(scope, op, [scalar, x] if first else [x, scalar], x)

    return step


def _unchanged(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    return inputs[0]


def _quotient(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    x, divisor = inputs
    if divisor.is_known and (divisor.known_array == 1).all() and x.held == tuple(spec.shape):  # the mean of one
        return x
    return _elementwise(scope, 'Div', inputs, spec)


def _maximum(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    for one, other in (inputs, inputs[::-1]):
        if other.is_known and not other.known_array.any() and one.dtype == np.float32 and one.held == one.shape:
            return _elementwise(scope, 'Relu', [one], spec)
    return _elementwise(scope, 'Max', inputs, spec)


def _not_equal(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    return _unary('Not')(scope, _elementwise(scope, 'Equal', inputs, spec))


def _on_booleans(op: str) -> Handler:
    def handler(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
        if spec.dtype != np.bool_:
            raise ValueError('ONNX has it for booleans only')
        return _elementwise(scope, op, inputs, spec)

    return handler


def _cast(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    if inputs[0].dtype == spec.dtype:
        return inputs[0]
    return _elementwise(scope, 'Cast', inputs, spec, to=np.dtype(spec.dtype))


def _select(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    which, *cases = inputs
    if len(cases) != 2 or which.dtype != np.bool_:
        raise ValueError('it selects among more than two')
    if spec.dtype != np.bool_:
        return _elementwise(scope, 'Where', [which, cases[1], cases[0]], spec)
    chosen = [
        _elementwise(scope, 'And', pair, spec) for pair in ([which, cases[1]], [_unary('Not')(scope, which), cases[0]])
    ]
    return _elementwise(scope, 'Or', chosen, spec)


def _clamp(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    low, x, high = inputs
    return _elementwise(scope, 'Min', [_elementwise(scope, 'Max', [x, low], spec), high], spec)


def _power(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    x, exponent = inputs[0], params['y']
    if exponent in (2, 3):
        return functools.reduce(lambda a, b: _elementwise(scope, 'Mul', [a, b], spec), [x] * exponent)
    return _with_number('Pow', exponent)(scope, x)


def _log1p(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    """``ln u + (x - (u - 1)) / u`` with ``u = 1 + x``, which keeps the digits of a small x that u has lost."""
    x = inputs[0]
    u = _with_number('Add', 1)(scope, x)
    lost = _elementwise(scope, 'Sub', [x, _with_number('Sub', 1)(scope, u)], spec)
    return _elementwise(scope, 'Add', [_unary('Log')(scope, u), _elementwise(scope, 'Div', [lost, u], spec)], spec)


def _expm1(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    """``tanh(x / 2) (exp x + 1)``, which keeps the digits of a small x."""
    half = _unary('Tanh')(scope, _with_number('Mul', 0.5)(scope, inputs[0]))
    return _elementwise(scope, 'Mul', [half, _with_number('Add', 1)(scope, _unary('Exp')(scope, inputs[0]))], spec)


def _is_finite(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    """``x - x`` is 0 for finite numbers and NaN for all others."""
    nothing = _elementwise(scope, 'Sub', inputs * 2, inputs[0])
    return _elementwise(scope, 'Equal', [nothing, known(np.zeros((), nothing.dtype))], spec)


def _broadcast(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    (x,), shape, axes = inputs, tuple(spec.shape), tuple(params['broadcast_dimensions'])
    held = [1] * len(shape)
    for axis, size in zip(axes, x.held, strict=True):
        held[axis] = size
    if x.is_known:
        return known(x.known_array.reshape(held), shape)
    if axes == tuple(range(len(shape))):
        return dataclasses.replace(x, shape=shape)
    name = scope.reshape(scope.read(x), x.held, held)
    return dataclasses.replace(scope.plain(name, shape, x.dtype), held=tuple(held))


def _iota(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    axis, shape = params['dimension'], tuple(spec.shape)
    if not is_size(shape[axis]):
        raise ValueError('it counts along an axis of any size')
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return known(np.arange(shape[axis], dtype=spec.dtype).reshape(sizes), shape)


def _reshape(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    if params.get('dimensions') is not None:
        raise ValueError('it transposes, too')
    x, shape = scope.full(inputs[0]), tuple(spec.shape)
    flattens = len(shape) == 2 and len(x.shape) > 2 and x.shape[0] == shape[0] and is_size(shape[1])
    if flattens and not x.is_known and x.order[0] == 0 and x.order != tuple(range(len(x.order))):
        return dataclasses.replace(scope.plain('', shape, x.dtype), flattened=x)
    return scope.plain(scope.reshape(scope.read(x), x.held, shape), shape, x.dtype)


def _squeeze(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    x = scope.full(inputs[0])
    return scope.plain(scope.reshape(scope.read(x), x.held, spec.shape), spec.shape, x.dtype)


def _transpose(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    x, axes = inputs[0], tuple(params['permutation'])
    if x.is_known:
        return known(np.transpose(x.known_array, axes), spec.shape)
    if x.flattened is not None:
        x = scope.plain(scope.read(x), x.shape, x.dtype)
    held, order = tuple(x.held[axis] for axis in axes), tuple(axes.index(axis) for axis in x.order)
    return dataclasses.replace(x, shape=tuple(spec.shape), held=held, order=order)


def _placed(scope: Scope, x: Value) -> tuple[str, Value]:
    """Returns the name of a value with nothing left to broadcasting, in the order in which it lies, and that value."""
    x = scope.full(x)
    return scope.read(x, x.order), x


def _pad(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    (name, x), edges = _placed(scope, inputs[0]), params['padding_config']
    if any(inner for *_, inner in edges) or any(not is_size(size) for edge in edges for size in edge):
        raise ValueError('it pads between elements')
    if any(size < 0 for low, high, _ in edges for size in (low, high)):
        raise ValueError('it pads by less than nothing')
    sizes = [edges[axis][side] for side in (0, 1) for axis in x.order]
    padded = scope.node('Pad', name, scope.integers(sizes), scope.read(inputs[1]))
    return dataclasses.replace(scope.made(x, padded), shape=tuple(spec.shape), held=tuple(spec.shape))


def _slice(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    name, x = _placed(scope, inputs[0])
    starts, ends = params['start_indices'], params['limit_indices']
    strides = params['strides'] or (1,) * len(starts)
    cut = [axis for axis in range(len(starts)) if x.shape[axis] != spec.shape[axis]]
    if not cut:
        return x
    vectors = [[values[axis] for axis in cut] for values in (starts, ends)]
    vectors += [[x.order.index(axis) for axis in cut], [strides[axis] for axis in cut]]
    sliced = scope.node('Slice', name, *map(scope.integers, vectors))
    return dataclasses.replace(scope.made(x, sliced), shape=tuple(spec.shape), held=tuple(spec.shape))


def _concatenate(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    whole = [scope.full(value) for value in inputs]
    like = next(value for value in whole if not value.is_known)
    axis = like.order.index(params['dimension'])
    name = scope.node('Concat', *(scope.read(value, like.order) for value in whole), axis=axis)
    return dataclasses.replace(scope.made(like, name), shape=tuple(spec.shape), held=tuple(spec.shape))


def _split(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> list[Value]:
    (name, x), axis, sizes = _placed(scope, inputs[0]), params['axis'], params['sizes']
    first = scope.node('Split', name, scope.integers(sizes), count=len(sizes), axis=x.order.index(axis))
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    names = [first, *(f'{first}_{n}' for n in range(1, len(sizes)))]
    return [dataclasses.replace(scope.made(x, n), shape=s, held=s) for n, s in zip(names, shapes, strict=True)]


def _without(x: Value, axes: Sequence[int], name: str, dtype: Any) -> Value:
    """Returns the value of a node that has removed axes."""
    left = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = tuple(left.index(axis) for axis in x.order if axis not in axes)
    shape, held = (tuple(sizes[axis] for axis in left) for sizes in (x.shape, x.held))
    return Value(shape, np.dtype(dtype), name, held=held, order=order)


def _reduce(op: str) -> Handler:
    def handler(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
        (name, x), axes = _placed(scope, inputs[0]), params['axes']
        places = sorted(x.order.index(axis) for axis in axes)
        if all(x.shape[axis] == 1 for axis in axes):
            return scope.plain(scope.reshape(scope.read(x), x.held, spec.shape), spec.shape, spec.dtype)
        if op == 'ReduceSum':  # the only one that takes its axes as an input in this opset
            return _without(x, axes, scope.node(op, name, scope.integers(places), keepdims=0), spec.dtype)
        return _without(x, axes, scope.node(op, name, axes=places, keepdims=0), spec.dtype)

    return handler


def _reduce_booleans(op: str) -> Handler:
    def handler(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
        if spec.dtype != np.bool_:
            raise ValueError('ONNX has it for booleans only')
        numbers = _elementwise(scope, 'Cast', inputs, inputs[0], to=np.dtype(np.int32))
        reduced: Any = _reduce(op)(scope, params, [dataclasses.replace(numbers, dtype=np.dtype(np.int32))], spec)
        return _elementwise(scope, 'Cast', [reduced], spec, to=np.dtype(np.bool_))

    return handler


def _arg(op: str) -> Handler:
    def handler(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
        (name, x), (axis,) = _placed(scope, inputs[0]), params['axes']
        found = _without(x, [axis], scope.node(op, name, axis=x.order.index(axis), keepdims=0), np.int64)
        return _elementwise(scope, 'Cast', [found], spec, to=np.dtype(spec.dtype))

    return handler


def _top_k(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> list[Value]:
    x, axis = scope.full(inputs[0]), len(inputs[0].shape) - 1
    if params.get('axis', params.get('operand_axis', axis)) not in (axis, -1):
        raise ValueError('it looks along another axis than the last')
    first = scope.node('TopK', scope.read(x), scope.integers([params['k']]), count=2, axis=axis)
    places = scope.node('Cast', f'{first}_1', to=np.dtype(np.int32))
    return [scope.plain(first, spec.shape, x.dtype), scope.plain(places, spec.shape, np.int32)]


def _pool(op: str) -> Handler:
    def handler(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
        x, rank, dilations = scope.full(inputs[0]), len(spec.shape), params['window_dilation']
        windows, strides, padding = params['window_dimensions'], params['window_strides'], params['padding']
        if any((windows[axis], strides[axis], *padding[axis]) != (1, 1, 0, 0) for axis in (0, rank - 1)):
            raise ValueError('it pools over images or channels')
        if any(d != 1 for d in params['base_dilation']) or (op == 'AveragePool' and any(d != 1 for d in dilations)):
            raise ValueError('it is dilated')
        spatial = range(1, rank - 1)
        order = (0, rank - 1, *spatial)
        attributes: dict[str, Any] = {
            'kernel_shape': [windows[a] for a in spatial],
            'strides': [strides[a] for a in spatial],
        }
        attributes['pads'] = [padding[a][side] for side in (0, 1) for a in spatial]
        if op == 'MaxPool':
            attributes['dilations'] = [dilations[a] for a in spatial]
        else:
            attributes['count_include_pad'] = 1
        name = scope.node(op, scope.read(x, order), **attributes)
        pooled = Value(tuple(spec.shape), x.dtype, name, held=tuple(spec.shape), order=order)
        return pooled if op == 'MaxPool' else _with_number('Mul', math.prod(windows))(scope, pooled)

    return handler


def _convolution(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    numbers, padding = params['dimension_numbers'], params['padding']
    if params['batch_group_count'] != 1 or any(d != 1 for d in params['lhs_dilation']):
        raise ValueError('it is transposed (its input is dilated) or grouped by images')
    if any(not is_size(size) or size < 0 for edge in padding for size in edge):
        raise ValueError('it pads by less than nothing')
    x, kernel = (scope.full(value) for value in inputs)
    name = scope.node(
        'Conv',
        scope.read(x, numbers.lhs_spec),
        scope.read(kernel, numbers.rhs_spec),
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=params['window_strides'],
        pads=[edge[side] for side in (0, 1) for edge in padding],
        dilations=params['rhs_dilation'],
        group=params['feature_group_count'],
    )
    shape = tuple(spec.shape)
    return Value(shape, np.dtype(spec.dtype), name, held=shape, order=tuple(numbers.out_spec))


def _product(scope: Scope, params: Params, inputs: list[Value], spec: Spec) -> Value:
    (left_sum, right_sum), (left_batch, right_batch) = params['dimension_numbers']
    left, right = inputs
    if left.flattened is not None and right.is_known and left_sum == (1,) and right_sum == (0,):
        # The rows of the weights follow the features as they lie, instead of the other way round.
        source = left.flattened
        right = known(scope.full(right).known_array[list(feature_order(source))])
        left = scope.plain(scope.node('Flatten', scope.read(source, source.order), axis=1), left.shape, left.dtype)
    left, right = scope.full(left), scope.full(right)
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_sum, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_sum, *right_batch)]
    summed, columns = (math.prod(right.shape[axis] for axis in axes) for axes in (right_sum, right_free))
    batch = [left.shape[axis] for axis in left_batch]
    rows = [left.shape[axis] for axis in left_free]
    if (batch and len(rows) != 1) or not rows:  # a matrix product has one axis of rows beside those of the batch
        rows = [math.prod(rows)]

    def arranged(value: Value, axes: Sequence[int], shape: list[Any]) -> str:
        if value.is_known:
            return scope.constant(np.transpose(value.known_array, axes).reshape(shape))
        return scope.reshape(scope.read(value, axes), [value.shape[axis] for axis in axes], shape)

    names = [
        arranged(left, (*left_batch, *left_free, *left_sum), [*batch, *rows, summed]),
        arranged(right, (*right_batch, *right_sum, *right_free), [*batch, summed, columns]),
    ]
    name = scope.node('Gemm' if len([*batch, *rows]) == 1 else 'MatMul', *names)
    name = scope.reshape(name, [*batch, *rows, columns], spec.shape)
    return scope.plain(name, spec.shape, spec.dtype)


TABLE: dict[str, Handler] = {
    **{
        name: _simple(op)
        for name, op in {
            'abs': 'Abs',
            'add': 'Add',
            'add_any': 'Add',
            'ceil': 'Ceil',
            'cos': 'Cos',
            'eq': 'Equal',
            'erf': 'Erf',
            'exp': 'Exp',
            'floor': 'Floor',
            'ge': 'GreaterOrEqual',
            'gt': 'Greater',
            'le': 'LessOrEqual',
            'log': 'Log',
            'logistic': 'Sigmoid',
            'lt': 'Less',
            'min': 'Min',
            'mul': 'Mul',
            'neg': 'Neg',
            'pow': 'Pow',
            'sign': 'Sign',
            'sin': 'Sin',
            'sqrt': 'Sqrt',
            'sub': 'Sub',
            'tanh': 'Tanh',
        }.items()
    },
    **{name: _on_booleans(op) for name, op in {'and': 'And', 'not': 'Not', 'or': 'Or', 'xor': 'Xor'}.items()},
    **{
        name: _reduce(op)
        for name, op in {
            'reduce_max': 'ReduceMax',
            'reduce_min': 'ReduceMin',
            'reduce_prod': 'ReduceProd',
            'reduce_sum': 'ReduceSum',
        }.items()
    },
    **dict.fromkeys(('copy', 'copy_p', 'stop_gradient', 'optimization_barrier'), _unchanged),
    'argmax': _arg('ArgMax'),
    'argmin': _arg('ArgMin'),
    'broadcast_in_dim': _broadcast,
    'clamp': _clamp,
    'concatenate': _concatenate,
    'conv_general_dilated': _convolution,
    'convert_element_type': _cast,
    'div': _quotient,
    'dot_general': _product,
    'erfc': _composed(_unary('Erf'), _with_number('Sub', 1, first=True)),
    'exp2': _composed(_with_number('Pow', 2, first=True)),
    'expm1': _expm1,
    'integer_pow': _power,
    'iota': _iota,
    'is_finite': _is_finite,
    'log1p': _log1p,
    'max': _maximum,
    'ne': _not_equal,
    'pad': _pad,
    'reduce_and': _reduce_booleans('ReduceMin'),
    'reduce_or': _reduce_booleans('ReduceMax'),
    'reduce_window_max': _pool('MaxPool'),
    'reduce_window_sum': _pool('AveragePool'),
    'reshape': _reshape,
    'rsqrt': _composed(_unary('Sqrt'), _unary('Reciprocal')),
    'select_n': _select,
    'slice': _slice,
    'split': _split,
    'square': lambda scope, params, inputs, spec: _elementwise(scope, 'Mul', inputs * 2, spec),
    'squeeze': _squeeze,
    'top_k': _top_k,
    'transpose': _transpose,
}
