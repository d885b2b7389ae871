"""What early exit will cost, from the times of stages and heads and from who would leave where: NumPy only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flax import struct

from branchy_jax.costs import StageCosts
from branchy_jax.inference.planning.segment_times import SegmentTimes

_RESAMPLED_BATCHES = 32
_MOST_SUBSETS = 1024


@struct.dataclass
class Forecast:
    """A choice of exits and chunk sizes, and what it will cost.

    Attributes:
        exits: the exits to ask, the last one among them.
        chunk_sizes: images that a stage takes at once, one per exit asked.
        ms: for a batch.
    """

    exits: tuple[int, ...] = struct.field(pytree_node=False)
    chunk_sizes: tuple[int, ...] = struct.field(pytree_node=False)
    ms: float


def forecast(
    times: SegmentTimes, confident: np.ndarray, batch_size: int, *, may_skip: bool = True, seed: int = 0
) -> list[Forecast]:
    """Computes for every choice of exits the best chunk sizes and the time of a batch, fastest first.

    Batches are drawn from the images given, so that the remainders of chunks count as they will come. A head that is
    sure of none of the images is left out of all choices. With more than ten other side exits, choices are limited to
    those that differ from all or from none in one exit.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` which side exit is sure of which image.
        batch_size: B.
        may_skip: whether exits may be left out.
        seed: of the draw.
    """
    num_exits, count = confident.shape[0] + 1, confident.shape[1]
    rows = np.random.default_rng(seed).integers(count, size=(_RESAMPLED_BATCHES, batch_size))
    if batch_size == count:
        rows[0] = np.arange(count)
    # A head that is sure of nobody here is never worth asking.
    useful = [n for n in range(num_exits - 1) if confident[n].any()]
    options = _choices(useful, num_exits - 1) if may_skip else [tuple(range(num_exits))]
    per_image = functools.cache(times.per_image)
    found = [_forecast(times, per_image, confident[:, rows], exits) for exits in options]
    return sorted(found, key=lambda option: option.ms)


def _choices(side: Sequence[int], last: int) -> list[tuple[int, ...]]:
    subsets: Iterable[tuple[int, ...]]
    if 2 ** len(side) <= _MOST_SUBSETS:
        subsets = itertools.chain.from_iterable(itertools.combinations(side, k) for k in range(len(side) + 1))
    else:
        few: list[tuple[int, ...]] = [(), *((n,) for n in side)]
        subsets = itertools.chain(few, (tuple(sorted(set(side) - set(chosen))) for chosen in few))
    return [(*chosen, last) for chosen in subsets]


def _forecast(
    times: SegmentTimes, per_image: Callable[[int], StageCosts], confident: np.ndarray, exits: tuple[int, ...]
) -> Forecast:
    """Computes the cost of a choice of exits for batches ``confident [N - 1, R, B]``."""
    waiting = np.ones(confident.shape[1:], bool)
    batch_size, total, start = confident.shape[2], 0.0, 0
    sizes: list[int] = []
    for n in exits:
        counts = waiting.sum(axis=1)
        best = min(
            (_step_ms(per_image(size), counts, size, range(start, n + 1)), size)
            for size in _sizes(times, counts, batch_size)
        )
        total, start = total + best[0], n + 1
        sizes.append(best[1])
        if n < len(confident):
            waiting &= ~confident[n]
    return Forecast(exits=exits, chunk_sizes=tuple(sizes), ms=total)


def _sizes(times: SegmentTimes, counts: np.ndarray, batch_size: int) -> list[int]:
    """Returns chunk sizes worth considering: the measured ones, and those that split the usual count evenly."""
    usual = max(1, round(float(np.median(counts))))
    even = {-(-usual // parts) for parts in range(1, 65)}
    return sorted(size for size in {*times.batch_sizes.tolist(), *even, batch_size} if size <= batch_size)


def _step_ms(rates: StageCosts, counts: np.ndarray, size: int, stages: Sequence[int]) -> float:
    ms = rates.stages[list(stages)].sum() + rates.exits[stages[-1]]
    return float(np.mean(np.ceil(counts / size)) * size * ms)
