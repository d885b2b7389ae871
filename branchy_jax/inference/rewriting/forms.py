"""Equivalent forms of convolutions, matrix products and poolings, of which each backend runs another one fastest."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.inference.rewriting.known import Constant, Known
from branchy_jax.models.banded import DIMENSION_NUMBERS, band_matrix, multiply_band
from branchy_jax.types import Array, spec_of

Params = dict[str, Any]
"""Of a convolution or matrix product, as its equation holds them."""


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


def as_written(primitive: jax_core.Primitive, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution or matrix product with known weights in its own form."""
    return primitive.bind(left, constant(kernel), **params)


def with_transposed_weights(_: Any, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a matrix product with weights ``[in, out]`` as one with weights ``[out, in]``."""
    numbers = ((params['dimension_numbers'][0][0], (1,)), ((), ()))
    weights, kept = constant(kernel.map(jnp.transpose)), params['preferred_element_type']
    return lax.dot_general(left, weights, numbers, params['precision'], preferred_element_type=kept)


def has_few_channels(equation: jax_core.JaxprEqn, most_pairs: int) -> bool:
    """Tells a convolution that `as_banded_product` can emit and that is small enough to gain by it."""
    params, shape, kernel = equation.params, spec_of(equation.invars[0]).shape, spec_of(equation.invars[1]).shape
    if len(shape) != 4 or params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
        return False
    plain = lax.conv_dimension_numbers(shape, kernel, DIMENSION_NUMBERS)
    dilated = any(d != 1 for d in (*params['lhs_dilation'], *params['rhs_dilation']))
    return params['dimension_numbers'] == plain and not dilated and kernel[2] * kernel[3] <= most_pairs


def as_banded_product(_: Any, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution as a product of windows with a banded matrix."""
    band = kernel.map(band_matrix, stride=params['window_strides'][1])
    return multiply_band(
        left, constant(band), kernel_shape=kernel.shape, strides=params['window_strides'], padding=params['padding'],
        precision=params['precision'],
    )  # fmt: skip


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
