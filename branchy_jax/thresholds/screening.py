"""Screening: what every combination of candidate thresholds gives, counted from cached outputs.

An exit answers what reaches it and is confident, so the outcome of a setting depends only on where each input's
uncertainties fall between the candidate thresholds. Counting inputs per cell of that grid once and summing the counts
gives every setting of the grid together: O(B + V^(N-1)) instead of O(B V^(N-1)).
"""

from __future__ import annotations

import numpy as np
from flax import struct

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import is_confident
from branchy_jax.thresholds.statistics import Metric, mean_of_statistic
from branchy_jax.types import Array, OperatingPoint

_MOST_SETTINGS = 100_000


@struct.dataclass
class Screen:
    """Every setting that was tried, and what it gave.

    Attributes:
        thresholds: ``[G, N - 1]`` float32.
        accuracy: ``[G]`` metric.
        exit_fractions: ``[G, N]``.
        cost: ``[G]`` expected cost of one input.
        criterion: name of the criterion whose uncertainties were screened.
        split: name of the data.
    """

    thresholds: np.ndarray
    accuracy: np.ndarray
    exit_fractions: np.ndarray
    cost: np.ndarray
    criterion: str = struct.field(pytree_node=False)
    split: str = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.cost)

    def point(self, index: int) -> OperatingPoint:
        """Returns one setting as an `OperatingPoint`."""
        return OperatingPoint(
            thresholds=self.thresholds[index],
            criterion=self.criterion,
            accuracy=float(self.accuracy[index]),
            split=self.split,
            exit_fractions=self.exit_fractions[index],
            cost=float(self.cost[index]),
        )


def quantile_grid(uncertainty: Array, *, size: int = 100) -> np.ndarray:
    """Proposes candidate thresholds at evenly spaced quantiles of each exit's uncertainties.

    Candidates lie midway between neighbouring values, so that an uncertainty that differs in its last bit on another
    device still falls on the same side. ``-inf`` (never exit) and ``+inf`` (always) are among them.

    Args:
        uncertainty: ``[N, B]``; the last exit's row is not used.
        size: V, candidates per exit, at least 2.

    Returns:
        ``[N - 1, V]`` float32, ascending; values repeat where there are fewer distinct ones.

    Raises:
        ValueError: fewer than 2 candidates, or no inputs.

    Example:
        >>> quantile_grid(np.array([[1, 2, 4, 8], [0, 0, 0, 0]]), size=5).tolist()
        [[-inf, 1.5, 3.0, 6.0, inf]]
    """
    uncertainty = _matrix(uncertainty)
    if size < 2:
        raise ValueError(f'size: got {size}; a grid holds at least never (-inf) and always (+inf)')
    candidates = [_candidates(row, size) for row in uncertainty[:-1]]
    return np.array(candidates, np.float32).reshape(-1, size)


def _candidates(values: np.ndarray, size: int) -> np.ndarray:
    distinct = np.unique(values[np.isfinite(values)]).astype(np.float32)
    middles = np.unique(np.float32((distinct[1:].astype(np.float64) + distinct[:-1]) / 2))
    if len(middles) > size - 2:
        shares = (np.arange(1, size - 1)) / (size - 1)
        wanted = np.quantile(values[np.isfinite(values)], shares)
        middles = middles[np.searchsorted(middles, wanted).clip(0, len(middles) - 1)]
    inner = np.concatenate([middles, np.full(size - 2 - len(middles), np.inf, np.float32)])
    return np.concatenate([[-np.inf], inner, [np.inf]]).astype(np.float32)


def screen(
    uncertainty: Array,
    statistics: Array,
    costs: StageCosts,
    *,
    grid: Array | None = None,
    metric: Metric = mean_of_statistic,
    criterion: str = 'entropy',
    split: str = 'validation',
) -> Screen:
    """Evaluates every combination of candidate thresholds.

    Args:
        uncertainty: ``[N, B]`` of every exit on every input, as `branchy_jax.inference.exit_outputs` returns it.
        statistics: ``[N, B, S]`` what each exit's answer adds to the metric's sums (`accuracy_statistics`).
        costs: per stage and head; the unit of the resulting cost.
        grid: ``[N - 1, V]`` ascending candidates per exit; `quantile_grid` if none is given, as fine as keeps the
            combinations below a hundred thousand.
        metric: turns summed statistics into the figure to maximise.
        criterion: name kept with the points.
        split: name of the data, kept with the points.

    Returns:
        `Screen` with G = V^(N-1) settings, the last exit's threshold varying fastest.

    Raises:
        ValueError: arrays whose shapes do not agree, no inputs, a grid with NaN or not ascending, or too many exits
            for a grid of their own.

    Example:
        >>> uncertainty = np.array([[0.1, 0.9], [0.0, 0.0]])
        >>> right = np.array([[[1.0], [0.0]], [[1.0], [1.0]]])
        >>> found = screen(uncertainty, right, StageCosts([1, 9], [0, 0]), grid=[[-np.inf, 0.5, np.inf]])
        >>> found.accuracy.tolist(), found.cost.tolist()
        ([1.0, 1.0, 0.5], [10.0, 5.5, 1.0])

    References:
        BranchyNet, 2016, section III-D: thresholds are screened over a grid.
    """
    uncertainty, statistics = _checked(uncertainty, statistics, costs)
    exits, inputs = uncertainty.shape
    grid = quantile_grid(uncertainty, size=grid_size(exits)) if grid is None else np.asarray(grid, np.float32)
    _check_grid(grid, exits)

    counts, sums = _outcomes(uncertainty, statistics, grid)
    fractions = counts / inputs
    settings = np.stack(np.meshgrid(*grid, indexing='ij'), axis=-1) if exits > 1 else np.empty((0,))
    flat = (-1, exits)
    return Screen(
        thresholds=settings.reshape(-1, exits - 1) if exits > 1 else np.empty((1, 0), np.float32),
        accuracy=np.asarray(metric(sums, inputs)).reshape(-1),
        exit_fractions=fractions.reshape(flat),
        cost=(fractions.reshape(flat) @ costs.to_exit),
        criterion=criterion,
        split=split,
    )


def grid_size(exits: int) -> int:
    """Returns how many candidates per exit keep the combinations below a hundred thousand."""
    size = min(1000, int(_MOST_SETTINGS ** (1 / max(1, exits - 1))))
    if size < 2:
        raise ValueError(
            f'grid: {exits} exits have more than {_MOST_SETTINGS} combinations of thresholds; give a grid with one '
            'candidate for most exits, or thin the network out with select_exits'
        )
    return size


def evaluate(
    uncertainty: Array,
    statistics: Array,
    costs: StageCosts,
    thresholds: Array,
    *,
    metric: Metric = mean_of_statistic,
    criterion: str = 'entropy',
    split: str = 'test',
) -> Screen:
    """Evaluates given settings, one by one: for carrying thresholds chosen elsewhere over to other data.

    Args:
        uncertainty: ``[N, B]``.
        statistics: ``[N, B, S]``.
        costs: per stage and head.
        thresholds: ``[G, N - 1]``.
        metric: turns summed statistics into the figure to report.
        criterion: name kept with the points.
        split: name of the data, kept with the points.

    Returns:
        `Screen` with the G settings in the order given.

    Raises:
        ValueError: arrays whose shapes do not agree, or NaN thresholds.

    Example:
        >>> found = evaluate([[0.1, 0.9], [0, 0]], np.ones((2, 2, 1)), StageCosts([1, 9], [0, 0]), [[0.5]])
        >>> found.exit_fractions.tolist()
        [[0.5, 0.5]]
    """
    uncertainty, statistics = _checked(uncertainty, statistics, costs)
    exits, inputs = uncertainty.shape
    thresholds = np.asarray(thresholds, np.float32)
    if thresholds.ndim != 2 or thresholds.shape[1] != exits - 1 or np.isnan(thresholds).any():
        raise ValueError(f'thresholds: expected [G, {exits - 1}] numbers without NaN, got shape {thresholds.shape}')
    fractions, sums = [], []
    for setting in thresholds:
        first = answering_exits(uncertainty, setting)
        fractions.append(np.bincount(first, minlength=exits) / inputs)
        sums.append(statistics[first, np.arange(inputs)].sum(axis=0))
    fractions = np.array(fractions)
    return Screen(
        thresholds=thresholds,
        accuracy=np.asarray(metric(np.array(sums), inputs)),
        exit_fractions=fractions,
        cost=fractions @ costs.to_exit,
        criterion=criterion,
        split=split,
    )


def answering_exits(uncertainty: Array, thresholds: Array) -> np.ndarray:
    """Returns which exit answers each input: the first that is confident, else the last.

    Args:
        uncertainty: ``[N, B]``.
        thresholds: ``[N - 1]``.

    Returns:
        ``[B]`` integers in ``[0, N)``.

    Example:
        >>> answering_exits([[0.1, 0.9], [0.0, 0.0]], [0.5]).tolist()
        [0, 1]
    """
    uncertainty = _matrix(uncertainty)
    confident = is_confident(uncertainty[:-1], np.asarray(thresholds, np.float32)[:, None])
    return np.concatenate([confident, np.ones((1, uncertainty.shape[1]), bool)]).argmax(axis=0)


def _outcomes(uncertainty: np.ndarray, statistics: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each setting of the grid: inputs per exit ``[V, …, N]``, and the summed statistics ``[V, …, S]``."""
    exits, inputs = uncertainty.shape
    width = grid.shape[1]
    # Input b exits at exit n under candidate v (strictly: uncertainty < grid[n, v]) iff bin[n, b] <= v.
    # NaN sorts last: such an input exits under no candidate.
    bins = np.stack([np.searchsorted(grid[n], uncertainty[n], side='right') for n in range(exits - 1)] or [[]])
    counts = np.zeros((width,) * (exits - 1) + (exits,))
    sums = np.zeros((width,) * (exits - 1) + statistics.shape[2:])
    for n in range(exits):
        values = np.concatenate([np.ones((inputs, 1)), statistics[n]], axis=1)
        leaving = _leaving(bins[:n], bins[n] if n < exits - 1 else None, values, width)
        leaving = leaving.reshape(leaving.shape[:-1] + (1,) * (exits - 1 - (leaving.ndim - 1)) + leaving.shape[-1:])
        counts[..., n] += leaving[..., 0]
        sums += leaving[..., 1:]
    return counts, sums


def _leaving(passed: np.ndarray, own: np.ndarray | None, values: np.ndarray, width: int) -> np.ndarray:
    """Sums ``values [B, S]`` of the inputs that pass the exits before and leave at this one, per setting.

    Args:
        passed: ``[n, B]`` bins at the exits before; passing under candidate v means bin > v.
        own: ``[B]`` bins at this exit; leaving under candidate v means bin <= v. ``None``: the last exit.
        values: ``[B, S]``.
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


def _matrix(uncertainty: Array) -> np.ndarray:
    uncertainty = np.asarray(uncertainty, np.float32)
    if uncertainty.ndim != 2 or 0 in uncertainty.shape:
        raise ValueError(f'uncertainty: expected [N, B] with at least one exit and one input, got {uncertainty.shape}')
    return uncertainty


def _checked(uncertainty: Array, statistics: Array, costs: StageCosts) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, statistics = _matrix(uncertainty), np.asarray(statistics, np.float64)
    exits, inputs = uncertainty.shape
    if statistics.ndim != 3 or statistics.shape[:2] != (exits, inputs):
        raise ValueError(f'statistics: expected [{exits}, {inputs}, S] to go with uncertainty, got {statistics.shape}')
    if len(costs.to_exit) != exits:
        raise ValueError(f'costs: expected {exits} stages and heads, got {len(costs.to_exit)}')
    return uncertainty, statistics


def _check_grid(grid: np.ndarray, exits: int) -> None:
    if grid.ndim != 2 or grid.shape[0] != exits - 1 or grid.shape[1] == 0:
        raise ValueError(f'grid: expected [{exits - 1}, V] candidates for {exits} exits, got shape {grid.shape}')
    if np.isnan(grid).any() or (grid[:, 1:] < grid[:, :-1]).any():
        raise ValueError('grid: candidates of an exit must be ascending and not NaN; sort them along the last axis')
