"""One cell of the benchmark: a batch size at forced exit shares, every executor against the plain jitted baseline."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.inference.planning.segments import Segments
from branchy_jax.inference.planning.times import SegmentTimes
from branchy_jax.thresholds import ExitTable
from branchy_jax.types import Variables
from experiments.run.records import Numbers
from experiments.run.timing import Network, fastest_options, on_device, staged, whole

USUAL_SHARES = {2: (0.94, 0.06), 3: (0.7, 0.2, 0.1)}
"""Shares that leave at each exit where nothing else is asked for, about those of the paper, by the number of exits."""

_BATCH_1_IMAGES = 100
_ALIKE = 'baseline, served alike'
_WARM_UP_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Cell:
    """An executor at a batch size and exit shares. Times are milliseconds per image.

    Attributes:
        network: its name.
        batch: images in a call.
        shares: ``[N]`` that were asked for.
        exit_fractions: ``[N]`` that a batch of that size could have.
        executor: its name.
        ms: its time.
        baseline_ms: of the plain jitted baseline.
        gain: baseline ÷ this, median of paired passes.
        gain_low: lower end of its 95 % interval.
        gain_high: upper end.
        gain_over_optimized: the same over the baseline that is rewritten and served alike.
        time_limit_ms: of an executor without any overhead.
        realised: that limit ÷ ``ms``.
        realised_within_batch: likewise, no stage seeing more images at once than a batch holds.
        slowdown_low: lower end of the 95 % interval of this ÷ baseline.
        slowdown_high: upper end.
        mac_limit: baseline MACs ÷ expected MACs.
        compile_s: seconds to compile, or to plan.
        peak_memory_mb: so far.
        plan: the planner's table, of its own cells.
    """

    network: str
    batch: int
    shares: Numbers
    exit_fractions: Numbers
    executor: str
    ms: float
    baseline_ms: float
    gain: float
    gain_low: float
    gain_high: float
    gain_over_optimized: float
    time_limit_ms: float
    realised: float
    realised_within_batch: float
    slowdown_low: float
    slowdown_high: float
    mac_limit: float
    compile_s: float
    peak_memory_mb: float
    plan: str = ''


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured, shared by all cells.

    Attributes:
        name: of the network.
        plain: the network as it is.
        fast: the same, rewritten by `branchy_jax.inference.optimize`.
        macs: per stage and head.
    """

    name: str
    plain: Network
    fast: Network
    macs: bj.costs.StageCosts


def prepare(name: str, variables: Variables | None, images: np.ndarray) -> Subject:
    """Creates the network; without trained variables, with random ones and BatchNorm statistics of the images."""
    model = bj.models.create(name)
    if variables is None:
        variables = _settled(model, model.init(jax.random.key(0), images[:1]), images[:32])
    variables = jax.tree.map(jnp.asarray, variables)
    return Subject(
        name=name,
        plain=(model, variables),
        fast=bj.inference.optimize(model, variables, inputs=images[:1]),
        macs=bj.costs.count_macs(model, inputs=images[:1]),
    )


def _settled(model: Any, variables: Variables, images: np.ndarray) -> Variables:
    """Lets running statistics settle: a deep residual network with fresh ones overflows, and all its exits agree."""
    if 'batch_stats' not in variables:
        return variables

    @jax.jit
    def step(variables: Variables) -> Variables:
        rngs = {'dropout': jax.random.key(0)}
        _, updated = model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs)
        return {**variables, **updated}

    for _ in range(_WARM_UP_STEPS):
        variables = step(variables)
    return variables


def images_needed(batch: int) -> int:
    """Returns how many images a cell is measured on."""
    return _BATCH_1_IMAGES if batch == 1 else batch


def measure_cell(
    subject: Subject, images: np.ndarray, shares: Sequence[float], batch: int, times: SegmentTimes, *, passes: int
) -> list[Cell]:
    """Measures one cell: the executors, the baselines and the stages alone, interleaved.

    Args:
        subject: the network.
        images: ``[M, H, W, C]``, one batch of them; for batch 1 at least 100, given one by one.
        shares: ``[N]`` to force.
        batch: batch size.
        times: of the stages at several batch sizes, to choose chunk sizes and limits by.
        passes: interleaved passes.

    Returns:
        One record per executor, the plan's last.
    """
    images = images[: images_needed(batch)]
    table = _table(subject, images)
    policy = table.for_shares(shares)
    fractions = np.bincount(table.answering_exits(policy), minlength=table.num_exits) / len(table)
    start = time.perf_counter()
    planned = bj.inference.plan(*subject.plain, images, policy, batch_size=batch, times=times)
    plan_seconds = time.perf_counter() - start
    executors = {
        **_baselines(subject, images, batch),
        **_executors(subject, images, policy, batch, _chunk_sizes(times, batch, fractions)),
        'planned': planned,
    }
    functions: dict[Any, Callable[[], Any]] = {name: _over(name, run, images, batch) for name, run in executors.items()}
    compiled = {name: _seconds(function) for name, function in functions.items()}
    best = times.best_sizes.tolist()
    for n, size in enumerate(best):
        every = Segments(subject.fast, images, size, bj.criteria.entropy).functions(images)
        functions.update({key: every[key] for key in every if key[1] == n})
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    limit = sum(
        fractions[n:].sum() * (seconds['stage', n, size] + seconds['exit', n, size]) / size * 1e3
        for n, size in enumerate(best)
    )
    return [
        Cell(
            network=subject.name,
            batch=batch,
            shares=tuple(shares),
            exit_fractions=tuple(fractions.tolist()),
            executor=name,
            **_figures(seconds, name, len(images), limit, _limit_within(times, batch, fractions)),
            mac_limit=bj.costs.mac_limit(subject.macs, fractions),
            # Planning has compiled the plan already.
            compile_s=plan_seconds if name == 'planned' else compiled[name] - float(np.median(seconds[name])),
            peak_memory_mb=peak_memory_mb(),
            plan=str(planned) if name == 'planned' else '',
        )
        for name in executors
        if not name.startswith('baseline')
    ]


def _table(subject: Subject, images: np.ndarray) -> ExitTable:
    """Returns the uncertainties of all exits; no statistics, time does not depend on who is right."""
    found = bj.inference.exit_outputs(*subject.fast, images, batch_size=min(256, len(images))).uncertainty
    return ExitTable(
        uncertainty=found,
        statistics=np.zeros((*found.shape, 1)),
        costs=subject.macs,
        criterion=bj.criteria.entropy,
        split='random images',
    )


def _chunk_sizes(times: SegmentTimes, batch: int, fractions: np.ndarray) -> tuple[int, ...]:
    """Returns the measured sizes at which the images that usually reach each stage take least."""
    reaching = np.append(1.0, 1 - np.cumsum(fractions)[:-1]) * batch
    fitting = times.batch_sizes <= batch
    sizes, ms = times.batch_sizes[fitting], (times.stages + times.exits)[fitting]
    chunks = [math.ceil(count) / sizes for count in np.maximum(reaching, 1)]
    return tuple(int(sizes[np.argmin(np.ceil(chunks[n]) * ms[:, n])]) for n in range(len(chunks)))


def _figures(
    seconds: dict[Any, np.ndarray], name: str, count: int, limit: np.ndarray, limit_within: float
) -> dict[str, float]:
    """Returns what the clock said, per image."""
    ms = seconds[name] / count * 1e3
    gain = bj.measure.paired_ratio(seconds['baseline'], seconds[name])
    return {
        'ms': float(np.median(ms)),
        'baseline_ms': float(np.median(seconds['baseline'])) / count * 1e3,
        'gain': gain.median,
        'gain_low': gain.low,
        'gain_high': gain.high,
        'gain_over_optimized': bj.measure.paired_ratio(seconds[_ALIKE], seconds[name]).median,
        'time_limit_ms': float(np.median(limit)),
        'realised': float(np.median(limit / ms)),
        'realised_within_batch': limit_within / float(np.median(ms)),
        'slowdown_low': 1 / gain.high,
        'slowdown_high': 1 / gain.low,
    }


def _baselines(subject: Subject, images: np.ndarray, batch: int) -> dict[str, Callable[[Any], Any]]:
    """Returns the baseline as written, and one that is served as the network with exits is."""
    model, variables = subject.plain
    baseline, nothing = bj.models.without_branches(model), np.zeros(0, np.float32)
    alike: Callable[[Any], Any]
    if batch == 1:
        fast = bj.inference.optimize(baseline, variables, inputs=images[:1])
        policy = bj.ExitPolicy(bj.criteria.entropy, nothing)
        alike = staged(fast, policy, fastest_options(fast, policy, on_device(images)))
    else:
        alike = bj.inference.plan(baseline, variables, images, nothing, batch_size=batch)
    return {'baseline': whole(baseline, variables), _ALIKE: alike}


def _executors(
    subject: Subject, images: np.ndarray, policy: bj.ExitPolicy, batch: int, chunk_sizes: tuple[int, ...]
) -> dict[str, Callable[[Any], Any]]:
    (model, variables), policy = subject.fast, jax.tree.map(jnp.asarray, policy)

    def bound(execute: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda images: execute(variables, images, policy)

    found = {'dense': bound(bj.inference.dense(model))}
    if batch == 1:
        found['staged'] = staged(subject.fast, policy, fastest_options(subject.fast, policy, on_device(images)))
    else:
        found['compacted'] = bound(bj.inference.compacted(model, chunk_size=chunk_sizes))
    return found


def _over(name: str, execute: Callable[[Any], Any], images: np.ndarray, batch: int) -> Callable[[], Any]:
    """Returns a pass over the images: in one call, or one call each."""
    if batch > 1:
        return functools.partial(execute, jax.block_until_ready(jnp.asarray(images)))
    inputs = [jnp.asarray(image if name in ('staged', _ALIKE) else image[None]) for image in images]
    return bj.measure.one_by_one(execute, jax.block_until_ready(inputs))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _limit_within(times: SegmentTimes, batch: int, fractions: np.ndarray) -> float:
    """Returns the time limit where no stage may see more images at once than the batch holds."""
    inside = times.batch_sizes <= batch
    smaller = SegmentTimes(times.batch_sizes[inside], times.stages[inside], times.exits[inside])
    return bj.costs.expected_cost(smaller.best(), fractions)


def peak_memory_mb() -> float:
    """Returns the most memory used so far: of the device if it reports memory, else of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in statistics:
        return statistics['peak_bytes_in_use'] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
