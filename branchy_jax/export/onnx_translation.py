"""Traced programs as ONNX nodes, equation by equation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from branchy_jax.export.onnx_graph import AnySize, Scope, Size, Spec, Value, is_size, known
from branchy_jax.export.onnx_primitives import TABLE
from branchy_jax.models.attached.program import bind
from branchy_jax.types import spec_of

TRACED_BATCH = 2
"""Images that programs of any batch are traced for; and again for one more."""


class Unsupported(ValueError):
    """A primitive that has no ONNX form here.

    Attributes:
        primitive: its name.
    """

    def __init__(self, primitive: str, reason: str) -> None:
        super().__init__(reason)
        self.primitive = primitive


def translate(
    scope: Scope, jaxpr: jax_core.ClosedJaxpr, inputs: Sequence[Value], larger: jax_core.ClosedJaxpr | None = None
) -> list[Value]:
    """Adds the nodes of a traced function to a graph.

    Args:
        scope: the graph.
        jaxpr: without nested calls.
        inputs: one for each argument; what depends on known values alone is computed now.
        larger: the same function traced for one image more than ``jaxpr``, which was traced for `TRACED_BATCH`: axes in
            which the two differ are of any size.

    Returns:
        What the function returns.

    Raises:
        Unsupported: a primitive or a dtype has no ONNX form here, or the function does more than grow with the batch.
    """
    program = jaxpr.jaxpr
    specs = _specs(program, program if larger is None else larger.jaxpr)
    uses = Counter(v for equation in program.eqns for v in equation.invars if not isinstance(v, jax_core.Literal))
    uses.update(v for v in program.outvars if not isinstance(v, jax_core.Literal))
    env = dict(zip(program.constvars, map(known, jaxpr.consts), strict=True))
    env.update(zip(program.invars, inputs, strict=True))

    def value_of(v: Any) -> Value:
        return known(np.asarray(v.val, spec_of(v).dtype)) if isinstance(v, jax_core.Literal) else env[v]

    for equation in program.eqns:
        taken, results = [value_of(v) for v in equation.invars], [specs[v] for v in equation.outvars]
        once = [not isinstance(v, jax_core.Literal) and uses[v] == 1 for v in equation.invars]
        outputs = (
            _fold(equation, taken, results)
            or _with_bias(scope, equation, taken, once)
            or _emit(scope, equation, taken, results)
        )
        env.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(v) for v in program.outvars]


def _specs(program: jax_core.Jaxpr, larger: jax_core.Jaxpr) -> dict[Any, Spec]:
    """Returns shapes and types of all results, in which axes that grow with the batch are marked."""
    found = {}
    for equation, other in itertools.zip_longest(program.eqns, larger.eqns):
        name = (equation or other).primitive.name
        if equation is None or other is None or equation.primitive is not other.primitive:
            raise Unsupported(name, 'the program has it for some sizes of the batch only')
        values = [[v.val for v in e.invars if isinstance(v, jax_core.Literal)] for e in (equation, other)]
        if not all(map(np.array_equal, *values)):
            raise Unsupported(name, 'it computes with the size of the batch')
        for here, there in zip(equation.outvars, other.outvars, strict=True):
            sizes = zip(here.aval.shape, there.aval.shape, strict=True)
            found[here] = Spec(tuple(_marked(name, *pair) for pair in sizes), here.aval.dtype)
    return found


def _marked(name: str, size: int, larger: int) -> Size:
    if size == larger:
        return size
    if size != TRACED_BATCH * (larger - size):
        raise Unsupported(name, f'for {TRACED_BATCH} and {TRACED_BATCH + 1} images it has {size} and {larger} values')
    return AnySize(larger - size)


def _fold(equation: jax_core.JaxprEqn, inputs: list[Value], results: list[Spec]) -> list[Value]:
    """Computes what depends on known values alone; repetitions are left as they are."""
    sizes = [size for shape in (*(v.shape for v in inputs), *(spec.shape for spec in results)) for size in shape]
    lazy = ('broadcast_in_dim', 'iota')
    if equation.primitive.name in lazy or not all(v.is_known for v in inputs) or not all(map(is_size, sizes)):
        return []
    arrays = [np.broadcast_to(value.known_array, value.shape) for value in inputs]
    return [known(array) for array in bind(equation, arrays)]


def _with_bias(scope: Scope, equation: jax_core.JaxprEqn, inputs: list[Value], once: list[bool]) -> list[Value]:
    """Lets a convolution or matrix product add a known value per feature that follows it."""
    if equation.primitive.name not in ('add', 'add_any'):
        return []
    for (product, only), other in zip(zip(inputs, once, strict=True), reversed(inputs), strict=True):
        if not only or product.is_known or not other.is_known or len(product.shape) < 2:
            continue
        feature = product.order[1]
        fits = all(size == 1 for axis, size in enumerate(other.held) if axis != feature)
        if fits and is_size(product.shape[feature]):
            bias = np.broadcast_to(other.known_array.reshape(-1), (product.shape[feature],))
            if scope.add_bias(product.name, bias):
                return [product]
    return []


def _emit(scope: Scope, equation: jax_core.JaxprEqn, inputs: list[Value], results: list[Spec]) -> list[Value]:
    name = equation.primitive.name
    for dtype in (*(value.dtype for value in inputs), *(spec.dtype for spec in results)):
        if jnp.issubdtype(dtype, np.floating) and dtype != np.float32:
            raise Unsupported(name, f'computes in {dtype}; build the network with dtype=float32')
    if name not in TABLE:
        raise Unsupported(name, 'it is not among ' + ', '.join(sorted(TABLE)))
    try:
        found = TABLE[name](scope, equation.params, inputs, results[0])
    except ValueError as error:
        raise Unsupported(name, str(error)) from error
    return found if isinstance(found, list) else [found]
