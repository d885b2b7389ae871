"""Batches that really get faster: later stages see survivors only, gathered into fixed-size chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.checks import Executor, guarded
from branchy_jax.inference.loops import build_loops
from branchy_jax.inference.pipeline import Answers, Pipeline, submitter
from branchy_jax.inference.steps import StepFunction, build_steps
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPrediction, Variables


def compacted(
    model: BranchyNet,
    *,
    chunk_size: int | Sequence[int],
    criterion: Criterion = entropy,
    exits: Sequence[int] | None = None,
    on_host: bool | None = None,
    workers: int = 1,
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
        criterion: how unsure an exit is.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        on_host: whether the host drives; by default on a CPU.
        workers: chunks that the host runs at the same time, in threads. Two gain where one chunk leaves cores idle.
            Threads do not see context managers of the caller such as `jax.default_matmul_precision`.

    Returns:
        ``(variables, images [B, H, W, C], thresholds [N - 1]) → ExitPrediction`` in the order of the images. Raises
        ValueError on the wrong number of thresholds, NaN, bad images, and when a host-driven one is traced.

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
    steps = build_steps(model, criterion, exits)
    chunk_sizes = check_chunk_sizes(chunk_size, len(steps))
    on_host = jax.default_backend() == 'cpu' if on_host is None else on_host
    if workers < 1 or (workers > 1 and not on_host):
        raise ValueError(f'workers: got {workers} with on_host={on_host}; give at least 1, more only with on_host=True')
    loops = jax.jit(build_loops(steps, chunk_sizes))
    run = _build_host_driven(steps, chunk_sizes, workers) if on_host else loops
    return guarded(run, model, traceable=loops)


def check_chunk_sizes(chunk_size: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Returns one chunk size per step, or says what is wrong with them."""
    sizes = tuple(chunk_size) if isinstance(chunk_size, (list, tuple)) else (chunk_size,) * count
    if len(sizes) != count or any(not isinstance(size, (int, np.integer)) or size < 1 for size in sizes):
        raise ValueError(
            f'chunk_size: got {chunk_size!r}; give one positive integer, or {count} of them, one for each exit asked'
        )
    return tuple(int(size) for size in sizes)


def _build_host_driven(steps: Sequence[StepFunction], chunk_sizes: Sequence[int], workers: int) -> Executor:
    steps, submit = [jax.jit(step) for step in steps], submitter(workers)

    def run(variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((variables, images, thresholds))):
            raise ValueError(
                'compacted: the host drives this one, so it cannot run under jit, vmap or grad; call it outside, or '
                'build it with on_host=False'
            )
        sizes = [min(size, len(images)) for size in chunk_sizes]
        pipeline = Pipeline(steps, variables, np.asarray(thresholds), sizes, workers=workers, submit=submit)
        pipeline.add(np.arange(len(images)), np.asarray(images))
        return _in_order(len(images), pipeline.run(flush=True))

    return run


def _in_order(count: int, found: Iterable[Answers]) -> ExitPrediction:
    results = None
    for answers in found:
        if results is None:
            results = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), answers.prediction)
        for target, values in zip(jax.tree.leaves(results), jax.tree.leaves(answers.prediction), strict=True):
            target[answers.ids] = values
    return jax.tree.map(jnp.asarray, results)
