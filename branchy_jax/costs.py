"""Multiply-accumulates (MACs) per stage and head, counted from the jaxpr.

``compiled.cost_analysis()`` does not serve: on a GPU a convolution is a custom call that it counts as nothing.
"""

import warnings
from typing import Any

import jax
import numpy as np

from branchy_jax import calling, program
from branchy_jax.types import Array, StageCosts

__all__ = ['count_macs', 'expected_cost', 'mac_limit']


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


def count_macs(model: Any, *, inputs: Any, variables: Any = None) -> StageCosts:
    """Counts the multiply-accumulates of one input in each stage and head.

    Matrix products and convolutions count, zero padding included, but not the zeros that a transposed convolution puts
    between and around its pixels; pooling, normalisation and activations, which multiply nothing by a weight matrix,
    do not. The last head is part of the last stage.

    Args:
        model: a network with N exits.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`.
        variables: of the model, or their shapes; by default those that ``init`` returns.

    Returns:
        `StageCosts` in MACs.

    Example:
        >>> import branchy_jax as bj
        >>> images = jax.ShapeDtypeStruct((1, 28, 28, 1), 'float32')
        >>> bj.costs.count_macs(bj.models.create('b-lenet'), inputs=images).stages
        array([ 112500, 1027570])
    """
    calling.check_model(model)
    if variables is None:
        shapes = calling.with_batch(inputs, 1)
        variables = jax.eval_shape(lambda key, x: calling.init(model, key, x), jax.random.key(0), shapes)
    return program.stages(model, variables, inputs).macs


def warn_if_nothing_is_saved(costs: StageCosts) -> None:
    """Warns where an early exit needs as much as the whole network, as exits inside one `jax.lax.scan` do."""
    for n, cost in enumerate(costs.to_exit[:-1]):
        if cost >= costs.trunk > 0:
            spent = f'costs {cost:,} MACs, the network without branches {costs.trunk:,.0f}: leaving there saves nothing'
            advice = 'compute later stages outside of loops that hold earlier exits, and keep heads small'
            warnings.warn(f'model: an input that leaves at exit {n} {spent}; {advice}', stacklevel=3)
