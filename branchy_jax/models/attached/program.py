"""Traced programs: a network as a flat list of equations, and the same list cut where exits leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from branchy_jax.types import Array

Value = Any
"""A variable of a jaxpr, or a literal in it."""


def bind(equation: jax_core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Emits an equation as it is, on other inputs."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def trace(function: Callable[..., Any], variables: Any, hidden: Any) -> tuple[jax_core.ClosedJaxpr, Any]:
    """Traces ``function(variables, hidden)`` to a jaxpr without nested calls.

    Args:
        function: a segment, or a whole network.
        variables: arrays or their shapes.
        hidden: arrays or their shapes.

    Returns:
        The jaxpr, over the flattened arguments, and the tree structure of the result.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(variables, hidden)
    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    flat = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*specs)
    return flat, jax.tree.structure(shapes)


def _inline(jaxpr: jax_core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, stepping into calls that only group equations (jit, custom derivatives, remat)."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, jax_core.Literal) else env[v] for v in equation.invars]
        inner = _call_body(equation)
        outputs = bind(equation, inputs) if inner is None else _inline(inner.jaxpr, inner.consts, inputs)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, jax_core.Literal) else env[v] for v in jaxpr.outvars]


def _call_body(equation: jax_core.JaxprEqn) -> jax_core.ClosedJaxpr | None:
    name, params = equation.primitive.name, equation.params
    if name in ('jit', 'pjit', 'closed_call', 'core_call'):
        return params.get('jaxpr', params.get('call_jaxpr'))
    if name in ('custom_jvp_call', 'custom_vjp_call'):
        return params['call_jaxpr']
    if name in ('checkpoint', 'remat', 'remat2'):
        return jax_core.ClosedJaxpr(params['jaxpr'], ())
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A network's program for one batch size, cut into stages.

    Attributes:
        variables: what the weights are in the program.
        inputs: what the inputs are.
        consts: variables with their values.
        equations: of each stage, those it runs: what its exit needs and no stage before has computed. What depends on
            weights alone is computed anew wherever it is needed, so that only what leads with the batch is handed on.
        carried: what each stage but the last hands on, in the order of its computation: what its own exit or a later
            stage reads.
        activations: what each exit reads, as a pytree; the last reads the network's result.
    """

    variables: tuple[Value, ...]
    inputs: tuple[Value, ...]
    consts: tuple[tuple[Value, Any], ...]
    equations: tuple[tuple[jax_core.JaxprEqn, ...], ...]
    carried: tuple[tuple[Value, ...], ...]
    activations: tuple[Any, ...]

    def run(self, n: int, weights: Sequence[Array], incoming: Sequence[Array]) -> list[Array]:
        """Runs one stage.

        Args:
            n: its number.
            weights: one for each of ``variables``.
            incoming: what stage ``n - 1`` handed on, or the inputs.

        Returns:
            What it hands on; the last stage, the leaves of the network's result.
        """
        env = dict(self.consts)
        env.update(zip(self.variables, weights, strict=True))
        env.update(zip(self.inputs if n == 0 else self.carried[n - 1], incoming, strict=True))
        for equation in self.equations[n]:
            inputs = [_value(v, env) for v in equation.invars]
            env.update(zip(equation.outvars, bind(equation, inputs), strict=True))
        last = n == len(self.equations) - 1
        return [_value(v, env) for v in (jax.tree.leaves(self.activations[-1]) if last else self.carried[n])]


def values_of(closed: jax_core.ClosedJaxpr, structure: Any) -> Any:
    """Returns what a traced function returns, as a pytree of values of its program."""
    return jax.tree.unflatten(structure, closed.jaxpr.outvars)


def cut(closed: jax_core.ClosedJaxpr, count: int, activations: tuple[Any, ...]) -> Cut:
    """Cuts a network's program at what its exits read.

    Args:
        closed: from `trace`.
        count: leaves of the network's variables.
        activations: what each exit reads, in the order of computation, as pytrees of values of the program; the last is
            the network's result.
    """
    program = closed.jaxpr
    producer = {out: n for n, equation in enumerate(program.eqns) for out in equation.outvars}
    dependent = set(program.invars[count:])
    for equation in program.eqns:
        if any(v in dependent for v in _variables(equation.invars)):
            dependent.update(equation.outvars)

    def needed(wanted: Sequence[Value], done: set[int], *, follow: Callable[[Value], bool]) -> set[int]:
        """Returns the equations that the wanted values need, beyond those done."""
        found: set[int] = set()
        waiting = [v for v in _variables(wanted) if follow(v)]
        while waiting:
            n = producer.get(waiting.pop())
            if n is not None and n not in found and n not in done:
                found.add(n)
                waiting.extend(v for v in _variables(program.eqns[n].invars) if follow(v))
        return found

    done: set[int] = set()
    own: list[set[int]] = []
    for activation in activations:
        own.append(needed(jax.tree.leaves(activation), done, follow=dependent.__contains__))
        done |= own[-1]
    stages = []
    for n, equations in enumerate(own):
        read = [v for e in equations for v in program.eqns[e].invars] + jax.tree.leaves(activations[n])
        of_weights = needed(read, set(), follow=lambda v: v not in dependent)
        stages.append(tuple(program.eqns[e] for e in sorted(equations | of_weights)))
    return Cut(
        variables=tuple(program.invars[:count]),
        inputs=tuple(program.invars[count:]),
        consts=tuple(zip(program.constvars, closed.consts, strict=True)),
        equations=tuple(stages),
        carried=_carried(program, own, activations, program.invars[count:], dependent),
        activations=activations,
    )


def in_order(closed: jax_core.ClosedJaxpr, values: Mapping[str, Any]) -> list[str]:
    """Returns the names of values of a program, each a pytree, in the order in which the program has them."""
    producer = {out: n for n, equation in enumerate(closed.jaxpr.eqns, 1) for out in equation.outvars}
    there = {
        name: max((producer.get(v, 0) for v in _variables(jax.tree.leaves(value))), default=0)
        for name, value in values.items()
    }
    return sorted(there, key=there.__getitem__)


def _carried(
    program: jax_core.Jaxpr,
    own: Sequence[set[int]],
    activations: Sequence[Any],
    inputs: Sequence[Value],
    dependent: set[Value],
) -> tuple[tuple[Value, ...], ...]:
    """Returns what each stage but the last hands on: there by then, and read by its exit or later."""
    read_by = [
        {v for e in equations for v in _variables(program.eqns[e].invars)}
        | set(_variables(jax.tree.leaves(activation)))
        for equations, activation in zip(own, activations, strict=True)
    ]
    there, carried = list(inputs), []
    for n in range(len(own) - 1):
        there += [v for e in sorted(own[n]) for v in program.eqns[e].outvars]
        reads = set(_variables(jax.tree.leaves(activations[n]))).union(*read_by[n + 1 :]) & dependent
        carried.append(tuple(v for v in there if v in reads))
    return tuple(carried)


def _variables(values: Sequence[Value]) -> list[Value]:
    return [v for v in values if not isinstance(v, jax_core.Literal)]


def _value(v: Value, env: dict[Value, Any]) -> Any:
    return v.val if isinstance(v, jax_core.Literal) else env[v]
