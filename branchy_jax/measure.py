"""What a call costs: seconds, honestly compared, and joules, where the device has a meter.

Clocks are warmed up, wait until the result is ready, take turns, and are reported as medians of paired ratios. Energy
comes from the device's own counter, idle power subtracted and shown. Counters are read through kept libraries, imported
on use: NVIDIA's through nvidia-ml-py, RAPL of the processor through zeus. Where there is neither, there is no figure.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import struct
from scipy import stats

Name = TypeVar('Name', bound=Hashable)
_UPDATES_TO_WATCH = 5
_LONGEST_WAIT = 5.0  # seconds, for a meter to move so often
_UPDATES_PER_RUN = 120  # both ends of a run are uncertain by one update: together below 2 %


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
    functions: Mapping[Name, Callable[[], Any]], *, passes: int = 20, warmup: int = 2, settle: int = 0
) -> dict[Name, np.ndarray]:
    """Times several functions in turns, so that a drifting machine slows all of them alike.

    Every pass calls each function once, in an order that rotates from pass to pass, and waits for its result.

    Args:
        functions: name to a callable whose result is a pytree of arrays.
        passes: how often each is timed.
        warmup: uncounted passes before, which also compile.
        settle: uncounted calls of a function right before each that counts: a program that is called again and again
            does not meet memory that others' turns have left untouched, which is slow to touch again.

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
        ValueError: no passes, or not as many of both.

    Example:
        >>> paired_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])).median
        2.0
    """
    baseline, candidate = np.asarray(baseline), np.asarray(candidate)
    if baseline.ndim != 1 or baseline.shape != candidate.shape or not len(baseline):
        raise ValueError(
            f'candidate: expected seconds [P] of the same passes as the baseline, got {candidate.shape} for '
            f'{baseline.shape}'
        )
    ratios = np.sort(baseline / candidate)
    below = max(int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return Ratio(median=float(np.median(ratios)), low=float(ratios[below]), high=float(ratios[len(ratios) - 1 - below]))


@dataclasses.dataclass(frozen=True)
class Meter:
    """A counter of energy that only grows.

    Attributes:
        name: of the device and the library that reads it.
        read: returns joules since some fixed moment.
    """

    name: str
    read: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Energy:
    """What a call costs.

    Attributes:
        joules: per call, idle power subtracted.
        joules_with_idle: per call, all that the device drew meanwhile.
        idle_watts: what the device draws with nothing to do.
        watts: what it drew while it worked.
        calls: how many were measured.
        seconds: for how long.
        resolution: what the meter's update period may be off by, as a share of the run.
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
    """Returns the meter of the device that JAX computes on, or ``None`` where it has none that can be read."""
    return _nvidia_meter() if jax.default_backend() in ('gpu', 'cuda') else _processor_meter()


def measure_energy(
    function: Callable[[], Any],
    meter: Meter,
    *,
    seconds: float = 10.0,
    idle_seconds: float = 5.0,
    idle_watts: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    r"""Measures the energy of a call, repeated for long enough that the meter's resolution is below 2 %.

    .. math:: J = \frac{E - P_{idle} t}{calls}

    The device rests first and its idle power is read; then the function, already warm, runs again and again.

    Args:
        function: what to measure; its result is waited for.
        meter: from `find_meter`.
        seconds: to run for at least; longer if the meter is slow.
        idle_seconds: to rest for before; as above.
        idle_watts: from an earlier measurement, to save the rest.
        clock: returns seconds.
        sleep: rests for so many seconds.

    Raises:
        ValueError: the meter stands still.

    Example:
        >>> now = [0.0]
        >>> def work(): now[0] += 0.5
        >>> def rest(seconds): now[0] += seconds
        >>> drawn = Meter('30 W', lambda: 30 * now[0])
        >>> measure_energy(work, drawn, clock=lambda: now[0], sleep=rest).joules_with_idle
        15.0
    """
    jax.block_until_ready(function())
    period = _update_period(meter, clock, sleep)
    if idle_watts is None:
        rest = max(idle_seconds, _UPDATES_PER_RUN * period)
        idle_watts, _, _ = _run(lambda: sleep(period), meter, rest, clock)
    watts, calls, elapsed = _run(
        lambda: jax.block_until_ready(function()), meter, max(seconds, _UPDATES_PER_RUN * period), clock
    )
    return Energy(
        joules=(watts - idle_watts) * elapsed / calls,
        joules_with_idle=watts * elapsed / calls,
        idle_watts=idle_watts,
        watts=watts,
        calls=calls,
        seconds=elapsed,
        resolution=2 * period / elapsed,
        meter=meter.name,
    )


def _run(
    function: Callable[[], Any], meter: Meter, seconds: float, clock: Callable[[], float]
) -> tuple[float, int, float]:
    """Returns mean watts, how many calls, and how long they took."""
    calls, start, before = 0, clock(), meter.read()
    while (elapsed := clock() - start) < seconds:
        function()
        calls += 1
    return (meter.read() - before) / elapsed, calls, elapsed


def _update_period(meter: Meter, clock: Callable[[], float], sleep: Callable[[float], None]) -> float:
    """Returns the longest time between two updates of a meter."""
    start, last = clock(), meter.read()
    moments: list[float] = []
    while len(moments) <= _UPDATES_TO_WATCH:
        if clock() - start > _LONGEST_WAIT:
            raise ValueError(f'meter: {meter.name} moved {len(moments)} times in {_LONGEST_WAIT} s; it cannot be used')
        sleep(1e-3)
        if (value := meter.read()) != last:
            last = value
            moments.append(clock())
    return max(after - before for before, after in itertools.pairwise(moments))


def _nvidia_meter() -> Meter | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(jax.local_devices()[0].local_hardware_id or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the library, the driver or the permission is missing: each says so in its own way
        return None
    return Meter(
        f'{jax.devices()[0].device_kind} (NVML)', lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    )


def _processor_meter() -> Meter | None:
    try:
        from zeus.device import get_cpus

        processors = get_cpus()
        count = len(processors)
    except Exception:  # as above
        return None
    if not count:
        return None

    def read() -> float:
        return sum(processors.get_total_energy_consumption(n).cpu_mj for n in range(count)) / 1e3

    return Meter('processor (RAPL, zeus)', read)
