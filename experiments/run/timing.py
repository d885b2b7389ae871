"""Times of a branchy network and its baseline, interleaved in one run: image by image, or in batches."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.inference.planning.segment_times import segment_functions
from branchy_jax.types import Variables
from experiments.run.networks import Networks
from experiments.run.processes import as_a_user_starts_them
from experiments.run.records import Clock, Timed

Network = tuple[bj.BranchyNet, Variables]
Policies = Mapping[str, bj.ExitPolicy]
_SEGMENT_CALLS = 100


def time_images(networks: Networks, images: np.ndarray, policies: Policies, *, passes: int) -> Timed:
    """Times both networks on the same images, one call per image, every call waited for.

    Both run through `branchy_jax.inference.optimize`; the plain jitted baseline runs beside them. On a CPU all of them
    run in a process of their own that keeps to one core, the fastest way for each: at batch 1 waking another core
    costs as much as a small network.

    Args:
        networks: both.
        images: ``[M, H, W, C]`` normalised.
        policies: by operating point, all of one criterion.
        passes: interleaved passes over the images.
    """
    arguments = (networks, np.asarray(images), jax.tree.map(np.asarray, dict(policies)), passes)
    if jax.default_backend() != 'cpu':
        return _time_images(*arguments)
    with one_core() as process:
        return process.submit(_time_images, *arguments).result()


@contextlib.contextmanager
def one_core() -> Iterator[ProcessPoolExecutor]:
    """Yields an executor whose one process keeps to one core, started as a user would start it."""
    spawn = multiprocessing.get_context('spawn')
    with (
        as_a_user_starts_them(),
        ProcessPoolExecutor(1, mp_context=spawn, initializer=keep_to_one_core) as process,
    ):
        yield process


def keep_to_one_core() -> None:
    """Keeps this process to one core, where waking another would cost more than it does."""
    # Before the first use of jax, which makes as many threads as it sees cores, and hands calls over to one of them.
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _time_images(networks: Networks, images: np.ndarray, policies: Policies, passes: int) -> Timed:
    criterion, exits = _criterion(policies), networks.model.num_exits
    plain = (networks.baseline, jax.tree.map(jnp.asarray, networks.baseline_variables))
    fast = bj.inference.optimize(networks.model, networks.variables)
    fast_baseline = bj.inference.optimize(networks.baseline, networks.baseline_variables)
    inputs = [jax.block_until_ready(jnp.asarray(image)) for image in images]
    few = inputs[: max(1, len(inputs) // 5)]
    alone = segment_functions(*fast, images, 1, criterion=criterion)
    segments = _trunk(exits, 1)
    seconds = bj.measure.interleaved_passes(
        {
            'plain': _staged(plain, _no_exits(criterion), inputs),
            'baseline': _staged(fast_baseline, _no_exits(criterion), inputs),
            **{('point', name): _staged(fast, policy, inputs) for name, policy in policies.items()},
            **{('exit', n): _staged(fast, _forced(criterion, exits, n), few) for n in range(exits)},
            **{key: _repeated(alone[key], _SEGMENT_CALLS) for key in segments},
        },
        passes=passes,
    )
    read = functools.partial(Clock.read, seconds, baseline='baseline', images=len(inputs), batch=1)
    return Timed(
        baseline=read('baseline'),
        points={name: read(('point', name)) for name in policies},
        exit_latency_ms=tuple(_ms(seconds['exit', n], len(few)) for n in range(exits)),
        trunk_only_ms=tuple(_ms(seconds[key], _SEGMENT_CALLS) for key in segments),
    )


def time_batches(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, *, batch: int, passes: int
) -> Timed:
    """Times both networks on the same batches, every call waited for.

    The branchy network runs as `branchy_jax.inference.plan` chooses on other images; its baseline is the faster of
    the plain jitted one and the one that `branchy_jax.inference.optimize` rewrites.

    Args:
        networks: both.
        planned_on: ``[M, H, W, C]`` normalised, for the planner.
        images: ``[M, H, W, C]`` normalised, for the clock; whole batches of them are used.
        policies: by operating point, all of one criterion.
        batch: images in a call.
        passes: interleaved passes over the images.

    Raises:
        ValueError: fewer images than a batch.
    """
    if min(len(images), len(planned_on)) < batch:
        raise ValueError(
            f'config.latency_batch: got {batch}, but there are {len(images)} images to time and {len(planned_on)} to '
            'plan on'
        )
    inputs = [jnp.asarray(images[start : start + batch]) for start in range(0, len(images) - batch + 1, batch)]
    plans = {
        name: bj.inference.plan(networks.model, networks.variables, planned_on[: 8 * batch], policy, batch_size=batch)
        for name, policy in policies.items()
    }
    criterion, exits = _criterion(policies), networks.model.num_exits
    fast, fast_variables = bj.inference.optimize(networks.model, networks.variables)
    compacted = bj.inference.compacted(fast, chunk_size=batch)

    def leaving_at(n: int) -> Callable[[Any], Any]:
        policy = _forced(criterion, exits, n)
        return lambda images: compacted(fast_variables, images, policy)

    functions: dict[Any, Callable[[Any], Any]] = {
        'plain': _whole(networks.baseline, networks.baseline_variables),
        'rewritten': _whole(*bj.inference.optimize(networks.baseline, networks.baseline_variables)),
        **{('point', name): plan for name, plan in plans.items()},
        **{('exit', n): leaving_at(n) for n in range(exits)},
    }
    timed = {name: bj.measure.one_by_one(function, inputs) for name, function in functions.items()}
    segments = _trunk(exits, batch)
    alone = segment_functions(fast, fast_variables, images[:batch], batch, criterion=criterion)
    seconds = bj.measure.interleaved_passes({**timed, **{key: alone[key] for key in segments}}, passes=passes)
    baseline, count = fastest(seconds, ('plain', 'rewritten')), len(inputs) * batch
    read = functools.partial(Clock.read, seconds, baseline=baseline, images=count, batch=batch)
    return Timed(
        baseline=read(baseline),
        points={name: read(('point', name), executor=plan.executor) for name, plan in plans.items()},
        exit_latency_ms=tuple(_ms(seconds['exit', n], count) for n in range(exits)),
        trunk_only_ms=tuple(_ms(seconds[key], batch) for key in segments),
    )


def time_static(networks: Mapping[str, Network], images: np.ndarray, *, passes: int) -> dict[str, Clock]:
    """Times one-exit networks in turns, one call per image, each as `branchy_jax.inference.optimize` rewrites it.

    From here on this process keeps to one core of a CPU.

    Args:
        networks: by name, with their variables; the one called ``'baseline'`` is what the others are compared with.
        images: ``[M, H, W, C]`` normalised.
        passes: interleaved passes over the images.
    """
    if jax.default_backend() == 'cpu':
        keep_to_one_core()
    inputs = [jax.block_until_ready(jnp.asarray(image)) for image in images]
    policy = _no_exits(bj.criteria.entropy)
    functions = {name: _staged(bj.inference.optimize(*network), policy, inputs) for name, network in networks.items()}
    functions['plain'] = _staged(networks['baseline'], policy, inputs)
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    return {name: Clock.read(seconds, name, baseline='baseline', images=len(inputs), batch=1) for name in networks}


def fastest(seconds: Mapping[Any, np.ndarray], names: Sequence[str]) -> str:
    """Returns the name whose median is least."""
    return min(names, key=lambda name: float(np.median(seconds[name])))


def _criterion(policies: Policies) -> Criterion:
    return next(iter(policies.values())).criterion


def _no_exits(criterion: Criterion) -> bj.ExitPolicy:
    return bj.ExitPolicy(criterion=criterion, thresholds=np.zeros(0, np.float32))


def _forced(criterion: Criterion, exits: int, n: int) -> bj.ExitPolicy:
    """Lets every image out at exit ``n``."""
    thresholds = np.where(np.arange(exits - 1) == n, np.inf, -np.inf).astype(np.float32)
    return bj.ExitPolicy(criterion=criterion, thresholds=thresholds)


def _trunk(exits: int, batch: int) -> list[tuple[str, int, int]]:
    """Names every stage alone, then the last head, as `segment_functions` does."""
    return [*(('stage', n, batch) for n in range(exits)), ('exit', exits - 1, batch)]


def _staged(network: Network, policy: bj.ExitPolicy, inputs: Sequence[jax.Array]) -> Callable[[], None]:
    (model, variables), policy = network, jax.tree.map(jnp.asarray, policy)
    execute = bj.inference.staged(model)
    return bj.measure.one_by_one(lambda image: execute(variables, image, policy), inputs)


def _repeated(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    return bj.measure.one_by_one(lambda _: function(), range(calls))


def _whole(model: bj.BranchyNet, variables: Variables) -> Callable[[Any], Any]:
    return functools.partial(jax.jit(model.apply), jax.tree.map(jnp.asarray, variables))


def _ms(seconds: np.ndarray, count: int) -> float:
    return float(np.median(seconds)) / count * 1e3
