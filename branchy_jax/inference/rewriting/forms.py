"""Equivalent forms of convolutions, matrix products and poolings, of which each backend runs another one fastest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.inference.rewriting.known import Constant, Known
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


def bind(equation: jax_core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Emits an equation as it is, on other inputs."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def as_written(equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms) -> Array:
    """Emits a convolution or matrix product with known weights in its own form."""
    if forms.dtype is None:
        return bind(equation, [left, constant(kernel)])[0]
    kernel = kernel.map(lambda k: k.astype(forms.dtype))
    params = {**equation.params, 'preferred_element_type': np.dtype(np.float32)}
    product = equation.primitive.bind(left.astype(forms.dtype), constant(kernel), **params)
    return product.astype(equation.outvars[0].aval.dtype)


def with_transposed_weights(
    equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms
) -> Array:
    """Emits a matrix product with weights ``[in, out]`` as one with weights ``[out, in]``."""
    params = equation.params
    kernel = kernel.map(jnp.transpose)
    numbers = ((params['dimension_numbers'][0][0], (1,)), ((), ()))
    kept = params['preferred_element_type']
    if forms.dtype is not None:
        left, kernel, kept = left.astype(forms.dtype), kernel.map(lambda k: k.astype(forms.dtype)), np.float32
    product = lax.dot_general(left, constant(kernel), numbers, params['precision'], preferred_element_type=kept)
    return product.astype(equation.outvars[0].aval.dtype)


def has_few_channels(equation: jax_core.JaxprEqn, most_pairs: int) -> bool:
    """Tells a convolution that `as_banded_product` can emit and that is small enough to gain by it."""
    params, shape, kernel = equation.params, equation.invars[0].aval.shape, equation.invars[1].aval.shape
    if len(shape) != 4 or params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
        return False
    plain = lax.conv_dimension_numbers(shape, kernel, DIMENSION_NUMBERS)
    dilated = any(d != 1 for d in (*params['lhs_dilation'], *params['rhs_dilation']))
    return params['dimension_numbers'] == plain and not dilated and kernel[2] * kernel[3] <= most_pairs


def as_banded_product(
    equation: jax_core.JaxprEqn, left: Array, kernel: Known, constant: Constant, forms: Forms
) -> Array:
    """Emits a convolution as a product of windows with a banded matrix."""
    params = equation.params
    band = kernel.map(functools.partial(band_matrix, stride=params['window_strides'][1]))
    if forms.dtype is not None:
        left, band = left.astype(forms.dtype), band.map(lambda b: b.astype(forms.dtype))
    product = multiply_band(
        left, constant(band), kernel_shape=kernel.shape, strides=params['window_strides'], padding=params['padding'],
        precision=params['precision'],
    )  # fmt: skip
    return product.astype(equation.outvars[0].aval.dtype)


def pooled_by_slices(equation: jax_core.JaxprEqn, inputs: list[Array], forms: Forms) -> list[Array] | None:
    """Emits a max pooling as maxima of strided slices, one axis after the other; ``None`` for anything else."""
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
