"""Training on data that stays on disk: the same steps in the same order, resumed in the middle of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax import checkpoint, sharding
from branchy_jax.losses import Loss, Watch, accuracy_per_exit, cross_entropy_per_exit
from branchy_jax.training.epochs import Prepare, epoch_order, step_keys, step_on_stored
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import Metrics
from branchy_jax.types import Array, Batch


class Stream(Protocol):
    """Examples that are read batch by batch, such as `branchy_jax.streaming.Examples`."""

    def __len__(self) -> int:
        """M."""

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Yields the examples of ``order[first_step]``, ``order[first_step + 1]``, … as NumPy arrays."""


_step = jax.jit(step_on_stored, static_argnames=('prepare', 'loss', 'watch'), donate_argnames='state')


def fit_stream(
    state: TrainState,
    stream: Stream,
    exit_weights: Array,
    key: Array,
    *,
    epochs: int,
    batch_size: int,
    prepare: Prepare,
    loss: Loss = cross_entropy_per_exit,
    watch: Watch = accuracy_per_exit,
    directory: Path | str | None = None,
    save_every: int | None = None,
    on_step: Callable[[int, int, int, Metrics], None] | None = None,
    on_epoch: Callable[[int, TrainState, Metrics], None] | None = None,
) -> TrainState:
    """Does what `fit` does with data that does not fit in memory.

    Batches, augmentation and dropout are those of `fit` with the same key. A run killed at any moment goes on at the
    batch after its last checkpoint: the number of steps taken tells the epoch and the place in it. With several
    processes each reads its own share of every batch, and nothing else.

    Args:
        state: donated. Where it lies on a mesh (`branchy_jax.sharding.replicate`), the mesh shares every batch.
        stream: the training set.
        exit_weights: ``[N]``.
        key: of the whole training.
        epochs: how many in all, those before a resume included.
        batch_size: examples in a step, of all processes together.
        prepare: ``(key, batch as stored) → batch as fed to the network``; runs inside jit.
        loss: ``(logits, labels) → [N]``.
        watch: ``(logits, labels) → metrics``.
        directory: where to keep one checkpoint (only the newest stays); ``None`` keeps none.
        save_every: steps between checkpoints; by default an epoch. The last step is followed by one, too.
        on_step: called as ``on_step(epoch, steps done, steps, metrics)`` after every step.
        on_epoch: called as ``on_epoch(epochs done, state, metrics)`` after every epoch, with the average of the
            epoch's steps, after a resume of those since.

    Returns:
        The trained state.

    Raises:
        ValueError: a batch size that the devices cannot share or the training set does not fill, or a checkpoint of
            another network or optimiser.
    """
    mesh, steps, done = sharding.mesh_of(state), len(stream) // batch_size, 0
    if mesh is not None:
        sharding.check_divisible('batch_size', batch_size, mesh)
    if save_every is not None and save_every < 1:
        raise ValueError(f'save_every: got {save_every}; give at least 1 step')
    if directory is not None and (found := checkpoint.restore(directory, state)) is not None:
        done, state = found
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    step = functools.partial(_step, prepare=prepare, loss=loss, watch=watch)
    for epoch in range(done // steps if steps else 0, epochs):
        order, keys, history = epoch_order(key, epoch, len(stream), batch_size), step_keys(key, epoch, steps), []
        for batch in stream.batches(_own_columns(np.asarray(order)), done % steps):
            batch = batch if mesh is None else sharding.shard_local(mesh, batch)
            state, metrics = step(state, batch, keys[done % steps], exit_weights)
            history.append(metrics)
            done += 1
            if directory is not None and (done % (save_every or steps) == 0 or done == epochs * steps):
                checkpoint.save(directory, done, state)
            if on_step is not None:
                on_step(epoch, done - epoch * steps, steps, metrics)
        if on_epoch is not None:
            on_epoch(epoch + 1, state, _mean(history))
    return state


def _own_columns(order: np.ndarray) -> np.ndarray:
    """Returns this process's share of every batch."""
    share = order.shape[1] // jax.process_count()
    return order[:, jax.process_index() * share :][:, :share]


def _mean(history: list[Any]) -> Metrics:
    return jax.tree.map(lambda *values: jnp.stack(values).mean(0), *history)
