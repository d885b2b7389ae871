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
from branchy_jax.training.recipe import describe
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import Metrics, check_exit_weights, run_in_training, train_step
from branchy_jax.types import Array, Batch, num_rows

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

    if len(keys) == 1:  # inside a loop, even an unrolled one, XLA:CPU compiles gradients of convolutions to slow code
        return body(state, jax.tree.map(lambda values: values[0], (order, keys)))
    state, history = lax.scan(body, state, (order, keys))
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
        exit_weights: ``[N]`` of at least 0.
        key: of the whole training; order, augmentation and dropout derive from it and the number of the step.
        epochs: number of all epochs, those before a resume included; a fraction ends within an epoch. Fewer than the
            checkpoint has done are accepted only if an earlier call in ``directory`` asked for them.
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
            steps since a resume. The state is a copy that stays usable.
        on_metrics: called as ``on_metrics(steps done, scalars)`` at the end of every epoch, and of the last fraction of
            one, with the same averages as numbers by name: ``loss``, ``exit_loss/0``, ``exit_accuracy/0``, …. For clu
            pass ``writer.write_scalars``; for Weights & Biases
            ``lambda step, scalars: wandb.log(dict(scalars), step=step)``; for TensorBoard a loop over
            ``scalars.items()`` that calls ``writer.add_scalar(name, value, step)``.

    Returns:
        The trained state.

    Raises:
        ValueError: if ``data`` is neither a `branchy_jax.Batch` nor a stream; ``epochs`` is below 0; an exit weight is
            negative or NaN; the devices cannot share ``batch_size``, or the training set does not fill a batch; a label
            has no class; a loss or a parameter is not finite after an epoch or before a checkpoint; a stream ends too
            early; another process trains in ``directory``, or its checkpoint is unreadable or of another training:
            network, optimiser, learning rate, loss, data, labels, key, exit weights, batch size or number of epochs.
            ``augment`` is not recorded and may change between starts.
    """
    mesh = sharding.mesh_of(state)
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    _check_settings(data, exit_weights, epochs, batch_size, save_every, mesh)
    recipe: dict[str, Any] = {'batch_size': batch_size, 'exit_weights': exit_weights.tolist()}
    recipe |= _checked_recipe(state, data, key, recipe, augment, loss, stored=directory is not None)
    if isinstance(data, Batch):  # moved once: data on the host would be sent to the device at every step
        data = jax.tree.map(jnp.asarray, data) if mesh is None else sharding.replicate(mesh, data)
    scan = isinstance(data, Batch) and (jax.default_backend() != 'cpu' if scan is None else scan)
    # Host devices share one pool of threads: collectives of overlapping steps there can wait for each other forever.
    waits = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
    steps = len(data) // batch_size
    last = round(epochs * steps)
    options = {'exit_weights': exit_weights, 'mesh': mesh, 'augment': augment, 'loss': loss, 'metrics': metrics}
    every, by_clock = save_every or steps, save_every is None and jax.process_count() == 1
    with contextlib.nullcontext() if directory is None else checkpoint.locked(directory):
        state, recipe = _resumed(directory, state, recipe, float(epochs), last)
        done, history, saved_at = int(state.step), [], time.monotonic()
        for epoch, batch, rows, keys in _schedule(data, key, batch_size, done, last, scan=scan, mesh=mesh):
            before, done = done, done + len(keys)
            state, averages = take_steps(state, batch, rows, keys, **options)
            history.append(averages)
            if waits:
                jax.block_until_ready(averages)
            late = by_clock and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
            ends, saves = done % steps == 0 or done == last, late or done == last or done // every > before // every
            if ends or saves:
                _check_finite(state, history if ends else history[-1:], epoch + 1, done - epoch * steps)
            if directory is not None and saves:
                checkpoint.save(directory, done, state, recipe=recipe)
                saved_at = time.monotonic()
            if on_step is not None:
                on_step(epoch, done - epoch * steps, steps, averages)
            if ends:
                averages, history = jax.tree.map(lambda *parts: jnp.stack(parts).mean(0), *history), []
                if on_epoch is not None and done % steps == 0:
                    on_epoch(epoch + 1, jax.tree.map(jnp.copy, state), averages)  # the next step donates the state
                if on_metrics is not None:
                    on_metrics(done, _scalars(averages))
    return state


def _check_settings(
    data: Any, exit_weights: Array, epochs: float, batch_size: int, save_every: int | None, mesh: Mesh | None
) -> None:
    if isinstance(data, Batch):
        num_rows(data, 'data')
    elif not (hasattr(data, 'batches') and hasattr(data, '__len__')):
        raise ValueError(f'data: got {type(data).__name__}; give a branchy_jax.Batch, or a stream with `batches`')
    if not (jnp.isfinite(exit_weights) & (exit_weights >= 0)).all():
        raise ValueError(f'exit_weights: got {exit_weights.tolist()}; give each exit a finite number of at least 0')
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= len(data):
        raise ValueError(f'batch_size: got {batch_size} for {len(data)} examples; give an integer from 1 to that')
    if not 0 <= epochs < float('inf'):
        raise ValueError(f'epochs: got {epochs}; give a number from 0 up, of all epochs')
    if mesh is not None:
        sharding.check_divisible('batch_size', batch_size, mesh)
    if save_every is not None and save_every < 1:
        raise ValueError(f'save_every: got {save_every}; give at least 1 step')


def _checked_recipe(
    state: TrainState, data: Any, key: Array, recipe: dict[str, Any], augment: Augment, loss: Loss, *, stored: bool
) -> dict[str, Any]:
    """Checks the number of exit weights, and lets the loss check all labels, unless ``augment`` changes them.

    All but labels are shapes, so nothing is computed. In a step labels are shapes too: one without a class makes the
    loss NaN. Returns what a checkpoint records, or nothing if none is ``stored``.
    """
    batch_size = recipe['batch_size']
    if isinstance(data, Batch):
        examples = data
    elif stored:
        examples = next(iter(data.batches(np.arange(batch_size)[None])))
    else:
        return {}  # a stream is not read twice without need

    def outputs(state: TrainState, key: Array, batch: Batch) -> tuple[tuple[Array, ...], Any]:
        fed = augment(key, batch)
        return run_in_training(state, fed.image, key)[0], fed.label

    logits, labels = jax.eval_shape(outputs, state, key, jax.tree.map(lambda values: values[:batch_size], examples))
    check_exit_weights(np.asarray(recipe['exit_weights']), len(logits))
    values = examples.replace(label=jax.tree.map(jnp.asarray, examples.label))
    whole = calling.with_batch(logits, len(examples))
    try:
        jax.eval_shape(lambda image, z: loss(z, augment(key, values.replace(image=image)).label), values.image, whole)
    except Exception as error:  # a loss of the user's own may need the size of a batch
        if isinstance(error, ValueError) and str(error).startswith('labels: '):
            raise
    return describe(state, examples, key, loss, logits, labels) | {'examples': len(data)} if stored else {}


def _resumed(
    directory: Path | str | None, state: TrainState, recipe: dict[str, Any], epochs: float, last: int
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to start from, and the recipe with all numbers of epochs that calls asked for."""
    restored = None if directory is None else checkpoint.restore(directory, state, recipe=recipe)
    if restored is None:
        return state, {**recipe, 'epochs': [epochs]}
    step, state, stored = restored
    asked = stored.get('epochs', [epochs])
    if step > last and epochs not in asked:
        there = f'the checkpoint in {directory} is of a training for {max(asked):g}'
        raise ValueError(f'epochs: got {epochs:g}, but {there}; give at least that, or another directory')
    return state, {**recipe, 'epochs': sorted({*asked, epochs})}


def _check_finite(state: TrainState, history: list[Metrics], epoch: int, step: int) -> None:
    """Refuses losses and parameters that are not finite; the last loss and the parameters are those of ``step``."""
    bad = [n for n, part in enumerate(history, step - len(history) + 1) if not np.isfinite(part['loss'])]
    if bad or not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params)):
        what = 'loss: is NaN or infinite' if bad else 'state: has parameters that are NaN or infinite'
        advice = 'lower the learning rate, and look for NaN in the data and for labels outside [0, K)'
        raise ValueError(f'{what} in epoch {epoch}, by step {min([*bad, step])}; {advice}')


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
    """Returns metrics as numbers; those of N exits are numbered from 0."""
    scalars: dict[str, float] = {}
    for name, values in metrics.items():
        for n, number in enumerate(np.ravel(values).tolist()):
            scalars[f'{name}/{n}' if np.ndim(values) else name] = number
    return scalars
