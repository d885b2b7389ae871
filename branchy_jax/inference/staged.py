"""One image at a time, later stages truly not run: nested `lax.cond`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from branchy_jax.criteria.criterion import Carry
from branchy_jax.inference.any_batch import AnyBatch, any_batch, check_max_batch
from branchy_jax.inference.compiler_options import Options, in_order
from branchy_jax.inference.steps import (
    Executor,
    StepFunction,
    asked_exits,
    at_rows,
    build_steps,
    compiled_once,
    guarded,
    jit_predicting,
    policy_checker,
    zeros,
)
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.models.compose import Hidden
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, check_inputs, input_specs, num_rows


def staged(
    model: BranchyNet, *, exits: Sequence[int] | None = None, compiler_options: Mapping[str, Any] | None = None
) -> Executor:
    """Builds the batch-1 executor: each stage after the first sits inside the `lax.cond` of the exit before it.

    One dispatch per image; what an exit makes superfluous is not executed. `jax.vmap` turns the conditionals into
    selects, which run everything: for batches use `branchy_jax.inference.compacted` or `sequential`.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.COMMAND_BUFFERS` on a GPU, or
            `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, image [H, W, C], policy) → ExitPrediction`` without the batch axis; a bare array of thresholds
        ``[N - 1]`` is a policy of entropy. Raises ValueError on a policy that does not fit, NaN, or a bad image.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, image = bj.models.create('b-lenet'), jnp.ones((28, 28, 1))
        >>> variables = model.init(jax.random.key(0), image[None])
        >>> staged(model)(variables, image, [float('-inf')]).exit_index.item()
        1

    References:
        BranchyNet, 2016, Figure 2.
    """
    return _staged(model, asked_exits(model, exits), in_order(compiler_options))


@compiled_once
def _staged(model: BranchyNet, asked: tuple[int, ...], options: Options) -> Executor:
    steps = build_steps(model, asked)

    # Taking a policy apart at every call would cost a small network 4 % of its time at batch 1: its leaves are taken.
    @functools.lru_cache
    def of_structure(structure: Any) -> Executor:
        @jit_predicting(options)
        def run(variables: Variables, image: Array, *leaves: Array) -> ExitPrediction:
            policy, alone = jax.tree.unflatten(structure, leaves), jax.tree.map(lambda leaf: leaf[None], image)
            if model.image_shape is not None:
                _check_image(image, alone, model.image_shape)
            return at_rows(_answer(steps, variables, alone, (), policy), 0)

        return run

    def prepared(policy: ExitPolicy) -> tuple[Executor, list[Array]]:
        leaves, structure = jax.tree.flatten(policy)
        return of_structure(structure), leaves

    check = policy_checker(model.num_exits, prepared)

    def execute(variables: Variables, image: Array, policy: Any) -> ExitPrediction:
        run, leaves = check(policy)
        return run(variables, image, *leaves)

    return execute


def sequential(
    model: BranchyNet,
    *,
    exits: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    workers: int = 1,
) -> Executor:
    """Builds the executor for a stream of single images in one program: a loop whose body is `staged`.

    Saves the dispatch of every image but the first, which is most of the time of a small network at batch 1. A batch of
    one image runs without a loop, as `staged` does. On a CPU a loop keeps about one core busy: with a worker for each,
    this is often the fastest way to answer a batch.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.COMMAND_BUFFERS` on a GPU, or
            `branchy_jax.inference.ALL_CORES` on a CPU.
        max_batch: compiles a loop for up to so many images, and one image alone, and answers batches of any size with
            those, in pieces where they are larger; an `AnyBatch`. By default every new size compiles.
        workers: pieces that run at the same time, in threads; more than one with ``max_batch`` alone. The next piece
            goes to who is free: small ones share the work well, each costs some ten microseconds. Threads do not see
            context managers of the caller such as `jax.default_matmul_precision`.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction``. Raises ValueError on a policy that does not fit,
        NaN, or bad images.

    Raises:
        ValueError: impossible ``exits``, ``max_batch`` or ``workers``.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((3, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> sequential(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0, 0]
    """
    asked, options = asked_exits(model, exits), in_order(compiler_options)
    if workers < 1 or (workers > 1 and max_batch is None):
        raise ValueError(
            f'workers: got {workers} with max_batch={max_batch}; give at least 1, more only with max_batch'
        )
    if max_batch is None:
        return _sequential(model, asked, options)
    check_max_batch(max_batch)
    return _sequential_of_any_batch(model, asked, options, int(max_batch), workers)


@compiled_once
def _sequential(model: BranchyNet, asked: tuple[int, ...], options: Options) -> Executor:
    return guarded(sequential_program(model, asked, options), model)


@compiled_once
def sequential_program(
    model: BranchyNet, asked: tuple[int, ...], options: Options = ()
) -> Callable[..., ExitPrediction]:
    """Returns ``(variables, images, policy, count=None) → ExitPrediction``: of the first ``count`` images."""
    steps = build_steps(model, asked)

    @jit_predicting(options)
    def run(variables: Variables, images: Array, policy: ExitPolicy, count: Array | None = None) -> ExitPrediction:
        def answer(image: Array) -> ExitPrediction:
            return _answer(steps, variables, image, (), policy)

        def answer_next(n: Array | int, found: ExitPrediction) -> ExitPrediction:
            image = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, n), images)
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=n, axis=0)
            return jax.tree.map(put, found, answer(image))

        length = num_rows(images)
        if length == 1:
            return answer(images)
        if count is None:
            return lax.map(lambda image: at_rows(answer(jax.tree.map(lambda leaf: leaf[None], image)), 0), images)
        nothing = zeros(jax.eval_shape(answer, at_rows(images, slice(1))), length)
        return lax.fori_loop(0, count, answer_next, nothing)

    return run


@compiled_once
def _sequential_of_any_batch(
    model: BranchyNet, asked: tuple[int, ...], options: Options, max_batch: int, workers: int
) -> AnyBatch:
    program = sequential_program(model, asked, options)

    def run(variables: Variables, images: Array, policy: ExitPolicy, count: np.int32) -> ExitPrediction:
        if num_rows(images) == 1:
            return program(variables, images, policy)
        if count == 1:
            return program(variables, jax.tree.map(lambda leaf: np.asarray(leaf)[:1], images), policy)
        return program(variables, images, policy, count)

    return any_batch(run, program, model, (max_batch,), workers=workers)


def _check_image(image: Any, alone: Any, image_shape: Any) -> None:
    """Refuses what is not one input; ``alone`` is the same with a batch axis of 1."""
    expected = [list(spec.shape[1:]) for spec in jax.tree.leaves(input_specs(image_shape, 1))]
    found = [tuple(leaf.shape) for leaf in jax.tree.leaves(image)]
    if [len(shape) for shape in found] != [len(shape) for shape in expected]:
        raise ValueError(
            f'image: expected one image {", ".join(map(str, expected))}, got shape {", ".join(map(str, found))}; for '
            'batches there are compacted, sequential and dense'
        )
    check_inputs(alone, image_shape)


def _answer(
    steps: Sequence[StepFunction], variables: Variables, hidden: Hidden, carry: Carry, policy: ExitPolicy
) -> ExitPrediction:
    """Answers a batch of one."""
    step = steps[0](variables, hidden, carry, policy)
    if len(steps) == 1:
        return step.prediction
    return lax.cond(
        step.confident[0],
        lambda: step.prediction,
        lambda: _answer(steps[1:], variables, step.hidden, step.carry, policy),
    )
