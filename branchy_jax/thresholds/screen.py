"""A screen: settings that were tried and what each gave; and how all settings of a grid are tried at once.

An exit answers what reaches it and is confident, so the outcome of a setting depends only on where each input's
uncertainties fall between the candidate thresholds. Counting inputs per cell of that grid once and summing the counts
gives every setting of the grid together: O(M + V^(N-1)) instead of O(M V^(N-1)).
"""

from __future__ import annotations

import numpy as np
from flax import struct
from jaxtyping import Float, Float32, Int, Shaped
from numpy.typing import ArrayLike

from branchy_jax.criteria import Criterion, is_confident
from branchy_jax.types import ByValue, ExitPolicy, OperatingPoint

_MOST_SETTINGS = 100_000


@struct.dataclass(eq=False)
class Screen(ByValue):
    """Every setting that was tried, and what it gave: points to choose from, or a curve of accuracy against cost.

    Attributes:
        thresholds: ``[G, N - 1]`` float32.
        accuracy: ``[G]`` metric.
        exit_fractions: ``[G, N]``.
        cost: ``[G]`` expected cost of one input.
        criterion: whose uncertainties the thresholds are compared with.
        split: name of the data that all figures were measured on.

    Example:
        >>> from branchy_jax.criteria import entropy
        >>> accuracy, cost = np.array([0.9, 0.8, 0.95]), np.array([5.0, 6.0, 9.0])
        >>> tried = Screen(np.zeros((3, 1)), accuracy, np.ones((3, 2)) / 2, cost, entropy, 'validation')
        >>> tried.frontier().accuracy.tolist(), tried.for_cost(8).accuracy, tried.for_accuracy(0.91).cost
        ([0.9, 0.95], 0.9, 9.0)
    """

    thresholds: np.ndarray
    accuracy: np.ndarray
    exit_fractions: np.ndarray
    cost: np.ndarray
    criterion: Criterion
    split: str = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.cost)

    def point(self, index: int | np.integer) -> OperatingPoint:
        """Returns one setting as an `OperatingPoint`, with its criterion and its split."""
        return OperatingPoint(
            policy=ExitPolicy(self.criterion, self.thresholds[index]),
            accuracy=float(self.accuracy[index]),
            split=self.split,
            exit_fractions=self.exit_fractions[index],
            cost=float(self.cost[index]),
        )

    def frontier(self) -> Screen:
        """Keeps the settings that no other beats in accuracy without costing more, by ascending cost."""
        order = np.lexsort((-self.accuracy, self.cost))
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(self.accuracy[order])[:-1]])
        kept = order[self.accuracy[order] > best_before]
        columns = ('thresholds', 'accuracy', 'exit_fractions', 'cost')
        return self.replace(**{name: getattr(self, name)[kept] for name in columns})

    def for_accuracy(self, at_least: float) -> OperatingPoint:
        """Picks the cheapest setting whose accuracy is at least the one asked for.

        Args:
            at_least: accuracy, in the unit of ``accuracy``.

        Raises:
            ValueError: no setting reaches it; the message says what can be reached.
        """
        frontier = self.frontier()
        # Accuracies are counts over M: the tolerance admits 0.1 + 0.2 for 0.3, never one more wrong answer.
        reaching = np.flatnonzero(frontier.accuracy >= at_least - 1e-9)
        if len(reaching) == 0:
            raise ValueError(
                f'at_least: no thresholds reach {at_least}; the best accuracy is {frontier.accuracy.max():.6f}'
            )
        return frontier.point(reaching[0])

    def for_cost(self, at_most: float) -> OperatingPoint:
        """Picks the most accurate setting whose expected cost is at most the one asked for.

        Args:
            at_most: expected cost of one input, in the unit of ``cost``.

        Raises:
            ValueError: every setting costs more; the message says what the cheapest costs.
        """
        frontier = self.frontier()
        affordable = np.flatnonzero(frontier.cost <= at_most * (1 + 1e-9))
        if len(affordable) == 0:
            raise ValueError(
                f'at_most: no thresholds cost {at_most} or less; the cheapest cost {frontier.cost.min():.6g}'
            )
        return frontier.point(affordable[-1])

    def knee(self) -> OperatingPoint:
        """Picks the knee of accuracy against cost: the frontier's point farthest above the line between its ends.

        Both axes are scaled to [0, 1] first. A frontier that nowhere rises above that line has no knee: every further
        cost pays, and the most accurate setting is picked.

        References:
            BranchyNet, 2016, Figure 3: the knee is the operating point of Table I. Satopää et al., Finding a "Kneedle"
            in a Haystack, 2011.
        """
        frontier = self.frontier()

        def scaled(values: np.ndarray) -> np.ndarray:
            return (values - values[0]) / max(values[-1] - values[0], np.finfo(float).tiny)

        height = scaled(frontier.accuracy) - scaled(frontier.cost)
        return frontier.point(len(height) - 1 - int(np.argmax(height[::-1])))


def answering_exits(uncertainty: ArrayLike, thresholds: ArrayLike) -> Int[np.ndarray, 'M']:
    """Returns which exit answers each input: the first that is confident, else the last.

    Args:
        uncertainty: ``[N, M]``.
        thresholds: ``[N - 1]``, in the unit of the uncertainties; `ExitTable.answering_exits` sees to that itself.

    Returns:
        ``[M]`` integers in ``[0, N)``.

    Raises:
        ValueError: thresholds that are not one per side exit.

    Example:
        >>> answering_exits([[0.1, 0.9], [0.0, 0.0]], [0.5]).tolist()
        [0, 1]
    """
    uncertainty, thresholds = as_matrix(uncertainty), np.asarray(thresholds, np.float32)
    if thresholds.shape != (len(uncertainty) - 1,):
        raise ValueError(f'thresholds: expected {len(uncertainty) - 1}, one per side exit, got {thresholds.shape}')
    confident = is_confident(uncertainty[:-1], thresholds[:, None])
    return np.concatenate([confident, np.ones((1, uncertainty.shape[1]), bool)]).argmax(axis=0)


def quantile_grid(uncertainty: ArrayLike, *, size: int = 100) -> Float32[np.ndarray, 'side_exits {size}']:
    """Proposes candidate thresholds at evenly spaced quantiles of each exit's uncertainties.

    Candidates lie midway between neighbouring values, so that an uncertainty that differs in its last bit on another
    device still falls on the same side. ``-inf`` (never exit) and ``+inf`` (always) are among them.

    Args:
        uncertainty: ``[N, M]``; the last exit's row is not used.
        size: V, candidates per exit, at least 2.

    Returns:
        ``[N - 1, V]`` float32, ascending; values repeat where there are fewer distinct ones.

    Raises:
        ValueError: fewer than 2 candidates, or no inputs.

    Example:
        >>> quantile_grid(np.array([[1, 2, 4, 8], [0, 0, 0, 0]]), size=5).tolist()
        [[-inf, 1.5, 3.0, 6.0, inf]]
    """
    uncertainty = as_matrix(uncertainty)
    if size < 2:
        raise ValueError(f'size: got {size}; a grid holds at least never (-inf) and always (+inf)')
    candidates = [_candidates(row, size) for row in uncertainty[:-1]]
    return np.array(candidates, np.float32).reshape(-1, size)


def _candidates(values: Float32[np.ndarray, 'M'], size: int) -> Float32[np.ndarray, '{size}']:
    distinct = np.unique(values[np.isfinite(values)]).astype(np.float32)
    middles = np.unique(midway(distinct[:-1], distinct[1:]))
    if len(middles) > size - 2:
        shares = (np.arange(1, size - 1)) / (size - 1)
        wanted = np.quantile(values[np.isfinite(values)], shares)
        middles = middles[np.searchsorted(middles, wanted).clip(0, len(middles) - 1)]
    inner = np.concatenate([middles, np.full(size - 2 - len(middles), np.inf, np.float32)])
    return np.concatenate([[-np.inf], inner, [np.inf]]).astype(np.float32)


def midway(lower: np.ndarray | np.floating, upper: np.ndarray | np.floating) -> Float32[np.ndarray, '*shape']:
    """Returns float32 thresholds under which ``lower`` leaves and ``upper`` stays, midway where float32 has a middle.

    Args:
        lower: float32 of any shape.
        upper: float32 of the same, above ``lower``; not NaN.
    """
    with np.errstate(invalid='ignore'):  # −inf and +inf have no middle: +inf lets the first leave
        middle = np.float32((np.asarray(lower, np.float64) + upper) / 2)
    return np.where(middle > lower, middle, upper)


def grid_size(exits: int) -> int:
    """Returns how many candidates per exit keep the combinations below a hundred thousand.

    Raises:
        ValueError: with this many exits not even two candidates do.
    """
    size = min(1000, int(_MOST_SETTINGS ** (1 / max(1, exits - 1))))
    if size < 2:
        raise ValueError(
            f'grid: {exits} exits have more than {_MOST_SETTINGS} combinations of thresholds; give a grid with one '
            'candidate for most exits, or thin the network out with select_exits'
        )
    return size


def checked_grid(grid: ArrayLike, exits: int) -> Float32[np.ndarray, '{exits}-1 V']:
    """Returns candidates ``[N - 1, V]`` as float32.

    Raises:
        ValueError: another shape, NaN, or candidates that are not ascending.
    """
    grid = np.asarray(grid, np.float32)
    if grid.ndim != 2 or grid.shape[0] != exits - 1 or grid.shape[1] == 0:
        raise ValueError(f'grid: expected [{exits - 1}, V] candidates for {exits} exits, got shape {grid.shape}')
    if np.isnan(grid).any() or (grid[:, 1:] < grid[:, :-1]).any():
        raise ValueError('grid: candidates of an exit must be ascending and not NaN; sort them along the last axis')
    return grid


def as_matrix(uncertainty: ArrayLike) -> Float32[np.ndarray, 'N M']:
    """Returns uncertainties ``[N, M]`` as float32.

    Raises:
        ValueError: another number of dimensions, no exits or no inputs.
    """
    uncertainty = np.asarray(uncertainty, np.float32)
    if uncertainty.ndim != 2 or 0 in uncertainty.shape:
        raise ValueError(f'uncertainty: expected [N, M] with at least one exit and one input, got {uncertainty.shape}')
    return uncertainty


def outcomes(
    uncertainty: Float32[np.ndarray, 'N M'],
    statistics: Shaped[np.ndarray, 'N M S'],
    grid: Float32[np.ndarray, 'side_exits V'],
) -> tuple[Float[np.ndarray, '*settings N'], Float[np.ndarray, '*settings S']]:
    """Counts what every setting of a grid gives.

    Args:
        uncertainty: ``[N, M]`` float32.
        statistics: ``[N, M, S]``.
        grid: ``[N - 1, V]`` ascending.

    Returns:
        Inputs per exit ``[V, …, N]``, and the summed statistics ``[V, …, S]``, one axis V for every side exit.
    """
    exits, inputs = uncertainty.shape
    width = grid.shape[1]
    # Input b exits at exit n under candidate v (strictly: uncertainty < grid[n, v]) iff bin[n, b] <= v.
    # NaN sorts last: such an input exits under no candidate.
    bins = np.array([np.searchsorted(grid[n], uncertainty[n], side='right') for n in range(exits - 1)], int)
    bins = bins.reshape(exits - 1, inputs)
    counts = np.zeros((width,) * (exits - 1) + (exits,))
    sums = np.zeros((width,) * (exits - 1) + statistics.shape[2:])
    for n in range(exits):
        values = np.concatenate([np.ones((inputs, 1)), statistics[n]], axis=1)
        leaving = _leaving(bins[:n], bins[n] if n < exits - 1 else None, values, width)
        leaving = leaving.reshape(leaving.shape[:-1] + (1,) * (exits - 1 - (leaving.ndim - 1)) + leaving.shape[-1:])
        counts[..., n] += leaving[..., 0]
        sums += leaving[..., 1:]
    return counts, sums


def _leaving(
    passed: Shaped[np.ndarray, 'n M'], own: Int[np.ndarray, 'M'] | None, values: Float[np.ndarray, 'M S'], width: int
) -> Float[np.ndarray, '*settings S']:
    """Sums ``values [M, S]`` of the inputs that pass the exits before and leave at this one, per setting.

    Args:
        passed: ``[n, M]`` bins at the exits before; passing under candidate v means bin > v.
        own: ``[M]`` bins at this exit; leaving under candidate v means bin <= v. ``None``: the last exit.
        values: ``[M, S]``.
        width: V.

    Returns:
        ``[V] * n + ([V] if own is given) + [S]``.
    """
    axes = list(passed) + ([own] if own is not None else [])
    shape = (width + 1,) * len(axes)
    cells = np.ravel_multi_index(axes, shape) if axes else np.zeros(len(values), int)
    size = int(np.prod(shape))
    table = np.stack([np.bincount(cells, column, minlength=size) for column in values.T], axis=-1)
    table = table.reshape(*shape, -1)
    for axis in range(len(passed)):
        at_least = np.flip(np.cumsum(np.flip(table, axis), axis), axis)
        table = np.take(at_least, np.arange(1, width + 1), axis)  # bin > v
    if own is not None:
        table = np.take(np.cumsum(table, len(passed)), np.arange(width), len(passed))  # bin <= v
    return table
