"""Times of a branchy network and its baseline, interleaved in one run: image by image, or in batches."""

import contextlib
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.inference.compiler_options import may_use_one_core
from branchy_jax.types import Variables
from experiments.run.networks import Networks
from experiments.run.trainings import STARTED

Network = tuple[Any, Variables]
Run = Callable[[Any], Any]
Runs = dict[Any, Run]
Policies = Mapping[str, bj.ExitPolicy]
_SEGMENT_PASSES = 25
_TRIAL_IMAGES, _TRIAL_PASSES = 50, 7


def time_run(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, *, batch: int, passes: int
) -> dict[str, Any]:
    """Times both networks on the same images, every call waited for, the plain jitted baseline beside them.

    At batch 1 both run through `branchy_jax.inference.optimize`, each with the compiler options that are faster in a
    short trial; on a CPU in a process of its own on one core, where each is fastest: waking another core costs as much
    as a small network. In larger batches both run as `branchy_jax.inference.plan` chooses on other images.

    Args:
        networks: both.
        planned_on: ``[M, H, W, C]`` normalised, for the planner.
        images: ``[M, H, W, C]`` normalised, at least a batch, for the clock; whole batches of them are used.
        policies: by operating point, all of one criterion.
        batch: images in a call.
        passes: interleaved passes over the images.

    Returns:
        ``baseline``: a clock (`clock`); ``points``: a clock by operating point; ``exit_latency_ms [N]``: the time of an
        image that leaves at exit n; ``trunk_only_ms [N + 1]``: of each stage alone, then of the last head, which is
        what the paper's protocol counts.
    """
    there = {name: jax.tree.map(np.asarray, policy) for name, policy in policies.items()}  # a tree would be sorted
    arguments = (networks, np.asarray(planned_on), np.asarray(images), there)
    if batch > 1 or jax.default_backend() != 'cpu':
        return _time(*arguments, batch, passes)
    with one_core() as process:
        return process.submit(_time, *arguments, batch, passes).result()


def clock(
    seconds: Mapping[Any, np.ndarray], name: Any, *, baseline: Any, images: int, batch: int, executor: str = ''
) -> dict[str, Any]:
    """Reads the times of one network from `branchy_jax.measure.interleaved_passes`, as fields of a row.

    Args:
        seconds: of passes over all images, by name; ``'plain'`` is the baseline as written.
        name: whose figures these are.
        baseline: the name of the network to compare with, like with like.
        images: in a pass.
        batch: images in a call.
        executor: that the planner chose, or how `staged` was compiled; left out where nothing was chosen.
    """
    gain = bj.measure.paired_ratio(seconds[baseline], seconds[name])
    row = {
        'batch': batch,
        'latency_images': images,
        'latency_passes': len(seconds[name]),
        'latency_ms': float(np.median(seconds[name])) / images * 1e3,
        'gain': gain.median,
        'gain_low': gain.low,
        'gain_high': gain.high,
        'gain_plain': bj.measure.paired_ratio(seconds['plain'], seconds[name]).median,
    }
    return {**row, 'executor': executor} if executor else row


@contextlib.contextmanager
def one_core() -> Iterator[ProcessPoolExecutor]:
    """Yields an executor whose one process keeps to one core, in the environment that the user has set."""
    ours, before = dict(os.environ), json.loads(os.environ.get(STARTED, '{}'))
    for name in before:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if value is not None})
    spawn = multiprocessing.get_context('spawn')
    try:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=keep_to_one_core) as process:
            yield process
    finally:
        os.environ.update(ours)


def keep_to_one_core() -> None:
    """Keeps this process to one core, where waking another would cost more than it does."""
    # Before the first use of jax, which makes as many threads as it sees cores, and hands calls over to one of them.
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _time(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, batch: int, passes: int
) -> dict[str, Any]:
    inputs, policy = on_device(images, batch), next(iter(policies.values()))
    runs, executors = (
        _one_by_one(networks, inputs, policies) if batch == 1 else _in_batches(networks, planned_on, policies, batch)
    )
    baseline, variables = networks.baseline, jax.tree.map(jnp.asarray, networks.baseline_variables)
    plain = jax.jit(lambda variables, x: baseline.apply(variables, x.reshape(batch, *images.shape[1:])))
    runs['plain'] = functools.partial(plain, variables)
    functions = {name: bj.measure.one_by_one(run, inputs) for name, run in runs.items()}
    seconds, count = bj.measure.interleaved_passes(functions, passes=passes), len(inputs) * batch
    faster = fastest(seconds, ['rewritten'] if batch == 1 else ['plain', 'rewritten'])
    read = functools.partial(clock, seconds, baseline=faster, images=count, batch=batch)
    alone = bj.inference.segment_times(*networks.fast, images, batch_sizes=[batch], passes=_SEGMENT_PASSES)
    return {
        'baseline': read(faster),
        'points': {name: read(('point', name), executor=executor) for name, executor in executors.items()},
        'exit_latency_ms': [float(np.median(seconds['exit', n])) / count * 1e3 for n in range(len(_forced(policy)))],
        'trunk_only_ms': (np.append(alone.stages[0], alone.exits[0, -1]) / batch).tolist(),
    }


def _one_by_one(networks: Networks, inputs: Sequence[jax.Array], policies: Policies) -> tuple[Runs, dict[str, str]]:
    """Returns what answers one image, and how each operating point is compiled."""
    policy = next(iter(policies.values()))
    none, options = _no_exits(policy), fastest_options(networks.fast, policy, inputs)
    runs: Runs = {
        'rewritten': staged(networks.fast_baseline, none, fastest_options(networks.fast_baseline, none, inputs)),
        **{('point', name): staged(networks.fast, own, options) for name, own in policies.items()},
        **{('exit', n): staged(networks.fast, forced, options) for n, forced in enumerate(_forced(policy))},
    }
    return runs, dict.fromkeys(policies, f'staged, {options}' if options else '')


def _in_batches(
    networks: Networks, planned_on: np.ndarray, policies: Policies, batch: int
) -> tuple[Runs, dict[str, str]]:
    """Returns what answers a batch, and which executor was planned for each operating point."""
    policy, plan = next(iter(policies.values())), functools.partial(bj.inference.plan, batch_size=batch)
    planned: dict[str, bj.inference.Plan] = {}
    for name, own in policies.items():  # what one measured of the stages holds at other thresholds
        earlier = next(iter(planned.values()), None)
        planned[name] = plan(networks.model, networks.variables, planned_on, own, earlier=earlier)
    fast, variables = networks.fast
    compacted = functools.partial(bj.inference.compacted(fast, chunk_size=batch), variables)
    runs: Runs = {
        'rewritten': plan(networks.baseline, networks.baseline_variables, planned_on, _no_exits(policy)),
        **{('point', name): run for name, run in planned.items()},
        **{('exit', n): functools.partial(compacted, policy=forced) for n, forced in enumerate(_forced(policy))},
    }
    return runs, {name: run.executor for name, run in planned.items()}


def fastest(seconds: Mapping[Any, np.ndarray], names: Sequence[str]) -> str:
    """Returns the name whose median is least."""
    return min(names, key=lambda name: float(np.median(seconds[name])))


def _no_exits(policy: bj.ExitPolicy) -> bj.ExitPolicy:
    """Returns a policy of the same criterion for a network of one exit."""
    return bj.ExitPolicy(policy.criterion, np.zeros(0, np.float32))


def _forced(policy: bj.ExitPolicy) -> list[bj.ExitPolicy]:
    """Returns for each exit the policy by which every image leaves there."""
    count = len(policy.thresholds)
    thresholds = np.where(np.arange(count + 1)[:, None] == np.arange(count), np.inf, -np.inf).astype(np.float32)
    return [bj.ExitPolicy(policy.criterion, own) for own in thresholds]


def staged(network: Network, policy: bj.ExitPolicy, options: str = '') -> Run:
    """Binds `branchy_jax.inference.staged` to weights and a policy, as a plan does.

    Args:
        network: with its variables, which become constants of the program.
        policy: when an image leaves.
        options: ``'one core'`` or none, from `fastest_options`.

    Returns:
        A function of one image, which returns the arrays of `branchy_jax.ExitPrediction`.
    """
    (model, variables), policy = network, jax.tree.map(jnp.asarray, policy)
    executor = bj.inference.staged(model)

    def answer(image: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(executor(variables, image, policy)))

    return jax.jit(answer, compiler_options=bj.inference.ONE_CORE if options else None)


def fastest_options(network: Network, policy: bj.ExitPolicy, inputs: Sequence[jax.Array]) -> str:
    """Tries `staged` on one core with XLA's own options and `branchy_jax.inference.ONE_CORE`; names the faster."""
    if not may_use_one_core():
        return ''
    few = inputs[:_TRIAL_IMAGES]
    runs = {name: bj.measure.one_by_one(staged(network, policy, name), few) for name in ('', 'one core')}
    return fastest(bj.measure.interleaved_passes(runs, passes=_TRIAL_PASSES), tuple(runs))


def on_device(images: np.ndarray, batch: int = 1) -> list[jax.Array]:
    """Returns images where calls take them from: one by one, or in whole batches."""
    parts = images if batch == 1 else [images[end - batch : end] for end in range(batch, len(images) + 1, batch)]
    return jax.block_until_ready([jnp.asarray(part) for part in parts])
