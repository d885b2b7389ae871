"""Times of stages and heads, and what they forecast for every choice of exits: NumPy only."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from branchy_jax.types import StageCosts

_HEAVY_MS = 25.0  # of eight inputs
# The share of a heavy network's time that does not shrink with the batch below the smallest measured size. It is an
# assumption: such networks take long to compile, so smaller sizes are not measured.
_FIXED_SHARE = 0.25

_RESAMPLED_BATCHES = 32
_MOST_SIDE_EXITS = 10
_MOST_PARTS = 64

Forecast = tuple[float, tuple[int, ...], tuple[int, ...]]
"""Milliseconds of a batch, the exits asked, and the chunk size of each."""


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentTimes:
    """Milliseconds of stages and heads for whole batches.

    Attributes:
        batch_sizes: ``[S]`` ascending.
        stages: ``[S, N]`` ms of stage n for a batch of that size.
        exits: ``[S, N]`` ms of head n and its uncertainty.
    """

    batch_sizes: np.ndarray
    stages: np.ndarray
    exits: np.ndarray

    def per_image(self, batch_size: int) -> StageCosts:
        """Returns ms per input at any batch size, interpolated between measured sizes on a logarithmic axis.

        Above the largest size its rate holds. A batch below the smallest size takes as long as one of that size; of a
        heavy network, a quarter of that and its share of the rest.
        """
        at = functools.partial(np.interp, np.log(batch_size), np.log(self.batch_sizes))
        fixed = _FIXED_SHARE if self.heavy else 1.0
        padding = 1 + fixed * max(0.0, self.batch_sizes[0] / batch_size - 1)

        def rates(ms: np.ndarray) -> np.ndarray:
            return np.array([at(rate) for rate in (ms / self.batch_sizes[:, None] * padding).T])

        return StageCosts(rates(self.stages), rates(self.exits))

    @property
    def heavy(self) -> bool:
        """Whether eight inputs take so long that starting a chunk costs nothing in comparison."""
        row = int(np.abs(self.batch_sizes - 8).argmin())
        ms = (self.stages[row] + self.exits[row]).sum() / self.batch_sizes[row] * 8
        return bool(ms > _HEAVY_MS)

    def best(self) -> StageCosts:
        """Returns ms per input of every stage with its head at the batch size that suits both best.

        ``branchy_jax.costs.expected_cost(times.best(), exit_fractions)`` is the *time limit* of an operating point:
        the time of an executor without overhead.
        """
        stages, exits = self.stages / self.batch_sizes[:, None], self.exits / self.batch_sizes[:, None]
        fastest = np.argmin(stages + exits, axis=0), np.arange(stages.shape[1])
        return StageCosts(stages[fastest], exits[fastest])

    @classmethod
    def joined(cls, several: Sequence['SegmentTimes']) -> 'SegmentTimes':
        """Returns times at several batch sizes, ascending."""
        ordered = sorted(several, key=lambda times: times.batch_sizes[0])
        return cls(*map(np.concatenate, zip(*(vars(times).values() for times in ordered), strict=True)))


def forecast(times: SegmentTimes, confident: np.ndarray, batch_size: int, *, may_skip: bool = True) -> list[Forecast]:
    """Computes for every choice of exits the best chunk sizes and the time of a batch, fastest first.

    Batches are drawn from the given inputs, so that the remainders of chunks count as they will occur. A head that is
    confident of no input is in no choice; of more than ten side exits, only the ten that are most often confident are.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` whether a side exit is confident of an input.
        batch_size: B.
        may_skip: whether exits may be left out.
    """
    last, count = confident.shape
    rows = np.random.default_rng(0).integers(count, size=(_RESAMPLED_BATCHES, batch_size))
    often = np.argsort(-confident.sum(axis=1), kind='stable')[:_MOST_SIDE_EXITS]
    side = [n for n in range(last) if n in often and confident[n].any()]
    choices: list[tuple[int, ...]] = [tuple(range(last))]
    if may_skip:
        choices = [chosen for size in range(len(side) + 1) for chosen in itertools.combinations(side, size)]
    return sorted(_forecast(times, confident[:, rows], (*exits, last)) for exits in choices)


def _forecast(times: SegmentTimes, confident: np.ndarray, exits: tuple[int, ...]) -> Forecast:
    """Computes the time for one choice of exits, from batches ``confident [N - 1, R, B]``."""
    waiting, total, start = np.ones(confident.shape[1:], bool), 0.0, 0
    chunk_sizes: list[int] = []
    for n in exits:
        counts = waiting.sum(axis=1)
        options = []
        for size in _sizes(times, counts, confident.shape[2]):
            rates = times.per_image(size)
            ms = rates.stages[start : n + 1].sum() + rates.exits[n]
            options.append((float(np.mean(np.ceil(counts / size)) * size * ms), size))
        ms, size = min(options)
        total, start = total + ms, n + 1
        chunk_sizes.append(size)
        waiting &= ~confident[n] if n < len(confident) else True
    return total, exits, tuple(chunk_sizes)


def _sizes(times: SegmentTimes, counts: np.ndarray, batch_size: int) -> list[int]:
    """Returns the chunk sizes to consider: the measured ones, and those that split the usual count evenly."""
    usual = max(1, round(float(np.median(counts))))
    even = {-(-usual // parts) for parts in range(1, _MOST_PARTS + 1)}
    return sorted(size for size in {*times.batch_sizes.tolist(), *even, batch_size} if size <= batch_size)
