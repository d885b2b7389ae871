"""Batches that get faster: later stages run on the remaining rows only, gathered into chunks of a fixed size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from branchy_jax import calling
from branchy_jax.criteria import as_policy
from branchy_jax.inference.pipeline import Pipeline
from branchy_jax.inference.steps import (
    Network,
    Step,
    are_traced,
    at_rows,
    check_chunk_sizes,
    chunk_size_of_each,
    chunk_sizes_of,
    jit_with,
    network,
    run_batch,
    static,
    take_step,
    zeros,
)
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows


@static
class Compacted:
    """The executor that `compacted` builds.

    Attributes:
        network: a model and its exits.
        chunk_size: rows that a stage takes at once; one number, or one for each exit asked.
        on_host: whether the host gathers rows and starts every chunk.
        workers: chunks that the host runs at the same time.
    """

    network: Network
    chunk_size: int | tuple[int, ...]
    on_host: bool
    workers: int

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        if not self.on_host or num_rows(images) == 0:
            return run_batch(self, variables, images, policy)
        policy = as_policy(policy)
        if are_traced(variables, images, policy):
            raise ValueError(
                'compacted: the host drives this executor, so it cannot run under jit, vmap or grad; call it outside, '
                'or build it with on_host=False'
            )
        # Cutting the program anew would take longer than a small batch; steps check the policy when they are traced.
        count = np.size(policy.thresholds) + 1 if self.network.exits is None else len(self.network.exits)
        steps = host_steps(self.network, variables, images, count)
        return drive(steps, images, policy, chunk_size_of_each(self.chunk_size, count), workers=self.workers)

    def program(
        self, variables: Variables, images: Any, policy: ExitPolicy, count: Array | None = None
    ) -> ExitPrediction:
        """Answers the first ``count`` rows of a batch, by default all, in loops over chunks; to be traced."""
        stages, batch_size = self.network.stages(variables, images), num_rows(images)
        chunk_sizes = [min(size, batch_size) for size in chunk_sizes_of(self.chunk_size, stages)]
        ids = jnp.arange(batch_size)  # images of the waiting rows; B, which is no image, behind them
        # A batch of whole chunks is in order, and none of its rows is gathered.
        rows = None if batch_size % chunk_sizes[0] == 0 else ids
        count = batch_size if count is None else count
        hidden, carry, results = images, None, None
        for n, size in enumerate(chunk_sizes):
            if rows is not None:
                length = -(-batch_size // size) * size
                fill = max(0, length - len(rows))
                rows = jnp.pad(rows[:length], (0, fill))
                ids = jnp.pad(ids[:length], (0, fill), constant_values=batch_size)
            step = functools.partial(take_step, stages.at(variables, size), n, policy=policy)
            done = run_chunks(step, (hidden, carry), rows, count, size, nonempty=n == 0)
            waiting = jnp.arange(len(ids)) < count
            # One row more, for what is to be dropped: compilers disagree about writes behind a buffer.
            results = zeros(done.prediction, batch_size + 1) if results is None else results
            leaving = jnp.where(waiting & done.confident, ids, batch_size)
            results = jax.tree.map(functools.partial(_write, leaving), results, done.prediction)
            stays = waiting & ~done.confident
            rows = jnp.argsort(~stays, stable=True)
            ids = jnp.where(stays, ids, batch_size)[rows]
            hidden, carry, count = done.hidden, done.carry, stays.sum()
        return at_rows(results, slice(batch_size))


def _write(ids: Array, target: jax.Array, values: Array) -> Array:
    return target.at[ids].set(values, mode='promise_in_bounds')


def compacted(
    model: Any,
    *,
    chunk_size: int | Sequence[int],
    exits: Sequence[int] | None = None,
    on_host: bool | None = None,
    workers: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> Compacted:
    """Builds the batch executor: each stage runs on chunks of the images for which no exit before was confident.

    Every stage compiles once for its chunk size, however many rows remain; the last chunk of a stage is padded. A chunk
    larger than the batch is cut to the batch, and the program of loops is one per batch size. The chunks are started in
    one of two places, with the same results:

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
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction`` in the order of the images. Raises ValueError on a
        policy that does not fit, NaN, bad images, and when a host-driven one is traced.

    Raises:
        ValueError: a chunk size below 1, not one chunk size per exit asked, ``workers`` without a host to drive them,
            or impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> compacted(model, chunk_size=2)(variables, images, [float('-inf')]).exit_index.tolist()
        [1, 1, 1, 1, 1]
    """
    on_host = jax.default_backend() == 'cpu' if on_host is None else on_host
    if workers < 1 or (workers > 1 and not on_host):
        raise ValueError(f'workers: got {workers} with on_host={on_host}; give at least 1, more only with on_host=True')
    chunk_size = check_chunk_sizes(chunk_size)
    if exits is not None:
        chunk_size_of_each(chunk_size, len(exits))
    return Compacted(network(model, exits, compiler_options), chunk_size, on_host, workers)


@static
class _HostStep:
    """One step that the host starts.

    Attributes:
        network: a model and its exits.
        n: counts the exits asked.
        inputs: shapes of the model's inputs.
    """

    network: Network
    n: int
    inputs: Any


def _run_step(step: _HostStep, variables: Variables, hidden: Any, carry: Any, policy: ExitPolicy) -> Step:
    stages = step.network.stages(variables, step.inputs)
    if stages.fixed_because:
        raise stages.refusal()
    return take_step(stages.at(variables, num_rows(hidden)), step.n, hidden, carry, policy)


def host_steps(network: Network, variables: Variables, inputs: Any, count: int) -> list[Callable[..., Step]]:
    """Returns the steps that the host starts, ``(hidden, carry, policy) → Step``, the same ones for all chunk sizes.

    Args:
        network: a model and its exits.
        variables: of the model.
        inputs: an example.
        count: how many exits are asked.
    """
    example = calling.with_batch(inputs, 2)
    jitted = jit_with(network.compiler_options, _run_step)
    return [functools.partial(jitted, _HostStep(network, n, example), variables) for n in range(count)]


def drive(
    steps: Sequence[Callable[..., Step]],
    images: Any,
    policy: ExitPolicy,
    chunk_sizes: Sequence[int],
    *,
    workers: int,
    count: int | None = None,
) -> ExitPrediction:
    """Answers the first ``count`` rows of a batch, by default all, with chunks that the host starts."""
    length = num_rows(images)
    present = length if count is None else int(count)
    sizes = [min(size, length) for size in chunk_sizes]
    pipeline = Pipeline(steps, lambda: policy, sizes, workers=workers)
    pipeline.add(np.arange(present), at_rows(jax.tree.map(np.asarray, images), slice(present)))
    results = None
    for part in pipeline.run(flush=True):
        if results is None:
            results = jax.tree.map(lambda x: np.empty((present, *x.shape[1:]), x.dtype), part.prediction)
        for target, values in zip(jax.tree.leaves(results), jax.tree.leaves(part.prediction), strict=True):
            target[part.ids] = values
    return jax.tree.map(jax.device_put, results)  # jnp.asarray would compile at every new shape


def run_chunks(
    step: Callable[[Any, Any], Step],
    waiting: tuple[Any, Any],
    rows: Array | None,
    count: Array | int,
    chunk_size: int,
    *,
    nonempty: bool = False,
) -> Step:
    """Runs a step on the waiting rows, chunk by chunk; rows behind them are not computed but for the last chunk's.

    Args:
        step: ``(hidden, carry) → Step`` at the chunk size.
        waiting: what the stage before returned and what the criterion remembers, ``[M, …]``.
        rows: positions in ``waiting`` in whole chunks, those that wait first; ``None`` if they are in order.
        count: how many wait.
        chunk_size: how many rows the step takes at once.
        nonempty: whether at least one row is known to wait: a single chunk then needs no loop.
    """

    def run_chunk(start: Array | int) -> Step:
        here: Any = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk_size)
        hidden, carry = jax.tree.map(here, waiting) if rows is None else at_rows(waiting, here(rows))
        return step(hidden, carry)

    length = num_rows(waiting if rows is None else rows)
    if length == chunk_size and nonempty:
        return run_chunk(0)

    def body(state: tuple[Array, Step]) -> tuple[Array, Step]:
        start, done = state
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return start + chunk_size, jax.tree.map(put, done, run_chunk(start))

    nothing = zeros(jax.eval_shape(run_chunk, 0), length)
    return lax.while_loop(lambda state: state[0] < count, body, (jnp.int32(0), nothing))[1]
