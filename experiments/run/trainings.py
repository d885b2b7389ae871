"""Trains the baseline and the branchy network of a run, each resumed where it stopped, with a progress bar."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import branchy_jax as bj
from branchy_jax.losses import Loss
from branchy_jax.training.fit import Augment
from branchy_jax.training.step import Metrics
from branchy_jax.types import Variables
from experiments.run.networks import image_specs, own_options, training_options
from experiments.run.tasks import TASKS

Build = Callable[..., Any]

_REFRESH_SECONDS = 0.5


def train_both(
    config: ConfigDict, options: Mapping[str, Any], dataset: bj.data.Dataset, workdir: Path, mesh: Mesh | None = None
) -> tuple[Variables, Variables]:
    """Trains the one-exit baseline on its own, then the branchy network.

    Args:
        config: settings of the run.
        options: that the network is created with.
        dataset: only its training part is used.
        workdir: checkpoints go below it.
        mesh: the devices that share every batch.

    Returns:
        Variables of the baseline and of the branchy network.
    """
    build = builder(config, options)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    example = jnp.zeros((1, *dataset.image_shape), jnp.float32)
    train = functools.partial(train_network, config=config, dataset=dataset, workdir=workdir, mesh=mesh)
    train_baseline = functools.partial(
        train,
        lambda **changed: bj.models.without_branches(build(**changed)),
        jax.jit(bj.models.without_branches(build()).init)(keys[0], example),
        keys[1],
        [1.0],
    )
    baseline_variables = train_baseline(name=config.network[2:], epochs=config.epochs_baseline)
    start = jax.jit(build().init)(keys[2], example)
    if config.regime != 'joint':
        trained = baseline_variables
        if config.epochs_start:
            trained = train_baseline(name=f'{config.network[2:]}-start', epochs=config.epochs_start)
        start, taken = bj.training.initialize_from_baseline(start, trained)
        print(f'{config.network}: took {len(taken.taken)} arrays from the baseline, {len(taken.fresh)} start fresh')
    variables = train(
        build,
        start,
        keys[3],
        config.exit_weights,
        name=config.network,
        epochs=config.epochs,
        frozen_trunk=config.regime == 'frozen',
    )
    return baseline_variables, variables


def builder(config: ConfigDict, options: Mapping[str, Any]) -> Build:
    """Returns what builds the run's branchy network in the form that trains fastest."""
    return functools.partial(bj.models.create, config.network, **training_options(config, options))


def train_network(
    build: Build,
    variables: Variables,
    key: jax.Array,
    exit_weights: Sequence[float],
    *,
    name: str,
    epochs: float,
    config: ConfigDict,
    dataset: bj.data.Dataset,
    workdir: Path,
    mesh: Mesh | None = None,
    frozen_trunk: bool = False,
) -> Variables:
    """Trains one network, resuming from its checkpoints.

    Args:
        build: makes the network; ``depth=`` gives a ResNet another depth.
        variables: to start from.
        key: of the whole training.
        exit_weights: ``[N]``.
        name: of its checkpoints.
        epochs: in all.
        config: settings of the run.
        dataset: only its training part is used.
        workdir: checkpoints go below it.
        mesh: devices to share batches over.
        frozen_trunk: trains the side heads only.
    """
    model, inputs = build(), image_specs(dataset.image_shape)
    phases = config.image_sides or (None,)
    augment = {side: _augmentation(config, dataset, side=side) for side in phases}
    if config.shallow_depth and not frozen_trunk:
        variables = _grown(
            build,
            variables,
            key,
            exit_weights,
            name=name,
            epochs=epochs,
            config=config,
            dataset=dataset,
            workdir=workdir,
            mesh=mesh,
        )
        epochs, phases = config.epochs_grown, phases[-1:]
        config = _of_the_grown(config)
    optimizer = _optimizer(config, steps=round(epochs * (len(dataset.train) // config.batch_size)))
    state = bj.training.create_train_state(model, variables, optimizer, frozen_trunk=frozen_trunk, inputs=inputs)
    data = dataset.train
    if mesh is not None:
        state = bj.sharding.replicate(mesh, state)
    elif isinstance(data, bj.Batch):
        data = jax.tree.map(jnp.asarray, data)
    with training_progress(name, epochs=epochs) as on_step:
        for phase, side in enumerate(phases, 1):
            state = bj.training.fit(
                state,
                data,
                jnp.array(exit_weights),
                key,
                epochs=epochs * phase / len(phases),
                directory=workdir / 'checkpoints' / name,
                batch_size=config.batch_size,
                augment=augment[side],
                loss=_loss(config, num_exits=len(exit_weights)),
                metrics=TASKS[config.task].metrics,
                on_step=on_step,
                save_every=config.save_every or None,
                scan=config.scan_epoch,
            )
    return off_the_mesh(state.variables)


def off_the_mesh(variables: Variables) -> Variables:
    """Returns the arrays that every device of a mesh holds, not committed to any device."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), variables)


def _grown(build: Build, variables: Variables, *rest: Any, name: str, config: ConfigDict, **options: Any) -> Variables:
    """Trains the shallow network with the same exits, and returns the whole network's variables grown from it."""
    shallow_build = functools.partial(build, depth=config.shallow_depth)
    example = jnp.zeros((1, *options['dataset'].image_shape), jnp.float32)
    start = jax.jit(shallow_build().init)(jax.random.fold_in(rest[0], 1), example)
    shallow_config = config.copy_and_resolve_references()
    shallow_config.shallow_depth = 0
    trained = train_network(
        shallow_build, start, *rest, name=f'{name}-depth{config.shallow_depth}', config=shallow_config, **options
    )
    # The whole ResNets say which blocks correspond, also for a baseline or for the first stages alone.
    deep = bj.models.create(config.network, **own_options(config))
    shallow = deep.clone(depth=config.shallow_depth)
    return bj.training.initialize_from_shallower(deep, variables, shallow, trained)


def _of_the_grown(config: ConfigDict) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update(batch_size=config.batch_size_grown, learning_rate=config.learning_rate_grown, accumulate=1)
    return changed


def _loss(config: ConfigDict, *, num_exits: int) -> Loss:
    share, supervised = config.distillation, TASKS[config.task].loss
    if config.label_smoothing:
        supervised = functools.partial(supervised, label_smoothing=config.label_smoothing)
    if not share or num_exits == 1:  # a single exit would be its own teacher: its loss would only shrink
        return supervised
    distilled = bj.losses.distillation(bj.losses.last_exit, temperature=config.temperature)
    return bj.losses.weighted_sum((1 - share, supervised), (share, distilled))


def _augmentation(config: ConfigDict, dataset: bj.data.Dataset, *, side: int | None) -> Augment:
    def augment(key: jax.Array, batch: bj.Batch) -> bj.Batch:
        batch = bj.data.augment(key, batch, crop_padding=config.crop_padding, flip=config.flip)
        image = dataset.normalization(batch.image)
        if side is not None and side != image.shape[1]:
            image = jax.image.resize(image, (len(image), side, side, image.shape[-1]), 'linear')
        return batch.replace(image=image)

    return augment


def _optimizer(config: ConfigDict, *, steps: int) -> optax.GradientTransformation:
    rate, updates = config.learning_rate, max(2, steps // config.accumulate)
    warmup = max(1, round(config.warmup * updates))
    if config.schedule == 'cosine':
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=warmup, decay_steps=max(warmup + 1, updates))
    if config.schedule == 'linear':
        rise, fall = optax.linear_schedule(0.0, rate, warmup), optax.linear_schedule(rate, 0.0, updates - warmup)
        rate = optax.join_schedules([rise, fall], [warmup])
    mask = _kernels if config.decay_kernels_only else None
    if config.optimizer == 'adam':
        optimizer = bj.training.paper_adam(rate)
    elif config.optimizer == 'adamw':
        optimizer = optax.adamw(rate, weight_decay=config.weight_decay, mask=mask)
    else:
        decayed = optax.add_decayed_weights(config.weight_decay, mask=mask)
        optimizer = optax.chain(decayed, optax.sgd(rate, momentum=0.9, nesterov=True))
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda array: array.ndim > 1, params)


@contextmanager
def training_progress(name: str, *, epochs: float) -> Iterator[Callable[[int, int, int, Metrics], None]]:
    """Shows a bar while training; yields the ``on_step`` callback of `branchy_jax.training.fit`.

    Reading a metric waits for the device, so within an epoch it is read at most every half second.
    """
    columns = (
        TextColumn('[bold]{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('epochs, loss per exit {task.fields[losses]}, host memory at most {task.fields[memory]:.2f} GB'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=jax.process_index() > 0) as progress:
        task = progress.add_task(name, total=epochs, losses='–', memory=peak_memory_gb())
        shown_at = 0.0

        def on_step(epoch: int, step: int, steps: int, metrics: Metrics) -> None:
            nonlocal shown_at
            if step == steps or time.monotonic() - shown_at > _REFRESH_SECONDS:
                losses = ' '.join(f'{loss:.4f}' for loss in np.asarray(metrics['exit_loss']))
                progress.update(task, completed=epoch + step / steps, losses=losses, memory=peak_memory_gb())
                shown_at = time.monotonic()

        yield on_step


def peak_memory_gb() -> float:
    """Returns the most host memory that this process has held so far."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
