"""The table of cached exits: everything that choosing thresholds needs, together, and every way to choose them.

What is chosen on a table carries the table's criterion and the name of its data along, so that no point can be taken
for one of another criterion, nor one found on validation data for one measured on test data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from scipy import optimize, special

from branchy_jax.costs import StageCosts, expected_cost
from branchy_jax.criteria import as_policy, entropy, replay
from branchy_jax.criteria.criterion import Criterion, check_criterion
from branchy_jax.thresholds.screen import (
    Screen,
    answering_exits,
    as_matrix,
    checked_grid,
    grid_size,
    midway,
    outcomes,
    quantile_grid,
)
from branchy_jax.thresholds.statistics import Metric, Statistics, accuracy_statistics, mean_of_statistic, standard_error
from branchy_jax.types import Array, ByValue, ExitPolicy, OperatingPoint


@struct.dataclass(eq=False, kw_only=True)
class ExitTable(ByValue):
    """What N exits said of M inputs, what that is worth, and what it costs.

    `branchy_jax.inference.exit_table` makes one by running a network, `ExitTable.from_logits` from cached logits.
    Methods that take a *setting* take an `ExitPolicy`, whatever holds one as ``policy`` (an `OperatingPoint`, a
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
        criterion: Criterion = entropy,
        statistics: Statistics = accuracy_statistics,
        metric: Metric = mean_of_statistic,
        split: str,
    ) -> ExitTable:
        """Makes a table from cached logits by replaying a criterion over them.

        Args:
            logits: ``[N, M, …, K]`` as the heads gave them.
            labels: ``[M, …]``, or whatever ``statistics`` takes.
            costs: per stage and head.
            criterion: how unsure an exit is; what it answers is what counts, not the head's own logits.
            statistics: ``(answer logits [N, M, …, K], labels) → [N, M, S]``.
            metric: of their sums.
            split: name of the data.

        Raises:
            ValueError: arrays whose shapes do not agree, no inputs, labels out of range, a criterion that was learned
                for another number of exits.
        """
        logits = np.asarray(logits)
        if logits.ndim < 3 or 0 in logits.shape:
            raise ValueError(f'logits: expected [N, M, …, K] with at least one exit and one input, got {logits.shape}')
        check_criterion(criterion, len(logits))
        answers, uncertainty = (np.asarray(found) for found in replay(criterion, logits))
        found = np.asarray(statistics(answers, labels), np.float64)
        table = cls(
            uncertainty=uncertainty, statistics=found, costs=costs, criterion=criterion, metric=metric, split=split
        )
        checked_arrays(table)
        return table

    def __len__(self) -> int:
        return np.shape(self.uncertainty)[1]

    @property
    def num_exits(self) -> int:
        """N."""
        return len(self.uncertainty)

    def rows(self, indices: Array | slice) -> ExitTable:
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
            setting: a policy, what holds one, or thresholds ``[N - 1]``.

        Raises:
            ValueError: a policy of another criterion, or thresholds that do not fit.
        """
        return answering_exits(self.uncertainty, self._thresholds_of(setting, 'setting'))

    def standard_error(self, setting: Any) -> float:
        """Computes the standard error of the metric under a setting, by the jackknife over inputs.

        Args:
            setting: a policy, what holds one, or thresholds ``[N - 1]``.

        Raises:
            ValueError: fewer than two inputs, or a setting that does not fit.
        """
        _, statistics = checked_arrays(self)
        return standard_error(statistics[self.answering_exits(setting), np.arange(len(self))], self.metric)

    def screen(self, grid: Array | None = None) -> Screen:
        """Evaluates every combination of candidate thresholds.

        Args:
            grid: ``[N - 1, V]`` ascending candidates per exit; `quantile_grid` if none is given, as fine as keeps the
                combinations below a hundred thousand.

        Returns:
            `Screen` with G = V^(N-1) settings, the last exit's threshold varying fastest.

        Raises:
            ValueError: arrays whose shapes do not agree, no inputs, a grid with NaN or not ascending, or too many exits
                for a grid of their own.

        Example:
            >>> right = np.array([[[1.0], [0.0]], [[1.0], [1.0]]])
            >>> table = ExitTable(uncertainty=np.array([[0.1, 0.9], [0.0, 0.0]]), statistics=right,
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> found = table.screen([[-np.inf, 0.5, np.inf]])
            >>> found.accuracy.tolist(), found.cost.tolist()
            ([1.0, 1.0, 0.5], [10.0, 5.5, 1.0])

        References:
            BranchyNet, 2016, section III-D: thresholds are screened over a grid.
        """
        uncertainty, statistics = checked_arrays(self)
        exits, inputs = uncertainty.shape
        grid = quantile_grid(uncertainty, size=grid_size(exits)) if grid is None else checked_grid(grid, exits)
        counts, sums = outcomes(uncertainty, statistics, grid)
        settings = np.array([*itertools.product(*grid.tolist())], np.float32)
        return self._screen_of(settings, sums.reshape(len(settings), -1), counts.reshape(len(settings), -1) / inputs)

    def evaluate(self, settings: Any) -> Screen:
        """Evaluates given settings, one by one: for carrying thresholds chosen elsewhere over to these data.

        Args:
            settings: a `Screen`; one policy or what holds one; or thresholds ``[G, N - 1]`` of the table's criterion.

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
        exits, inputs = uncertainty.shape
        thresholds = self._all_thresholds_of(settings)
        fractions, sums = np.empty((len(thresholds), exits)), np.empty((len(thresholds), statistics.shape[2]))
        for g, setting in enumerate(thresholds):
            first = answering_exits(uncertainty, setting)
            fractions[g] = np.bincount(first, minlength=exits) / inputs
            sums[g] = statistics[first, np.arange(inputs)].sum(axis=0)
        return self._screen_of(thresholds, sums, fractions)

    def exact(self, at_most: float, grid: Array | None = None) -> OperatingPoint:
        """Finds the most accurate setting of a grid whose expected cost is at most the one given: none is better.

        Args:
            at_most: expected cost of one input.
            grid: ``[N - 1, V]``; `quantile_grid` of 100 values if none is given, fewer where there are too many
                settings.

        Raises:
            ValueError: every setting costs more, or too many exits for a grid of their own.

        Example:
            >>> table = ExitTable(uncertainty=[[0.1, 0.9], [0, 0]], statistics=[[[1], [0]], [[1], [1]]],
            ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
            >>> table.exact(6).accuracy
            1.0
        """
        if grid is None:
            grid = quantile_grid(self.uncertainty, size=min(100, grid_size(self.num_exits)))
        return self.screen(grid).for_cost(at_most)

    def coordinate_descent(self, at_most: float, grid: Array | None = None) -> OperatingPoint:
        """Searches greedily: one threshold at a time, the most accurate within the cost, until none changes.

        Linear in the number of exits where `exact` is exponential; stops at a setting that no single threshold
        improves.

        Args:
            at_most: expected cost of one input.
            grid: ``[N - 1, V]`` ascending; `quantile_grid` of 100 values if none is given.

        Raises:
            ValueError: even the cheapest setting costs more, or a grid with NaN or not ascending.
        """
        grid = checked_grid(quantile_grid(self.uncertainty) if grid is None else grid, self.num_exits)
        # The last candidate of each exit lets the most leave: the cheapest setting.
        best = self.evaluate(grid[None, :, -1]).for_cost(at_most)
        while True:
            before = best
            for n in range(len(grid)):
                settings = np.repeat(np.asarray(best.thresholds)[None], len(grid[n]) + 1, axis=0)
                settings[1:, n] = grid[n]
                found = self.evaluate(settings).for_cost(at_most)
                if (found.accuracy, -found.cost) > (best.accuracy, -best.cost):
                    best = found
            if best is before:
                return best

    def for_shares(self, shares: Array) -> ExitPolicy:
        """Finds thresholds at which these inputs leave in given shares, up to rounding and ties.

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
        waiting, thresholds = np.arange(count), np.empty(exits - 1, np.float32)
        for n, left in enumerate(np.round(np.cumsum(shares[:-1]) * count).astype(int)):
            thresholds[n] = _leave(uncertainty[n, waiting], left - (count - len(waiting)))
            waiting = waiting[~(uncertainty[n, waiting] < thresholds[n])]
        return ExitPolicy(self.criterion, thresholds)

    def for_budget(self, budget: float) -> ExitPolicy:
        r"""Finds thresholds whose expected cost is a given budget, with shares that fall or rise geometrically.

        Exit n answers a share proportional to :math:`q^n`; the one q that costs the budget is found.

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
        checked_arrays(self)
        return self.for_shares(_geometric_shares(self.costs, budget))

    def anytime(self) -> Screen:
        """Computes the accuracy of each exit against what it costs to get there, every input stopping at the same exit.

        Returns:
            `Screen` of N settings, exit after exit. An input whose uncertainty there is not finite goes on, as always.

        References:
            Huang et al., Multi-Scale Dense Networks, 2018, section 4: anytime prediction.
        """
        exits = self.num_exits
        return self.evaluate(np.where(np.arange(exits - 1) == np.arange(exits)[:, None], np.inf, -np.inf))

    def budgeted(self, found_on: ExitTable, budgets: Sequence[float] | None = None) -> Screen:
        """Computes accuracy against average cost, with thresholds that `for_budget` finds on other data.

        Args:
            found_on: the table to find thresholds on, validation data; of the same network and criterion. Budgets are
                in the unit of this table's costs.
            budgets: average costs to aim at; twenty between the first exit's and the last's if none are given.

        Returns:
            `Screen` of one setting per budget, measured on this table's data.

        Raises:
            ValueError: a table of another criterion or number of exits, or a budget out of reach.

        References:
            Huang et al., Multi-Scale Dense Networks, 2018, section 4: budgeted batch classification.
        """
        checked_arrays(self)
        _check_same(found_on.criterion, self.criterion, 'found_on')
        found_on = found_on.replace(costs=self.costs)
        ends = self.costs.to_exit[0], self.costs.to_exit[-1]
        spread = np.linspace(*ends, 20) if budgets is None else budgets
        return self.evaluate(np.array([found_on.for_budget(float(budget)).thresholds for budget in spread]))

    def _screen_of(self, thresholds: np.ndarray, sums: np.ndarray, fractions: np.ndarray) -> Screen:
        accuracy, cost = np.asarray(self.metric(sums, len(self))), fractions @ self.costs.to_exit
        return Screen(thresholds, accuracy, fractions, cost, self.criterion, self.split)

    def _thresholds_of(self, setting: Any, argument: str) -> np.ndarray:
        """Returns ``[N - 1]`` of what goes for a setting; thresholds of another criterion are refused."""
        policy = getattr(setting, 'policy', setting)
        if isinstance(policy, ExitPolicy):
            _check_same(policy.criterion, self.criterion, argument)
        else:
            policy = ExitPolicy(self.criterion, policy)
        return np.asarray(as_policy(policy, self.num_exits).thresholds)

    def _all_thresholds_of(self, settings: Any) -> np.ndarray:
        """Returns ``[G, N - 1]`` of what `evaluate` takes."""
        if isinstance(getattr(settings, 'policy', settings), ExitPolicy):
            return self._thresholds_of(settings, 'settings')[None]
        if isinstance(settings, Screen):
            _check_same(settings.criterion, self.criterion, 'settings')
            settings = settings.thresholds
        thresholds = np.asarray(settings, np.float32)
        if thresholds.ndim != 2 or thresholds.shape[1] != self.num_exits - 1 or np.isnan(thresholds).any():
            raise ValueError(
                f'settings: expected [G, {self.num_exits - 1}] thresholds without NaN, got shape {thresholds.shape}'
            )
        return thresholds


def checked_arrays(table: ExitTable) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table's uncertainty as float32 and its statistics as float64, once all of it is seen to agree.

    Raises:
        ValueError: uncertainty that is not ``[N, M]``, or statistics, costs or a criterion that do not go with it.
    """
    uncertainty, statistics = as_matrix(table.uncertainty), np.asarray(table.statistics, np.float64)
    exits, inputs = uncertainty.shape
    if statistics.ndim != 3 or statistics.shape[:2] != (exits, inputs):
        raise ValueError(f'statistics: expected [{exits}, {inputs}, S] to go with uncertainty, got {statistics.shape}')
    stages, heads = np.shape(table.costs.stages), np.shape(table.costs.exits)
    if not stages == heads == (exits,):
        raise ValueError(f'costs: expected {exits} stages and heads to go with uncertainty, got {stages} and {heads}')
    check_criterion(table.criterion, exits)
    return uncertainty, statistics


def _check_same(theirs: Criterion, ours: Criterion, argument: str) -> None:
    if theirs != ours:
        apart = ', with other numbers in it' if getattr(theirs, 'name', None) == ours.name else ''
        raise ValueError(
            f'{argument}: made for the criterion {getattr(theirs, "name", theirs)!r}{apart}, but the uncertainties of '
            f'this table are of {ours.name!r}; thresholds of one say nothing of the other'
        )


def _leave(uncertainty: np.ndarray, count: int) -> np.float32:
    """Returns the threshold at which the ``count`` least unsure leave; NaN never does."""
    if count <= 0:
        return np.float32(-np.inf)
    ordered = np.sort(np.where(np.isnan(uncertainty), np.float32(np.inf), uncertainty))
    return np.float32(np.inf) if count >= len(ordered) else np.float32(midway(ordered[count - 1], ordered[count]))


def _geometric_shares(costs: StageCosts, budget: float) -> np.ndarray:
    """Returns shares ``[N]`` proportional to powers of the one number with which they cost the budget."""
    cheapest, dearest = costs.to_exit[0], costs.to_exit[-1]
    if not cheapest <= budget <= dearest:
        raise ValueError(f'budget: got {budget}; this network costs {cheapest:.6g} to {dearest:.6g}')
    exits = np.arange(len(costs.to_exit))

    def excess(log_ratio: float) -> float:
        return expected_cost(costs, special.softmax(exits * log_ratio)) - budget

    steepest = 100.0  # e^-100: all but one exit answer nothing that float64 can tell
    if excess(-steepest) >= 0 or excess(steepest) <= 0:
        return special.softmax(exits * (-steepest if excess(-steepest) >= 0 else steepest))
    return special.softmax(exits * optimize.brentq(excess, -steepest, steepest))
