"""Training for a number of epochs, on data in memory or on disk. A run that is killed at any moment resumes."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from branchy_jax import calling, checkpoint, sharding
from branchy_jax.losses import Loss, MetricsOf, accuracy_per_exit, cross_entropy_per_exit
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import Metrics, train_step
from branchy_jax.types import Array, Batch, check_labels, num_rows

Augment = Callable[[Array, Batch], Batch]
"""``(key, batch as stored) → batch as fed to the network``: augmentation and normalisation, traced inside jit."""

_SECONDS_BETWEEN_SAVES = 240.0


class Stream(Protocol):
    """Examples that are read batch by batch, such as `branchy_jax.data.OnDisk`."""

    def __len__(self) -> int:
        """M."""

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Yields the examples of ``order[first_step]``, ``order[first_step + 1]``, … as NumPy arrays."""


@functools.partial(jax.jit, static_argnames=('mesh', 'augment', 'loss', 'metrics'), donate_argnames='state')
def take_steps(
    state: TrainState, data: Batch, order: Any, keys: Array, *, mesh: Mesh | None, augment: Augment, **options: Any
) -> tuple[TrainState, Metrics]:
    """Takes one step for each key, on the rows of ``data`` in ``order [steps, B]``, or on ``data`` if that is None.

    Returns:
        The state after the steps, and their average metrics.
    """

    def body(state: TrainState, step: tuple[Array | None, Array]) -> tuple[TrainState, Metrics]:
        rows, key = step
        batch = data if rows is None else jax.tree.map(lambda values: values[rows], data)
        if mesh is not None:  # every device holds all examples: it gathers and computes its own rows only
            batch = lax.with_sharding_constraint(batch, sharding.by_rows(mesh))
        augment_key, dropout_key = jax.random.split(key)
        return train_step(state, augment(augment_key, batch), key=dropout_key, **options)

    state, history = lax.scan(body, state, (order, keys), unroll=len(keys) == 1)  # one step needs no loop
    return state, jax.tree.map(lambda values: values.mean(0), history)


def fit(
    state: TrainState,
    data: Batch | Stream,
    exit_weights: Array,
    key: Array,
    *,
    epochs: float,
    batch_size: int,
    augment: Augment = lambda key, batch: batch,
    loss: Loss = cross_entropy_per_exit,
    metrics: MetricsOf = accuracy_per_exit,
    scan: bool | None = None,
    directory: Path | str | None = None,
    save_every: int | None = None,
    on_step: Callable[[int, int, int, Metrics], None] | None = None,
    on_epoch: Callable[[int, TrainState, Metrics], None] | None = None,
    on_metrics: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainState:
    """Trains from ``state.step``, or from the checkpoint in ``directory``, until ``epochs`` epochs are done.

    ``state.step`` determines the epoch and the position in it, for data in memory and on disk. A run that is killed at
    any moment and started again with the same arguments ends with the same parameters as an uninterrupted one, because
    every step is a pure function of the state before it, ``key`` and its number. The checkpoint may come from another
    number of devices; its arrays are put on the devices of ``state``.

    A training in phases, such as one with growing images, calls `fit` once for each phase, with the number of epochs
    done at its end; one directory serves all phases.

    Args:
        state: donated; it also gives the shapes of the checkpoint. If it is replicated on a mesh
            (`branchy_jax.sharding.replicate`), the devices of the mesh share every batch.
        data: the whole training set as stored, or a stream of it. Each of several processes reads only its own part of
            every batch of a stream.
        exit_weights: ``[N]``.
        key: of the whole training; order, augmentation and dropout derive from it and the number of the step.
        epochs: number of all epochs, those before a resume included; a fraction ends within an epoch.
        batch_size: examples in a step, of all processes together.
        augment: ``(key, batch as stored) → batch as fed to the network``: augmentation and normalisation; runs inside
            jit. By default the batch is unchanged.
        loss: ``(logits, labels) → [N]``.
        metrics: ``(logits, labels) → metrics by name``.
        scan: for data in memory: one program runs an epoch, and checkpoints are written between epochs. Otherwise each
            step is dispatched by itself, which shows progress and resumes within an epoch. False by default on a CPU,
            where convolutions inside a loop run many times slower. Parameters are equal up to rounding.
        directory: folder for the newest checkpoint; ``None`` writes none.
        save_every: steps between checkpoints; by default an epoch, or four minutes if an epoch takes longer (an epoch
            with several processes, which share no clock). The last step is always followed by a checkpoint.
        on_step: called as ``on_step(epoch, steps done, steps, metrics)`` after every step; with ``scan`` after every
            epoch, with averages.
        on_epoch: called as ``on_epoch(epochs done, state, metrics)`` after every whole epoch, with the averages of its
            steps since a resume. The next step donates the state: copy what you need later, such as
            ``jax.tree.map(jnp.copy, state.variables)``.
        on_metrics: called as ``on_metrics(steps done, scalars)`` at the end of every epoch, and of the last fraction of
            one, with the same averages as numbers by name: ``loss``, ``exit_loss/1``, ``exit_accuracy/1``, …. For clu
            pass ``writer.write_scalars``; for Weights & Biases
            ``lambda step, scalars: wandb.log(dict(scalars), step=step)``; for TensorBoard a loop over
            ``scalars.items()`` that calls ``writer.add_scalar(name, value, step)``.

    Returns:
        The trained state.

    Raises:
        ValueError: if ``epochs`` is below 0; the devices cannot share ``batch_size``, or the training set does not fill
            a batch; a label has no class; a stream ends too early; another process trains in ``directory``, or its
            checkpoint is unreadable or of another recipe: arrays of the network or the optimiser, key, exit weights,
            batch size or number of examples. What these do not record, such as ``loss``, ``augment`` or a learning
            rate, may change between starts.
    """
    mesh = sharding.mesh_of(state)
    _check_settings(data, epochs, batch_size, save_every, mesh)
    if isinstance(data, Batch):
        _check_labels(state, data, augment, key, loss)
        # Moved once: data on the host would be sent to the device at every step.
        data = jax.tree.map(jnp.asarray, data) if mesh is None else sharding.replicate(mesh, data)
    scan = isinstance(data, Batch) and (jax.default_backend() != 'cpu' if scan is None else scan)
    # Host devices share one pool of threads: collectives of overlapping steps there can wait for each other forever.
    waits = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
    steps = len(data) // batch_size
    last = round(epochs * steps)
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    options = {'exit_weights': exit_weights, 'mesh': mesh, 'augment': augment, 'loss': loss, 'metrics': metrics}
    recipe = {'examples': len(data), 'batch_size': batch_size, 'exit_weights': exit_weights.tolist()}
    recipe['key'] = jax.random.key_data(key).tolist()
    every, by_clock = save_every or steps, save_every is None and jax.process_count() == 1
    with contextlib.nullcontext() if directory is None else checkpoint.locked(directory):
        if directory is not None:
            _, state = checkpoint.restore(directory, state, recipe=recipe) or (0, state)
        done, history, saved_at = int(state.step), [], time.monotonic()
        for epoch, batch, rows, keys in _schedule(data, key, batch_size, done, last, scan=scan, mesh=mesh):
            before, done = done, done + len(keys)
            state, averages = take_steps(state, batch, rows, keys, **options)
            history.append(averages)
            if waits:
                jax.block_until_ready(averages)
            late = by_clock and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
            if directory is not None and (late or done == last or done // every > before // every):
                checkpoint.save(directory, done, state, recipe=recipe)
                saved_at = time.monotonic()
            if on_step is not None:
                on_step(epoch, done - epoch * steps, steps, averages)
            if done % steps == 0 or done == last:
                averages, history = jax.tree.map(lambda *parts: jnp.stack(parts).mean(0), *history), []
                if on_epoch is not None and done % steps == 0:
                    on_epoch(epoch + 1, state, averages)
                if on_metrics is not None:
                    on_metrics(done, _scalars(averages))
    return state


def _check_settings(data: Any, epochs: float, batch_size: int, save_every: int | None, mesh: Mesh | None) -> None:
    if isinstance(data, Batch):
        num_rows(data, 'data')
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= len(data):
        raise ValueError(f'batch_size: got {batch_size} for {len(data)} examples; give an integer from 1 to that')
    if not 0 <= epochs < float('inf'):
        raise ValueError(f'epochs: got {epochs}; give a number from 0 up, of all epochs')
    if mesh is not None:
        sharding.check_divisible('batch_size', batch_size, mesh)
    if save_every is not None and save_every < 1:
        raise ValueError(f'save_every: got {save_every}; give at least 1 step')


def _check_labels(state: TrainState, data: Batch, augment: Augment, key: Array, loss: Loss) -> None:
    if getattr(loss, 'func', loss) is not cross_entropy_per_exit:  # another loss may take any target
        return
    inputs = jax.eval_shape(augment, key, jax.tree.map(lambda values: values[:1], data)).image
    logits = jax.eval_shape(functools.partial(calling.apply, state.model), state.variables, inputs)
    check_labels(data.label, logits[-1].shape[-1])


def _schedule(
    data: Batch | Stream, key: Array, batch_size: int, done: int, last: int, *, scan: bool, mesh: Mesh | None
) -> Iterator[tuple[int, Batch, np.ndarray | None, Array]]:
    """Yields, for steps ``done`` to ``last``: epoch, data, rows to gather ``[steps, B]`` or None, keys ``[steps]``.

    Order and keys are pure functions of ``key`` and the epoch. A remainder that fills no batch is left out of an epoch.
    """
    steps = len(data) // batch_size
    while done < last:
        epoch, first = divmod(done, steps)
        stop = min(steps, first + last - done)
        epoch_key = jax.random.fold_in(key, epoch)
        order = np.asarray(jax.random.permutation(epoch_key, len(data)))[: stop * batch_size].reshape(stop, batch_size)
        keys = jax.random.split(jax.random.fold_in(epoch_key, 1), steps)
        if isinstance(data, Batch):
            size = stop - first if scan else 1
            for n in range(first, stop, size):
                yield epoch, data, order[n : n + size], keys[n : n + size]
        else:
            own = np.split(order, jax.process_count(), axis=1)[jax.process_index()]  # this process's part of each batch
            batches = data.batches(own, first)
            for n in range(first, stop):
                if (batch := next(batches, None)) is None:
                    place = f'{n} of {stop} steps of epoch {epoch + 1}'
                    raise ValueError(f'data: its batches ended after {place}; `batches` must yield the whole order')
                if mesh is not None:
                    batch = jax.make_array_from_process_local_data(sharding.by_rows(mesh), batch)
                yield epoch, batch, None, keys[n : n + 1]
        done = epoch * steps + stop


def _scalars(metrics: Metrics) -> dict[str, float]:
    """Returns metrics as numbers; those of N exits are numbered from 1."""
    scalars: dict[str, float] = {}
    for name, values in metrics.items():
        for n, number in enumerate(np.ravel(values).tolist(), 1):
            scalars[f'{name}/{n}' if np.ndim(values) else name] = number
    return scalars
