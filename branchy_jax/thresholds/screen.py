"""A screen: settings of the thresholds with the result of each, and how all settings of a grid are evaluated together.

An exit answers what reaches it and is confident, so the outcome of a setting depends only on where each input's
uncertainties fall between the candidate thresholds. Counting inputs per cell of that grid once and summing the counts
gives every setting of the grid together: O(M + V^(N-1)) instead of O(M V^(N-1)).
"""

import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from branchy_jax.criteria import Criterion, is_confident
from branchy_jax.types import ByValue, ExitPolicy, OperatingPoint

_MOST_SETTINGS = 100_000  # of a default grid: evaluated within seconds


class Screen(ByValue, struct.PyTreeNode, eq=False):
    """Settings of the thresholds and their results: points to choose from, or a curve of accuracy against cost.

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
        policy, fractions = ExitPolicy(self.criterion, self.thresholds[index]), self.exit_fractions[index]
        return OperatingPoint(policy, float(self.accuracy[index]), self.split, fractions, float(self.cost[index]))

    def frontier(self) -> 'Screen':
        """Returns the settings that no other beats in accuracy without costing more, by ascending cost."""
        order = np.lexsort((-self.accuracy, self.cost))
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(self.accuracy[order])[:-1]])
        best = order[self.accuracy[order] > best_before]
        columns = ('thresholds', 'accuracy', 'exit_fractions', 'cost')
        return self.replace(**{name: getattr(self, name)[best] for name in columns})

    def for_accuracy(self, at_least: float) -> OperatingPoint:
        """Picks the cheapest setting whose accuracy is at least the one asked for.

        Args:
            at_least: accuracy, in the unit of ``accuracy``.

        Raises:
            ValueError: no setting reaches it; the message says what can be reached.
        """
        frontier = self.frontier()
        # Accuracies are counts over M: the tolerance admits 0.1 + 0.2 for 0.3, never one more wrong answer.
        reaches = frontier.accuracy >= at_least - 1e-9
        if not reaches.any():
            best = f'the best accuracy is {frontier.accuracy[-1]:.6f}'
            raise ValueError(f'at_least: no thresholds reach {at_least}; {best}')
        return frontier.point(reaches.argmax())

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
            raise ValueError(f'at_most: no thresholds cost {at_most} or less; the cheapest cost {frontier.cost[0]:.6g}')
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
        height = _scaled(frontier.accuracy) - _scaled(frontier.cost)
        return frontier.point(len(height) - 1 - int(np.argmax(height[::-1])))

    def path(self, *, size: int = 50) -> np.ndarray:
        """Picks settings from never leaving to leaving most: the frontier of cost and risk, for guarantees.

        The path must be fixed before the calibration data is looked at: screen other data. Screen for the loss that is
        to be bounded, with a table whose statistics are ``1 - losses[..., None]`` (`losses_against_full`) and whose
        metric is their mean. A screen for accuracy knows no settings between the full network and the most accurate.

        Args:
            size: settings taken from the frontier at most.

        Returns:
            ``[G, N - 1]``, thresholds of the screen's criterion; the first never exits, cost falls along the path on
            the data that was screened.

        Raises:
            ValueError: a size below 1.

        Example:
            >>> from branchy_jax.costs import StageCosts
            >>> from branchy_jax.thresholds import ExitTable, losses_against_full
            >>> logits, costs = np.log([[[0.9, 0.1], [0.4, 0.6]], [[0.9, 0.1], [0.8, 0.2]]]), StageCosts([1, 9], [0, 0])
            >>> table = ExitTable.from_logits(logits, [0, 0], costs, split='validation')
            >>> table = table.replace(statistics=1 - losses_against_full(logits, [0, 0])[..., None])
            >>> along = table.evaluate(table.screen().path())
            >>> along.cost.tolist(), along.accuracy.tolist()
            ([10.0, 5.5, 1.0], [1.0, 1.0, 0.5])
        """
        if size < 1:
            raise ValueError(f'size: got {size}; a path holds at least one setting')
        frontier = self.frontier()
        # Evenly spaced in rank: the frontier is dense where risk is small, where guarantees are asked for.
        chosen = np.unique(np.linspace(0, len(frontier) - 1, size).round().astype(int))[::-1]
        never = np.full((1, frontier.thresholds.shape[1]), -np.inf, np.float32)
        return np.concatenate([never, frontier.thresholds[chosen]])


def _scaled(values: np.ndarray) -> np.ndarray:
    return (values - values[0]) / max(values[-1] - values[0], np.finfo(float).tiny)


def answering_exits(uncertainty: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns which exit answers each input, ``[M]`` in ``[0, N)``: the first that is confident, else the last.

    Args:
        uncertainty: ``[N, M]`` float32.
        thresholds: ``[N - 1]`` float32.

    Example:
        >>> answering_exits(np.float32([[0.1, 0.9], [0.0, 0.0]]), np.float32([0.5])).tolist()
        [0, 1]
    """
    confident = is_confident(uncertainty[:-1], thresholds[:, None])
    return np.concatenate([confident, np.ones((1, uncertainty.shape[1]), bool)]).argmax(axis=0)


def grid_of(given: ArrayLike | int | None, uncertainty: np.ndarray) -> np.ndarray:
    """Returns candidate thresholds ``[N - 1, V]`` float32, ascending for each exit.

    Candidates that were not given lie at evenly spaced quantiles of each exit's uncertainties, midway between two
    neighbouring values, so that an uncertainty whose last bit differs on another device falls on the same side.
    ``-inf`` (never exit) and ``+inf`` (always) are among them; values repeat where there are fewer distinct ones.

    Args:
        given: candidates ``[N - 1, V]``; or V, at least 2; or ``None``: at most 1000, and as many as keep the number of
            settings below a hundred thousand.
        uncertainty: ``[N, M]`` float32.

    Raises:
        ValueError: fewer than 2 candidates, another shape, NaN, candidates that are not ascending, or too many exits
            for a grid of their own.
    """
    exits = len(uncertainty)
    if given is None or isinstance(given, int):
        size = min(1000, int(_MOST_SETTINGS ** (1 / max(1, exits - 1)))) if given is None else given
        if size < 2:
            advice = 'give 2 or more; for many exits, give a grid with one candidate for most, or use select_exits'
            raise ValueError(f'grid: got {size} candidates for each of {exits} exits; {advice}')
        return np.array([_candidates(values, size) for values in uncertainty[:-1]], np.float32).reshape(-1, size)
    grid = np.asarray(given, np.float32)
    if grid.ndim != 2 or grid.shape[0] != exits - 1 or grid.shape[1] == 0:
        raise ValueError(f'grid: expected [{exits - 1}, V] candidates for {exits} exits, got shape {grid.shape}')
    if np.isnan(grid).any() or (grid[:, 1:] < grid[:, :-1]).any():
        raise ValueError('grid: candidates of an exit must be ascending and not NaN; sort them along the last axis')
    return grid


def _candidates(values: np.ndarray, size: int) -> np.ndarray:
    finite = values[np.isfinite(values)]
    distinct = np.unique(finite)
    middles = np.unique(midway(distinct[:-1], distinct[1:]))
    if len(middles) > size - 2:
        wanted = np.quantile(finite, np.arange(1, size - 1) / (size - 1))
        middles = middles[np.searchsorted(middles, wanted).clip(0, len(middles) - 1)]
    return np.concatenate([[-np.inf], middles, np.full(size - 1 - len(middles), np.inf)])


def midway(lower: np.ndarray | np.floating, upper: np.ndarray | np.floating) -> np.ndarray:
    """Returns float32 thresholds under which ``lower`` leaves and ``upper`` stays, midway where float32 has a middle.

    Args:
        lower: float32 of any shape.
        upper: float32 of the same, above ``lower``; not NaN.
    """
    with np.errstate(invalid='ignore'):  # −inf and +inf have no middle: +inf lets the first leave
        middle = np.float32((np.asarray(lower, np.float64) + upper) / 2)
    return np.where(middle > lower, middle, upper)


def outcomes(uncertainty: np.ndarray, statistics: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the results of every setting of a grid.

    Args:
        uncertainty: ``[N, M]`` float32.
        statistics: ``[N, M, S]``.
        grid: ``[N - 1, V]`` ascending.

    Returns:
        Inputs per exit ``[V, …, 1, N]``, and the summed statistics ``[V, …, 1, S]``, one axis V for every side exit.
    """
    (exits, inputs), sizes = uncertainty.shape, [grid.shape[1]] * len(grid) + [1]
    # Input b is confident at exit n under candidate v (strictly: uncertainty < grid[n, v]) iff bins[n][b] <= v.
    # NaN sorts last: such an input is confident under no candidate.
    bins = [np.searchsorted(*pair, side='right') for pair in zip(grid, uncertainty[:-1], strict=True)]
    bins.append(np.zeros(inputs, int))  # at the last exit all leave
    counts, sums = np.zeros((*sizes, exits)), np.zeros((*sizes, statistics.shape[2]))
    for n in range(exits):
        columns = np.concatenate([np.ones((inputs, 1)), statistics[n]], axis=1)
        leaving = np.zeros([*(size + 1 for size in sizes[: n + 1]), columns.shape[1]])
        np.add.at(leaving, tuple(bins[: n + 1]), columns)
        for axis, size in enumerate(sizes[: n + 1]):
            confident, every = np.split(np.cumsum(leaving, axis), [size], axis)
            leaving = confident if axis == n else every - confident
        leaving = np.expand_dims(leaving, tuple(range(n + 1, exits)))  # later thresholds change nothing
        counts[..., n] += leaving[..., 0]
        sums += leaving[..., 1:]
    return counts, sums
