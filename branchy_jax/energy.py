"""Joules per call, from the device's own meter, idle power subtracted and shown.

Meters come from kept libraries, imported on use: NVIDIA's counter through nvidia-ml-py, RAPL of the processor through
zeus. Where there is neither, there is no figure.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax

_UPDATES_TO_WATCH = 5
_LONGEST_WAIT = 5.0
_UPDATES_PER_RUN = 120  # both ends of a run are uncertain by one update: together below 2 %


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
    start, last, moments = clock(), meter.read(), []
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
        f'{jax.devices()[0].device_kind} (NVML)',
        lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
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
