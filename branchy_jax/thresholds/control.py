"""Thresholds that adapt while they run: hold a target as the data drift, and notice that they drift.

The paper proposes thresholds that adapt at run time to hold a latency or an accuracy; here they move along a path of
settings, from leaving most to never leaving. `Controller` and `Monitor` are frozen pytrees whose methods return the
state after, and work under `jax.jit` and `jax.vmap`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.criteria.criterion import Criterion, check_criterion
from branchy_jax.thresholds.table import ExitTable, checked_arrays
from branchy_jax.types import Array, ByValue, ExitPolicy

_FEWEST_EXPECTED = 5.0  # Cochran's rule: below it, the answers of an exit scatter too unevenly for a chi-squared


@struct.dataclass(eq=False)
class Controller(ByValue):
    """Where the thresholds stand, and what holds them there. Goes straight into an executor.

    Attributes:
        path: ``[G, N - 1]`` finite settings from leaving most to leaving least.
        criterion: whose uncertainties they are compared with.
        position: in ``[0, 1]`` along the path.
        target: mean that the observed values are to have.
        scale: how much the observed mean rises from one end of the path to the other, roughly.
        horizon: images after which an error has shrunk to a third.
        largest_step: the most that the position moves in one update.
    """

    path: Array
    criterion: Criterion
    position: Array
    target: Array
    scale: Array
    horizon: Array
    largest_step: Array

    @property
    def policy(self) -> ExitPolicy:
        """The policy to answer with now: thresholds between the two nearest settings of the path."""
        place = self.position * (len(self.path) - 1)
        below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, len(self.path) - 2)
        share = place - below
        return ExitPolicy(self.criterion, self.path[below] * (1 - share) + self.path[below + 1] * share)

    def update(self, observed: Array) -> Controller:
        r"""Moves the thresholds after some images were answered with `policy`.

        .. math:: p \leftarrow \operatorname{clip}_{[0, 1]}\left(p +
            \operatorname{clip}_{\pm s} \sum_b \operatorname{clip}_{\pm 1} \frac{t - o_b}{h\, r}\right)

        An integral controller on a plant without memory. Where the observed mean rises along the path by k times the
        given scale, it settles without overshoot while k times the batch size is below the horizon, and settles at all
        below twice that.

        No image moves the thresholds by more than the whole path, so sums stay finite however absurd an observation.

        Args:
            observed: ``[B]`` cost, milliseconds or proxy of each image answered.

        Returns:
            The state after. Values that are not finite are left out.
        """
        observed = jnp.asarray(observed, jnp.float32)
        moves = (self.target - observed) / self.scale / self.horizon
        # NaN here is 0 / 0: XLA divides by scale × horizon, which may be too small for float32.
        moves = jnp.where(jnp.isfinite(observed) & ~jnp.isnan(moves), jnp.clip(moves, -1.0, 1.0), 0.0)
        step = jnp.clip(moves.sum(), -self.largest_step, self.largest_step)
        return self.replace(position=jnp.clip(self.position + step, 0.0, 1.0))


def create_controller(
    path: Array,
    *,
    criterion: Criterion,
    target: float,
    scale: float,
    position: float = 0.5,
    horizon: float = 300.0,
    largest_step: float = 0.1,
) -> Controller:
    """Creates a controller that has seen nothing yet.

    Args:
        path: ``[G, N - 1]`` settings from leaving most to leaving least, best evenly spaced in what is held
            (`path_by_shares`; turn a `threshold_path` round); infinities are replaced by the nearest finite threshold
            of their exit.
        criterion: whose uncertainties the path was made for.
        target: mean to hold: of cost or milliseconds per image, or of a label-free proxy of accuracy such as one minus
            a calibrated or learned uncertainty. Whatever is held must rise along the path.
        scale: rise of that mean along the path, roughly.
        position: to start at.
        horizon: images after which an error has shrunk to a third; short ones follow faster and scatter more. Well
            above the batch size, see `Controller.update`.
        largest_step: the most that the position moves in one update, however wild the observations.

    Raises:
        ValueError: numbers out of range, a path without two settings, or one that begins at its leaving least; a
            criterion's name instead of a criterion.

    Example:
        >>> from branchy_jax.criteria import entropy
        >>> controller = create_controller([[0.1], [0.0]], criterion=entropy, target=5.0, scale=10.0)
        >>> controller = controller.update(jnp.array([9.0, 9.0]))   # too dear: leave earlier
        >>> bool(controller.policy.thresholds[0] > 0.05)
        True
    """
    path = _finite(np.asarray(path, np.float32))
    check_criterion(criterion, path.shape[1] + 1)
    numbers = {'position': position, 'target': target, 'scale': scale, 'horizon': horizon, 'largest_step': largest_step}
    smallest = np.finfo(np.float32).tiny  # what is smaller counts as 0 on most devices
    with np.errstate(over='ignore'):
        values = {name: np.float32(number) for name, number in numbers.items()}
    if not (
        all(np.isfinite(value) for value in values.values())
        and min(values['scale'], values['horizon'], values['largest_step']) >= smallest
        and values['largest_step'] <= 1
        and 0 <= values['position'] <= 1
    ):
        raise ValueError(
            'target, scale, horizon, largest_step, position: expected finite numbers, scale and horizon above 0, '
            f'largest_step in (0, 1], position in [0, 1]; got {target}, {scale}, {horizon}, {largest_step}, {position}'
        )
    return Controller(jnp.asarray(path), criterion, **{name: jnp.float32(value) for name, value in values.items()})


def _finite(path: np.ndarray) -> np.ndarray:
    if path.ndim != 2 or len(path) < 2 or np.isnan(path).any() or not np.isfinite(path).any(axis=0).all():
        raise ValueError(f'path: expected [G, N - 1] with G at least 2 and finite settings, got shape {path.shape}')
    if (path[0] < path[-1]).any():
        raise ValueError(
            'path: it must lead from leaving most to leaving least; this one leads the other way, turn it round'
        )
    with_nan = np.where(np.isfinite(path), path, np.nan)
    return np.clip(path, np.nanmin(with_nan, axis=0), np.nanmax(with_nan, axis=0))


def path_by_shares(table: ExitTable, *, size: int = 101, floor: float | None = None) -> np.ndarray:
    """Builds a path along which every exit is sure of a share of all inputs that falls evenly from all to none.

    Shares of *all* inputs, not of those that reach the exit: costs are roughly, not exactly, even along it. Inputs
    whose uncertainty is not finite leave at no setting and are not counted.

    Args:
        table: of validation data.
        size: G.
        floor: keeps only the end of the path from which on the table's metric is nowhere below this, half-way between
            two settings either, where a controller may stand: G is then smaller.

    Returns:
        ``[G, N - 1]`` thresholds of the table's criterion.

    Raises:
        ValueError: fewer than two settings, an exit with no finite uncertainty, or a floor out of reach.

    Example:
        >>> from branchy_jax.costs import StageCosts
        >>> from branchy_jax.criteria import entropy
        >>> table = ExitTable(uncertainty=[[1, 2, 4, 8], [0, 0, 0, 0]], statistics=np.ones((2, 4, 1)),
        ...                   costs=StageCosts([1, 9], [0, 0]), criterion=entropy, split='validation')
        >>> path = path_by_shares(table, size=4)
        >>> [int((np.array([1, 2, 4, 8]) < setting).sum()) for setting in path]
        [4, 2, 1, 0]
    """
    if size < 2:
        raise ValueError(f'size: got {size}; a path has two ends')
    uncertainty, _ = checked_arrays(table)
    finite = np.where(np.isfinite(uncertainty[:-1]), uncertainty[:-1], np.nan)
    if np.isnan(finite).all(axis=1).any():
        raise ValueError('uncertainty: an exit of the table is unsure of everything without end; it has no shares')
    path = np.nanquantile(finite, np.linspace(1, 0, size), axis=1).astype(np.float32)
    path[0] = np.nextafter(path[0], np.float32(np.inf))  # the comparison is strict: now all are sure
    return path if floor is None else _above(path, table, floor)


def _above(path: np.ndarray, table: ExitTable, floor: float) -> np.ndarray:
    accuracy = table.evaluate(path).accuracy
    between = table.evaluate((path[1:] + path[:-1]) / 2).accuracy
    under = np.flatnonzero(np.minimum(accuracy, np.append(between, np.inf)) < floor)
    kept = path[under[-1] + 1 :] if len(under) else path
    if len(kept) < 2:
        raise ValueError(f'floor: got {floor}; where inputs leave least the metric is {accuracy[-1]:.4f}')
    return kept


@struct.dataclass(eq=False)
class Monitor(ByValue):
    """Which exits answer lately, against how it should be.

    Attributes:
        expected: ``[N]`` shares on reference data.
        shares: ``[N]`` moving average.
        seen: how many images it has averaged, counted up to the memory.
        memory: images that the moving average reaches back.
        noise: sum of the squared weights of the images averaged: one over the images that the average is worth.
    """

    expected: Array
    shares: Array
    seen: Array
    memory: Array
    noise: Array

    def observe(self, exit_index: Array) -> Monitor:
        """Counts a batch of answers.

        Args:
            exit_index: ``[B]`` as executors return it; B may be 0.

        Returns:
            The state after.
        """
        exit_index = jnp.atleast_1d(exit_index)
        count = len(exit_index)
        if count == 0:
            return self
        found = jax.nn.one_hot(exit_index, len(self.expected)).mean(axis=0)
        seen = jnp.minimum(self.seen + count, jnp.maximum(self.memory, count))
        weight = count / seen
        return self.replace(
            shares=(1 - weight) * self.shares + weight * found,
            seen=seen,
            noise=(1 - weight) ** 2 * self.noise + weight**2 / count,
        )

    @property
    def drift(self) -> Array:
        r"""How far the shares are from those expected, in standard deviations of chance.

        .. math:: \sqrt{\frac{\chi^2}{\max(1, d)}}, \quad
            \chi^2 = \sum_n \frac{m (\hat f_n - f_n)^2}{\max(f_n, 5 / m)}, \quad
            d = \sum_n \frac{f_n (1 - f_n)}{\max(f_n, 5 / m)}

        with m the images that the moving average is worth: as many as were seen at first, twice the memory in the end.
        About 1 without drift, above 3 hardly by chance. The shares expected count as exact: take them from many more
        images than the memory holds.

        **Exits that are expected to answer hardly ever.** Pearson's statistic, which this is where every exit expects
        five answers or more, breaks down below that: dividing by an expectation near 0, a single answer is an alarm.
        Waiting until the rarest exit expects five would be silence for good where it never does, and adding a rare exit
        to its neighbour would hide inputs that move between just these two. So a rare exit is judged as if it expected
        five: its own scatter is smaller than that, chance raises an alarm more rarely, not more often, and it takes
        about seven answers too many to be noticed, be it expected to answer none. The same holds for every exit while
        few images were seen, so nothing need be waited for. What such exits hold back is taken out of the degrees of
        freedom d, N − 1 if none is rare, so that exits which never answer do not dull the others' alarm. That a rare
        exit answers *less* than expected nobody can tell.
        """
        floored = jnp.maximum(self.expected, _FEWEST_EXPECTED * self.noise)
        chi_squared = jnp.sum((self.shares - self.expected) ** 2 / floored) / self.noise
        freedom = jnp.sum(self.expected * (1 - self.expected) / floored)
        return jnp.sqrt(chi_squared / jnp.maximum(1.0, freedom))


def create_monitor(expected: Array, *, memory: float = 1000.0) -> Monitor:
    """Creates a monitor that has seen nothing yet.

    Args:
        expected: ``[N]`` exit shares on reference data, summing to 1; exits may be expected to answer none.
        memory: images that the moving average reaches back.

    Raises:
        ValueError: shares that do not sum to 1, or a memory below 1.

    Example:
        >>> monitor = create_monitor([0.9, 0.1, 0.0])
        >>> monitor = monitor.observe(jnp.array([0] * 90 + [1] * 10))
        >>> bool(monitor.drift < 1), bool(monitor.observe(jnp.array([2] * 20)).drift > 3)
        (True, True)
    """
    expected = np.asarray(expected, np.float32)
    if expected.ndim != 1 or not abs(expected.sum() - 1) <= 1e-4 or (expected < 0).any() or not 1 <= memory < np.inf:
        raise ValueError(f'expected: got {expected.tolist()}, memory {memory}; give shares summing to 1, memory ≥ 1')
    shares = jnp.asarray(expected)
    return Monitor(shares, shares, seen=jnp.float32(0.0), memory=jnp.float32(memory), noise=jnp.float32(1.0))
