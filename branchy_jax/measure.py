"""Honest clocks: warmed up, blocked until ready, interleaved, reported as medians of paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from scipy import stats


@struct.dataclass
class Ratio:
    """How many times faster a candidate is than a baseline, from paired passes.

    Attributes:
        median: of baseline time ÷ candidate time over the pairs.
        low: lower end of the 95 % confidence interval of that median.
        high: upper end.
    """

    median: float
    low: float
    high: float


def interleaved_passes(
    functions: Mapping[str, Callable[[], Any]], *, passes: int = 20, warmup: int = 2
) -> dict[str, np.ndarray]:
    """Times several functions in turns, so that a drifting machine slows all of them alike.

    Every pass calls each function once, in an order that rotates from pass to pass, and waits for its result.

    Args:
        functions: name to a callable whose result is a pytree of arrays.
        passes: how often each is timed.
        warmup: uncounted passes before, which also compile.

    Returns:
        Name to seconds ``[passes]``; entry i of every array comes from the same pass.

    Raises:
        ValueError: nothing to time.

    Example:
        >>> seconds = interleaved_passes({'a': lambda: 1, 'b': lambda: 2}, passes=3)
        >>> seconds['a'].shape
        (3,)
    """
    if not functions or passes < 1:
        raise ValueError(f'functions: nothing to time ({len(functions)} functions, {passes} passes)')
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, passes):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def one_by_one(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], None]:
    """Returns a pass over ``inputs`` that calls ``function`` on each and waits for the result before the next."""

    def run() -> None:
        for value in inputs:
            jax.block_until_ready(function(value))

    return run


def paired_ratio(baseline: np.ndarray, candidate: np.ndarray) -> Ratio:
    """Computes the median of baseline ÷ candidate over paired passes, with a 95 % interval.

    The interval is the distribution-free one between order statistics; with fewer than 6 pairs it is the full range
    and covers less than 95 %.

    Args:
        baseline: ``[P]`` seconds.
        candidate: ``[P]`` seconds of the same passes.

    Example:
        >>> paired_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])).median
        2.0
    """
    ratios = np.sort(np.asarray(baseline) / np.asarray(candidate))
    below = max(int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return Ratio(median=float(np.median(ratios)), low=float(ratios[below]), high=float(ratios[len(ratios) - 1 - below]))
