"""Traced programs as ONNX nodes, equation by equation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from branchy_jax.jaxprs import Equation, Program, bind, flatten
from branchy_jax.jaxprs import Value as Variable
from branchy_jax.translate.onnx_graph import Graph, Value, is_size, known
from branchy_jax.translate.onnx_primitives import COMPOSED, ON_BOOLEANS, TABLE

Values = dict[Variable, Value]
"""The value in the file of each variable of a program."""


class UntranslatableError(ValueError):
    """An equation has no ONNX form here.

    Attributes:
        equation: of the program.
        place: the submodule and the source line of the equation.
        part: start of the names of the nodes that the graph got at the time.
    """

    def __init__(self, reason: str, equation: Equation, place: str, part: str) -> None:
        super().__init__(reason)
        self.equation, self.place, self.part = equation, place, part


def start(program: Program, inputs: Iterable[Value]) -> Values:
    """Returns the values that a program starts from: its inputs and its constants."""
    constants = {v: known(array) for v, array in program.consts.items()}
    return {**constants, **dict(zip(program.inputs, inputs, strict=True))}


def translate(graph: Graph, program: Program, numbers: Iterable[int], values: Values) -> None:
    """Adds the nodes of equations to a graph, and their results to ``values``.

    Args:
        graph: to add nodes to.
        program: traced at a numeric or symbolic batch size.
        numbers: of the equations.
        values: of everything that the equations read. Equations that read known values alone are computed now.

    Raises:
        UntranslatableError: a primitive, its parameters or a dtype has no ONNX form here.
    """
    for number in numbers:
        equation = program.equations[number]
        inputs = [value_in(values, v) for v in equation.invars]
        try:
            outputs = _fold(equation, inputs) or _emit(graph, equation, inputs)
        except (ValueError, NotImplementedError) as error:  # JAX raises the latter where it needs a symbolic size
            raise UntranslatableError(str(error), equation, program.where(number), graph.prefix) from error
        values.update(zip(equation.outvars, outputs, strict=True))


def translate_function(graph: Graph, function: Callable[..., Any], *arguments: Any) -> Any:
    """Traces a function, adds its nodes to a graph, and returns its result.

    Args:
        graph: to add nodes to.
        function: of arrays.
        *arguments: pytrees of values.

    Raises:
        UntranslatableError: a primitive, its parameters or a dtype has no ONNX form here.
    """
    specs = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), arguments)
    closed, result = jax.make_jaxpr(function, return_shape=True)(*specs)
    program = flatten(closed)
    values = start(program, jax.tree.leaves(arguments))
    translate(graph, program, range(len(program.equations)), values)
    return jax.tree.unflatten(jax.tree.structure(result), [value_in(values, v) for v in program.outputs])


def value_in(values: Values, v: Variable) -> Value:
    """Returns the value of a variable or literal."""
    if not isinstance(v, jax_core.Literal):
        return values[v]
    spec: Any = v.aval
    return known(np.asarray(v.val, spec.dtype))


def _fold(equation: Equation, inputs: list[Value]) -> list[Value]:
    """Computes an equation on known values, except for repetitions: `TABLE` stores one element of those."""
    specs = [*inputs, *(v.aval for v in equation.outvars)]
    numeric = all(is_size(size) for spec in specs for size in spec.shape)
    arrays = [value.array for value in inputs if value.array is not None]
    if not inputs or not numeric or len(arrays) < len(inputs) or equation.primitive.name == 'broadcast_in_dim':
        return []
    repeated = [np.broadcast_to(array, value.shape) for array, value in zip(arrays, inputs, strict=True)]
    return [known(array) for array in bind(equation, repeated)]


def _emit(graph: Graph, equation: Equation, inputs: list[Value]) -> list[Value]:
    name = equation.primitive.name
    specs = [v.aval for v in equation.outvars]
    for dtype in (spec.dtype for spec in [*inputs, *specs]):
        if jnp.issubdtype(dtype, np.floating) and dtype != np.float32:
            raise ValueError(f'it computes in {dtype}; build the network with dtype=float32')
    if name in ON_BOOLEANS and specs[0].dtype != np.bool_:
        raise ValueError('ONNX has it for booleans alone')
    if name in COMPOSED:
        result = translate_function(graph, functools.partial(COMPOSED[name], **equation.params), *inputs)
    elif name in TABLE:
        result = TABLE[name](graph, equation.params, inputs, specs[0])
    else:
        raise ValueError('this primitive is not translated')
    return result if isinstance(result, list) else [result]
