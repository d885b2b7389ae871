"""Partial evaluation of a jaxpr whose weights are known: the machinery behind `optimize`.

A segment of a network (a stage or a head) is traced to a jaxpr over its variables and its input. Whatever depends on
variables alone is *known*: it is computed once, when the network is optimised, and becomes a constant of the rewritten
segment. What depends on the input is emitted again, with these changes:

- a convolution or matrix product with known weights absorbs the known per-feature scales and shifts that follow it
  (BatchNorm, biases), as long as nobody else looks at the value in between;
- a convolution with few channels becomes one matrix product, a max pooling becomes maxima of slices, and a matrix
  product takes its weights transposed, where the backend runs these faster.

Constants are asked for in an order that depends on the program's structure only, not on the batch size. So a rewritten
segment retraces the original at whatever batch size it meets, and takes its constants from a list.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.models.banded import DIMENSION_NUMBERS, band_matrix, multiply_band
from branchy_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Forms:
    """Which equivalent forms to emit.

    Attributes:
        most_channel_pairs: a convolution becomes a product with a banded matrix if its input channels times its output
            channels are at most this many; 0: never.
        sliced_pooling: max pooling as maxima of strided slices.
        transposed_weights: matrix products with weights stored as ``[out, in]``, whose rows the dot products of a
            single image read in order.
        dtype: that matrix products and convolutions multiply in; ``None`` keeps theirs. They accumulate in float32.
    """

    most_channel_pairs: int = 0
    sliced_pooling: bool = False
    transposed_weights: bool = False
    dtype: Any = None


class Known:
    """A value that depends on variables alone, computed when first asked for and then kept.

    Attributes:
        shape: of the value.
        dtype: of the value.
        source: for a broadcast, the known value that was spread, so that no batch-sized constant is stored.
        dimensions: for a broadcast, the axes of ``source`` in this value.
    """

    def __init__(
        self,
        compute: Callable[[], Array],
        shape: tuple[int, ...],
        dtype: Any,
        source: Known | None = None,
        dimensions: tuple[int, ...] = (),
    ) -> None:
        self.shape, self.dtype, self.source, self.dimensions = shape, dtype, source, dimensions
        self.value = functools.cache(compute)

    def map(self, function: Callable[[Array], Array], *others: Known) -> Known:
        """Returns the known result of a function of known values."""
        spec = jax.eval_shape(function, *(jax.ShapeDtypeStruct(k.shape, k.dtype) for k in (self, *others)))
        return Known(lambda: function(self.value(), *(k.value() for k in others)), spec.shape, spec.dtype)


Constant = Callable[[Known], Array]
"""Hands out a known value inside the rewritten program: records it when optimising, replays it afterwards."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A convolution or matrix product with known weights that has not been emitted yet.

    Attributes:
        emit: ``(kernel, constant) → array``.
        kernel: known weights.
        feature_axis: axis of the output features in ``kernel``.
        features: number of output features, the last axis of the result.
        shift: known ``[features]`` to add, or ``None``.
        aval: shape and dtype of the result.
    """

    emit: Callable[[Known, Constant], Array]
    kernel: Known
    feature_axis: int
    features: int
    shift: Known | None
    aval: Any

    def scaled(self, scale: Known) -> Linear:
        """Returns the same with every feature multiplied."""
        axes = [1] * len(self.kernel.shape)
        axes[self.feature_axis] = self.features
        kernel = self.kernel.map(lambda k, s: k * s.reshape(axes), scale)
        shift = None if self.shift is None else self.shift.map(jnp.multiply, scale)
        return dataclasses.replace(self, kernel=kernel, shift=shift)

    def shifted(self, shift: Known) -> Linear:
        """Returns the same with a value added to every feature."""
        return dataclasses.replace(self, shift=shift if self.shift is None else self.shift.map(jnp.add, shift))

    def result(self, constant: Constant) -> Array:
        """Emits the operation."""
        product = self.emit(self.kernel, constant)
        if self.shift is None:
            return product
        return product + jnp.expand_dims(constant(self.shift).astype(product.dtype), range(product.ndim - 1))


def trace(function: Callable[..., Any], variables: Any, hidden: Any) -> tuple[jax_core.ClosedJaxpr, Any]:
    """Traces ``function(variables, hidden)`` to a jaxpr without nested calls.

    Args:
        function: one segment.
        variables: arrays or their shapes.
        hidden: arrays or their shapes.

    Returns:
        The jaxpr, over the flattened arguments, and the tree structure of the result.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(variables, hidden)
    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    flat = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*specs)
    return flat, jax.tree.structure(shapes)


def _inline(jaxpr: jax_core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, stepping into calls that only group equations (jit, custom derivatives, remat)."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, jax_core.Literal) else env[v] for v in equation.invars]
        inner = _call_body(equation)
        outputs = _bind(equation, inputs) if inner is None else _inline(inner.jaxpr, inner.consts, inputs)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, jax_core.Literal) else env[v] for v in jaxpr.outvars]


def _call_body(equation: jax_core.JaxprEqn) -> jax_core.ClosedJaxpr | None:
    name, params = equation.primitive.name, equation.params
    if name in ('jit', 'pjit', 'closed_call', 'core_call'):
        return params.get('jaxpr', params.get('call_jaxpr'))
    if name in ('custom_jvp_call', 'custom_vjp_call'):
        return params['call_jaxpr']
    if name in ('checkpoint', 'remat', 'remat2'):
        return jax_core.ClosedJaxpr(params['jaxpr'], ())
    return None


def _bind(equation: jax_core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def run(
    jaxpr: jax_core.ClosedJaxpr, variables: Sequence[Known], hidden: Sequence[Array], constant: Constant, forms: Forms
) -> list[Array]:
    """Evaluates a flat jaxpr from `trace` with its first arguments known.

    Args:
        jaxpr: over the leaves of variables, then of hidden.
        variables: leaves, known.
        hidden: leaves, arrays.
        constant: hands out known values.
        forms: which forms to emit.

    Returns:
        Leaves of the result.
    """
    program = jaxpr.jaxpr
    uses = Counter(v for equation in program.eqns for v in equation.invars if not isinstance(v, jax_core.Literal))
    uses.update(v for v in program.outvars if not isinstance(v, jax_core.Literal))
    env: dict[Any, Any] = dict(zip(program.constvars, jaxpr.consts, strict=True))
    env.update(zip(program.invars, [*variables, *hidden], strict=True))

    def emitted(value: Any) -> Any:
        if isinstance(value, Linear):
            return value.result(constant)
        return _spread(value, constant) if isinstance(value, Known) else value

    for equation in program.eqns:
        inputs = [v.val if isinstance(v, jax_core.Literal) else env[v] for v in equation.invars]
        if any(isinstance(x, Known) for x in inputs) and all(_is_still(x) for x in inputs):
            outputs = _known_outputs(equation, inputs)
        else:
            outputs = [_absorb(equation, inputs) or _linear(equation, inputs, forms)]
            if outputs == [None]:
                arrays = [emitted(x) for x in inputs]
                outputs = _pooled(equation, arrays, forms) or _bind(equation, arrays)
            elif uses[equation.outvars[0]] > 1:  # several look at it: nothing may be absorbed beyond this point
                outputs = [emitted(outputs[0])]
        env.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, jax_core.Literal) else emitted(env[v]) for v in program.outvars]


def _is_still(value: Any) -> bool:
    """Whether a value is the same for every input of the network and needs no batch size."""
    return isinstance(value, Known) or (np.ndim(value) == 0 and not isinstance(value, (jax.core.Tracer, Linear)))


def _known_outputs(equation: jax_core.JaxprEqn, inputs: list[Any]) -> list[Known]:
    @functools.cache
    def outputs() -> list[Array]:
        with jax.ensure_compile_time_eval():
            return _bind(equation, [x.value() if isinstance(x, Known) else x for x in inputs])

    spread = {}
    if equation.primitive.name == 'broadcast_in_dim' and len(inputs) == 1:
        spread = {'source': inputs[0], 'dimensions': equation.params['broadcast_dimensions']}
    return [
        Known(lambda n=n: outputs()[n], v.aval.shape, v.aval.dtype, **spread) for n, v in enumerate(equation.outvars)
    ]


def _spread(value: Known, constant: Constant) -> Array:
    if value.source is None:
        return constant(value)
    return lax.broadcast_in_dim(_spread(value.source, constant), value.shape, value.dimensions)


def _feature_vector(value: Any, features: int) -> Known | None:
    """Returns ``[features]`` if a known value of any rank varies along its last axis alone, else ``None``."""
    if not isinstance(value, Known):
        if np.ndim(value) == 0 and not isinstance(value, (jax.core.Tracer, Linear)):
            return Known(lambda: jnp.full(features, value), (features,), jnp.result_type(value))
        return None
    if value.source is None:
        if value.shape == () or int(np.prod(value.shape)) == features == value.shape[-1]:
            return value.map(lambda v: jnp.broadcast_to(v.reshape(-1), (features,)))
        return None
    last = len(value.shape) - 1
    moved = [axis for axis, size in enumerate(value.source.shape) if size > 1 and value.dimensions[axis] != last]
    if moved or value.shape[-1] != features:
        return None
    inner = _feature_vector(value.source, features if np.prod(value.source.shape, dtype=int) == features else 1)
    return None if inner is None else inner.map(lambda v: jnp.broadcast_to(v, (features,)))


def _absorb(equation: jax_core.JaxprEqn, inputs: list[Any]) -> Linear | None:
    """Folds a known scale or shift into the linear operation before it."""
    name = equation.primitive.name
    if name not in ('add', 'add_any', 'sub', 'mul', 'div') or not any(isinstance(x, Linear) for x in inputs):
        return None
    left, right = inputs
    if not isinstance(left, Linear) and name in ('add', 'add_any', 'mul'):
        left, right = right, left
    if not isinstance(left, Linear) or left.aval.dtype != equation.outvars[0].aval.dtype:
        return None
    vector = _feature_vector(right, left.features)
    if vector is None:
        return None
    if name in ('mul', 'div'):
        return left.scaled(vector if name == 'mul' else vector.map(lambda v: 1 / v))
    return left.shifted(vector if name != 'sub' else vector.map(jnp.negative))


def _linear(equation: jax_core.JaxprEqn, inputs: list[Any], forms: Forms) -> Linear | None:
    """Recognises a convolution or matrix product of something unknown with something known."""
    name, params = equation.primitive.name, equation.params
    if name not in ('conv_general_dilated', 'dot_general'):
        return None
    left, kernel = inputs
    if not isinstance(kernel, Known) or isinstance(left, Known):
        return None
    aval = equation.outvars[0].aval
    if name == 'dot_general':
        (left_axes, kernel_axes), (batch_axes, _) = params['dimension_numbers']
        if len(kernel.shape) != 2 or batch_axes or len(left_axes) != 1 or len(aval.shape) < 2:
            return None
        feature_axis = 1 - kernel_axes[0]
        emit = _transposed if forms.transposed_weights and feature_axis == 1 else _bound
    else:
        numbers = params['dimension_numbers']
        if numbers.out_spec[1] != len(aval.shape) - 1:
            return None
        feature_axis = numbers.rhs_spec[0]
        emit = _banded if _has_few_channels(equation, forms.most_channel_pairs) else _bound

    def emit_here(kernel: Known, constant: Constant) -> Array:
        value = left.result(constant) if isinstance(left, Linear) else left
        return emit(equation, value, kernel, constant, forms)

    return Linear(emit_here, kernel, feature_axis, kernel.shape[feature_axis], None, aval)


def _bound(equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms) -> Array:
    if forms.dtype is None:
        return _bind(equation, [left, constant(kernel)])[0]
    kernel = kernel.map(lambda k: k.astype(forms.dtype))
    params = {**equation.params, 'preferred_element_type': np.dtype(np.float32)}
    product = equation.primitive.bind(left.astype(forms.dtype), constant(kernel), **params)
    return product.astype(equation.outvars[0].aval.dtype)


def _transposed(equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms) -> Array:
    params = equation.params
    kernel = kernel.map(jnp.transpose)
    numbers = ((params['dimension_numbers'][0][0], (1,)), ((), ()))
    kept = params['preferred_element_type']
    if forms.dtype is not None:
        left, kernel, kept = left.astype(forms.dtype), kernel.map(lambda k: k.astype(forms.dtype)), np.float32
    product = lax.dot_general(left, constant(kernel), numbers, params['precision'], preferred_element_type=kept)
    return product.astype(equation.outvars[0].aval.dtype)


def _has_few_channels(equation: jax_core.JaxprEqn, most_pairs: int) -> bool:
    params, shape, kernel = equation.params, equation.invars[0].aval.shape, equation.invars[1].aval.shape
    if len(shape) != 4 or params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
        return False
    plain = lax.conv_dimension_numbers(shape, kernel, DIMENSION_NUMBERS)
    dilated = any(d != 1 for d in (*params['lhs_dilation'], *params['rhs_dilation']))
    return params['dimension_numbers'] == plain and not dilated and kernel[2] * kernel[3] <= most_pairs


def _banded(equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms) -> Array:
    params = equation.params
    band = kernel.map(functools.partial(band_matrix, stride=params['window_strides'][1]))
    if forms.dtype is not None:
        left, band = left.astype(forms.dtype), band.map(lambda b: b.astype(forms.dtype))
    product = multiply_band(
        left, constant(band), kernel_shape=kernel.shape, strides=params['window_strides'], padding=params['padding'],
        precision=params['precision'],
    )  # fmt: skip
    return product.astype(equation.outvars[0].aval.dtype)


def _pooled(equation: jax_core.JaxprEqn, inputs: list[Array], forms: Forms) -> list[Array] | None:
    """Emits a max pooling as maxima of strided slices, one axis after the other."""
    params = equation.params
    if equation.primitive.name != 'reduce_window_max' or not forms.sliced_pooling:
        return None
    if any(d != 1 for d in (*params['base_dilation'], *params['window_dilation'])):
        return None
    (x,) = inputs
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    x = lax.pad(x, jnp.array(lowest, x.dtype), [(*edge, 0) for edge in params['padding']])
    for axis, (window, stride) in enumerate(zip(params['window_dimensions'], params['window_strides'], strict=True)):
        reach = x.shape[axis] - window + 1
        shifted = [lax.slice_in_dim(x, shift, shift + reach, stride, axis) for shift in range(window)]
        x = functools.reduce(jnp.maximum, shifted)
    return [x]
