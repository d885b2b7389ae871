"""Times of a branchy network and its baseline, interleaved in one run: image by image, or in batches."""

import contextlib
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from experiments.run.networks import Networks
from experiments.run.report import Row, of_ratio
from experiments.run.trainings import STARTED

Policies = Mapping[str, bj.ExitPolicy]
_SEGMENT_PASSES = 25


def time_run(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, *, batch: int, passes: int
) -> dict[str, Any]:
    """Times both networks and the plain jitted baseline on the same images; waits for every call.

    Both run as `branchy_jax.inference.plan` chooses on other images. At batch 1 on a CPU they run in a process of its
    own on one core, where each is fastest: waking another core costs as much as a small network.

    Args:
        networks: both.
        planned_on: ``[M, H, W, C]`` normalised, for the planner.
        images: ``[M, H, W, C]`` normalised, at least a batch, for the clock; whole batches of them are used.
        policies: by operating point, all of one criterion.
        batch: images in a call.
        passes: interleaved passes over the images.

    Returns:
        ``baseline``: the clock fields of its row; ``points``: those of each operating point, with the executor that the
        planner chose; ``exit_latency_ms [N]``: the time of an image that leaves at exit n; ``trunk_only_ms [N + 1]``:
        of each stage alone, then of the last head, which is what the paper's protocol counts.
    """
    there = {name: jax.tree.map(np.asarray, policy) for name, policy in policies.items()}  # a tree would be sorted
    arguments = (networks, np.asarray(planned_on), np.asarray(images), there)
    if batch > 1 or jax.default_backend() != 'cpu':
        return _time(*arguments, batch, passes)
    with one_core() as process:
        return process.submit(_time, *arguments, batch, passes).result()


def one_core() -> contextlib.AbstractContextManager[ProcessPoolExecutor]:
    """Makes `own_process` keep to one core, in the environment that the user has set."""
    return own_process(json.loads(os.environ.get(STARTED, '{}')), keep_to_one_core)


@contextlib.contextmanager
def own_process(
    environment: Mapping[str, str | None], initializer: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Yields an executor with one process that starts with these variables, and without those that are ``None``."""
    ours, spawn = dict(os.environ), multiprocessing.get_context('spawn')
    for name, value in environment.items():
        os.environ[name] = value or ''
        if value is None:
            del os.environ[name]
    try:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=initializer) as process:
            yield process
    finally:
        os.environ.clear()
        os.environ.update(ours)


def keep_to_one_core() -> None:
    """Keeps this process to one core: for a small network, to wake another core takes longer than to work alone."""
    # Before the first use of jax, which makes as many threads as it sees cores, and hands calls over to one of them.
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _time(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, batch: int, passes: int
) -> dict[str, Any]:
    plan = functools.partial(bj.inference.plan, images=planned_on, batch_size=batch)
    own_plan, planned = functools.partial(plan, networks.model, networks.variables), {}
    for name, policy in policies.items():  # what the first plan measured of the stages holds at other thresholds
        planned['point', name] = own_plan(policy=policy, earlier=next(iter(planned.values()), None))
    policy, first = next(iter(policies.values())), next(iter(planned.values()))
    # An image that leaves at exit n has asked all exits before; the engine is that of the table's point.
    engine = 'onnxruntime' if first.chosen.executor == 'onnx' else 'xla'
    for n, forced in enumerate(_forced(policy)):
        planned['exit', n] = own_plan(policy=forced, earlier=first, skip_heads=False, engine=engine)
    baseline, variables = networks.baseline, jax.tree.map(jnp.asarray, networks.baseline_variables)
    none = bj.ExitPolicy(policy.criterion, np.zeros(0, np.float32))
    planned['baseline'] = plan(baseline, variables, policy=none)
    inputs, on_host = on_device(images, batch), jax.default_backend() == 'cpu'  # where plans are tried so
    runs = {name: functools.partial(own, as_numpy=on_host) for name, own in planned.items()}
    runs['plain'] = functools.partial(jax.jit(baseline.apply), variables)
    functions = {name: bj.measure.one_by_one(run, inputs) for name, run in runs.items()}
    seconds, count = bj.measure.interleaved_passes(functions, passes=passes), len(inputs) * batch
    alone = bj.inference.segment_times(*networks.fast, images, batch_sizes=[batch], passes=_SEGMENT_PASSES)
    sizes = {'batch': batch, 'latency_images': count, 'latency_passes': passes}
    clocks = {name: {**sizes, **_clock(seconds, name, count)} for name in runs}
    executors = {name: str(planned['point', name].executor) for name in policies}
    return {
        'baseline': clocks['baseline'],
        'points': {name: {**clocks['point', name], 'executor': executor} for name, executor in executors.items()},
        'exit_latency_ms': [clocks['exit', n]['latency_ms'] for n in range(len(policy.thresholds) + 1)],
        'trunk_only_ms': (np.append(alone.stages[0], alone.exits[0, -1]) / batch).tolist(),
    }


def _clock(seconds: Mapping[Any, np.ndarray], name: Any, images: int) -> Row:
    gain, plain = (bj.measure.paired_ratio(seconds[slower], seconds[name]) for slower in ('baseline', 'plain'))
    ms = float(np.median(seconds[name])) / images * 1e3
    return {'latency_ms': ms, **of_ratio('gain', gain), 'gain_plain': plain.median}


def _forced(policy: bj.ExitPolicy) -> list[bj.ExitPolicy]:
    """Returns for each exit the policy by which every image leaves there."""
    count = len(policy.thresholds)
    thresholds = np.where(np.arange(count + 1)[:, None] == np.arange(count), np.inf, -np.inf).astype(np.float32)
    return [bj.ExitPolicy(policy.criterion, own) for own in thresholds]


def on_device(images: np.ndarray, batch: int) -> list[jax.Array]:
    """Returns images on the device, in whole batches."""
    parts = [images[end - batch : end] for end in range(batch, len(images) + 1, batch)]
    return jax.block_until_ready([jnp.asarray(part) for part in parts])
