"""Values that a rewriting knows already, and linear operations that wait for what follows them."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from branchy_jax.types import Array

_NUMBERS = itertools.count()


class Known:
    """A value that depends on variables alone, computed when first asked for and then kept.

    Attributes:
        function: of the arrays of ``inputs``.
        inputs: the known values that it is computed from; none for a variable.
        shape: of the value.
        dtype: of the value.
        key: equal for values that come about alike: by the same operations, on the same shapes, from the same
            variables, so that a value of one batch size is recognised at another.
        name: path of the variable, or of the one of highest rank that the value is computed from.
        spread: for a broadcast, the axes of its input in this value; ``None`` for anything else. A broadcast is emitted
            anew, so that no constant of the size of a batch is stored.
        depends_on_batch: whether the value was described with a symbolic batch size.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        inputs: 'tuple[Known, ...]',
        spec: Any,
        *description: Any,
        name: str = '',
        spread: tuple[int, ...] | None = None,
    ) -> None:
        self.function, self.inputs, self.shape, self.dtype = function, inputs, spec.shape, spec.dtype
        self.key: Any = _key_of(description, [known.key for known in inputs], self.shape, self.dtype)
        self.name: str = name or (max(inputs, key=lambda known: len(known.shape)).name if inputs else 'number')
        self.spread = spread
        is_symbolic = any(map(jax.export.is_symbolic_dim, [*self.shape, *jax.tree.leaves(description)]))
        self.depends_on_batch: bool = is_symbolic or any(known.depends_on_batch for known in inputs)

    @functools.cached_property
    def value(self) -> Array:
        """The array itself."""
        with jax.ensure_compile_time_eval():
            return self.function(*(known.value for known in self.inputs))

    def map(self, function: Callable[..., Array], *others: 'Known', **options: Any) -> 'Known':
        """Returns the known result of a function of known values.

        Args:
            function: which its name tells from others: no lambda.
            *others: known values that it takes besides.
            **options: of the function.
        """
        inputs = (self, *others)
        run = functools.partial(function, **options)
        spec = jax.eval_shape(run, *(jax.ShapeDtypeStruct(known.shape, known.dtype) for known in inputs))
        return Known(run, inputs, spec, function.__name__, options)


def _key_of(*parts: Any) -> str:
    text = repr(parts)
    if ' at 0x' in text:  # a function, say, whose text shows no value: equal to nothing else
        text += f' {next(_NUMBERS)}'
    return hashlib.sha256(text.encode()).hexdigest()


Constant = Callable[[Known], Array]
"""Hands out a known value inside the rewritten program: records it when optimising, replays it afterwards."""


def from_stored(stored: Mapping[str, Array]) -> Constant:
    """Returns what hands out stored values, and computes the others from these inside the program."""
    given = dict(stored)

    def constant(known: Known) -> Array:
        if known.key not in given:
            given[known.key] = known.function(*map(constant, known.inputs))
        return given[known.key]

    return constant


@dataclasses.dataclass(frozen=True)
class Linear:
    """A convolution or matrix product with known weights that has not been emitted yet.

    Attributes:
        emit: ``(kernel, constant) → array``.
        kernel: known weights.
        feature_axis: axis of the output features in ``kernel``; in the result it is the last one.
        shift: known ``[features]`` to add, or ``None``.
        aval: shape and dtype of the result.
    """

    emit: Callable[[Known, Constant], Array]
    kernel: Known
    feature_axis: int
    shift: Known | None
    aval: Any

    @property
    def features(self) -> int:
        """How many output features there are."""
        return self.kernel.shape[self.feature_axis]

    def scaled(self, scale: Known) -> 'Linear':
        """Returns the same with every feature multiplied."""
        others = tuple(axis for axis in range(len(self.kernel.shape)) if axis != self.feature_axis)
        kernel = self.kernel.map(_multiply_features, scale, others=others)
        shift = None if self.shift is None else self.shift.map(jnp.multiply, scale)
        return dataclasses.replace(self, kernel=kernel, shift=shift)

    def shifted(self, shift: Known) -> 'Linear':
        """Returns the same with a value added to every feature."""
        return dataclasses.replace(self, shift=shift if self.shift is None else self.shift.map(jnp.add, shift))

    def result(self, constant: Constant) -> Array:
        """Emits the operation."""
        product = self.emit(self.kernel, constant)
        if self.shift is None:
            return product
        return product + jnp.expand_dims(constant(self.shift).astype(product.dtype), range(product.ndim - 1))


def _multiply_features(kernel: Array, scale: Array, *, others: tuple[int, ...]) -> Array:
    return kernel * jnp.expand_dims(scale, others)
