"""The table of cached exits: everything that a choice of thresholds needs, and every search for them.

What is chosen on a table carries the table's criterion and the name of its data, so that thresholds of one criterion
are never used with another, and accuracy on validation data is never reported as accuracy on test data.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from numpy.typing import ArrayLike
from scipy import special

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import Criterion, as_criterion, entropy, replay
from branchy_jax.criteria.criterion import check_criterion
from branchy_jax.thresholds.screen import Screen, answering_exits, grid_of, midway, outcomes
from branchy_jax.thresholds.statistics import Metric, Statistics, accuracy_statistics, mean_of_statistic
from branchy_jax.types import Array, ByValue, ExitPolicy, OperatingPoint


class ExitTable(ByValue, struct.PyTreeNode, eq=False, kw_only=True):
    """The answers of N exits to M inputs: their uncertainty, statistics and costs.

    `branchy_jax.inference.exit_table` makes one by running a network, `ExitTable.from_logits` from cached logits.
    Methods that take a *setting* take an `ExitPolicy`, an object that holds one as ``policy`` (an `OperatingPoint`, a
    `Guarantee`, a `Controller`), or thresholds ``[N - 1]`` alone, which are of the table's own criterion.

    Attributes:
        uncertainty: ``[N, M]`` of every exit on every input.
        statistics: ``[N, M, S]`` what each exit's answer adds to the metric's sums (`accuracy_statistics`).
        costs: per stage and head, in MACs or measured time; the unit of every cost that comes out.
        criterion: whose uncertainties these are.
        metric: turns summed statistics into the figure to maximise.
        split: name of the data: 'validation', 'test'.

    Example:
        >>> logits = np.log([[[0.9, 0.1], [0.4, 0.6]], [[0.9, 0.1], [0.8, 0.2]]])  # two exits, two inputs
        >>> table = ExitTable.from_logits(logits, [0, 0], StageCosts([1, 9], [0, 0]), split='validation')
        >>> point = table.screen().for_accuracy(1.0)
        >>> point.cost, point.split, table.answering_exits(point).tolist()
        (5.5, 'validation', [0, 1])
    """

    uncertainty: Array
    statistics: Array
    costs: StageCosts
    criterion: Criterion
    metric: Metric = struct.field(pytree_node=False, default=mean_of_statistic)
    split: str = struct.field(pytree_node=False)

    @classmethod
    def from_logits(
        cls,
        logits: Array,
        labels: Array,
        costs: StageCosts,
        *,
        criterion: Any = entropy,
        statistics: Statistics = accuracy_statistics,
        metric: Metric = mean_of_statistic,
        split: str,
    ) -> 'ExitTable':
        """Makes a table from cached logits by replaying a criterion over them.

        Args:
            logits: ``[N, M, …, K]`` of the heads.
            labels: ``[M, …]``, or whatever ``statistics`` takes.
            costs: per stage and head.
            criterion: a criterion or a function of logits; the criterion's answers are counted, not the heads'.
            statistics: ``(answer logits [N, M, …, K], labels) → [N, M, S]``.
            metric: of their sums.
            split: name of the data.

        Raises:
            ValueError: arrays whose shapes do not agree, no inputs, labels out of range, a criterion that was fitted
                for another number of exits.
        """
        if np.ndim(logits) < 3 or 0 in np.shape(logits):
            raise ValueError(f'logits: expected [N, M, …, K] of at least one exit and input, got {np.shape(logits)}')
        criterion = as_criterion(criterion)
        answers, uncertainty = replay(criterion, logits)
        columns = {'uncertainty': uncertainty, 'statistics': statistics(answers, labels)}
        table = cls(**columns, costs=costs, criterion=criterion, metric=metric, split=split)
        return table.rows(slice(None))  # validated

    def __len__(self) -> int:
        return np.shape(self.uncertainty)[1]

    @property
    def num_exits(self) -> int:
        """N."""
        return len(self.uncertainty)

    def rows(self, indices: Array | slice) -> 'ExitTable':
        """Returns the table of some of the inputs, such as the half to fit on.

        Args:
            indices: integers, a mask ``[M]``, or a slice.

        Raises:
            ValueError: arrays whose shapes do not agree.
        """
        uncertainty, statistics = checked_arrays(self)
        return self.replace(uncertainty=uncertainty[:, indices], statistics=statistics[:, indices])

    def answering_exits(self, setting: Any) -> np.ndarray:
        """Returns which exit answers each input, ``[M]`` integers in ``[0, N)``.

        Args:
            setting: a policy, an object that holds one, or thresholds ``[N - 1]``.

        Raises:
            ValueError: a policy of another criterion, or thresholds that do not fit.
        """
        uncertainty, _ = checked_arrays(self)
        thresholds = checked_settings(self, setting, 'setting')
        if len(thresholds) != 1:
            raise ValueError(f'setting: expected one, got {len(thresholds)}')
        return answering_exits(uncertainty, thresholds[0])

    def standard_error(self, setting: Any) -> float:
        r"""Computes the standard error of the metric under a setting, by the jackknife over inputs.

        .. math:: s^2 = \frac{M - 1}{M} \sum_b (m_{-b} - \bar m)^2,

        where :math:`m_{-b}` is the metric without input b. For an accuracy p it is :math:`\sqrt{p (1 - p) / (M - 1)}`.

        Args:
            setting: a policy, an object that holds one, or thresholds ``[N - 1]``.

        Raises:
            ValueError: fewer than two inputs, or a setting that does not fit.

        References:
            Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
        """
        (_, statistics), count = checked_arrays(self), len(self)
        if count < 2:
            raise ValueError(f'statistics: a standard error needs at least 2 inputs, got {count}')
        given = statistics[self.answering_exits(setting), np.arange(count)]
        without_one = np.asarray(self.metric(given.sum(axis=0) - given, count - 1))
        return float(np.sqrt((count - 1) / count * np.square(without_one - without_one.mean()).sum()))

    def screen(self, grid: ArrayLike | int | None = None) -> Screen:
        """Evaluates every combination of candidate thresholds.

        ``table.screen(grid).for_cost(c)`` is the exact search: no setting of the grid within the cost is better.

        Args:
            grid: ``[N - 1, V]`` ascending candidates per exit; or V of them at quantiles of the uncertainties; as many
                as keep the combinations below a hundred thousand by default.

        Returns:
            `Screen` with G = V^(N-1) settings, the last exit's threshold varying fastest.

        Raises:
            ValueError: arrays whose shapes do not agree, no inputs, a grid with NaN or not ascending, or too many exits
                for a grid of their own.

        Example:
            >>> right = np.array([[[1.0], [0.0]], [[1.0], [1.0]]])
            >>> table = ExitTable(uncertainty=np.array([[0.1, 0.9], [0.0, 0.0]]), statistics=right,
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> screen = table.screen([[-np.inf, 0.5, np.inf]])
            >>> screen.accuracy.tolist(), screen.cost.tolist(), screen.for_cost(6).accuracy
            ([1.0, 1.0, 0.5], [10.0, 5.5, 1.0], 1.0)

        References:
            BranchyNet, 2016, section III-D: thresholds are screened over a grid.
        """
        uncertainty, statistics = checked_arrays(self)
        grid = grid_of(grid, uncertainty)
        counts, sums = outcomes(uncertainty, statistics, grid)
        settings = np.array([*itertools.product(*grid.tolist())], np.float32)
        return self._screen_of(settings, sums.reshape(len(settings), -1), counts.reshape(len(settings), -1))

    def evaluate(self, settings: Any) -> Screen:
        """Evaluates given settings one by one, such as thresholds that were chosen on other data.

        Args:
            settings: a `Screen`; one setting; or thresholds ``[G, N - 1]`` of the table's criterion.

        Returns:
            `Screen` with the G settings in the order given, measured on this table's data.

        Raises:
            ValueError: settings of another criterion, arrays whose shapes do not agree, or NaN thresholds.

        Example:
            >>> table = ExitTable(uncertainty=[[0.1, 0.9], [0, 0]], statistics=np.ones((2, 2, 1)),
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='test')
            >>> table.evaluate([[0.5]]).exit_fractions.tolist()
            [[0.5, 0.5]]
        """
        uncertainty, statistics = checked_arrays(self)
        thresholds = checked_settings(self, settings, 'settings')
        exits = [answering_exits(uncertainty, setting) for setting in thresholds]
        sums = np.array([statistics[n, np.arange(len(self))].sum(axis=0) for n in exits])
        counts = np.array([np.bincount(n, minlength=self.num_exits) for n in exits])
        return self._screen_of(thresholds, sums, counts)

    def coordinate_descent(self, at_most: float, grid: ArrayLike | int = 100) -> OperatingPoint:
        """Searches greedily: one threshold at a time, the most accurate within the cost, until none changes.

        Linear in the number of exits where `screen` is exponential; stops at a setting that no single threshold
        improves.

        Args:
            at_most: expected cost of one input.
            grid: candidates, as for `screen`.

        Raises:
            ValueError: even the cheapest setting costs more, or a grid with NaN or not ascending.
        """
        grid = grid_of(grid, checked_arrays(self)[0])
        # The last candidate of each exit lets the most leave: the cheapest setting.
        best, before = self.evaluate(grid[None, :, -1]).for_cost(at_most), None
        while best is not before:
            before = best
            for n, candidates in enumerate(grid):
                settings = np.repeat(np.asarray(best.thresholds)[None], len(candidates) + 1, axis=0)
                settings[1:, n] = candidates
                other = self.evaluate(settings).for_cost(at_most)
                if (other.accuracy, -other.cost) > (best.accuracy, -best.cost):
                    best = other
        return best

    def for_shares(self, shares: ArrayLike) -> ExitPolicy:
        """Computes thresholds at which these inputs leave in given shares, up to rounding and ties.

        Thresholds lie midway between the last input that leaves and the first that stays.

        Args:
            shares: ``[N]``, summing to 1.

        Raises:
            ValueError: shares that are negative, do not sum to 1 or are not one per exit.

        Example:
            >>> table = ExitTable(uncertainty=[[1, 2, 4, 8], [0, 0, 0, 0]], statistics=np.ones((2, 4, 1)),
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> table.for_shares([0.5, 0.5]).thresholds.tolist()
            [3.0]
        """
        uncertainty, _ = checked_arrays(self)
        exits, count = uncertainty.shape
        shares = np.asarray(shares, np.float64)
        if shares.shape != (exits,) or not (shares >= 0).all() or not abs(shares.sum() - 1) <= 1e-6:
            raise ValueError(f'shares: got {shares.tolist()}; give {exits} shares that sum to 1')
        gone, thresholds = np.zeros(count, bool), np.full(exits - 1, -np.inf, np.float32)
        for n, left in enumerate(np.round(np.cumsum(shares[:-1]) * count).astype(int)):
            if (leaving := left - gone.sum()) > 0:
                # NaN never leaves: it sorts with what has left already.
                ordered = np.append(np.sort(np.where(gone, np.inf, np.fmin(uncertainty[n], np.inf))), np.inf)
                thresholds[n] = midway(ordered[leaving - 1], ordered[leaving])
            gone |= uncertainty[n] < thresholds[n]
        return ExitPolicy(self.criterion, thresholds)

    def for_budget(self, budget: float) -> ExitPolicy:
        r"""Computes thresholds whose expected cost is a given budget, with shares that fall or rise geometrically.

        Exit n answers a share proportional to :math:`q^n`; one q costs the budget.

        Args:
            budget: expected cost of one input.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's.

        Example:
            >>> table = ExitTable(uncertainty=[[1, 2, 4, 8], [0, 0, 0, 0]], statistics=np.ones((2, 4, 1)),
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> table.for_budget(5.5).thresholds.tolist()
            [3.0]

        References:
            Huang et al., Multi-Scale Dense Networks, 2018, section 4: budgeted batch classification.
        """
        from scipy import optimize  # on use: the import is slow

        checked_arrays(self)
        to_exit = self.costs.to_exit
        if not to_exit[0] <= budget <= to_exit[-1]:
            raise ValueError(f'budget: got {budget}; this network costs {to_exit[0]:.6g} to {to_exit[-1]:.6g}')

        exits = np.arange(self.num_exits)
        # At a logarithm of ±1000 all inputs leave at one exit.
        log_ratio = optimize.brentq(lambda ratio: special.softmax(exits * ratio) @ to_exit - budget, -1000.0, 1000.0)
        return self.for_shares(special.softmax(exits * log_ratio))

    def anytime(self) -> Screen:
        """Computes the accuracy of each exit against what it costs to get there, every input stopping at the same exit.

        Returns:
            `Screen` of N settings, exit after exit. An input whose uncertainty there is not finite goes on, as always.

        References:
            Huang et al., Multi-Scale Dense Networks, 2018, section 4: anytime prediction.
        """
        exits = self.num_exits
        return self.evaluate(np.where(np.arange(exits - 1) == np.arange(exits)[:, None], np.inf, -np.inf))

    def budgeted(self, chosen_on: 'ExitTable', budgets: Sequence[float] | None = None) -> Screen:
        """Computes accuracy against average cost, with thresholds that `for_budget` computes on other data.

        Args:
            chosen_on: the table to choose thresholds on, validation data; of the same network and criterion. Budgets
                are in the unit of this table's costs.
            budgets: average costs to aim at; twenty between the first exit's and the last's if none are given.

        Returns:
            `Screen` of one setting per budget, measured on this table's data.

        Raises:
            ValueError: a table of another criterion or number of exits, or a budget out of reach.

        References:
            Huang et al., Multi-Scale Dense Networks, 2018, section 4: budgeted batch classification.
        """
        _check_same(chosen_on.criterion, self.criterion, 'chosen_on')
        chosen_on, to_exit = chosen_on.replace(costs=self.costs), self.costs.to_exit
        spread = np.linspace(to_exit[0], to_exit[-1], 20) if budgets is None else budgets
        return self.evaluate(np.array([chosen_on.for_budget(float(budget)).thresholds for budget in spread]))

    def path_by_shares(self, *, size: int = 101, floor: float = -np.inf) -> np.ndarray:
        """Builds a path for a `Controller`, along which the share of inputs that an exit is confident of falls evenly.

        Shares of *all* inputs, not of those that reach the exit: costs are roughly, not exactly, even along it. Inputs
        whose uncertainty is not finite leave at no setting and are not counted.

        Args:
            size: G.
            floor: drops all settings up to the last one at which the table's metric, there or half-way to the next, is
                below this value, since a controller interpolates: G is then smaller.

        Returns:
            ``[G, N - 1]`` thresholds of the table's criterion, from leaving most to leaving least.

        Raises:
            ValueError: fewer than two settings, an exit with no finite uncertainty, or a floor out of reach.

        Example:
            >>> table = ExitTable(uncertainty=[[1, 2, 4, 8], [0, 0, 0, 0]], statistics=np.ones((2, 4, 1)),
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> path = table.path_by_shares(size=4)
            >>> [int((np.array([1, 2, 4, 8]) < setting).sum()) for setting in path]
            [4, 2, 1, 0]
        """
        if size < 2:
            raise ValueError(f'size: got {size}; a path has two ends')
        uncertainty, _ = checked_arrays(self)
        finite = np.where(np.isfinite(uncertainty[:-1]), uncertainty[:-1], np.nan)
        if np.isnan(finite).all(axis=1).any():
            raise ValueError('uncertainty: an exit of the table has no finite uncertainty, so no shares')
        path = np.nanquantile(finite, np.linspace(1, 0, size), axis=1).astype(np.float32)
        path[0] = np.nextafter(path[0], np.float32(np.inf))  # the comparison is strict: now every input leaves
        accuracy, between = self.evaluate(path).accuracy, self.evaluate((path[1:] + path[:-1]) / 2).accuracy
        below = np.flatnonzero(np.minimum(accuracy, np.append(between, np.inf)) < floor)
        path = path[below.max(initial=-1) + 1 :]
        if len(path) < 2:
            raise ValueError(f'floor: got {floor}; where inputs leave least the metric is {accuracy[-1]:.4f}')
        return path

    def _screen_of(self, thresholds: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> Screen:
        accuracy, fractions = np.asarray(self.metric(sums, len(self))), counts / len(self)
        return Screen(thresholds, accuracy, fractions, fractions @ self.costs.to_exit, self.criterion, self.split)


def checked_arrays(table: ExitTable) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table's uncertainty as float32 and its statistics as float64, after validation of the whole table.

    Raises:
        ValueError: uncertainty that is not ``[N, M]``, or statistics, costs or a criterion that do not go with it.
    """
    uncertainty, statistics = np.asarray(table.uncertainty, np.float32), np.asarray(table.statistics, np.float64)
    if uncertainty.ndim != 2 or 0 in uncertainty.shape:
        raise ValueError(f'uncertainty: expected [N, M] with at least one exit and one input, got {uncertainty.shape}')
    exits, inputs = uncertainty.shape
    if statistics.ndim != 3 or statistics.shape[:2] != (exits, inputs):
        raise ValueError(f'statistics: expected [{exits}, {inputs}, S] to go with uncertainty, got {statistics.shape}')
    stages, heads = np.shape(table.costs.stages), np.shape(table.costs.exits)
    if not stages == heads == (exits,):
        raise ValueError(f'costs: expected {exits} stages and heads to go with uncertainty, got {stages} and {heads}')
    check_criterion(as_criterion(table.criterion), exits)
    return uncertainty, statistics


def checked_settings(table: ExitTable, given: Any, argument: str) -> np.ndarray:
    """Returns the thresholds ``[G, N - 1]`` of settings, after validation of their criterion and values."""
    given = getattr(given, 'policy', given)
    if isinstance(given, (ExitPolicy, Screen)):
        _check_same(given.criterion, table.criterion, argument)
        given = given.thresholds
    thresholds, width = np.atleast_2d(np.asarray(given, np.float32)), table.num_exits - 1
    if thresholds.ndim != 2 or thresholds.shape[1] != width or len(thresholds) == 0 or np.isnan(thresholds).any():
        expected = f'expected thresholds [{width}] or [G, {width}], no NaN'
        raise ValueError(f'{argument}: {expected}; got {thresholds.tolist()!s:.200}')
    return thresholds


def _check_same(theirs: Any, ours: Any, argument: str) -> None:
    theirs, ours = as_criterion(theirs), as_criterion(ours)
    if theirs != ours:
        names = f'{theirs.name!r}, but this table holds uncertainties of {ours.name!r}'
        raise ValueError(f'{argument}: made for the criterion {names}; their names and their numbers must agree')
