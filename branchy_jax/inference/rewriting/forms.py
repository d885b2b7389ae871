"""Equivalent forms of convolutions, matrix products and poolings; each backend runs another form fastest."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from branchy_jax.inference.rewriting.known import Constant, Known
from branchy_jax.jaxprs import Equation
from branchy_jax.models.banded import DIMENSION_NUMBERS, band_matrix, multiply_band
from branchy_jax.types import Array

Params = dict[str, Any]
"""Of a convolution or matrix product, as its equation holds them."""


# Measured inside LeNet, AlexNet and ResNet at batch 1: up to 200 pairs 1.1 to 4 times faster, from 256 on slower.
_MOST_CHANNEL_PAIRS_ON_CPU = 200
# Likewise up to 16 channels and features 1.1 to 2 times faster on one core, and on two with `ALL_CORES` or `ONE_CORE`.
# Compiled with neither, XLA shares the last of them among several cores as they are written, but not when wider.
_MOST_PAIRS_TOGETHER_ON_CPU = 256


@dataclasses.dataclass(frozen=True)
class Forms:
    """Which equivalent forms to emit.

    Attributes:
        most_pairs_together: a convolution becomes one that computes several neighbouring pixels as features of one, if
            its input channels times its output channels are at most this many, and these pixels fill what the processor
            multiplies at once; 0: never.
        most_channel_pairs: any other convolution becomes a product with a banded matrix if it has at most this many
            such pairs; 0: never.
        sliced_pooling: max pooling as maxima of strided slices.
        transposed_weights: matrix products with weights stored as ``[out, in]``, whose rows the dot products of a
            single image read in order.
        dtype: that matrix products and convolutions multiply in; ``None`` keeps theirs. They accumulate in float32.
    """

    most_pairs_together: int = 0
    most_channel_pairs: int = 0
    sliced_pooling: bool = False
    transposed_weights: bool = False
    dtype: Any = None


def default_forms(dtype: Any = None, *, platform: str | None = None) -> Forms:
    """Returns the forms that a platform runs fastest; by default this process's backend."""
    if (platform or jax.default_backend()) != 'cpu':
        return Forms(dtype=dtype)
    most = _MOST_PAIRS_TOGETHER_ON_CPU, _MOST_CHANNEL_PAIRS_ON_CPU
    return Forms(*most, sliced_pooling=True, transposed_weights=True, dtype=dtype)


def as_written(primitive: jax_core.Primitive, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution or matrix product with known weights in its own form."""
    return primitive.bind(left, constant(kernel), **params)


def with_transposed_weights(_: Any, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a matrix product with weights ``[in, out]`` as one with weights ``[out, in]``."""
    numbers = ((params['dimension_numbers'][0][0], (1,)), ((), ()))
    weights, kept = constant(kernel.map(jnp.transpose)), params['preferred_element_type']
    return lax.dot_general(left, weights, numbers, params['precision'], preferred_element_type=kept)


def convolution(equation: Equation, forms: Forms) -> Callable[..., Array]:
    """Returns what emits a convolution in the form of these that suits it."""
    if not _is_plain(equation):
        return as_written
    _, _, channels, features = equation.invars[1].aval.shape
    pairs = channels * features
    if pairs <= forms.most_pairs_together and (pixels := _pixels_together(equation)) > 1:
        return functools.partial(as_wider_convolution, pixels=pixels)
    return as_banded_product if pairs <= forms.most_channel_pairs else as_written


def _is_plain(equation: Equation) -> bool:
    """Tells an undilated, ungrouped convolution of images that crops none of them, features last."""
    params, shape, kernel = equation.params, equation.invars[0].aval.shape, equation.invars[1].aval.shape
    groups = params['feature_group_count'], params['batch_group_count']
    if len(shape) != 4 or {*groups, *params['lhs_dilation'], *params['rhs_dilation']} != {1}:
        return False
    plain = lax.conv_dimension_numbers(shape, kernel, DIMENSION_NUMBERS)
    return params['dimension_numbers'] == plain and min(itertools.chain(*params['padding'])) >= 0


def _pixels_together(equation: Equation) -> int:
    """Returns how many neighbouring pixels fill what a CPU multiplies at once; 1 where none do.

    XLA:CPU hands convolutions of more than 16 channels or features to YNNPACK, which was fastest with 32 features, or
    64 if the channels cannot be taken in pairs. Each pixel adds zeros to the kernel.
    """
    _, columns, channels, features = equation.invars[1].aval.shape
    at_once = 64 if channels % 2 and channels > 1 else 32
    pixels, rest = divmod(at_once, features)
    width, stride = equation.outvars[0].aval.shape[2], equation.params['window_strides'][1]
    return pixels if rest == 0 and pixels <= min(8, width) and stride < columns else 1


def as_wider_convolution(
    primitive: jax_core.Primitive, params: Params, left: Array, kernel: Known, constant: Constant, *, pixels: int
) -> Array:
    """Emits a convolution as one of fewer, wider windows, whose features are those of several pixels side by side."""
    (down, along), (rows, (before, after)) = params['window_strides'], params['padding']
    batch, _, width, _ = left.shape
    _, columns, _, features = kernel.shape
    width_out = (width + before + after - columns) // along + 1
    blocks = -(-width_out // pixels)
    missing = along * (blocks * pixels - 1) + columns - (width + before + after)  # of the last block
    edges = rows, (before, after + max(missing, 0))
    wider = {**params, 'window_strides': (down, along * pixels), 'padding': edges}
    product = primitive.bind(left, constant(kernel.map(_side_by_side, pixels=pixels, stride=along)), **wider)
    return product.reshape(batch, product.shape[1], blocks * pixels, features)[:, :, :width_out]


def _side_by_side(kernel: Array, *, pixels: int, stride: int) -> Array:
    """Spreads ``[kh, kw, I, O]`` into ``[kh, kw + stride · (pixels - 1), I, pixels · O]``."""
    reach = stride * (pixels - 1)
    padded = jnp.pad(kernel, ((0, 0), (reach, reach), (0, 0), (0, 0)))
    starts = range(reach, -1, -stride)
    return jnp.concatenate([padded[:, start : start + kernel.shape[1] + reach] for start in starts], axis=3)


def as_banded_product(_: Any, params: Params, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution as a product of windows with a banded matrix."""
    band, strides = kernel.map(band_matrix, stride=params['window_strides'][1]), params['window_strides']
    kept = {name: params[name] for name in ('padding', 'precision', 'preferred_element_type')}
    return multiply_band(left, constant(band), kernel_shape=kernel.shape, strides=strides, **kept)


def pooled_by_slices(equation: Equation, inputs: list[Array], forms: Forms) -> list[Array] | None:
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
