"""Batch-1 latency of a branchy network and its baseline, interleaved in one run."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.inference.segment_times import segment_functions
from branchy_jax.types import Variables
from experiments.processes import as_a_user_starts_them
from experiments.tasks import TASKS

_SEGMENT_CALLS = 100


@dataclasses.dataclass(frozen=True)
class Timed:
    """What the clock said, as fields of the report's rows.

    Attributes:
        baseline: of the one-exit network.
        points: of the branchy network, by operating point.
        exit_latency_ms: time of an image that leaves at exit n.
        trunk_only_ms: of each stage alone, then of the last head: what the paper's protocol counts.
    """

    baseline: dict[str, Any]
    points: dict[str, dict[str, Any]]
    exit_latency_ms: list[float]
    trunk_only_ms: list[float]


def time_networks(
    network: str,
    options: Mapping[str, Any],
    variables: Variables,
    baseline_variables: Variables,
    images: np.ndarray,
    thresholds: Mapping[str, np.ndarray],
    *,
    passes: int,
    criterion: tuple[str, str] = ('classification', 'entropy'),
) -> Timed:
    """Times both networks on the same images, one call per image, every call waited for.

    Both run through `branchy_jax.inference.optimize`; the plain jitted baseline runs beside them. On a CPU all of them
    run in a process of their own that keeps to one core, the fastest way for each: at batch 1 waking another core
    costs as much as a small network.

    Args:
        network: name of the branchy network.
        options: it was created with.
        variables: of the branchy network.
        baseline_variables: of its baseline.
        images: ``[M, H, W, C]`` normalised.
        thresholds: ``[N - 1]`` by operating point.
        passes: interleaved passes over the images.
        criterion: task and name, as in `experiments.tasks.TASKS`.
    """
    stored = jax.tree.map(np.asarray, (variables, baseline_variables))
    arguments = (network, dict(options), *stored, np.asarray(images), dict(thresholds), passes, criterion)
    if jax.default_backend() != 'cpu':
        return _time(*arguments)
    spawn = multiprocessing.get_context('spawn')
    with (
        as_a_user_starts_them(),
        ProcessPoolExecutor(1, mp_context=spawn, initializer=keep_to_one_core) as process,
    ):
        return process.submit(_time, *arguments).result()


def keep_to_one_core() -> None:
    """Keeps this process to one core, where waking another would cost more than it does."""
    # Before the first use of jax, which makes as many threads as it sees cores, and hands calls over to one of them.
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _time(
    network: str,
    options: dict[str, Any],
    variables: Variables,
    baseline_variables: Variables,
    images: np.ndarray,
    thresholds: dict[str, np.ndarray],
    passes: int,
    criterion: tuple[str, str],
) -> Timed:
    task, name = criterion
    on = functools.partial(_on, criterion=TASKS[task].criteria[name])
    model = bj.models.create(network, **options)
    baseline = bj.models.without_branches(model)
    inputs = [jax.block_until_ready(jnp.asarray(image)) for image in images]
    few = inputs[: max(1, len(inputs) // 5)]
    fast, fast_baseline = bj.inference.optimize(model, variables), bj.inference.optimize(baseline, baseline_variables)
    none = np.zeros(0, np.float32)
    functions = {
        'plain': on(baseline, jax.tree.map(jnp.asarray, baseline_variables), none, inputs),
        'baseline': on(*fast_baseline, none, inputs),
        **{('point', name): on(*fast, values, inputs) for name, values in thresholds.items()},
    }
    exits = model.num_exits
    for n in range(exits):  # force every image out at exit n
        functions[f'exit {n}'] = on(*fast, np.where(np.arange(exits - 1) == n, np.inf, -np.inf), few)
    functions.update(_trunk_segments(fast, images, _SEGMENT_CALLS))
    seconds = bj.measure.interleaved_passes(functions, passes=passes)

    def fields(name: Any) -> dict[str, Any]:
        gain = bj.measure.paired_ratio(seconds['baseline'], seconds[name])
        return {
            'batch': 1,
            'latency_images': len(inputs),
            'latency_passes': passes,
            'latency_ms': float(np.median(seconds[name])) / len(inputs) * 1e3,
            'gain': gain.median,
            'gain_low': gain.low,
            'gain_high': gain.high,
            'gain_plain': bj.measure.paired_ratio(seconds['plain'], seconds[name]).median,
        }

    return Timed(
        baseline=fields('baseline'),
        points={name: fields(('point', name)) for name in thresholds},
        exit_latency_ms=[float(np.median(seconds[f'exit {n}'])) / len(few) * 1e3 for n in range(exits)],
        trunk_only_ms=[
            float(np.median(seconds[key])) / _SEGMENT_CALLS * 1e3
            for key in (*(('stage', n, 1) for n in range(exits)), ('exit', exits - 1, 1))
        ],
    )


def _trunk_segments(
    network: tuple[bj.BranchyNet, Variables], images: np.ndarray, calls: int
) -> dict[Any, Callable[[], None]]:
    every = segment_functions(*network, images, 1)
    last = network[0].num_exits - 1
    return {
        key: bj.measure.one_by_one(lambda _, run=run: run(), range(calls))
        for key, run in every.items()
        if key[0] == 'stage' or key[1] == last
    }


def time_static(
    networks: Mapping[str, tuple[bj.BranchyNet, Variables]], images: np.ndarray, *, passes: int
) -> dict[str, np.ndarray]:
    """Times one-exit networks in turns, one call per image, each as `branchy_jax.inference.optimize` rewrites it.

    Args:
        networks: by name, with their variables.
        images: ``[M, H, W, C]`` normalised.
        passes: interleaved passes over the images.

    Returns:
        Seconds ``[passes]`` by name.
    """
    if jax.default_backend() == 'cpu' and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    inputs = [jax.block_until_ready(jnp.asarray(image)) for image in images]
    none = np.zeros(0, np.float32)
    functions = {
        name: _on(*bj.inference.optimize(*network), none, inputs, criterion=bj.criteria.entropy)
        for name, network in networks.items()
    }
    return bj.measure.interleaved_passes(functions, passes=passes)


def _on(
    model: bj.BranchyNet,
    variables: Variables,
    thresholds: np.ndarray,
    inputs: list[jax.Array],
    *,
    criterion: Criterion,
) -> Callable[[], None]:
    execute, thresholds = bj.inference.staged(model, criterion=criterion), jnp.asarray(thresholds, jnp.float32)
    return bj.measure.one_by_one(lambda image: execute(variables, image, thresholds), inputs)
