"""Trains the baseline and the branchy network of a run, each resumed where it stopped, with a progress bar."""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from branchy_jax.training.step import Metrics
from branchy_jax.types import Variables
from experiments.run.networks import image_specs, own_options
from experiments.run.products import as_products

Build = Callable[..., Any]

_CONVOLUTIONS = {'banded': bj.models.banded_convolution, 'products': as_products}
_REFRESH_SECONDS = 0.5
STARTED = 'BRANCHY_JAX_STARTED'
"""Holds what the environment was before `start_again_on_cpu` changed it, as JSON."""
# XLA:CPU gives its temporary memory back after every call, and the page faults of the next call cost more than the
# work. Kept, and in huge pages, it is there.
_ALLOCATOR = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=1000000000'  # noqa: E501 - one value


def start_again_on_cpu(devices: int) -> None:
    """Starts this command again with the settings under which a CPU trains fastest; on a GPU or TPU it returns.

    Host devices share one pool of threads, and collectives of overlapping steps have been seen to wait for each other
    there without end: dispatch is synchronous.

    Args:
        devices: host devices to make; with 1 it returns.
    """
    if devices == 1 or STARTED in os.environ or jax.default_backend() != 'cpu':
        return
    settings = settings_on_cpu(devices)
    before = json.dumps({name: os.environ.get(name) for name in settings})
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings, STARTED: before})


def settings_on_cpu(devices: int) -> dict[str, str]:
    """Returns the environment variables of `start_again_on_cpu`; variables that the user has set stay as they are."""
    flags, host_devices = os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count'
    if host_devices not in flags:
        flags = f'{flags} {host_devices}={devices}'.strip()
    settings = {'GLIBC_TUNABLES': _ALLOCATOR, 'JAX_CPU_ENABLE_ASYNC_DISPATCH': '0'}
    return {**{name: os.environ.get(name, value) for name, value in settings.items()}, 'XLA_FLAGS': flags}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The common settings of the trainings of a run.

    Attributes:
        config: settings of the run.
        options: that its networks are created with.
        dataset: only its training part is used.
        workdir: checkpoints go below it.
        mesh: the devices that share every batch.
    """

    config: ConfigDict
    options: Mapping[str, Any]
    dataset: bj.data.Dataset
    workdir: Path
    mesh: Mesh | None = None

    def build(self, **changed: Any) -> Any:
        """Makes the branchy network in the form that a CPU trains fastest; ``depth=`` changes the depth of a ResNet."""
        options = {**self.options, **changed}
        if self.config.convolution:
            options['convolution'] = _CONVOLUTIONS[self.config.convolution]
        if self.config.image_sides:  # images grow during training
            options['image_shape'] = None
        return bj.models.create(self.config.network, **options)

    def train_both(self) -> tuple[Variables, Variables]:
        """Trains the one-exit baseline on its own, then the branchy network; returns the variables of both."""
        config, keys = self.config, jax.random.split(jax.random.key(self.config.seed), 4)
        name, baseline_name = config.network, config.network[2:]

        def build_baseline(**changed: Any) -> Any:
            return bj.models.without_branches(self.build(**changed))

        fresh = self.init(build_baseline, keys[0])
        train_baseline = functools.partial(self.train, build_baseline, fresh, keys[1], [1.0])
        baseline = trained = train_baseline(baseline_name, config.epochs_baseline)
        start = self.init(self.build, keys[2])
        if config.regime != 'joint':
            if config.epochs_start:
                trained = train_baseline(f'{baseline_name}-start', config.epochs_start)
            start, taken = bj.training.initialize_from_baseline(start, trained)
            print(f'{name}: took {len(taken.taken)} arrays from the baseline, {len(taken.fresh)} start fresh')
        return baseline, self.train(self.build, start, keys[3], config.exit_weights, name, config.epochs)

    def init(self, build: Build, key: jax.Array) -> Variables:
        """Returns fresh variables."""
        return jax.jit(build().init)(key, jnp.zeros((1, *self.dataset.image_shape), jnp.float32))

    def train(
        self, build: Build, variables: Variables, key: jax.Array, exit_weights: Any, name: str, epochs: float
    ) -> Variables:
        """Trains one network, resuming from its checkpoints.

        Args:
            build: makes the network.
            variables: to start from.
            key: of the whole training.
            exit_weights: ``[N]``.
            name: of its checkpoints.
            epochs: in all.
        """
        config, data, inputs = self.config, self.dataset.train, image_specs(self.dataset.image_shape)
        frozen = config.regime == 'frozen' and len(exit_weights) > 1
        if config.shallow_depth and not frozen:
            return self._grow(build, variables, key, exit_weights, name, epochs)
        optimizer = optimizer_of(config, steps=round(epochs * (len(data) // config.batch_size)))
        state = bj.training.create_train_state(build(), variables, optimizer, frozen_trunk=frozen, inputs=inputs)
        if self.mesh is not None:
            state = bj.sharding.replicate(self.mesh, state)
        elif isinstance(data, bj.Batch):
            data = jax.tree.map(jnp.asarray, data)
        sides = config.image_sides or (None,)
        with training_progress(name, epochs=epochs) as on_step:
            for phase, side in enumerate(sides, 1):
                state = bj.training.fit(
                    state,
                    data,
                    jnp.array(exit_weights),
                    key,
                    epochs=epochs * phase / len(sides),
                    directory=self.workdir / 'checkpoints' / name,
                    batch_size=config.batch_size,
                    augment=functools.partial(self._augment, side),
                    loss=loss_of(config, num_exits=len(exit_weights)),
                    on_step=on_step,
                    save_every=config.save_every or None,
                    scan=config.scan_epoch,
                )
        # What every device of a mesh holds, not committed to any device.
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state.variables)

    def _grow(
        self, build: Build, variables: Variables, key: jax.Array, exit_weights: Any, name: str, epochs: float
    ) -> Variables:
        """Trains a shallow network with the same exits, grows the whole network from it, and trains it a little."""
        config, depth = self.config, self.config.shallow_depth
        small = functools.partial(build, depth=depth)
        start = self.init(small, jax.random.fold_in(key, 1))
        trained = self._changed(shallow_depth=0).train(small, start, key, exit_weights, f'{name}-depth{depth}', epochs)
        # The whole ResNets say which blocks correspond, also for a baseline.
        deep = bj.models.create(config.network, **own_options(config))
        grown = bj.training.initialize_from_shallower(deep, variables, deep.clone(depth=depth), trained)
        changes = {'batch_size': config.batch_size_grown, 'learning_rate': config.learning_rate_grown}
        rest = self._changed(shallow_depth=0, image_sides=config.image_sides[-1:], **changes)
        return rest.train(build, grown, key, exit_weights, name, config.epochs_grown)

    def _changed(self, **changes: Any) -> 'Trainer':
        config = self.config.copy_and_resolve_references()
        config.update(changes)
        return dataclasses.replace(self, config=config)

    def _augment(self, side: int | None, key: jax.Array, batch: bj.Batch) -> bj.Batch:
        batch = bj.data.augment(key, batch, crop_padding=self.config.crop_padding, flip=self.config.flip)
        image = self.dataset.normalization(batch.image)
        if side is not None and side != image.shape[1]:
            image = jax.image.resize(image, (len(image), side, side, image.shape[-1]), 'linear')
        return batch.replace(image=image)


def loss_of(config: ConfigDict, *, num_exits: int) -> Loss:
    """Returns the loss of each exit: from labels, and if the settings say so with the last exit as a teacher."""
    supervised = functools.partial(bj.losses.cross_entropy_per_exit, label_smoothing=config.label_smoothing)
    share = config.distillation
    if not share or num_exits == 1:  # a single exit would be its own teacher: its loss would only shrink
        return supervised
    distilled = bj.losses.distillation(bj.losses.last_exit, temperature=config.temperature)
    return bj.losses.weighted_sum((1 - share, supervised), (share, distilled))


def optimizer_of(config: ConfigDict, *, steps: int, factor: float = 1.0, wait: int = 0) -> optax.GradientTransformation:
    """Returns the optimiser of the settings.

    Args:
        config: settings of the run.
        steps: of the whole training.
        factor: of the learning rate.
        wait: steps at the beginning that train nothing.
    """
    rate, steps = factor * config.learning_rate, max(2, steps - wait)
    warmup = max(1, round(config.warmup * steps))
    if config.schedule == 'cosine':
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=warmup, decay_steps=max(warmup + 1, steps))
    if config.schedule == 'linear':
        rise, fall = optax.linear_schedule(0.0, rate, warmup), optax.linear_schedule(rate, 0.0, steps - warmup)
        rate = optax.join_schedules([rise, fall], [warmup])
    if wait:
        later = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([optax.constant_schedule(0.0), later], [wait])
    if config.optimizer == 'adam':
        return bj.training.paper_adam(rate)
    mask = functools.partial(jax.tree.map, lambda array: array.ndim > 1) if config.decay_kernels_only else None
    if config.optimizer == 'adamw':
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=mask)
    decayed = optax.add_decayed_weights(config.weight_decay, mask=mask)
    return optax.chain(decayed, optax.sgd(rate, momentum=0.9, nesterov=True))


@contextmanager
def training_progress(name: str, *, epochs: float) -> Iterator[Callable[[int, int, int, Metrics], None]]:
    """Shows a bar while training; yields the ``on_step`` callback of `branchy_jax.training.fit`.

    Reading a metric waits for the device, so within an epoch it is read at most every half second.
    """
    text = TextColumn('epochs, loss per exit {task.fields[losses]}')
    columns = (TextColumn('[bold]{task.description}'), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=jax.process_index() > 0) as progress:
        task = progress.add_task(name, total=epochs, losses='–')
        shown_at = 0.0

        def on_step(epoch: int, step: int, steps: int, metrics: Metrics) -> None:
            nonlocal shown_at
            if step == steps or time.monotonic() - shown_at > _REFRESH_SECONDS:
                losses = ' '.join(f'{loss:.4f}' for loss in np.asarray(metrics['exit_loss']))
                progress.update(task, completed=epoch + step / steps, losses=losses)
                shown_at = time.monotonic()

        yield on_step
