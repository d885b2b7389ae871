"""Exact rewriting of a trained network before inference: the same contract, fewer and faster operations.

Values that depend on variables alone are *known*: they are computed once, when the network is optimised, and become the
variables of the rewritten network. Equations that depend on the input are emitted again, with these changes:

- a convolution or matrix product with known weights absorbs the known per-feature scales and shifts that follow it
  (BatchNorm, biases), where no other equation reads the value in between;
- a convolution with few channels becomes a product with a banded matrix, where the backend runs that faster.

A rewritten network traces the original at every batch size and recognises its constants by their origin (`Known.key`).
Values that depend on the batch size as well, such as a class token repeated for every image, are computed inside the
program from values that do not.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from branchy_jax import calling, program
from branchy_jax.jaxprs import Equation, bind, value_of, variables_of
from branchy_jax.models.banded import DIMENSION_NUMBERS, band_matrix, multiply_band
from branchy_jax.types import Array, Variables

_NUMBERS = itertools.count()

# Of input channels times output channels. Measured inside LeNet at batch 1 and 256, with 5 and 50: 2.3 to 3 times
# faster; with 48 in ResNet as fast, with 96 in AlexNet slower by a tenth.
_MOST_PAIRS_OF_A_BANDED_PRODUCT = 64


class Known:
    """A value that depends on variables and numbers alone, computed when first asked for and then kept.

    Attributes:
        function: of the arrays of ``inputs``.
        inputs: the known values that it is computed from; none for a variable or a number.
        shape: of the value.
        dtype: of the value.
        key: equal for values that come about alike: by the same operations, on the same shapes, from the same
            variables, so that a value of one batch size is recognised at another.
        name: path of the variable, or of the one of highest rank that the value is computed from; '' without any.
        spread: for a broadcast, the axes of its input in this value; ``None`` for anything else.
        depends_on_batch: whether the value was described with a symbolic batch size.
        is_stored: whether the value becomes a variable of the rewritten network. A call computes the others:
            broadcasts, what depends on the batch size, and what depends on no variable.
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
        named = [known for known in inputs if known.name]
        self.name: str = name or max(named, key=lambda known: len(known.shape)).name if named else name
        self.spread = spread
        is_symbolic = any(map(jax.export.is_symbolic_dim, [*self.shape, *jax.tree.leaves(description)]))
        self.depends_on_batch: bool = is_symbolic or any(known.depends_on_batch for known in inputs)
        self.is_stored = bool(self.name) and spread is None and not self.depends_on_batch

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


@dataclasses.dataclass(frozen=True)
class Rewritten(calling.Model):
    """A network rewritten for inference: what `optimize` returns. A model whose variables are computed constants.

    ``init`` raises ValueError, since the variables come from `optimize`. ``apply`` evaluates, and raises ValueError for
    training, or for variables that `optimize` did not return for this network.

    Attributes:
        model: the network as it was, without weights.
        shapes: of the variables of ``model``.
        banded: whether convolutions with few channels become products with a banded matrix.
        dtype: that matrix products and convolutions multiply in; ``None`` keeps theirs. They accumulate in float32.
        names: the key of each constant and its name among the variables.
    """

    model: Any
    shapes: Any
    banded: bool
    dtype: Any = None
    names: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f'Rewritten({calling.name_of(self.model)})'

    def _init(self, key: Any, inputs: Any) -> Variables:
        raise ValueError('model: is rewritten for inference; its variables are those that optimize returned')

    def _run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        if mode.train or mode.mutable:
            raise ValueError('model: is rewritten for inference and cannot train; train the network as it was before')
        params = variables.get('params', {})
        missing = sorted({name for _, name in self.names} - set(params))
        if missing:
            raise ValueError(f'variables: have no {missing[0]}; give those that optimize returned with this network')
        constants = {key: params[name] for key, name in self.names}
        return self.evaluate(_known_variables(self.shapes, None), inputs, from_stored(constants)), {}

    def evaluate(self, known: Sequence[Known], inputs: Any, constant: Constant) -> tuple[Array, ...]:
        """Runs the rewritten program; ``constant`` hands out what it needs of the known variables."""
        traced = program.trace(self.model, self.shapes, inputs)
        uses = Counter(v for equation in traced.equations for v in variables_of(equation.invars))
        uses.update(variables_of(traced.outputs))
        given = zip(traced.inputs, [*known, *jax.tree.leaves(inputs)], strict=True)
        env: dict[Any, Any] = {**traced.consts, **dict(given)}

        def emitted(value: Any) -> Any:
            if isinstance(value, Linear):
                return value.result(constant)
            return constant(value) if isinstance(value, Known) else value

        outputs: list[Any]
        for equation, place in zip(traced.equations, traced.places, strict=True):
            arguments = [_number(v) if isinstance(v, jax_core.Literal) else env[v] for v in equation.invars]
            if arguments and all(isinstance(x, Known) for x in arguments):
                outputs = _known_outputs(equation, arguments)
            else:
                # Named, so that an error or a profile of the rewritten network shows the module.
                with jax.named_scope(place) if place else contextlib.nullcontext():
                    linear = _absorb(equation, arguments) or self._linear(equation, arguments)
                    if linear is None:
                        outputs = bind(equation, list(map(emitted, arguments)))
                    else:  # waits for what follows, unless several equations read it
                        outputs = [linear if uses[equation.outvars[0]] <= 1 else emitted(linear)]
            env.update(zip(equation.outvars, outputs, strict=True))
        return tuple(emitted(value_of(v, env)) for v in traced.outputs)

    def _linear(self, equation: Equation, inputs: list[Any]) -> Linear | None:
        """Recognises a convolution or matrix product of something unknown with something known."""
        name, params = equation.primitive.name, equation.params
        if name not in ('conv_general_dilated', 'dot_general'):
            return None
        left, kernel = inputs
        if not isinstance(kernel, Known) or isinstance(left, Known):
            return None
        aval = equation.outvars[0].aval
        emit: Any = _as_written
        if self.dtype is not None:
            params = {**params, 'preferred_element_type': np.dtype(np.float32)}
        if name == 'dot_general':
            (left_axes, kernel_axes), (batch_axes, _) = params['dimension_numbers']
            if len(kernel.shape) != 2 or batch_axes or len(left_axes) != 1 or len(aval.shape) < 2:
                return None
            feature_axis = 1 - kernel_axes[0]
        else:
            numbers = params['dimension_numbers']
            if numbers.out_spec[1] != len(aval.shape) - 1:
                return None
            feature_axis = numbers.rhs_spec[0]
            if self.banded and _suits_a_banded_product(equation):
                emit = _as_banded_product

        def emit_here(kernel: Known, constant: Constant) -> Array:
            value = left.result(constant) if isinstance(left, Linear) else left
            if self.dtype is not None:
                value, kernel = value.astype(self.dtype), kernel.map(lax.convert_element_type, new_dtype=self.dtype)
            return emit(equation.primitive, params, value, kernel, constant).astype(aval.dtype)

        return Linear(emit_here, kernel, feature_axis, None, aval)

    def asked(self, known: Sequence[Known], inputs: Any) -> list[Known]:
        """Returns the known values that the rewritten program needs for inputs of some shape.

        In place of a value that is not stored come those that it is computed from.
        """
        values: list[Known] = []

        def record(known: Known) -> Array:
            if not known.is_stored:
                return known.function(*map(record, known.inputs))
            values.append(known)
            return jnp.zeros(known.shape, known.dtype)

        jax.eval_shape(lambda inputs: self.evaluate(known, inputs, record), inputs)
        return values


def optimize(
    model: Any, variables: Variables, *, inputs: Any, dtype: Any = None, banded: bool | None = None
) -> tuple[Any, Variables]:
    """Rewrites a trained network for inference, exactly up to rounding.

    Values that depend on variables alone are computed now. BatchNorms and biases are folded into the convolutions and
    matrix products before them. On a CPU, convolutions with few channels become products with a banded matrix. Works on
    any network, since it works on the jaxpr.

    Args:
        model: a network with N exits.
        variables: trained.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`.
        dtype: ``jnp.bfloat16`` multiplies in bfloat16 and accumulates in float32; not exact.
        banded: whether convolutions with few channels become products with a banded matrix; by default on a CPU.

    Returns:
        A model with the same exits, for inference only, and its variables. Logits agree within 1e-4 in float32. The
        model runs at any batch size; one that asks for the number of rows at those of the example and 1.

    Raises:
        ValueError: not a model, or variables of another model.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> fast_model, fast_variables = optimize(model, variables, inputs=images)
        >>> first, same = model.apply(variables, images)[0], fast_model.apply(fast_variables, images)[0]
        >>> bool(jnp.allclose(first, same, atol=1e-4))
        True
    """
    banded = jax.default_backend() == 'cpu' if banded is None else banded
    stages = program.stages(model, variables, inputs)
    draft = Rewritten(calling.without_weights(model), calling.specs(variables), banded, dtype)
    known = _known_variables(draft.shapes, variables)
    # A single input is often traced otherwise than a batch, since its arrays need no spreading.
    batch = calling.specs(inputs) if stages.fixed_because else calling.with_batch(inputs, program.BATCH)
    asked = [*draft.asked(known, calling.with_batch(inputs, 1)), *draft.asked(known, batch)]
    names: dict[str, str] = {}
    params: dict[str, Array] = {}
    for key, value in {value.key: value for value in asked}.items():
        names[key] = f'{value.name} ({len(params)})' if value.name in params else value.name
        params[names[key]] = value.value
    return dataclasses.replace(draft, names=tuple(names.items())), {'params': params}


def _known_variables(shapes: Any, variables: Variables | None) -> list[Known]:
    """Returns the leaves of variables as known values; without their values where ``variables`` is ``None``."""
    known, leaves = [], jax.tree.leaves(variables)
    for n, (path, spec) in enumerate(jax.tree.leaves_with_path(shapes)):
        function = functools.partial(leaves.__getitem__, n) if leaves else _unavailable
        name = jax.tree_util.keystr(path[1:], simple=True, separator='/')
        known.append(Known(function, (), spec, 'variable', n, name=name))
    return known


def _unavailable() -> Array:
    others = 'the batches for which the network was rewritten do not'
    raise ValueError(f'inputs: a batch of this size needs weights that {others}; run the network before optimize')


def _number(literal: Any) -> Known:
    """Returns a number in the program as a known value without a name."""
    value = np.asarray(literal.val, literal.aval.dtype)
    return Known(lambda: value, (), value, 'number', value.tobytes())


def _known_outputs(equation: Equation, inputs: Sequence[Known]) -> list[Known]:
    def output(*arrays: Array, n: int) -> Array:
        return bind(equation, arrays)[n]

    spread = equation.params.get('broadcast_dimensions') if len(inputs) == 1 else None
    description = equation.primitive.name, equation.params
    return [
        Known(functools.partial(output, n=n), tuple(inputs), v.aval, *description, n, spread=spread)
        for n, v in enumerate(equation.outvars)
    ]


def _feature_vector(value: Any, features: int) -> Known | None:
    """Returns ``[features]`` if a known value of any rank varies along its last axis alone, else ``None``."""
    if not isinstance(value, Known):
        return None
    while value.spread is not None:
        (source,), last = value.inputs, len(value.shape) - 1
        if any(size != 1 and axis != last for axis, size in zip(value.spread, source.shape, strict=True)):
            return None
        value = source
    if value.shape[-1:] in ((), (1,), (features,)) and all(size == 1 for size in value.shape[:-1]):
        return value.map(_flat_features, features=features)
    return None


def _flat_features(values: Array, *, features: int) -> Array:
    return jnp.broadcast_to(values.reshape(-1), (features,))


def _absorb(equation: Equation, inputs: list[Any]) -> Linear | None:
    """Folds a known scale or shift into the linear operation before it."""
    name = equation.primitive.name
    if name not in ('add', 'add_any', 'sub', 'mul', 'div'):
        return None
    left, right = inputs
    if not isinstance(left, Linear) and name not in ('sub', 'div'):
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


def _as_written(primitive: Any, params: Any, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution or matrix product in its own form."""
    return primitive.bind(left, constant(kernel), **params)


def _as_banded_product(_: Any, params: Any, left: Array, kernel: Known, constant: Constant) -> Array:
    """Emits a convolution as a product of windows with a banded matrix."""
    band, strides = kernel.map(band_matrix, stride=params['window_strides'][1]), params['window_strides']
    kept = {name: params[name] for name in ('padding', 'precision', 'preferred_element_type')}
    return multiply_band(left, constant(band), kernel_shape=kernel.shape, strides=strides, **kept)


def _suits_a_banded_product(equation: Equation) -> bool:
    """Whether a convolution of images has few channels, and no dilation, groups or cropping; features lie last."""
    params, shape, kernel = equation.params, equation.invars[0].aval.shape, equation.invars[1].aval.shape
    groups = params['feature_group_count'], params['batch_group_count']
    if len(shape) != 4 or {*groups, *params['lhs_dilation'], *params['rhs_dilation']} != {1}:
        return False
    plain = params['dimension_numbers'] == lax.conv_dimension_numbers(shape, kernel, DIMENSION_NUMBERS)
    crops = np.min(params['padding']) < 0
    return plain and not crops and kernel[2] * kernel[3] <= _MOST_PAIRS_OF_A_BANDED_PRODUCT
