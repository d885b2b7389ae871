"""Measures seconds, as paired comparisons, and joules, where the device has an energy counter.

Timing warms functions up, waits for every result, takes turns and reports medians of paired ratios. Energy comes from
the device's own counter, minus idle power. zeus reads the counters of GPUs and processors; it is imported on use.
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from scipy import special

__all__ = ['interleaved_passes', 'measure_energy', 'paired_ratio']

Name = TypeVar('Name', bound=Hashable)
_UPDATES_TO_WATCH = 5
_LONGEST_WAIT = 5.0  # seconds for that many updates, beyond the rest itself
_UPDATES_PER_RUN = 120  # each end of a run is uncertain by one update: together below 2 %


class Ratio(NamedTuple):
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
    functions: Mapping[Name, Callable[[], Any]], *, passes: int = 20, warmup: int = 2, settle: int = 0
) -> dict[Name, np.ndarray]:
    """Times several functions in turns, so that a drift of the machine's speed affects all of them.

    Every pass calls each function once, in an order that rotates from pass to pass, and waits for its result.

    Args:
        functions: name to a callable that returns a pytree of arrays.
        passes: number of timed calls of each function.
        warmup: number of untimed passes before, which also compile.
        settle: number of untimed calls of a function before each timed call. Memory that was idle during the turns of
            other functions is slow to access again; a program that runs in a loop does not see that.

    Returns:
        Name to seconds ``[passes]``; entry i of every array comes from the same pass.

    Raises:
        ValueError: if there are no functions or no passes.

    Example:
        >>> seconds = interleaved_passes({'a': lambda: 1, 'b': lambda: 2}, passes=3)
        >>> seconds['a'].shape
        (3,)
    """
    if not functions or passes < 1:
        raise ValueError(f'functions: got {len(functions)} functions and {passes} passes; give at least one of each')
    names = list(functions)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(-warmup, passes):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            for _ in range(settle):
                jax.block_until_ready(functions[name]())
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[warmup:]) for name, values in seconds.items()}


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

    Raises:
        ValueError: if there are no passes, or the two numbers of passes differ.

    Example:
        >>> paired_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])).median
        2.0
    """
    baseline, candidate = np.asarray(baseline), np.asarray(candidate)
    if baseline.ndim != 1 or baseline.shape != candidate.shape or not len(baseline):
        shapes = f'{candidate.shape} and {baseline.shape}'
        raise ValueError(f'candidate: expected seconds [P] as for the baseline, got {shapes}')
    ratios = np.sort(baseline / candidate)
    # The probability that at most so many ratios lie below their median.
    below_median = special.bdtr(np.arange(len(ratios) + 1), len(ratios), 0.5)
    below = max(int(np.searchsorted(below_median, 0.025)) - 1, 0)
    return Ratio(median=float(np.median(ratios)), low=float(ratios[below]), high=float(ratios[len(ratios) - 1 - below]))


class Meter(NamedTuple):
    """An energy counter that only increases.

    Attributes:
        name: of the device and the library that reads it.
        read: returns joules since some fixed moment.
    """

    name: str
    read: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Energy:
    """Energy of a call.

    Attributes:
        joules: per call, idle power subtracted.
        joules_with_idle: per call, everything that the device drew.
        idle_watts: power of the idle device.
        watts: power during the calls.
        calls: number of measured calls.
        seconds: duration of the measured calls.
        resolution: uncertainty from the meter's update period, as a share of the run.
        meter: its name.
    """

    joules: float
    joules_with_idle: float
    idle_watts: float
    watts: float
    calls: int
    seconds: float
    resolution: float
    meter: str


def find_meter() -> Meter | None:
    """Returns the meter of the device that JAX computes on, or ``None`` if it has no readable one."""
    try:
        from zeus.device import get_cpus, get_gpus

        on_gpu = jax.default_backend() in ('gpu', 'cuda')
        devices = get_gpus() if on_gpu else get_cpus()
        numbers = [jax.local_devices()[0].local_hardware_id or 0] if on_gpu else range(len(devices))

        def read() -> float:
            values = [devices.get_total_energy_consumption(n) for n in numbers]
            return sum(value if on_gpu else value.cpu_mj for value in values) / 1e3

        name = f'{jax.devices()[0].device_kind} (zeus)' if on_gpu else 'processor (RAPL, zeus)'
        return Meter(name, read) if read() > 0 else None
    except Exception:  # the library, the driver or the permission is missing; each has its own class
        return None


def measure_energy(
    function: Callable[[], Any],
    meter: Meter,
    *,
    seconds: float = 10.0,
    idle_watts: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    r"""Measures the energy of a call, repeated for long enough that the meter's resolution is below 2 %.

    .. math:: J = \frac{E - P_{idle} t}{calls}

    First the device rests, and its idle power and the time between two updates of the meter are measured; then the warm
    function runs repeatedly.

    Args:
        function: returns a pytree of arrays, for which the measurement waits.
        meter: from `find_meter`.
        seconds: shortest duration of the run; the rest lasts half as long. Both are longer if the meter is slow.
        idle_watts: from an earlier measurement; the rest then lasts for a few updates only.
        clock: returns seconds.
        sleep: rests for a number of seconds.

    Raises:
        ValueError: if the meter does not change.

    Example:
        >>> now = [0.0]
        >>> def work(): now[0] += 0.5
        >>> def rest(seconds): now[0] += seconds
        >>> meter = Meter('30 W', lambda: 30 * now[0])
        >>> measure_energy(work, meter, clock=lambda: now[0], sleep=rest).joules_with_idle
        15.0
    """
    rested_watts, period = _rest(meter, seconds / 2 if idle_watts is None else 0.0, clock, sleep)
    idle_watts = rested_watts if idle_watts is None else idle_watts
    jax.block_until_ready(function())
    calls, start, before = 0, clock(), meter.read()
    while (elapsed := clock() - start) < max(seconds, _UPDATES_PER_RUN * period):
        jax.block_until_ready(function())
        calls += 1
    watts = (meter.read() - before) / elapsed
    joules, idle = watts * elapsed / calls, idle_watts * elapsed / calls
    return Energy(joules - idle, joules, idle_watts, watts, calls, elapsed, 2 * period / elapsed, meter.name)


def _rest(
    meter: Meter, seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[float, float]:
    """Rests; returns the power between the first and the last update, and the longest time between two updates."""
    start = clock()
    joules, moments = [meter.read()], [start]
    while (elapsed := clock() - start) < seconds or len(joules) <= _UPDATES_TO_WATCH + 1:
        if elapsed > seconds + _LONGEST_WAIT:
            raise ValueError(f'meter: {meter.name} changed {len(joules) - 1} times in {elapsed:.1f} s; it is too slow')
        sleep(1e-3)
        if (value := meter.read()) != joules[-1]:
            joules.append(value)
            moments.append(clock())
    return (joules[-1] - joules[1]) / (moments[-1] - moments[1]), float(np.diff(moments[1:]).max())
