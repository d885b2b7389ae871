"""Thresholds that adapt at run time: hold a target as the data drift, and detect the drift.

The paper proposes thresholds that adapt at run time to hold a latency or an accuracy; here they move along a path of
settings, from leaving most to leaving least. `Controller` and `Monitor` are frozen pytrees whose methods return the
next state, and work under `jax.jit` and `jax.vmap`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from branchy_jax.criteria import Criterion, as_criterion
from branchy_jax.criteria.criterion import check_criterion
from branchy_jax.types import Array, ByValue, ExitPolicy

_FEWEST_EXPECTED = 5.0  # Cochran's rule: below it, the answers of an exit scatter too unevenly for a chi-squared


class Controller(ByValue, struct.PyTreeNode, eq=False):
    """A controller that holds a target by moving the thresholds along a path. Goes wherever a policy goes.

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

    @classmethod
    def create(
        cls,
        path: ArrayLike,
        *,
        criterion: Any,
        target: float,
        scale: float,
        position: float = 0.5,
        horizon: float = 300.0,
        largest_step: float = 0.1,
    ) -> 'Controller':
        """Creates a controller that has observed nothing yet.

        Args:
            path: ``[G, N - 1]`` settings from leaving most to leaving least, best evenly spaced in what is held
                (`ExitTable.path_by_shares`; reverse a `Screen.path`); infinities are replaced by the nearest finite
                threshold of their exit.
            criterion: whose uncertainties the path was made for: a criterion, or a function of logits.
            target: mean to hold: of cost or milliseconds per image, or of a label-free proxy of accuracy such as one
                minus a calibrated or learned uncertainty. Whatever is held must rise along the path.
            scale: rise of that mean along the path, roughly.
            position: to start at.
            horizon: images after which an error has shrunk to a third; short ones follow faster and scatter more. Well
                above the batch size, see `update`.
            largest_step: the most that the position moves in one update, however wild the observations.

        Raises:
            ValueError: numbers out of range, a path without two settings, or one that begins at its leaving least; a
                criterion's name instead of a criterion.

        Example:
            >>> from branchy_jax.criteria import entropy
            >>> controller = Controller.create([[0.1], [0.0]], criterion=entropy, target=5.0, scale=10.0)
            >>> controller = controller.update(jnp.array([9.0, 9.0]))   # too expensive: leave earlier
            >>> bool(controller.policy.thresholds[0] > 0.05)
            True
        """
        path, criterion = _finite_path(path), as_criterion(criterion)
        check_criterion(criterion, path.shape[1] + 1)
        with np.errstate(over='ignore'):
            numbers = np.array([position, target, scale, horizon, largest_step], np.float32)
        # Numbers below float32's smallest normal one count as 0 on most devices.
        positive = numbers[2:].min() >= np.finfo(np.float32).tiny
        if not (np.isfinite(numbers).all() and positive and largest_step <= 1 and 0 <= position <= 1):
            expected = 'finite numbers, position in [0, 1], scale and horizon above 0, largest_step in (0, 1]'
            raise ValueError(f'position, target, scale, horizon, largest_step: got {numbers.tolist()}; give {expected}')
        return cls(jnp.asarray(path), criterion, *map(jnp.asarray, numbers))

    @property
    def policy(self) -> ExitPolicy:
        """The policy to answer with now: thresholds between the two nearest settings of the path."""
        place = self.position * (len(self.path) - 1)
        below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, len(self.path) - 2)
        share = place - below
        return ExitPolicy(self.criterion, self.path[below] * (1 - share) + self.path[below + 1] * share)

    def update(self, observed: Array) -> 'Controller':
        r"""Moves the thresholds after some images were answered with `policy`.

        .. math:: p \leftarrow \operatorname{clip}_{[0, 1]}\left(p +
            \operatorname{clip}_{\pm s} \sum_b \operatorname{clip}_{\pm 1} \frac{t - o_b}{h\, r}\right)

        An integral controller on a plant without memory. Where the observed mean rises along the path by k times the
        given scale, it settles without overshoot while k times the batch size is below the horizon, and settles at all
        below twice that.

        No image moves the thresholds by more than the whole path, so sums stay finite for any finite observation.

        Args:
            observed: ``[B]`` cost, milliseconds or proxy of each image answered.

        Returns:
            The next state. Values that are not finite are left out.
        """
        observed = jnp.asarray(observed, jnp.float32)
        moves = (self.target - observed) / self.scale / self.horizon
        # NaN here is 0 / 0: XLA divides by scale × horizon, which may be too small for float32.
        moves = jnp.where(jnp.isfinite(observed) & ~jnp.isnan(moves), jnp.clip(moves, -1.0, 1.0), 0.0)
        step = jnp.clip(moves.sum(), -self.largest_step, self.largest_step)
        return self.replace(position=jnp.clip(self.position + step, 0.0, 1.0))


def _finite_path(given: ArrayLike) -> np.ndarray:
    path = np.asarray(given, np.float32)
    if path.ndim != 2 or len(path) < 2 or np.isnan(path).any() or not np.isfinite(path).any(axis=0).all():
        raise ValueError(f'path: expected [G, N - 1] with G at least 2 and finite settings, got shape {path.shape}')
    if (path[0] < path[-1]).any():
        raise ValueError('path: it must lead from leaving most to leaving least; reverse this one')
    with_nan = np.where(np.isfinite(path), path, np.nan)
    return np.clip(path, np.nanmin(with_nan, axis=0), np.nanmax(with_nan, axis=0))


class Monitor(ByValue, struct.PyTreeNode, eq=False):
    """A moving average of the shares of inputs that each exit answers, compared with the shares expected.

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

    @classmethod
    def create(cls, expected: ArrayLike, *, memory: float = 1000.0) -> 'Monitor':
        """Creates a monitor that has observed nothing yet.

        Args:
            expected: ``[N]`` exit shares on reference data, summing to 1; exits may be expected to answer none.
            memory: images that the moving average reaches back.

        Raises:
            ValueError: shares that do not sum to 1, or a memory below 1.

        Example:
            >>> monitor = Monitor.create([0.9, 0.1, 0.0])
            >>> monitor = monitor.observe(jnp.array([0] * 90 + [1] * 10))
            >>> bool(monitor.drift < 1), bool(monitor.observe(jnp.array([2] * 20)).drift > 3)
            (True, True)
        """
        shares = np.asarray(expected, np.float32)
        if shares.ndim != 1 or not abs(shares.sum() - 1) <= 1e-4 or (shares < 0).any() or not 1 <= memory < np.inf:
            raise ValueError(f'expected: got {shares.tolist()}, memory {memory}; give shares summing to 1, memory ≥ 1')
        return cls(*map(jnp.asarray, (shares, shares, np.float32(0), np.float32(memory), np.float32(1))))

    def observe(self, exit_index: Array) -> 'Monitor':
        """Counts a batch of answers.

        Args:
            exit_index: ``[B]`` as executors return it; B may be 0.

        Returns:
            The next state.
        """
        exit_index = jnp.atleast_1d(exit_index)
        if (count := len(exit_index)) == 0:
            return self
        shares = jax.nn.one_hot(exit_index, len(self.expected)).mean(axis=0)
        seen = jnp.minimum(self.seen + count, jnp.maximum(self.memory, count))
        weight = count / seen
        noise = (1 - weight) ** 2 * self.noise + weight**2 / count
        return self.replace(shares=(1 - weight) * self.shares + weight * shares, seen=seen, noise=noise)

    @property
    def drift(self) -> Array:
        r"""How far the shares are from those expected, in standard deviations of chance.

        .. math:: \sqrt{\frac{\chi^2}{\max(1, d)}}, \quad
            \chi^2 = \sum_n \frac{m (\hat f_n - f_n)^2}{\max(f_n, 5 / m)}, \quad
            d = \sum_n \frac{f_n (1 - f_n)}{\max(f_n, 5 / m)}

        with m the images that the moving average is worth: as many as were seen at first, twice the memory in the end.
        About 1 without drift, above 3 hardly by chance. The shares expected count as exact: take them from many more
        images than the memory holds.

        **Rare exits.** Where every exit expects five answers or more, this is Pearson's statistic. Below that, Pearson
        divides by an expectation near 0, and a single answer raises an alarm. Waiting until the rarest exit expects
        five may take for ever, and adding a rare exit to its neighbour would hide inputs that move between the two.
        Therefore an exit that expects fewer than five answers is treated as if it expected five. Its own scatter is
        smaller than that, so chance raises an alarm more rarely, and about seven unexpected answers raise one even
        where none are expected. The same holds for every exit while few images were seen. The degrees of freedom d
        (N − 1 if no exit is rare) shrink accordingly, so that rare exits do not hide the drift of the others. That a
        rare exit answers *less* than expected cannot be detected.
        """
        floored = jnp.maximum(self.expected, _FEWEST_EXPECTED * self.noise)
        chi_squared = jnp.sum((self.shares - self.expected) ** 2 / floored) / self.noise
        freedom = jnp.sum(self.expected * (1 - self.expected) / floored)
        return jnp.sqrt(chi_squared / jnp.maximum(1.0, freedom))
