"""Values that a rewriting knows already, and linear operations that wait for what follows them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from branchy_jax.types import Array


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
