"""Training the baseline and the branchy network of a run, each resumed where it stopped."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.progress import training_progress

Data = bj.data.Dataset | bj.streaming.StreamedDataset


def train_both(
    config: ConfigDict, options: Mapping[str, Any], dataset: Data, workdir: Path, mesh: Mesh | None = None
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
    if config.banded:  # the same network and parameters, in the form in which a CPU trains it fastest
        options = {**options, 'convolution': bj.models.banded_convolution}
    model = bj.models.create(config.network, **options)
    baseline = bj.models.without_branches(model)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    example = jnp.zeros((1, *dataset.image_shape), jnp.float32)
    train = functools.partial(train_network, config=config, dataset=dataset, workdir=workdir, mesh=mesh)
    baseline_variables = train(
        baseline, jax.jit(baseline.init)(keys[0], example), keys[1], [1.0],
        name=config.network[2:], epochs=config.epochs_baseline,
    )  # fmt: skip
    start = jax.jit(model.init)(keys[2], example)
    if config.regime != 'joint':
        trained = baseline_variables
        if config.epochs_start:
            trained = train(
                baseline, jax.jit(baseline.init)(keys[0], example), keys[1], [1.0],
                name=f'{config.network[2:]}-start', epochs=config.epochs_start,
            )  # fmt: skip
        start, taken = bj.training.initialize_from_baseline(start, trained)
        print(f'{config.network}: took {len(taken.taken)} arrays from the baseline, {len(taken.fresh)} start fresh')
    variables = train(
        model, start, keys[3], config.exit_weights,
        name=config.network, epochs=config.epochs, frozen_trunk=config.regime == 'frozen',
    )  # fmt: skip
    return baseline_variables, variables


def train_network(
    model: bj.BranchyNet,
    variables: Variables,
    key: jax.Array,
    exit_weights: Sequence[float],
    *,
    name: str,
    epochs: int,
    config: ConfigDict,
    dataset: Data,
    workdir: Path,
    mesh: Mesh | None = None,
    frozen_trunk: bool = False,
) -> Variables:
    """Trains one network, resuming from its checkpoints.

    Args:
        model: the network.
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
    optimizer = _optimizer(config, steps=epochs * (len(dataset.train) // config.batch_size))
    state = bj.training.create_train_state(model, variables, optimizer, frozen_trunk=frozen_trunk)
    if mesh is not None:
        state = bj.sharding.replicate(mesh, state)
    if isinstance(dataset, bj.streaming.StreamedDataset):
        data, fit = dataset.train, functools.partial(bj.training.fit_stream, save_every=config.save_every or None)
    else:
        data = jax.tree.map(jnp.asarray, dataset.train) if mesh is None else dataset.train
        fit = functools.partial(bj.training.fit, scan=config.scan_epoch)
    with training_progress(name, epochs=epochs) as on_step:
        state = fit(
            state, data, jnp.array(exit_weights), key, epochs=epochs, directory=workdir / 'checkpoints' / name,
            batch_size=config.batch_size, prepare=_preparation(config, dataset), loss=_loss(config), on_step=on_step,
        )  # fmt: skip
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state.variables)


def _loss(config: ConfigDict) -> bj.losses.Loss:
    share = config.distillation
    if not share:
        return bj.losses.cross_entropy_per_exit
    taught = bj.losses.distillation(bj.losses.last_exit, temperature=config.temperature)
    return bj.losses.weighted_sum((1 - share, bj.losses.cross_entropy_per_exit), (share, taught))


def _preparation(config: ConfigDict, dataset: Data) -> bj.training.Prepare:
    augment = functools.partial(bj.data.augment, crop_padding=config.crop_padding, flip=config.flip)
    normalize = dataset.normalization

    def prepare(key: jax.Array, batch: bj.Batch) -> bj.Batch:
        image, label = normalize(augment(key, batch.image)), batch.label
        if label.ndim == 3:  # a mask moves with its image: same key, same shift
            label = augment(key, label[..., None])[..., 0]
        return bj.Batch(image, label)

    return prepare


def _optimizer(config: ConfigDict, *, steps: int) -> optax.GradientTransformation:
    rate = config.learning_rate
    if config.schedule == 'cosine':
        warmup = max(1, round(config.warmup * steps))
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=warmup, decay_steps=max(warmup + 1, steps))
    if config.optimizer == 'adam':
        return bj.training.paper_adam(rate)
    if config.optimizer == 'adamw':
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True))
