"""Latency of batches of a branchy network through the planner, and of its baseline, interleaved in one run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.inference.segment_times import segment_functions
from experiments.networks import Networks
from experiments.timing import Timed


def time_batches(
    networks: Networks,
    planned_on: np.ndarray,
    images: np.ndarray,
    thresholds: Mapping[str, np.ndarray],
    *,
    batch: int,
    passes: int,
    criterion: Criterion,
) -> Timed:
    """Times both networks on the same batches, every call waited for.

    The branchy network runs as `branchy_jax.inference.plan` chooses on other images; its baseline is the faster of
    the plain jitted one and the one that `branchy_jax.inference.optimize` rewrites.

    Args:
        networks: both.
        planned_on: ``[M, H, W, C]`` normalised, for the planner.
        images: ``[M, H, W, C]`` normalised, for the clock; whole batches of them are used.
        thresholds: ``[N - 1]`` by operating point.
        batch: images in a call.
        passes: interleaved passes over the images.
        criterion: that lets an image leave.
    """
    if min(len(images), len(planned_on)) < batch:
        raise ValueError(
            f'config.latency_batch: got {batch}, but there are {len(images)} images to time and {len(planned_on)} to '
            'plan on'
        )
    inputs = [jnp.asarray(images[start : start + batch]) for start in range(0, len(images) - batch + 1, batch)]
    plans = {
        name: bj.inference.plan(
            networks.model, networks.variables, planned_on[: 8 * batch], values, batch_size=batch, criterion=criterion
        )
        for name, values in thresholds.items()
    }
    fast = bj.inference.optimize(networks.model, networks.variables)
    exits = networks.model.num_exits
    functions: dict[Any, Callable[[Any], Any]] = {
        'plain': _whole(networks.baseline, networks.baseline_variables),
        'rewritten': _whole(*bj.inference.optimize(networks.baseline, networks.baseline_variables)),
        **{('point', name): plan for name, plan in plans.items()},
        **{('exit', n): _forced(*fast, n, criterion, batch) for n in range(exits)},
    }
    timed = {name: bj.measure.one_by_one(function, inputs) for name, function in functions.items()}
    alone = segment_functions(*fast, images[:batch], batch, criterion=criterion)
    segments = [*(('stage', n, batch) for n in range(exits)), ('exit', exits - 1, batch)]
    timed.update({key: alone[key] for key in segments})
    seconds = bj.measure.interleaved_passes(timed, passes=passes)
    baseline = min(('plain', 'rewritten'), key=lambda name: np.median(seconds[name]))
    count = len(inputs) * batch

    def fields(name: Any) -> dict[str, Any]:
        gain = bj.measure.paired_ratio(seconds[baseline], seconds[name])
        return {
            'batch': batch,
            'latency_images': count,
            'latency_passes': passes,
            'latency_ms': float(np.median(seconds[name])) / count * 1e3,
            'gain': gain.median,
            'gain_low': gain.low,
            'gain_high': gain.high,
            'gain_plain': bj.measure.paired_ratio(seconds['plain'], seconds[name]).median,
        }

    return Timed(
        baseline=fields(baseline),
        points={name: {**fields(('point', name)), 'executor': plans[name].executor} for name in thresholds},
        exit_latency_ms=[float(np.median(seconds['exit', n])) / count * 1e3 for n in range(exits)],
        trunk_only_ms=[float(np.median(seconds[key])) / batch * 1e3 for key in segments],
    )


def _whole(model: bj.BranchyNet, variables: Any) -> Callable[[Any], Any]:
    return functools.partial(jax.jit(model.apply), jax.tree.map(jnp.asarray, variables))


def _forced(model: bj.BranchyNet, variables: Any, n: int, criterion: Criterion, batch: int) -> Callable[[Any], Any]:
    """Lets every image out at exit ``n``."""
    thresholds = np.where(np.arange(model.num_exits - 1) == n, np.inf, -np.inf).astype(np.float32)
    execute = bj.inference.compacted(model, chunk_size=batch, criterion=criterion)
    return lambda images: execute(variables, images, thresholds)
