"""Batches that get faster: later stages run on the remaining rows only, gathered into chunks of a fixed size."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference.host import drive, host_steps
from branchy_jax.inference.steps import Network, Step, are_traced, at_rows, network, run_batch, select_rows, take_step
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows, static

Combine = Callable[[Any, Any], Any]
"""``(answers, others)``: sends answers back to where their rows came from; rows that were not sent keep the others."""
Dispatch = Callable[[Array, Any], tuple[Any, Array, Combine]]
"""``(stays [M], tree [≥ M, …])`` to the tree where its rows are handled next, which rows wait there, and `Combine`."""


@struct.dataclass
class Compacted:
    """The executor that `compacted` builds.

    Attributes:
        network: a model and its exits.
        on_host: whether the host gathers rows and starts every chunk.
        workers: chunks that the host runs at the same time.
    """

    network: Network = static()
    on_host: bool = static()
    workers: int = static()

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        if not self.on_host or num_rows(images) == 0:
            return run_batch(self, variables, images, policy)
        policy = as_policy(policy)
        if are_traced(variables, images, policy):
            advice = 'call it outside of jit, vmap and grad, or build it with on_host=False'
            raise ValueError(f'compacted: the host drives this executor, so it cannot be traced; {advice}')
        # To cut the program again would take longer than a small batch; steps check the policy when they are traced.
        count = np.size(policy.thresholds) + 1 if self.network.exits is None else len(self.network.exits)
        steps = host_steps(self.network, variables, images, count)
        return drive(steps, images, policy, self.network.chunk_sizes(count), workers=self.workers)

    def program(self, variables: Variables, images: Any, policy: ExitPolicy, count: Any = None) -> ExitPrediction:
        """Answers the first ``count`` rows of a batch, by default all, in loops over chunks; to be traced."""
        batch_size = num_rows(images)
        waiting = jnp.arange(batch_size) < (batch_size if count is None else count)
        return answer_in_chunks(self, variables, images, policy, waiting, _stay)


def _stay(stays: Array, tree: Any) -> tuple[Any, Array, Combine]:
    """Leaves rows where they are."""
    return tree, stays, functools.partial(select_rows, stays)


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
        exits: the exits to ask, ascending, the last among them; the other exits never answer.
        on_host: whether the host drives; by default on a CPU.
        workers: chunks that the host runs at the same time, in threads. Two gain where one chunk leaves cores idle.
            Threads do not see context managers of the caller such as `jax.default_matmul_precision`.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction`` in the order of the images. Raises ValueError on a
        policy that does not fit, NaN, bad images, not one chunk size per exit asked, and when a host-driven one is
        traced.

    Raises:
        ValueError: a chunk size below 1, ``workers`` without a host to drive them, or impossible ``exits``.

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
    return Compacted(network(model, exits, compiler_options, chunk_size), on_host, workers)


def answer_in_chunks(
    executor: Any, variables: Variables, inputs: Any, policy: ExitPolicy, waiting: Array, dispatch: Dispatch
) -> ExitPrediction:
    """Answers the waiting rows, every stage in a loop over chunks; to be traced. Other rows' values are unspecified.

    Args:
        executor: with a ``network``.
        variables: of the model.
        inputs: ``[M, …]``.
        policy: when a row leaves.
        waiting: ``[M]`` which rows to answer; they come before the others.
        dispatch: where the remaining rows are handled next, after every exit but the last.
    """
    stages = executor.network.stages(variables, inputs)
    hidden, carry, passed = inputs, None, []
    for n, most in enumerate(executor.network.chunk_sizes(len(stages.exits))):
        length, count = len(waiting), waiting.sum()
        size = min(most, length)
        rows = jnp.arange(length) if n == 0 else jnp.argsort(~waiting, stable=True)
        # The first batch is in order; where it is one of whole chunks, none of its rows is gathered.
        chosen = None if n == 0 and length % size == 0 else jnp.pad(rows, (0, -length % size))
        step = functools.partial(take_step, stages.at(variables, size), n, policy=policy)
        done = _run_chunks(step, (hidden, carry), chosen, count, size)
        answer, confident = at_rows((done.prediction, done.confident), slice(length))
        if n + 1 < len(stages.exits):
            stays = (jnp.arange(length) < count) & ~confident
            (hidden, carry), waiting, combine = dispatch(stays, (done.hidden, done.carry))
            passed.append((rows, answer, combine))
    for earlier_rows, own, combine in reversed(passed):
        answer = combine(at_rows(answer, _inverse(rows)), own)
        rows = earlier_rows
    return answer


def _inverse(permutation: Array) -> Array:
    return jnp.zeros_like(permutation).at[permutation].set(jnp.arange(len(permutation)), mode='promise_in_bounds')


def _run_chunks(
    step: Callable[[Any, Any], Step], waiting: tuple[Any, Any], rows: Array | None, count: Array, size: int
) -> Step:
    """Runs a step on the waiting rows, chunk by chunk; rows behind them are not computed but for the last chunk's.

    Args:
        step: ``(hidden, carry) → Step`` at the chunk size.
        waiting: what the stage before returned and what the criterion remembers, ``[M, …]``.
        rows: positions in ``waiting`` in whole chunks, those that wait first; ``None`` if they are in order: a single
            chunk then needs no loop.
        count: how many wait.
        size: how many rows the step takes at once.
    """

    def run_chunk(start: Array | int) -> Step:
        here: Any = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        hidden, carry = jax.tree.map(here, waiting) if rows is None else at_rows(waiting, here(rows))
        return step(hidden, carry)

    length = num_rows(waiting if rows is None else rows)
    if length == size and rows is None:
        return run_chunk(0)

    def body(state: tuple[Array, Step]) -> tuple[Array, Step]:
        start, done = state
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return start + size, jax.tree.map(put, done, run_chunk(start))

    shapes = jax.eval_shape(run_chunk, 0)
    nothing = jax.tree.map(lambda spec: jnp.zeros((length, *spec.shape[1:]), spec.dtype), shapes)
    return lax.while_loop(lambda state: state[0] < count, body, (jnp.int32(0), nothing))[1]
