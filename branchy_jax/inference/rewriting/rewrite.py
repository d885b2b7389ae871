"""Partial evaluation of a program whose weights are known: the machinery behind `optimize`.

Values that depend on variables alone are *known*: they are computed once, when the network is optimised, and become the
variables of the rewritten network. Equations that depend on the input are emitted again, with these changes:

- a convolution or matrix product with known weights absorbs the known per-feature scales and shifts that follow it
  (BatchNorm, biases), where no other equation reads the value in between;
- a convolution with few channels computes several pixels together or becomes one matrix product, a max pooling becomes
  maxima of slices, and a matrix product takes its weights transposed, where the backend runs these faster.

A rewritten network traces the original at every batch size and recognises its constants by their origin (`Known.key`).
Values that depend on the batch size as well, such as a class token repeated for every image, are computed inside the
program from values that do not.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.inference.rewriting import forms as fast
from branchy_jax.inference.rewriting.forms import Forms
from branchy_jax.inference.rewriting.known import Constant, Known, Linear
from branchy_jax.jaxprs import Equation, Program, Value, bind, value_of, variables_of
from branchy_jax.types import Array


def run(
    program: Program, variables: Sequence[Known], inputs: Sequence[Array], constant: Constant, forms: Forms
) -> list[Array]:
    """Evaluates a program whose first arguments are known.

    Args:
        program: over the leaves of variables, then of inputs.
        variables: leaves, known.
        inputs: leaves, arrays.
        constant: hands out known values.
        forms: which forms to emit.

    Returns:
        One array per output.
    """
    uses = Counter(v for equation in program.equations for v in variables_of(equation.invars))
    uses.update(variables_of(program.outputs))
    env: dict[Any, Any] = {**program.consts, **dict(zip(program.inputs, [*variables, *inputs], strict=True))}

    def emitted(value: Any) -> Any:
        if isinstance(value, Linear):
            return value.result(constant)
        return _spread(value, constant) if isinstance(value, Known) else value

    outputs: list[Any]
    for equation, place in zip(program.equations, program.places, strict=True):
        arguments = [_literal(v) if isinstance(v, jax_core.Literal) else env[v] for v in equation.invars]
        if any(isinstance(x, Known) for x in arguments) and all(_is_fixed(x) for x in arguments):
            outputs = _known_outputs(equation, arguments)
        else:
            # Named, so that an error or a profile of the rewritten network shows the module.
            with jax.named_scope(place) if place else contextlib.nullcontext():
                outputs = _emit(equation, arguments, emitted, forms, last_use=uses[equation.outvars[0]] <= 1)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [emitted(value_of(v, env)) for v in program.outputs]


def _emit(
    equation: Equation, arguments: list[Any], emitted: Callable[[Any], Any], forms: Forms, *, last_use: bool
) -> list[Any]:
    """Emits an equation that depends on the input; a linear one waits for what follows unless several read it."""
    linear = _absorb(equation, arguments) or _linear(equation, arguments, forms)
    if linear is not None:
        return [linear if last_use else emitted(linear)]
    arrays = [emitted(x) for x in arguments]
    return fast.pooled_by_slices(equation, arrays, forms) or bind(equation, arrays)


def _literal(variable: Value) -> np.ndarray:
    """Returns a number in the program as a NumPy scalar, which nothing that is computed from the input ever is."""
    return np.asarray(variable.val, variable.aval.dtype)


def _is_fixed(value: Any) -> bool:
    """Whether a value is the same for every input of the network."""
    return isinstance(value, Known) or (isinstance(value, np.ndarray) and value.ndim == 0)


def _known_outputs(equation: Equation, inputs: list[Any]) -> list[Known]:
    known = tuple(x for x in inputs if isinstance(x, Known))
    literals = [None if isinstance(x, Known) else x.tobytes() for x in inputs]

    def output(*arrays: Array, n: int) -> Array:
        given = iter(arrays)
        return bind(equation, [next(given) if isinstance(x, Known) else x for x in inputs])[n]

    spread = {}
    if equation.primitive.name == 'broadcast_in_dim' and len(inputs) == 1:
        spread = {'source': inputs[0], 'dimensions': equation.params['broadcast_dimensions']}
    description = (equation.primitive.name, equation.params, literals)
    return [
        Known(functools.partial(output, n=n), known, v.aval, *description, n, **spread)
        for n, v in enumerate(equation.outvars)
    ]


def _spread(value: Known, constant: Constant) -> Array:
    if value.source is None:
        return constant(value)
    return lax.broadcast_in_dim(_spread(value.source, constant), value.shape, value.dimensions)


def _feature_vector(value: Any, features: int) -> Known | None:
    """Returns ``[features]`` if a known value of any rank varies along its last axis alone, else ``None``."""
    if not isinstance(value, Known):
        if _is_fixed(value):
            spec = jax.ShapeDtypeStruct((features,), value.dtype)
            return Known(functools.partial(jnp.full, features, value), (), spec, 'number', value.tobytes())
        return None
    if value.source is None:
        if value.shape == () or int(np.prod(value.shape)) == features == value.shape[-1]:
            return value.map(_flat_features, features=features)
        return None
    last = len(value.shape) - 1
    moved = [axis for axis, size in enumerate(value.source.shape) if size > 1 and value.dimensions[axis] != last]
    if moved or value.shape[-1] != features:
        return None
    inner = _feature_vector(value.source, features if np.prod(value.source.shape, dtype=int) == features else 1)
    return inner if inner is None or inner.shape == (features,) else inner.map(_flat_features, features=features)


def _flat_features(values: Array, *, features: int) -> Array:
    return jnp.broadcast_to(values.reshape(-1), (features,))


def _absorb(equation: Equation, inputs: list[Any]) -> Linear | None:
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
        # Integers divide with a remainder, and a scale of another precision would give the kernel that precision too.
        dtype = left.aval.dtype
        if not jnp.issubdtype(dtype, jnp.inexact) or left.kernel.dtype != dtype:
            return None
        return left.scaled(vector if name == 'mul' else vector.map(jnp.reciprocal))
    return left.shifted(vector if name != 'sub' else vector.map(jnp.negative))


def _linear(equation: Equation, inputs: list[Any], forms: Forms) -> Linear | None:
    """Recognises a convolution or matrix product of something unknown with something known."""
    name, params = equation.primitive.name, equation.params
    if name not in ('conv_general_dilated', 'dot_general'):
        return None
    left, kernel = inputs
    if not isinstance(kernel, Known) or isinstance(left, Known):
        return None
    aval = equation.outvars[0].aval
    if forms.dtype is not None:
        params = {**params, 'preferred_element_type': np.dtype(np.float32)}
    if name == 'dot_general':
        (left_axes, kernel_axes), (batch_axes, _) = params['dimension_numbers']
        if len(kernel.shape) != 2 or batch_axes or len(left_axes) != 1 or len(aval.shape) < 2:
            return None
        feature_axis = 1 - kernel_axes[0]
        emit = fast.with_transposed_weights if forms.transposed_weights and feature_axis == 1 else fast.as_written
    else:
        numbers = params['dimension_numbers']
        if numbers.out_spec[1] != len(aval.shape) - 1:
            return None
        feature_axis = numbers.rhs_spec[0]
        emit = fast.convolution(equation, forms)

    def emit_here(kernel: Known, constant: Constant) -> Array:
        value = left.result(constant) if isinstance(left, Linear) else left
        if forms.dtype is not None:
            value, kernel = value.astype(forms.dtype), kernel.map(lax.convert_element_type, new_dtype=forms.dtype)
        return emit(equation.primitive, params, value, kernel, constant).astype(aval.dtype)

    return Linear(emit_here, kernel, feature_axis, kernel.shape[feature_axis], None, aval)
