"""Times of a branchy network and its baseline, interleaved in one run: image by image, or in batches."""

from __future__ import annotations

import contextlib
import dataclasses
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
from branchy_jax.inference.compiler_options import BY_NAME, may_use_one_core
from branchy_jax.inference.planning.segments import Segments, bind
from branchy_jax.inference.steps import arrays_of
from branchy_jax.types import Variables
from experiments.run.networks import Networks, first_stages
from experiments.run.processes import as_a_user_starts_them
from experiments.run.records import Clock, Timed

Network = tuple[Any, Variables]
Policies = Mapping[str, bj.ExitPolicy]
Runs = dict[Any, tuple[Callable[[Any], Any], Sequence[Any]]]
"""What answers an input, and the inputs of a pass, by name."""
_SEGMENT_CALLS = 100
_TRIAL_IMAGES, _TRIAL_PASSES = 50, 7


def time_images(networks: Networks, images: np.ndarray, policies: Policies, *, passes: int) -> Timed:
    """Times both networks on the same images, one call per image, every call waited for.

    Both run through `branchy_jax.inference.optimize`, each with the compiler options that are faster in a short trial;
    the plain jitted baseline runs beside them. On a CPU all of them run in a process of their own on one core, where
    each is fastest: at batch 1 waking another core costs as much as a small network.

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
    criterion, exits = _criterion(policies), networks.num_exits
    inputs, nothing = on_device(images), _no_exits(criterion)
    few, again = inputs[: max(1, len(inputs) // 5)], range(_SEGMENT_CALLS)
    compiled = fastest_options(networks.fast, next(iter(policies.values())), few)
    alone = Segments(networks.fast, images, 1, criterion, BY_NAME[compiled]).functions(images)
    runs: Runs = {
        'plain': (staged((networks.baseline, networks.baseline_variables), nothing, embed=False), inputs),
        'rewritten': (
            staged(networks.fast_baseline, nothing, fastest_options(networks.fast_baseline, nothing, few)),
            inputs,
        ),
        **{('point', name): (staged(networks.fast, policy, compiled), inputs) for name, policy in policies.items()},
        **{('exit', n): (staged(networks.fast, _forced(criterion, exits, n), compiled), few) for n in range(exits)},
        **{key: (lambda _, key=key: alone[key](), again) for key in _trunk(exits, 1)},
    }
    return _time(runs, ('rewritten',), policies, exits, batch=1, passes=passes)


def _time(
    runs: Runs, baselines: Sequence[str], policies: Sequence[str], exits: int, *, batch: int, passes: int
) -> Timed:
    """Lets all runs take turns, and reads the figures of the fastest baseline, the points, the exits and the trunk."""
    functions = {name: bj.measure.one_by_one(run, inputs) for name, (run, inputs) in runs.items()}
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    images = {name: len(inputs) * batch for name, (_, inputs) in runs.items()}

    def ms(name: Any) -> float:
        return float(np.median(seconds[name])) / images[name] * 1e3

    baseline = fastest(seconds, baselines)
    read = functools.partial(Clock.read, seconds, baseline=baseline, images=images[baseline], batch=batch)
    return Timed(
        baseline=read(baseline),
        points={
            name: read(('point', name), executor=getattr(runs['point', name][0], 'executor', '')) for name in policies
        },
        exit_latency_ms=tuple(ms(('exit', n)) for n in range(exits)),
        trunk_only_ms=tuple(ms(key) for key in _trunk(exits, batch)),
    )


def time_batches(
    networks: Networks, planned_on: np.ndarray, images: np.ndarray, policies: Policies, *, batch: int, passes: int
) -> Timed:
    """Times both networks on the same batches, every call waited for.

    Both run as `branchy_jax.inference.plan` chooses on other images, the plain jitted baseline beside them.

    Args:
        networks: both.
        planned_on: ``[M, H, W, C]`` normalised, for the planner.
        images: ``[M, H, W, C]`` normalised, at least a batch, for the clock; whole batches of them are used.
        policies: by operating point, all of one criterion.
        batch: images in a call.
        passes: interleaved passes over the images.
    """
    inputs = on_device(images, batch)
    criterion, exits = _criterion(policies), networks.num_exits
    fast, fast_variables = networks.fast
    compacted = bj.inference.compacted(fast, chunk_size=batch)
    alone = Segments(networks.fast, images, batch, criterion).functions(images)
    planned: dict[str, bj.inference.Plan] = {}
    for name, policy in policies.items():  # what one measured of the stages holds at other thresholds
        planned[name] = bj.inference.plan(
            networks.model,
            networks.variables,
            planned_on[: 8 * batch],
            policy,
            batch_size=batch,
            earlier=next(iter(planned.values()), None),
        )

    def leaving_at(n: int) -> Callable[[Any], Any]:
        policy = _forced(criterion, exits, n)
        return lambda images: compacted(fast_variables, images, policy)

    alike = bj.inference.plan(
        networks.baseline, networks.baseline_variables, planned_on[: 8 * batch], _no_exits(criterion), batch_size=batch
    )
    runs: Runs = {
        'plain': (whole(networks.baseline, networks.baseline_variables), inputs),
        'planned': (alike, inputs),
        **{('point', name): (run, inputs) for name, run in planned.items()},
        **{('exit', n): (leaving_at(n), inputs) for n in range(exits)},
        **{key: (lambda _, key=key: alone[key](), range(1)) for key in _trunk(exits, batch)},
    }
    return _time(runs, ('plain', 'planned'), policies, exits, batch=batch, passes=passes)


def time_static(
    networks: Networks, static: Sequence[Variables], images: np.ndarray, *, passes: int
) -> tuple[Clock, ...]:
    """Times the baseline and the first stages with each side exit in turns, as `time_images` times a run.

    Args:
        networks: of the run; the baseline is what the others are compared with.
        static: the variables of `experiments.run.networks.first_stages`, an exit after the other.
        images: ``[M, H, W, C]`` normalised.
        passes: interleaved passes over the images.
    """
    arguments = (networks, jax.tree.map(np.asarray, list(static)), np.asarray(images), passes)
    if jax.default_backend() != 'cpu':
        return _time_static(*arguments)
    with one_core() as process:
        return process.submit(_time_static, *arguments).result()


def _time_static(networks: Networks, static: Sequence[Variables], images: np.ndarray, passes: int) -> tuple[Clock, ...]:
    inputs, nothing = on_device(images), _no_exits(bj.criteria.entropy)
    parts = [
        bj.inference.optimize(first_stages(networks.model, n), variables, inputs=networks.inputs)
        for n, variables in enumerate(static)
    ]
    fast = dict(enumerate(parts)) | {'baseline': networks.fast_baseline}
    runs = {name: staged(network, nothing, fastest_options(network, nothing, inputs)) for name, network in fast.items()}
    runs['plain'] = staged((networks.baseline, networks.baseline_variables), nothing, embed=False)
    functions = {name: bj.measure.one_by_one(run, inputs) for name, run in runs.items()}
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    read = functools.partial(Clock.read, seconds, baseline='baseline', images=len(inputs), batch=1)
    return tuple(read(n) for n in range(len(parts)))


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
    """Names every stage alone, then the last head, as `Segments.functions` does."""
    return [*(('stage', n, batch) for n in range(exits)), ('exit', exits - 1, batch)]


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """`branchy_jax.inference.staged` with its weights and policy.

    Attributes:
        answer: answers an image.
        executor: its name with its compiler options; empty where none were chosen.
    """

    answer: Callable[[jax.Array], bj.ExitPrediction]
    executor: str = ''

    def __call__(self, image: jax.Array) -> bj.ExitPrediction:
        """Answers."""
        return self.answer(image)


def staged(network: Network, policy: bj.ExitPolicy, options: str = '', *, embed: bool = True) -> Staged:
    """Binds `branchy_jax.inference.staged` to weights and a policy, as a plan does.

    Args:
        network: with its variables.
        policy: when an image leaves.
        options: the name of compiler options, from `fastest_options`.
        embed: whether weights are constants of the program; not those of a plain network.
    """
    (model, variables), policy = network, jax.tree.map(jnp.asarray, policy)
    executor = bj.inference.staged(model)

    def answer(variables: Variables, image: jax.Array) -> tuple[jax.Array, ...]:
        return arrays_of(executor.program(variables, image, policy))

    run = bind(answer, variables, BY_NAME[options], embed=embed)
    return Staged(lambda image: bj.ExitPrediction(*run(image)), options and f'staged, {options}')


def fastest_options(network: Network, policy: bj.ExitPolicy, inputs: Sequence[jax.Array]) -> str:
    """Tries `staged` on one core with XLA's own options and `branchy_jax.inference.ONE_CORE`; names the faster."""
    if not may_use_one_core():
        return ''
    few = inputs[:_TRIAL_IMAGES]
    runs = {name: bj.measure.one_by_one(staged(network, policy, name), few) for name in ('', 'one core')}
    return fastest(bj.measure.interleaved_passes(runs, passes=_TRIAL_PASSES), tuple(runs))


def whole(model: Any, variables: Variables) -> Callable[[Any], Any]:
    """Returns the jitted network, which computes every exit of a batch."""
    return functools.partial(jax.jit(model.apply), jax.tree.map(jnp.asarray, variables))


def on_device(images: np.ndarray, batch: int | None = None) -> list[jax.Array]:
    """Returns images where calls take them from: one by one, or in whole batches."""
    parts = images if batch is None else [images[end - batch : end] for end in range(batch, len(images) + 1, batch)]
    return jax.block_until_ready([jnp.asarray(part) for part in parts])
