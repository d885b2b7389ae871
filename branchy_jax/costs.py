"""Multiply-accumulates (MACs) per stage and head, counted from the jaxpr.

``compiled.cost_analysis()`` is of no use here: on a GPU a convolution is a custom call that it counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.extend import core as jax_core

from branchy_jax.types import Array, input_specs, spec_of


@struct.dataclass
class StageCosts:
    """Cost of one image in every stage and every head.

    Attributes:
        stages: ``[N]`` cost of trunk stage i alone.
        exits: ``[N]`` cost of head i alone.
    """

    stages: np.ndarray
    exits: np.ndarray

    @property
    def to_exit(self) -> np.ndarray:
        """``[N]`` cost of an image that leaves at exit n: stages and heads 0…n, since every head on the way runs."""
        return np.cumsum(np.asarray(self.stages) + np.asarray(self.exits))

    @property
    def trunk(self) -> float:
        """Cost of the network without its side branches: all stages and the last head."""
        return float(np.sum(self.stages) + self.exits[-1])


def expected_cost(costs: StageCosts, exit_fractions: Array) -> float:
    r"""Computes the mean cost of an image, heads included: :math:`\sum_n f_n \sum_{i \le n} (s_i + h_i)`.

    Args:
        costs: per stage and head.
        exit_fractions: ``[N]``.

    Example:
        >>> expected_cost(StageCosts(stages=[10, 90], exits=[1, 1]), [0.5, 0.5])
        56.5
    """
    return float(np.dot(np.asarray(exit_fractions, np.float64), costs.to_exit))


def mac_limit(costs: StageCosts, exit_fractions: Array) -> float:
    r"""Computes how many times less early exit costs than the trunk alone: the most that any executor can gain.

    .. math:: \frac{\sum_i s_i + h_N}{\sum_n f_n \sum_{i \le n} (s_i + h_i)}

    The *time limit*, in milliseconds, is ``expected_cost(times.best(), exit_fractions)`` with times from
    `branchy_jax.inference.segment_times`.

    Args:
        costs: per stage and head, in MACs.
        exit_fractions: ``[N]``.

    Example:
        >>> round(mac_limit(StageCosts(stages=[10, 90], exits=[1, 1]), [0.5, 0.5]), 3)
        1.788
    """
    return costs.trunk / expected_cost(costs, exit_fractions)


def count_macs(model: Any, image_shape: Any) -> StageCosts:
    """Counts the multiply-accumulates that one image needs in each stage and head of a `BranchyNet`.

    Matrix products and convolutions count, zero padding included, but not the zeros that a transposed convolution puts
    between and around its pixels; pooling, normalisation and activations, which
    multiply nothing by a weight matrix, do not.

    Args:
        model: anything with ``init``, ``apply``, ``run_stage``, ``run_exit`` and ``num_exits``.
        image_shape: ``(H, W, C)`` of a float image; of other inputs a `jax.ShapeDtypeStruct` for each array, without B.

    Returns:
        `StageCosts` in MACs.

    Example:
        >>> import branchy_jax as bj
        >>> bj.costs.count_macs(bj.models.create('b-lenet'), (28, 28, 1)).stages
        array([ 112500, 1026730])
    """
    hidden = input_specs(image_shape, 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), hidden)
    stages, exits = [], []
    for n in range(model.num_exits):

        def run(variables: Any, hidden: Any, method: str, n: int = n) -> Any:
            return model.apply(variables, hidden, n, method=method)

        stages.append(macs_of(lambda v, h: run(v, h, 'run_stage'), variables, hidden))
        hidden = jax.eval_shape(lambda v, h: run(v, h, 'run_stage'), variables, hidden)
        exits.append(macs_of(lambda v, h: run(v, h, 'run_exit'), variables, hidden))
    return StageCosts(stages=np.array(stages), exits=np.array(exits))


def macs_of(function: Callable[..., Any], *args: Any) -> int:
    """Counts the MACs of one call of a traceable function.

    A ``cond`` counts as its most expensive branch and a ``scan`` as its length times its body.

    Args:
        function: any JAX function.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: the function holds a ``while_loop``, whose trip count no jaxpr tells.

    Example:
        >>> macs_of(lambda a, b: a @ b, np.ones((2, 3)), np.ones((3, 5)))
        30
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: jax_core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: jax_core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = spec_of(equation.invars[0]).shape
        return math.prod(spec_of(equation.outvars[0]).shape) * math.prod(left[axis] for axis in contracted)
    if name == 'conv_general_dilated':
        return _convolution_macs(equation)
    if name == 'while':
        raise ValueError('function: its jaxpr holds a while_loop, whose trip count is unknown; count its body instead')
    if name == 'cond':
        return max(_count(branch.jaxpr) for branch in params['branches'])
    inner = [value for value in params.values() if isinstance(value, (jax_core.Jaxpr, jax_core.ClosedJaxpr))]
    macs = sum(_count(value.jaxpr if isinstance(value, jax_core.ClosedJaxpr) else value) for value in inner)
    return macs * params['length'] if name == 'scan' else macs


def _convolution_macs(equation: jax_core.JaxprEqn) -> int:
    """Counts what each output multiplies: all taps of its window, padding included, but zeros put between pixels."""
    params, numbers = equation.params, equation.params['dimension_numbers']
    image, kernel, out = (spec_of(v).shape for v in (*equation.invars, *equation.outvars))
    lengths, windows, counts = (
        [shape[place] for place in spec[2:]]
        for shape, spec in ((image, numbers.lhs_spec), (kernel, numbers.rhs_spec), (out, numbers.out_spec))
    )
    before = [low for low, _ in params['padding']]
    spacing = (params['window_strides'], before, params['lhs_dilation'], params['rhs_dilation'])
    taps = math.prod(map(_taps, lengths, windows, counts, *spacing))
    return out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]] * taps


def _taps(length: int, window: int, count: int, stride: int, padding: int, spacing: int, reach: int) -> int:
    """Counts the taps of all windows along one axis; where pixels are spaced out, those that fall on a pixel."""
    if spacing == 1:
        return count * window
    places = np.add.outer(np.arange(count) * stride - padding, np.arange(window) * reach)
    return int(((places >= 0) & (places < length * spacing) & (places % spacing == 0)).sum())
