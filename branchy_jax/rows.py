"""Whether the rows of a batch are independent, and where the batch lies in each value of a program.

The guarantee of every executor is f(x[rows]) = f(x)[rows] for every list of rows. A program that was traced with a
symbolic batch size shows the batch in the shapes of its values; a table of primitives says which axes each one mixes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.jaxprs import Equation, Program, Value, bodies, nested
from branchy_jax.types import Array


def axes_with(v: Value, batch: Any, *, folded: bool = False) -> list[int]:
    """Returns the axes of a value that are exactly the batch, or also those into which it is folded with others."""
    return [axis for axis, size in enumerate(v.aval.shape) if _holds(size, batch) and (folded or size == batch)]


def _holds(size: Any, batch: Any) -> bool:
    return size > 0 and size % batch == 0 if isinstance(batch, int) else not isinstance(size, int)


def batch_axis(program: Program, v: Value, batch: Any) -> int:
    """Returns the axis of a value that is the batch.

    Raises:
        ValueError: the value has no axis that is the batch, or several; the message names the place.
    """
    axes = axes_with(v, batch)
    if len(axes) == 1 and len(axes_with(v, batch, folded=True)) == 1:
        return axes[0]
    number = next((n for n, equation in enumerate(program.equations) if v in equation.outvars), None)
    where = 'the inputs' if number is None else program.where(number)
    raise ValueError(
        f'a value of shape {v.aval.str_short()} at {where} is handed on past an exit and has not one row for each input'
    )


def check_rows(program: Program, numbers: Iterable[int], batch: Any) -> None:
    """Refuses a program in which one row of a batch influences another.

    Args:
        program: traced with a symbolic batch size, or at a number of which no other axis is a multiple.
        numbers: of the equations to check, which depend on the inputs.
        batch: that size.

    Raises:
        ValueError: an equation mixes the axis of the batch; the message names the place.
    """
    for number in sorted(numbers):
        mixing = _mixing(program.equations[number], batch)
        # At a number of rows a model may go through them one by one: these are tried.
        if mixing and not (mixing == 'slice' and isinstance(batch, int)):
            raise ValueError(
                f'model: the rows of a batch influence one another at {program.where(number)}: {mixing} works along '
                'the axis of the batch; every row must be computed from its own input alone (BatchNorm: use running '
                'averages in evaluation; attach(…, train=…) takes the name of a flag)'
            )


def _mixing(equation: Equation, batch: Any, *, folded: bool = False) -> str:
    """Returns the primitive with which an equation, or one inside it, mixes rows, '' where none does.

    Args:
        equation: of the program or of a loop in it.
        batch: the size of the batch.
        folded: whether to look at axes into which the batch is folded too: these may hold one row several times.
    """
    mixing = (inner.primitive.name for inner in nested(equation) if _mixes(inner, batch, folded))
    return next(mixing, '')


def _mixes(equation: Equation, batch: Any, folded: bool) -> bool:
    name = equation.primitive.name
    if name == 'scan' and _carries_from_row_to_row(equation, batch):
        return True
    arguments = zip(equation.invars, _MIXED_AXES.get(name, _named)(equation), strict=False)
    if any(set(axes) & set(axes_with(v, batch, folded=folded)) for v, axes in arguments):
        return True
    return not (bodies(equation) or _has_rows(equation, batch))


def _has_rows(equation: Equation, batch: Any) -> bool:
    """Whether an equation that reads rows returns as many: a single one, or one more, come from several."""
    if not any(axes_with(v, batch, folded=True) for v in equation.invars):
        return True
    sizes = [[v.aval.shape[axis] for axis in axes_with(v, batch, folded=True)] for v in equation.outvars]
    return all(several and all((size % batch) == 0 for size in several) for several in sizes)


def _carries_from_row_to_row(equation: Equation, batch: Any) -> bool:
    """Whether a scan over rows changes what it hands on from row to row."""
    consts, carries = equation.params['num_consts'], equation.params['num_carry']
    body = equation.params['jaxpr'].jaxpr
    changes = any(body.outvars[n] is not body.invars[consts + n] for n in range(carries))
    return changes and any(0 in axes_with(v, batch) for v in equation.invars[consts + carries :])


def first_undecided(program: Program, numbers: Iterable[int], batch: Any) -> str:
    """Returns the place of the first equation that may mix rows, depending on values; '' if there is none.

    These are indices along the axis of the batch, the numbers of the rows, the size of the batch, noise, linear
    algebra, loops that go on until all rows are done, and whatever works along an axis into which the batch is folded.

    Args:
        program: as for `check_rows`.
        numbers: of the equations to look at.
        batch: the size of the batch.
    """
    order: dict[str, Any] = {}
    for n in sorted(numbers):
        folds = _folds(program.equations[n], batch)
        if _is_undecided(program.equations[n], batch) or any(order.setdefault(*fold) != fold[1] for fold in folds):
            return program.where(n)
    return ''


def _folds(equation: Equation, batch: Any) -> list[tuple[str, int]]:
    """Returns the size of each axis that a reshape folds or unfolds, and how many values lie between two rows."""
    if equation.primitive.name != 'reshape':
        return []
    before, after = equation.invars[0], equation.outvars[0]
    return [
        (str(many.aval.shape[folded]), math.prod(one.aval.shape[:axis]) // math.prod(many.aval.shape[:folded]))
        for one, many in ((before, after), (after, before))
        for axis in axes_with(one, batch)
        for folded in axes_with(many, batch, folded=True)
        if many.aval.shape[folded] != batch
    ]


def _is_undecided(equation: Equation, batch: Any) -> bool:
    return _mixing(equation, batch, folded=True) != '' or any(_depends(inner, batch) for inner in nested(equation))


def _depends(equation: Equation, batch: Any) -> bool:
    """Whether an equation mixes rows or not depending on values."""
    name, params = equation.primitive.name, equation.params
    if name == 'while' and any(_mixing(inner, batch) for inner in params['cond_jaxpr'].eqns):
        return True
    if name in _UNDECIDED:
        return True
    if name == 'iota':
        return params['dimension'] in axes_with(equation.outvars[0], batch, folded=True)
    numbers = params.get('dimension_numbers')
    indexed = getattr(numbers, 'start_index_map', getattr(numbers, 'scatter_dims_to_operand_dims', ()))
    if name in _LINEAR_ALGEBRA:
        rank = len(equation.invars[0].aval.shape)
        indexed = (rank - 2, rank - 1)
    return any(axis in axes_with(equation.invars[0], batch, folded=True) for axis in indexed)


def check_by_trial(logits_of: Callable[[Any], Sequence[Array]], inputs: Any, place: str, tolerance: float) -> None:
    """Runs a network on 7 rows in other company: reversed, one row repeated, one row alone, NaN in another row.

    Args:
        logits_of: the network.
        inputs: arrays ``[B, …]``.
        place: of the equation that the program does not decide.
        tolerance: part of the largest logit that rounding may change.

    Raises:
        ValueError: the logits of a row depend on the others.
    """
    count = len(jax.tree.leaves(inputs)[0])
    rows = jax.tree.map(lambda x: jnp.asarray(x)[jnp.arange(7) % count], inputs)
    poisoned = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, rows)
    expected = [np.asarray(logits) for logits in logits_of(rows)]
    trials = [(rows, order, order) for order in ([6, 5, 4, 3, 2, 1, 0], [2] * 7, [4])]
    for given, order, answers in [*trials, (poisoned, list(range(7)), list(range(1, 7)))]:
        result = logits_of(jax.tree.map(lambda x, order=order: x[jnp.array(order)], given))
        for logits, alone in zip(result, expected, strict=True):
            seen = np.asarray(logits)[-len(answers) :]
            if not np.allclose(
                seen, alone[answers], rtol=0, atol=tolerance * np.abs(alone).max() + 1e-6, equal_nan=True
            ):
                raise ValueError(
                    f'model: the rows of a batch influence one another, probably at {place}: among other rows the '
                    'logits of the same row are others; every row must be computed from its own input alone'
                )


Axes = list[Any]
"""For each argument of an equation the axes that it mixes."""


def _named(equation: Equation) -> Axes:
    """Returns the axes that a parameter names: reductions, running sums, sorting, reversal and others."""
    named = [equation.params[name] for name in _AXIS_PARAMETERS if name in equation.params]
    axes = [axes if isinstance(axes, (tuple, list)) else [axes] for axes in named]
    return axes * len(equation.invars)  # all arguments have the same axes


def _none(equation: Equation) -> Axes:
    return []


def _dot_general(equation: Equation) -> Axes:
    return list(equation.params['dimension_numbers'][0])


def _convolution(equation: Equation) -> Axes:
    numbers = equation.params['dimension_numbers']
    if not isinstance(equation.params['feature_group_count'], int):  # a kernel for each row
        return [numbers.lhs_spec[2:], numbers.rhs_spec[1:]]
    groups = equation.params['batch_group_count'] > 1
    return [numbers.lhs_spec if groups else numbers.lhs_spec[1:], numbers.rhs_spec]


def _unequal(ours: Sequence[Any], theirs: Iterable[Any]) -> list[int]:
    return [axis for axis, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]


def _window(equation: Equation) -> Axes:
    return [_unequal(equation.params['window_dimensions'], itertools.repeat(1))]


def _slice(equation: Equation) -> Axes:
    return [_unequal(equation.invars[0].aval.shape, equation.outvars[0].aval.shape)]


def _update(equation: Equation) -> Axes:
    return [_unequal(*(v.aval.shape for v in equation.invars[:2]))] * 2


def _pad(equation: Equation) -> Axes:
    return [_unequal(equation.params['padding_config'], itertools.repeat((0, 0, 0)))]


def _fft(equation: Equation) -> Axes:
    rank = len(equation.invars[0].aval.shape)
    return [range(rank - len(equation.params['fft_lengths']), rank)]


def _reshape(equation: Equation) -> Axes:
    """An axis keeps its rows only where as many values lie before it as after it."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    same = {(size, math.prod(after[:axis])) for axis, size in enumerate(after)}
    moved = [axis for axis, size in enumerate(before) if (size, math.prod(before[:axis])) not in same]
    return [moved if any(size in before for size in after if not isinstance(size, int)) else []]


_AXIS_PARAMETERS = ('axes', 'axis', 'dimensions', 'dimension', 'reduction_dimension')
_UNDECIDED = ('dim_as_value', 'random_bits', 'random_gamma', 'rng_bit_generator', 'pure_callback', 'io_callback')
_LINEAR_ALGEBRA = ('cholesky', 'eig', 'eigh', 'householder_product', 'lu', 'qr', 'svd', 'triangular_solve')
_WINDOWS = ('reduce_window_sum', 'reduce_window_max', 'reduce_window_min', 'reduce_window', 'select_and_gather_add')

_MIXED_AXES: dict[str, Callable[[Equation], Axes]] = {
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(('concatenate', 'stack'), _none),  # keep every row
    'fft': _fft,
    'reshape': _reshape,
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
    'dynamic_slice': _slice,
    'dynamic_update_slice': _update,
    'pad': _pad,
    'slice': _slice,
}
