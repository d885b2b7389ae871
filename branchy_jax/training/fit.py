"""Training for a number of epochs, on data in memory or on disk: numbered by steps, and safe to kill at any moment."""

from __future__ import annotations

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

from branchy_jax import checkpoint, sharding
from branchy_jax.losses import Loss, MetricsOf, accuracy_per_exit, cross_entropy_per_exit
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import Metrics, take_step
from branchy_jax.types import Array, Batch, Variables, check_labels, num_rows

Prepare = Callable[[Array, Batch], Batch]
"""``(key, batch as stored) → batch as fed to the network``: normalisation and augmentation, traced inside jit."""

_SECONDS_BETWEEN_SAVES = 240.0


def _as_stored(key: Array, batch: Batch) -> Batch:
    return batch


class Stream(Protocol):
    """Examples that are read batch by batch, such as `branchy_jax.data.OnDisk`."""

    def __len__(self) -> int:
        """M."""

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Yields the examples of ``order[first_step]``, ``order[first_step + 1]``, … as NumPy arrays."""


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
        ValueError: the training set does not fill one batch, or no batch size.
    """
    _check_batch_size(batch_size, num_examples)
    steps = num_examples // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def _check_batch_size(batch_size: int, num_examples: int) -> None:
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= num_examples:
        raise ValueError(
            f'batch_size: got {batch_size}, but there are only {num_examples} training examples; give an integer of '
            'at least 1 and at most that'
        )


def _step_keys(key: Array, epoch: int, steps: int) -> Array:
    """Returns the key of each step of an epoch, for augmentation and dropout ``[steps]``."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, epoch), 1), steps)


def _step_on_stored(
    state: TrainState, batch: Batch, key: Array, exit_weights: Array, *, prepare: Prepare, **options: Any
) -> tuple[TrainState, Metrics]:
    prepare_key, dropout_key = jax.random.split(key)
    return take_step(state, prepare(prepare_key, batch), exit_weights, dropout_key, **options)


def _step_on_rows(
    state: TrainState, data: Batch, rows: Array, key: Array, exit_weights: Array, *, mesh: Mesh | None, **options: Any
) -> tuple[TrainState, Metrics]:
    # Every device holds all examples; told so, each gathers its own share of the batch and computes on that alone.
    batch = sharding.constrain(mesh, jax.tree.map(lambda values: values[rows], data))
    return _step_on_stored(state, batch, key, exit_weights, **options)


_STATIC = ('prepare', 'loss', 'metrics')
_jitted_step_on_stored = jax.jit(_step_on_stored, static_argnames=_STATIC, donate_argnames='state')
_jitted_step_on_rows = jax.jit(_step_on_rows, static_argnames=(*_STATIC, 'mesh'), donate_argnames='state')


@functools.partial(jax.jit, static_argnames=(*_STATIC, 'mesh'), donate_argnames='state')
def _scan_steps(
    state: TrainState, data: Batch, order: Array, keys: Array, exit_weights: Array, **options: Any
) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, step: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        return _step_on_rows(state, data, *step, exit_weights, **options)

    return lax.scan(body, state, (order, keys))


def fit(
    state: TrainState,
    data: Batch | Stream,
    exit_weights: Array,
    key: Array,
    *,
    epochs: float,
    batch_size: int,
    prepare: Prepare = _as_stored,
    loss: Loss = cross_entropy_per_exit,
    metrics: MetricsOf = accuracy_per_exit,
    scan: bool | None = None,
    directory: Path | str | None = None,
    save_every: int | None = None,
    on_step: Callable[[int, int, int, Metrics], None] | None = None,
    on_epoch: Callable[[int, TrainState, Metrics], None] | None = None,
    on_metrics: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainState:
    """Trains on from ``state.step``, or from the checkpoint in ``directory``, until ``epochs`` epochs are done.

    ``state.step`` numbers everything: it tells the epoch and the place in it, for data in memory as for data on disk.
    A run killed at any moment and started again with the same arguments ends with the same parameters as one never
    killed: every step is a pure function of the state before it, ``key`` and its number. The checkpoint may come from
    another number of devices: what is read lies where ``state`` does.

    A training in phases, such as images that grow, calls `fit` once a phase with the epochs done by its end; one
    directory serves them all.

    Args:
        state: donated; also tells the shapes of what a checkpoint holds. Where it lies on a mesh
            (`branchy_jax.sharding.replicate`), the mesh shares every batch.
        data: the whole training set as stored, or a stream of it. With several processes each reads its own share of
            a stream's batches, and nothing else.
        exit_weights: ``[N]``.
        key: of the whole training; order, augmentation and dropout derive from it and the number of the step.
        epochs: how many in all, those before a resume included; a fraction ends within an epoch.
        batch_size: examples in a step, of all processes together.
        prepare: ``(key, batch as stored) → batch as fed to the network``; runs inside jit. By default batches are taken
            as they are stored.
        loss: ``(logits, labels) → [N]``.
        metrics: ``(logits, labels) → metrics``.
        scan: for data in memory: the epoch is one program, and checkpoints lie between epochs. Otherwise one dispatch
            a step, which shows progress and can be killed within an epoch. By default not on a CPU, where convolutions
            inside a loop run many times slower; small networks without any gain by it there, too. Both ways end with
            the same parameters up to rounding.
        directory: where to keep one checkpoint (only the newest stays); ``None`` keeps none.
        save_every: steps between checkpoints; by default an epoch, or four minutes where an epoch takes longer (with
            several processes, which have no clock in common, an epoch). The last step is followed by one, too.
        on_step: called as ``on_step(epoch, steps done, steps, metrics)`` after every step, or once per epoch, with
            averages, where it is scanned.
        on_epoch: called as ``on_epoch(epochs done, state, metrics)`` after every whole epoch, with the average of the
            epoch's steps, after a resume of those since. The state is donated to the next step: copy what you keep,
            such as ``jax.tree.map(jnp.copy, state.variables)``.
        on_metrics: called as ``on_metrics(steps done, scalars)`` at the end of every epoch, also of a part of one, with
            the same averages as numbers by name: ``loss``, ``exit_loss/1``, ``exit_accuracy/1``, …. Writers of the
            field fit as they are or in one line: clu's ``writer.write_scalars``; for Weights & Biases
            ``lambda step, scalars: wandb.log(dict(scalars), step=step)``; for TensorBoard a loop over
            ``scalars.items()`` that calls ``writer.add_scalar(name, value, step)``.

    Returns:
        The trained state.

    Raises:
        ValueError: epochs below 0; a batch size that the devices cannot share or the training set does not fill; labels
            that the network has no class for; a stream that ends too early; a directory that another process trains
            in, or whose checkpoint is unreadable or of another recipe: other arrays in the network or the optimiser's
            state, another key, other exit weights, batches or examples. What leaves no trace in these, such as
            ``loss``, ``prepare`` or a learning rate, may change from one start to the next.
    """
    _check_settings(data, epochs, batch_size, save_every, sharding.mesh_of(state))
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    known = getattr(loss, 'func', loss) is cross_entropy_per_exit  # with or without label smoothing
    if isinstance(data, Batch) and known:  # another loss may take any target
        check_labels(data.label, _num_classes(state, data, prepare, key))
    scan = jax.default_backend() != 'cpu' if scan is None else scan
    take = _taker(state, data, exit_weights, scan=scan, prepare=prepare, loss=loss, metrics=metrics)
    steps = len(data) // batch_size
    last = round(epochs * steps)
    recipe = {
        'examples': len(data),
        'batch_size': batch_size,
        'exit_weights': exit_weights.tolist(),
        'key': jax.random.key_data(key).tolist(),
    }
    with contextlib.nullcontext() if directory is None else checkpoint.locked(directory):
        state = _resumed(directory, state, recipe)
        done = int(state.step)
        by_the_clock = save_every is None and jax.process_count() == 1
        save = _saver(directory, recipe, every=save_every or steps, by_the_clock=by_the_clock, first=done, last=last)
        while done < last:
            epoch, place = divmod(done, steps)
            stop, history = min(steps, place + last - done), []
            order, keys = epoch_order(key, epoch, len(data), batch_size), _step_keys(key, epoch, steps)
            for after, found, count in take(state, order[:stop], keys, place):
                state, done = after, done + count
                history.append(found)
                save(done, state)
                if on_step is not None:
                    on_step(epoch, done - epoch * steps, steps, found)
            if done < epoch * steps + stop:
                raise ValueError(
                    f'data: its batches ended after {done - epoch * steps} of {stop} steps of epoch {epoch + 1}; '
                    '`batches` has to yield the whole order, every time it is called'
                )
            if on_epoch is None and on_metrics is None:
                continue
            averages = jax.tree.map(lambda *parts: jnp.stack(parts).mean(0), *history)
            if on_epoch is not None and stop == steps:
                on_epoch(epoch + 1, state, averages)
            if on_metrics is not None:
                on_metrics(done, _scalars(averages))
    return state


def _scalars(metrics: Metrics) -> dict[str, float]:
    """Returns metrics as numbers; those of N exits are numbered from 1."""
    found = {}
    for name, values in metrics.items():
        numbers = np.asarray(values)
        several = {f'{name}/{n}': float(number) for n, number in enumerate(numbers.ravel(), 1)}
        found.update(several if numbers.ndim else {name: float(numbers)})
    return found


def _check_settings(
    data: Batch | Stream, epochs: float, batch_size: int, save_every: int | None, mesh: Mesh | None
) -> None:
    if isinstance(data, Batch) and num_rows(data.image) != len(data.label):
        raise ValueError(
            f'data: got {num_rows(data.image)} images and {len(data.label)} labels; give one label per image'
        )
    _check_batch_size(batch_size, len(data))
    if not 0 <= epochs < float('inf'):
        raise ValueError(f'epochs: got {epochs}; give a number from 0 up, of all epochs')
    if mesh is not None:
        sharding.check_divisible('batch_size', batch_size, mesh)
    if save_every is not None and save_every < 1:
        raise ValueError(f'save_every: got {save_every}; give at least 1 step')


Taken = Iterator[tuple[TrainState, Metrics, int]]
"""States as training goes on, the metrics of the steps before each, averaged, and how many those were."""


def _taker(
    state: TrainState, data: Batch | Stream, exit_weights: Array, *, scan: bool, **options: Any
) -> Callable[[TrainState, Array, Array, int], Taken]:
    """Returns ``(state, order, keys, place) → states``: what takes the steps of an epoch from ``place`` on."""
    mesh, in_memory = sharding.mesh_of(state), isinstance(data, Batch)
    if in_memory:
        # Once: what lies on the host would be sent to the device at every step.
        data = jax.tree.map(jnp.asarray, data) if mesh is None else sharding.replicate(mesh, data)
        options['mesh'] = mesh
    # Host devices share one pool of threads: collectives of steps that overlap there can wait for each other forever.
    wait = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'

    def at_once(state: TrainState, order: Array, keys: Array, place: int) -> Taken:
        order = order[place:]
        state, history = _scan_steps(state, data, order, keys[place : place + len(order)], exit_weights, **options)
        yield state, jax.tree.map(lambda values: values.mean(0), history), len(order)

    def one_by_one(state: TrainState, order: Array, keys: Array, place: int) -> Taken:
        order = np.asarray(order)
        arguments: Iterator[tuple[Any, ...]]
        if isinstance(data, Batch):
            step, arguments = _jitted_step_on_rows, ((data, rows) for rows in order[place:])
        else:
            own = np.split(order, jax.process_count(), axis=1)[jax.process_index()]  # this process's share of a batch
            step, stream = _jitted_step_on_stored, data.batches(own, place)
            arguments = ((batch if mesh is None else sharding.shard_local(mesh, batch),) for batch in stream)
        for n, given in zip(range(place, len(order)), arguments, strict=False):  # a stream may not end by itself
            state, found = step(state, *given, keys[n], exit_weights, **options)
            if wait:
                jax.block_until_ready(found)
            yield state, found, 1

    return at_once if scan and in_memory else one_by_one


def _resumed(directory: Path | str | None, state: TrainState, recipe: dict[str, Any]) -> TrainState:
    """Returns the state to go on from: the directory's, if it holds one."""
    found = None if directory is None else checkpoint.restore(directory, state, recipe=recipe)
    if found is None:
        return state
    number, state = found
    if number != int(state.step):
        raise ValueError(
            f'directory: checkpoint {number} in {directory} was written after {int(state.step)} steps, by a '
            'version that numbered by epochs; delete the directory to start over'
        )
    return state


def _saver(
    directory: Path | str | None, recipe: dict[str, Any], *, every: int, by_the_clock: bool, first: int, last: int
) -> Callable[[int, TrainState], None]:
    """Returns what decides after each step whether a checkpoint is written, and writes it."""
    saved_at, seen = time.monotonic(), first

    def after(done: int, state: TrainState) -> None:
        nonlocal saved_at, seen
        late = by_the_clock and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
        due, seen = done // every > seen // every, done  # a scanned epoch passes many multiples at once
        if directory is not None and (due or done == last or late):
            checkpoint.save(directory, done, state, recipe=recipe)
            saved_at = time.monotonic()

    return after


def _num_classes(state: TrainState, data: Batch, prepare: Prepare, key: Array) -> int:
    def logits(variables: Variables, data: Batch) -> Any:
        return state.model.apply(variables, prepare(key, data).image)[-1]

    return jax.eval_shape(logits, state.variables, jax.tree.map(lambda values: values[:1], data)).shape[-1]
