"""Batches that really get faster: later stages see survivors only, gathered into fixed-size chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from branchy_jax.inference.any_batch import AnyBatch, any_batch, sizes_up_to
from branchy_jax.inference.compiler_options import Options, in_order, jit_with
from branchy_jax.inference.host.pipeline import Answers, Pipeline, submitter
from branchy_jax.inference.staged import sequential_program
from branchy_jax.inference.steps import (
    Executor,
    Step,
    StepFunction,
    asked_exits,
    at_rows,
    build_steps,
    check_chunk_sizes,
    compiled_once,
    guarded,
    jit_predicting,
    zeros,
)
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Replaceable, Variables, num_rows


def compacted(
    model: BranchyNet,
    *,
    chunk_size: int | Sequence[int],
    exits: Sequence[int] | None = None,
    on_host: bool | None = None,
    workers: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
) -> Executor:
    """Builds the batch executor: each stage runs on chunks of the images that no exit before it was sure of.

    Every stage compiles once for its chunk size, however many survive; the last chunk of a stage is padded. (A chunk
    larger than the batch is cut to it, and the program of loops is one per batch size.) There are two ways to drive it,
    with the same results:

    - one program in which every stage is a `lax.while_loop` over chunks: nothing leaves the device. Wins on GPU and
      TPU. Works under `jax.jit`.
    - the host gathers survivors and starts every chunk. Wins on a CPU, where the host's memory is the device's. Cannot
      be traced.

    Args:
        model: a network with N exits.
        chunk_size: images that a stage takes at once; one number, or one for each exit that is asked. Chunks larger
            than the batch are cut to it. Small chunks waste little on the remainder, large ones run at a better rate;
            `branchy_jax.inference.plan` chooses by measuring.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        on_host: whether the host drives; by default on a CPU.
        workers: chunks that the host runs at the same time, in threads. Two gain where one chunk leaves cores idle.
            Threads do not see context managers of the caller such as `jax.default_matmul_precision`.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU. With any it cannot be
            traced.
        max_batch: compiles for batches of this size and of a few smaller ones, one image as `staged` runs it, and
            answers batches of any size with those, in pieces where they are larger. What fills up a piece is no image:
            it never keeps a stage busy. An `AnyBatch`, whose ``warm_up`` compiles all. By default a new size compiles
            what it needs.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction`` in the order of the images. Raises ValueError on a
        policy that does not fit, NaN, bad images, and when a host-driven one is traced.

    Raises:
        ValueError: a chunk size below 1, not one chunk size per exit asked, ``workers`` without a host to drive them,
            or impossible ``exits`` or ``max_batch``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> compacted(model, chunk_size=2)(variables, images, [float('-inf')]).exit_index.tolist()
        [1, 1, 1, 1, 1]
    """
    asked, options = asked_exits(model, exits), in_order(compiler_options)
    chunk_sizes = check_chunk_sizes(chunk_size, len(asked))
    on_host = jax.default_backend() == 'cpu' if on_host is None else on_host
    if workers < 1 or (workers > 1 and not on_host):
        raise ValueError(f'workers: got {workers} with on_host={on_host}; give at least 1, more only with on_host=True')
    if max_batch is None:
        return _compacted(model, asked, chunk_sizes, on_host, workers, options)
    return _compacted_of_any_batch(model, asked, chunk_sizes, on_host, workers, options, sizes_up_to(max_batch))


@compiled_once
def _compacted(
    model: BranchyNet,
    asked: tuple[int, ...],
    chunk_sizes: tuple[int, ...],
    on_host: bool,
    workers: int,
    options: Options,
) -> Executor:
    loops, run = _programs(model, asked, chunk_sizes, on_host, workers, options)
    return guarded(run, model, traceable=loops)


@compiled_once
def _compacted_of_any_batch(
    model: BranchyNet,
    asked: tuple[int, ...],
    chunk_sizes: tuple[int, ...],
    on_host: bool,
    workers: int,
    options: Options,
    sizes: tuple[int, ...],
) -> AnyBatch:
    loops, several = _programs(model, asked, chunk_sizes, on_host, workers, options)
    alone = sequential_program(model, asked, options)

    def run(variables: Variables, images: Array, policy: ExitPolicy, count: np.int32) -> ExitPrediction:
        if num_rows(images) == 1:
            return alone(variables, images, policy)
        return several(variables, images, policy, count)

    return any_batch(run, several, model, sizes, traceable=loops)


@compiled_once
def _programs(
    model: BranchyNet,
    asked: tuple[int, ...],
    chunk_sizes: tuple[int, ...],
    on_host: bool,
    workers: int,
    options: Options,
) -> tuple[Callable[..., ExitPrediction], Callable[..., ExitPrediction]]:
    """Returns the program of loops, and what runs in its place; each takes a count of images after the policy."""
    loops = jit_predicting(options)(_build_loops(build_steps(model, asked), chunk_sizes))
    return loops, _build_host_driven(jitted_steps(model, asked, options), chunk_sizes, workers) if on_host else loops


@compiled_once
def jitted_steps(model: BranchyNet, asked: tuple[int, ...], options: Options = ()) -> tuple[StepFunction, ...]:
    """Returns the steps that the host starts, the same ones for all chunk sizes."""
    return tuple(jit_with(options)(step) for step in build_steps(model, asked))


def _build_host_driven(steps: Sequence[StepFunction], chunk_sizes: Sequence[int], workers: int) -> Executor:
    submit = submitter(workers)

    def run(variables: Variables, images: Array, policy: ExitPolicy, count: np.int32 | None = None) -> ExitPrediction:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((variables, images, policy))):
            raise ValueError(
                'compacted: the host drives this one, so it cannot run under jit, vmap or grad; call it outside, or '
                'build it with on_host=False'
            )
        length = num_rows(images)
        present = length if count is None else int(count)
        sizes = [min(size, length) for size in chunk_sizes]
        pipeline = Pipeline(steps, variables, lambda: policy, sizes, workers=workers, submit=submit)
        pipeline.add(np.arange(present), at_rows(jax.tree.map(np.asarray, images), slice(present)))
        return _in_order(present, pipeline.run(flush=True))

    return run


def _in_order(count: int, found: Iterable[Answers]) -> ExitPrediction:
    results = None
    for answers in found:
        if results is None:
            results = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), answers.prediction)
        for target, values in zip(jax.tree.leaves(results), jax.tree.leaves(answers.prediction), strict=True):
            target[answers.ids] = values
    return jax.tree.map(jax.device_put, results)  # jnp.asarray would compile at every new shape


@struct.dataclass
class Queue(Replaceable):
    """Rows that wait for a stage, undecided ones first.

    Attributes:
        hidden: what the stage before returned, ``[M, …]``.
        carry: what the criterion remembers, ``[M, …]``.
        rows: ``[M]`` positions in ``hidden``, the waiting ones first; ``None`` if they lie there in order.
        ids: ``[M]`` the images that those rows belong to; B, which is no image, behind the waiting ones.
        count: how many wait.
    """

    hidden: Any
    carry: Any
    rows: Array | None
    ids: Array
    count: Array | int


def _build_loops(steps: Sequence[StepFunction], chunk_sizes: Sequence[int]) -> Executor:
    """Builds the traceable program that runs each step on chunks of survivors.

    Args:
        steps: from `build_steps`.
        chunk_sizes: one per step.
    """

    def run(variables: Variables, images: Array, policy: ExitPolicy, count: Array | None = None) -> ExitPrediction:
        batch_size = num_rows(images)
        everyone = jnp.arange(batch_size)
        in_order = batch_size % min(chunk_sizes[0], batch_size) == 0  # whole chunks: nothing need be gathered
        rows = None if in_order else everyone
        queue = Queue(hidden=images, carry=(), rows=rows, ids=everyone, count=batch_size if count is None else count)
        results = None
        for step, chunk_size in zip(steps, chunk_sizes, strict=True):
            size = min(chunk_size, batch_size)
            queue = _padded(queue, size, batch_size)
            done = run_chunks(step, variables, queue, policy, size, somebody=results is None)
            waiting = jnp.arange(len(queue.ids)) < queue.count
            # One row more, for what is to be dropped: compilers disagree about writes behind a buffer.
            results = zeros(done.prediction, batch_size + 1) if results is None else results
            results = _write(results, done.prediction, jnp.where(waiting & done.confident, queue.ids, batch_size))
            stays = waiting & ~done.confident
            rows = jnp.argsort(~stays, stable=True)
            ids = jnp.where(stays, queue.ids, batch_size)[rows]
            queue = Queue(hidden=done.hidden, carry=done.carry, rows=rows, ids=ids, count=stays.sum())
        return at_rows(results, slice(batch_size))

    return run


def _write(results: ExitPrediction, found: ExitPrediction, ids: Array) -> ExitPrediction:
    """Puts what was found in the places of the images it belongs to; id B, the last row, is no image."""
    return jax.tree.map(lambda target, values: target.at[ids].set(values, mode='promise_in_bounds'), results, found)


def _padded(queue: Queue, chunk_size: int, nobody: int) -> Queue:
    """Cuts or fills the queue to whole chunks that hold all images."""
    length = -(-nobody // chunk_size) * chunk_size
    if queue.rows is None:
        return queue
    fill = max(0, length - len(queue.rows))
    return queue.replace(
        rows=jnp.pad(queue.rows[:length], (0, fill)), ids=jnp.pad(queue.ids[:length], (0, fill), constant_values=nobody)
    )


def run_chunks(
    step: StepFunction,
    variables: Variables,
    queue: Queue,
    policy: ExitPolicy,
    chunk_size: int,
    *,
    somebody: bool = False,
) -> Step:
    """Runs a step on the waiting rows, chunk by chunk; rows behind them are not computed but for the last chunk's.

    Args:
        step: from `build_steps`.
        variables: of the network.
        queue: the rows, in whole chunks.
        policy: when an image leaves.
        chunk_size: how many the step takes at once.
        somebody: whether at least one row is known to wait: a single chunk then needs no loop.
    """

    def run_chunk(start: Array | int) -> Step:
        here: Any = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk_size)
        waiting = (queue.hidden, queue.carry)
        hidden, carry = jax.tree.map(here, waiting) if queue.rows is None else at_rows(waiting, here(queue.rows))
        return step(variables, hidden, carry, policy)

    length = len(queue.ids)
    if length == chunk_size and somebody:
        return run_chunk(0)

    def body(state: tuple[Array, Step]) -> tuple[Array, Step]:
        start, done = state
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return start + chunk_size, jax.tree.map(put, done, run_chunk(start))

    nothing = zeros(jax.eval_shape(run_chunk, 0), length)
    return lax.while_loop(lambda state: state[0] < queue.count, body, (jnp.int32(0), nothing))[1]
