"""Jaxprs as flat lists of equations: inlining, running, multiply-accumulates, source lines."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jax_core

Value = Any
"""A variable of a jaxpr, or a literal in it."""

Equation = Any
"""A `jax.extend.core.JaxprEqn`, whose values have shapes and dtypes that its type does not declare."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jaxpr without nested calls.

    Attributes:
        inputs: variables of the arguments' leaves.
        consts: values of variables that are neither inputs nor computed.
        equations: in the order of computation.
        places: for each equation the path of the submodule that it comes from.
        outputs: one value per result.
    """

    inputs: tuple[Value, ...]
    consts: Mapping[Value, Any]
    equations: tuple[Equation, ...]
    places: tuple[str, ...]
    outputs: tuple[Value, ...]

    def where(self, number: int) -> str:
        """Returns the submodule and the source line of an equation."""
        line = _source_line(self.equations[number])
        return ', '.join(filter(None, [self.places[number], line])) or 'an unknown place'

    def read_by(self, numbers: Iterable[int], results: Iterable[Value]) -> set[Value]:
        """Returns the variables that equations read, and those among results."""
        return set(variables_of([*(v for number in numbers for v in self.equations[number].invars), *results]))


def flatten(closed: jax_core.ClosedJaxpr, *, derivatives: bool = False) -> Program:
    """Inlines the calls of a jaxpr that only group equations: jit, remat, and unless asked custom derivatives."""
    consts: dict[Value, Any] = {}
    equations: list[Equation] = []
    places: list[str] = []

    def visit(inner: jax_core.ClosedJaxpr, arguments: Sequence[Value], place: str) -> list[Value]:
        env: dict[Value, Value] = dict(zip(inner.jaxpr.invars, arguments, strict=True))
        for variable, value in zip(inner.jaxpr.constvars, inner.consts, strict=True):
            env[variable] = jax_core.Var(variable.aval)
            consts[env[variable]] = value

        def read(values: Iterable[Value]) -> list[Value]:
            return [v if isinstance(v, jax_core.Literal) else env[v] for v in values]

        for equation in inner.jaxpr.eqns:
            inputs = read(equation.invars)
            here = '/'.join(filter(None, [place, str(equation.source_info.name_stack)]))
            if equation.primitive.name in (_CALLS if derivatives else (*_CALLS, *_DERIVATIVES)):
                outputs = visit(bodies(equation)[0], inputs, here)
            else:
                outputs = [jax_core.Var(v.aval) for v in equation.outvars]
                equations.append(equation.replace(invars=inputs, outvars=outputs))
                places.append(here)
            env.update(zip(equation.outvars, outputs, strict=True))
        return read(inner.jaxpr.outvars)

    inputs = [jax_core.Var(v.aval) for v in closed.jaxpr.invars]
    outputs = visit(closed, inputs, '')
    return Program(tuple(inputs), consts, tuple(equations), tuple(places), tuple(outputs))


_CALLS = ('jit', 'closed_call', 'checkpoint', 'remat2')
_DERIVATIVES = ('custom_jvp_call', 'custom_vjp_call')


def bodies(equation: Equation) -> list[jax_core.ClosedJaxpr]:
    """Returns the jaxprs of a call, loop or conditional; the condition of a loop only says when all rows are done."""
    held = [equation.params[key] for key in ('jaxpr', 'body_jaxpr', 'call_jaxpr') if key in equation.params]
    closed = [jax_core.ClosedJaxpr(body, body.constvars) if isinstance(body, jax_core.Jaxpr) else body for body in held]
    return [*closed, *equation.params.get('branches', ())]


def nested(equation: Equation) -> Iterator[Equation]:
    """Yields the equations of an equation's bodies at any depth, then the equation itself."""
    for body in bodies(equation):
        for inner in body.eqns:
            yield from nested(inner)
    yield equation


def bind(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Emits an equation on other inputs."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def variables_of(values: Iterable[Value]) -> list[Value]:
    """Returns the values that are not literals."""
    return [v for v in values if not isinstance(v, jax_core.Literal)]


def value_of(v: Value, env: Mapping[Value, Any]) -> Any:
    """Returns what a value stands for, given what its variables stand for."""
    return v.val if isinstance(v, jax_core.Literal) else env[v]


def _source_line(equation: Equation) -> str:
    """Returns file and line of the user's code that an equation comes from; '' where only libraries are on the way."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in ('/site-packages/', '/branchy_jax/', '<frozen', '/lib/python')):
            return f'{frame.file_name}:{frame.line_num}'
    return ''


def count_macs(equations: Iterable[Equation]) -> int:
    """Counts the multiply-accumulates (MACs) of equations.

    Matrix products and convolutions count, zero padding included, but not the zeros that a transposed convolution puts
    between pixels. A ``cond`` counts as its most expensive branch and a ``scan`` as its length times its body.

    Raises:
        ValueError: a ``while_loop``, whose trip count no jaxpr tells.
    """
    return sum(_count(equation) for equation in equations)


def _count(equation: Equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == 'conv_general_dilated':
        return _convolution_macs(equation)
    if name == 'while':
        raise ValueError('model: holds a while_loop, whose trip count is unknown; count the MACs of its body instead')
    if name == 'cond':
        return max(count_macs(branch.eqns) for branch in params['branches'])
    macs = sum(count_macs(body.eqns) for body in bodies(equation))
    return macs * params['length'] if name == 'scan' else macs


def _convolution_macs(equation: Equation) -> int:
    """Counts the taps of all windows, those on padding included, those on zeros between pixels not."""
    params, numbers = equation.params, equation.params['dimension_numbers']
    image, kernel, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    taps = 1
    for n, (low, _) in enumerate(params['padding']):
        length, window = image[numbers.lhs_spec[2 + n]], kernel[numbers.rhs_spec[2 + n]]
        spacing = params['lhs_dilation'][n]
        starts = np.arange(out[numbers.out_spec[2 + n]]) * params['window_strides'][n] - low
        pixels = np.add.outer(starts, np.arange(window) * params['rhs_dilation'][n])
        inside = (pixels >= 0) & (pixels < length * spacing) & (pixels % spacing == 0)
        taps *= pixels.size if spacing == 1 else int(inside.sum())
    return out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]] * taps
