"""Epochs over data that fits on the device, and runs that survive being killed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from branchy_jax import checkpoint, sharding
from branchy_jax.losses import Loss, Watch, accuracy_per_exit, cross_entropy_per_exit
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import Metrics, take_step
from branchy_jax.types import Array, Batch, Variables, check_labels

Prepare = Callable[[Array, Batch], Batch]
"""``(key, batch as stored) → batch as fed to the network``: normalisation and augmentation, traced inside jit."""


def epoch_order(key: Array, epoch: int, num_examples: int, batch_size: int) -> Array:
    """Returns which examples make up each batch of an epoch: a pure function of its arguments.

    Args:
        key: of the whole training.
        epoch: 0, 1, …; every epoch is another permutation.
        num_examples: size of the training set.
        batch_size: examples in a batch; a remainder that does not fill one sits this epoch out.

    Returns:
        ``[steps, batch_size]`` integers.

    Raises:
        ValueError: the training set does not fill one batch.
    """
    steps = num_examples // batch_size
    if steps < 1:
        raise ValueError(f'batch_size: got {batch_size}, but there are only {num_examples} training examples')
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def step_keys(key: Array, epoch: int, steps: int) -> Array:
    """Returns the key of each step of an epoch, for augmentation and dropout ``[steps]``."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, epoch), 1), steps)


def step_on_stored(
    state: TrainState, batch: Batch, key: Array, exit_weights: Array, *, prepare: Prepare, **options: Any
) -> tuple[TrainState, Metrics]:
    """Takes a step on a batch of images as stored; for callers that jit more than that."""
    prepare_key, dropout_key = jax.random.split(key)
    return take_step(state, prepare(prepare_key, batch), exit_weights, dropout_key, **options)


def _step_on_rows(
    state: TrainState, data: Batch, rows: Array, key: Array, exit_weights: Array, *, mesh: Mesh | None, **options: Any
) -> tuple[TrainState, Metrics]:
    # Every device holds all examples; told so, each gathers its own share of the batch and computes on that alone.
    batch = sharding.constrain(mesh, jax.tree.map(lambda values: values[rows], data))
    return step_on_stored(state, batch, key, exit_weights, **options)


_STATIC = ('prepare', 'loss', 'watch', 'mesh')
_jitted_step_on_rows = jax.jit(_step_on_rows, static_argnames=_STATIC, donate_argnames='state')


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames='state')
def _scan_epoch(
    state: TrainState, data: Batch, order: Array, keys: Array, exit_weights: Array, **options: Any
) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, step: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        return _step_on_rows(state, data, *step, exit_weights, **options)

    return lax.scan(body, state, (order, keys))


def train_epoch(
    state: TrainState,
    data: Batch,
    exit_weights: Array,
    key: Array,
    *,
    epoch: int,
    batch_size: int,
    prepare: Prepare,
    loss: Loss = cross_entropy_per_exit,
    watch: Watch = accuracy_per_exit,
    scan: bool = True,
    on_step: Callable[[int, int, int, Metrics], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes the steps of one epoch over data that fits on the device.

    Where ``state`` lies on the devices of a mesh (`branchy_jax.sharding.replicate`), each of them computes its share of
    every batch.

    Args:
        state: donated.
        data: the whole training set as stored, ``image [M, H, W, C]`` uint8.
        exit_weights: ``[N]``.
        key: of the whole training; order, augmentation and dropout derive from it and ``epoch``.
        epoch: 0, 1, ….
        batch_size: examples in a step.
        prepare: ``(key, stored batch) → batch for the network``; runs inside jit.
        loss: ``(logits, labels) → [N]``.
        watch: ``(logits, labels) → figures by name``.
        scan: the epoch is one program, a `jax.lax.scan`; otherwise one dispatch per step, which is slower for small
            networks but reports progress within the epoch. Both end with the same parameters up to rounding.
        on_step: called as ``on_step(epoch, steps done, steps, metrics)`` after every step, or once per epoch with
            ``scan``.

    Returns:
        The next state, and the metrics averaged over the epoch.

    Raises:
        ValueError: a batch size that the devices cannot share, or that the training set does not fill.
    """
    order = epoch_order(key, epoch, len(data), batch_size)
    steps, keys = len(order), step_keys(key, epoch, len(order))
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    mesh = sharding.mesh_of(state)
    options = {'prepare': prepare, 'loss': loss, 'watch': watch, 'mesh': mesh}
    if mesh is not None:
        sharding.check_divisible('batch_size', batch_size, mesh)
        data = sharding.replicate(mesh, data)
    if scan:
        state, history = _scan_epoch(state, data, order, keys, exit_weights, **options)
        metrics = jax.tree.map(lambda values: values.mean(0), history)
        if on_step is not None:
            on_step(epoch, steps, steps, metrics)
        return state, metrics
    history = []
    for step in range(steps):
        state, metrics = _jitted_step_on_rows(state, data, order[step], keys[step], exit_weights, **options)
        history.append(metrics)
        if on_step is not None:
            on_step(epoch, step + 1, steps, metrics)
    return state, jax.tree.map(lambda *values: jnp.stack(values).mean(0), *history)


def fit(
    state: TrainState,
    data: Batch,
    exit_weights: Array,
    key: Array,
    *,
    epochs: int,
    directory: Path | str | None = None,
    on_epoch: Callable[[int, TrainState, Metrics], None] | None = None,
    **options: Any,
) -> TrainState:
    """Trains for a number of epochs, resuming from ``directory`` if it holds a checkpoint.

    A run killed at any moment and started again with the same arguments ends with the same parameters as one never
    killed: every epoch is a pure function of the state before it, ``key`` and its number. The checkpoint may come from
    another number of devices: what is read lies where ``state`` does.

    Args:
        state: donated; also tells the shapes of what a checkpoint holds.
        data: the whole training set as stored.
        exit_weights: ``[N]``.
        key: of the whole training.
        epochs: how many in all, those before a resume included.
        directory: where to keep one checkpoint per epoch (only the newest stays); ``None`` keeps none.
        on_epoch: called as ``on_epoch(epochs done, state, metrics)`` after every epoch.
        **options: of `train_epoch`: ``batch_size``, ``prepare``, ``loss``, ``watch``, ``scan``, ``on_step``.

    Returns:
        The trained state.

    Raises:
        ValueError: the directory holds a checkpoint of another network or optimiser, or an unreadable one; labels
            that the network has no class for.
    """
    if options.get('loss', cross_entropy_per_exit) is cross_entropy_per_exit:  # another may take any target
        check_labels(data.label, _num_classes(state, data, options['prepare'], key))
    start, mesh = 0, sharding.mesh_of(state)
    if mesh is not None:  # once, not once an epoch
        data = sharding.replicate(mesh, data)
    if directory is not None and (found := checkpoint.restore(directory, state)) is not None:
        start, state = found
    for epoch in range(start, epochs):
        state, metrics = train_epoch(state, data, exit_weights, key, epoch=epoch, **options)
        if directory is not None:
            checkpoint.save(directory, epoch + 1, state)
        if on_epoch is not None:
            on_epoch(epoch + 1, state, metrics)
    return state


def _num_classes(state: TrainState, data: Batch, prepare: Prepare, key: Array) -> int:
    def logits(variables: Variables, data: Batch) -> Array:
        return state.model.apply(variables, prepare(key, data).image)[-1]

    return jax.eval_shape(logits, state.variables, jax.tree.map(lambda values: values[:1], data)).shape[-1]
