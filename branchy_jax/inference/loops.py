"""Compaction inside one program: each stage is a loop over fixed-size chunks of the rows that are still undecided."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from branchy_jax.inference.checks import Executor
from branchy_jax.inference.steps import Step, StepFunction, at_rows
from branchy_jax.types import Array, ExitPrediction, Variables


@struct.dataclass
class Queue:
    """Rows that wait for a stage, undecided ones first.

    Attributes:
        hidden: what the stage before returned, ``[M, …]``.
        carry: what the criterion remembers, ``[M, …]``.
        rows: ``[M]`` positions in ``hidden``, the waiting ones first.
        ids: ``[M]`` the images that those rows belong to; B, which is no image, behind the waiting ones.
        count: how many wait.
    """

    hidden: Any
    carry: Any
    rows: Array
    ids: Array
    count: Array | int


def build_loops(steps: Sequence[StepFunction], chunk_sizes: Sequence[int]) -> Executor:
    """Builds the traceable program that runs each step on chunks of survivors.

    Args:
        steps: from `build_steps`.
        chunk_sizes: one per step.
    """

    def run(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        batch_size = len(images)
        everyone = jnp.arange(batch_size)
        queue = Queue(hidden=images, carry=(), rows=everyone, ids=everyone, count=batch_size)
        results = None
        for step, chunk_size in zip(steps, chunk_sizes, strict=True):
            size = min(chunk_size, batch_size)
            queue = _padded(queue, size, batch_size)
            done = run_chunks(step, variables, queue, thresholds, size)
            waiting = jnp.arange(len(queue.ids)) < queue.count
            results = _write(
                results, done.prediction, jnp.where(waiting & done.confident, queue.ids, batch_size), batch_size
            )
            stays = waiting & ~done.confident
            rows = jnp.argsort(~stays, stable=True)
            ids = jnp.where(stays, queue.ids, batch_size)[rows]
            queue = Queue(hidden=done.hidden, carry=done.carry, rows=rows, ids=ids, count=stays.sum())
        return results

    return run


def _write(results: ExitPrediction | None, found: ExitPrediction, ids: Array, batch_size: int) -> ExitPrediction:
    """Puts what was found in the places of the images it belongs to; id B is no image."""
    if results is None:
        results = _zeros(found, batch_size)
    return jax.tree.map(lambda target, values: target.at[ids].set(values, mode='drop'), results, found)


def _zeros(like: Any, length: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), like)


def _padded(queue: Queue, chunk_size: int, nobody: int) -> Queue:
    """Cuts or fills the queue to whole chunks that hold all images."""
    length = -(-nobody // chunk_size) * chunk_size
    fill = max(0, length - len(queue.rows))
    return queue.replace(
        rows=jnp.pad(queue.rows[:length], (0, fill)), ids=jnp.pad(queue.ids[:length], (0, fill), constant_values=nobody)
    )


def run_chunks(step: StepFunction, variables: Variables, queue: Queue, thresholds: Array, chunk_size: int) -> Step:
    """Runs a step on the waiting rows, chunk by chunk; rows behind them are not computed but for the last chunk's."""

    def run_chunk(start: Array | int) -> Step:
        rows = lax.dynamic_slice_in_dim(queue.rows, start, chunk_size)
        return step(variables, at_rows(queue.hidden, rows), at_rows(queue.carry, rows), thresholds)

    length = len(queue.rows)
    if length == chunk_size and isinstance(queue.count, int):
        return run_chunk(0)

    def body(state: tuple[Array, Step]) -> tuple[Array, Step]:
        start, done = state
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return start + chunk_size, jax.tree.map(put, done, run_chunk(start))

    nothing = _zeros(jax.eval_shape(run_chunk, 0), length)
    return lax.while_loop(lambda state: state[0] < queue.count, body, (jnp.int32(0), nothing))[1]
