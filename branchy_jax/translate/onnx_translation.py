"""Traced programs as ONNX nodes, equation by equation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from branchy_jax.jaxprs import Equation, Program, bind, flatten
from branchy_jax.jaxprs import Value as Variable
from branchy_jax.translate.onnx_graph import Graph, Value, computed, is_size, known
from branchy_jax.translate.onnx_primitives import COMPOSED, ON_BOOLEANS, TABLE


class UntranslatableError(ValueError):
    """An equation has no ONNX form here.

    Attributes:
        equation: of the program.
        place: the named scopes and the source line of the equation.
        part: start of the names of the nodes that the graph got at the time.
    """

    def __init__(self, reason: str, equation: Equation, place: str, part: str) -> None:
        super().__init__(reason)
        self.equation, self.place, self.part = equation, place, part


def translate(graph: Graph, function: Callable[..., Any], *arguments: Any) -> Any:
    """Traces a function, adds its nodes to a graph, and returns its result.

    The nodes are named after the scopes (`jax.named_scope`) that the function computes in.

    Args:
        graph: to add nodes to.
        function: of arrays.
        *arguments: pytrees of values. What depends on known values alone is computed now.

    Raises:
        UntranslatableError: a primitive, its parameters or a dtype has no ONNX form here.
    """
    specs = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), arguments)
    closed, result = jax.make_jaxpr(function, return_shape=True)(*specs)
    outputs = _run(graph, flatten(closed), jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(result), outputs)


def _run(graph: Graph, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Adds the nodes of a program, and returns its results."""
    values: dict[Variable, Value] = {v: known(array) for v, array in program.consts.items()}
    values.update(zip(program.inputs, inputs, strict=True))

    def read(v: Variable) -> Value:
        if not isinstance(v, jax_core.Literal):
            return values[v]
        spec: Any = v.aval
        return known(np.asarray(v.val, spec.dtype))

    around = graph.prefix
    for number, equation in enumerate(program.equations):
        graph.prefix = f'{program.places[number]}/' if program.places[number] else around
        arguments = [read(v) for v in equation.invars]
        try:
            outputs = _fold(equation, arguments) or _emit(graph, equation, arguments)
        except UntranslatableError:  # of an equation within this one
            raise
        except (ValueError, NotImplementedError) as error:  # JAX raises the latter where it needs a symbolic size
            raise UntranslatableError(str(error), equation, program.where(number), graph.prefix) from error
        values.update(zip(equation.outvars, outputs, strict=True))
    graph.prefix = around
    return [read(v) for v in program.outputs]


def _fold(equation: Equation, inputs: list[Value]) -> list[Value]:
    """Computes an equation on known values, except for repetitions: `TABLE` stores one element of those."""
    specs = [*inputs, *(v.aval for v in equation.outvars)]
    fixed = all(is_size(size) for spec in specs for size in spec.shape) and all(v.array is not None for v in inputs)
    if not inputs or not fixed or equation.primitive.name == 'broadcast_in_dim':
        return []
    arrays: list[Any] = [value.array for value in inputs]  # keys of random numbers cannot be repeated
    whole = [x if x.shape == v.shape else np.broadcast_to(x, v.shape) for x, v in zip(arrays, inputs, strict=True)]
    return [known(array) for array in bind(equation, whole)]


def _emit(graph: Graph, equation: Equation, inputs: list[Value]) -> list[Value]:
    name = equation.primitive.name
    specs = [v.aval for v in equation.outvars]
    for dtype in (spec.dtype for spec in [*inputs, *specs]):
        if jnp.issubdtype(dtype, np.floating) and dtype != np.float32:
            raise ValueError(f'it computes in {dtype}; build the network with dtype=float32')
    if name in ON_BOOLEANS and specs[0].dtype != np.bool_:
        raise ValueError('ONNX has it for booleans alone')
    if name == 'cond':
        return _choose(graph, equation.params['branches'], inputs, specs)
    composed = COMPOSED.get(name)
    result = composed and translate(graph, functools.partial(composed, **equation.params), *inputs)
    if result is None and name not in TABLE:
        raise ValueError('this primitive is not translated; compute it by others, or export StableHLO')
    if result is None:
        result = TABLE[name](graph, equation.params, inputs, specs[0])
    return result if isinstance(result, list) else [result]


def _choose(graph: Graph, branches: Sequence[Any], inputs: list[Value], specs: list[Any]) -> list[Value]:
    """Adds a conditional. Each branch is a graph of its own, whose nodes run only if the branch is chosen."""
    if len(branches) != 2:
        raise ValueError('it chooses among more than two branches')
    (chosen, *operands), names = inputs, [graph.fresh('If') for _ in specs]
    bodies = {}
    for place, branch in zip(('else_branch', 'then_branch'), branches, strict=True):  # in the order of 0 and 1
        body = Graph(graph)
        outputs = _run(body, flatten(branch), operands)
        bodies[place] = body.finish(graph.fresh(place), dict(zip(names, outputs, strict=True)))
    graph.node('If', graph.cast(graph.read(chosen), np.bool_), outputs=names, **bodies)
    return [computed(name, spec.shape, spec.dtype) for name, spec in zip(names, specs, strict=True)]
