"""The settings, data, task and networks of a run."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.criteria import Criterion, as_criterion
from branchy_jax.models.pretrained import image_shape
from branchy_jax.sharding import check_divisible
from branchy_jax.thresholds.statistics import Metric, Statistics
from branchy_jax.types import Variables
from experiments.configs import common

CHOICES = {
    'task': ('classification', 'segmentation'),
    'placement': ('text', 'released', 'tuned', ''),
    'dtype': ('float32', 'bfloat16'),
    'optimizer': ('adam', 'adamw', 'sgd'),
    'schedule': ('cosine', 'linear', 'constant'),
    'convolution': ('', 'banded', 'products'),
    'regime': ('baseline', 'joint', 'frozen', 'finetune'),
    'choose': ('accuracy', 'baseline', 'knee'),
    'criteria': ('entropy', 'margin', 'max_probability'),
}
_POSITIVE = ('epochs', 'epochs_baseline', 'batch_size', 'latency_images', 'latency_passes', 'latency_batch')


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the main job.

    Attributes:
        metric: its key in rows: ``test_<metric>``.
        label: of the metric in tables and pictures.
        statistics: what each answer adds to the metric's sums.
        of_sums: the metric of these sums.
        criteria: to compare, where the settings name none.
    """

    metric: str
    label: str
    statistics: Statistics
    of_sums: Metric
    criteria: tuple[Criterion, ...]


# Entropy of a quarter of the pixels: a patch of 8 pixels is 4 of them wide.
_ENTROPY = as_criterion(bj.criteria.entropy, stride=2, name='mean entropy')
_MASK_CRITERIA = (
    _ENTROPY,
    as_criterion(_ENTROPY, name='98 % quantile of entropy', quantile=0.98),
    as_criterion(_ENTROPY, name='most unsure 8 × 8 patch', quantile=1.0, patch=4),
)
_ACCURACY, _IOU = bj.thresholds.accuracy_statistics, bj.thresholds.iou_statistics
TASKS = {
    'classification': Task(
        'accuracy', 'accuracy', _ACCURACY, bj.thresholds.statistics.mean_of_statistic, (bj.criteria.entropy,)
    ),
    'segmentation': Task('miou', 'mIoU', _IOU, bj.thresholds.mean_iou, _MASK_CRITERIA),
}


def criteria_of(config: ConfigDict) -> tuple[Criterion, ...]:
    """Returns the criteria to compare; a run takes the one whose thresholds are cheapest on validation data."""
    return tuple(getattr(bj.criteria, name) for name in config.criteria) or TASKS[config.task].criteria


def check(config: ConfigDict, mesh: Mesh | None = None) -> None:
    """Refuses settings that do not exist or contradict each other.

    Raises:
        ValueError: names the field, what it holds and what it may hold.
    """
    for field, choices in CHOICES.items():
        given = config[field] if isinstance(config[field], tuple) else (config[field],)
        if unknown := [value for value in given if value not in choices]:
            raise ValueError(f'config.{field}: got {unknown[0]!r}; choose from {", ".join(choices)}')
    for field in _POSITIVE:
        if config[field] < 1:
            raise ValueError(f'config.{field}: got {config[field]}; expected at least 1')
    if not 0 <= config.distillation < 1:
        raise ValueError(f'config.distillation: got {config.distillation}; give a share in [0, 1)')
    if not config.network.startswith('b-'):
        raise ValueError(f'config.network: got {config.network!r}; give the branchy one, its baseline is trained too')
    if config.shallow_depth and config.regime == 'baseline':
        raise ValueError(
            'config.shallow_depth: a network that starts from its trained baseline does not grow; give config.regime '
            "'joint' or 'frozen', or a depth of 0"
        )
    _check_networks(config)
    if mesh is not None:
        for field in ('batch_size', 'batch_size_grown') if config.shallow_depth else ('batch_size',):
            check_divisible(f'config.{field}', config[field], mesh)


def _check_networks(config: ConfigDict) -> None:
    model, weights = bj.models.create(config.network, **own_options(config)), len(config.exit_weights)
    exits = count_exits(model, image_specs(image_shape(model)))
    if weights != exits:
        raise ValueError(f'config.exit_weights: {config.network} has {exits} exits, got {weights} weights')
    if config.shallow_depth:  # without variables nothing is copied, but networks that do not correspond are refused
        shallower = bj.models.create(config.network, **{**own_options(config), 'depth': config.shallow_depth})
        bj.training.initialize_from_shallower(model, {}, shallower, {})


def load(config: ConfigDict) -> bj.data.Dataset:
    """Loads the data set of a run; `experiments.configs.common` says from where."""
    packed = Path(os.environ.get('BRANCHY_JAX_PACKS', ''), f'{config.dataset}.npz')
    dataset = bj.data.load_dataset(
        str(packed) if packed.is_absolute() and packed.exists() else config.dataset,
        in_memory=config.in_memory,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        task=config.task,
        image_size=tuple(config.image_size) or None,
        workers=config.workers,
        prefetch=config.prefetch,
    )
    if config.images:
        if not config.in_memory:
            raise ValueError('config.images: a short trial needs its images in memory; leave config.in_memory')
        parts = {part: getattr(dataset, part) for part in ('train', 'validation', 'test')}
        few = {part: jax.tree.map(lambda values: values[: config.images], batch) for part, batch in parts.items()}
        dataset = dataset.replace(**few)
    if config.normalization:
        mean, deviation = jnp.float32(config.normalization)[:, None].repeat(dataset.image_shape[-1], 1)
        dataset = dataset.replace(normalization=bj.Normalization(mean=mean, deviation=deviation))
    return dataset.replace(name=config.dataset)


def own_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of a run's networks that do not depend on the data."""
    return {**({'placement': config.placement} if config.placement else {}), **config.network_options.to_dict()}


def network_options(config: ConfigDict, num_classes: int, image_shape: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments that a run's networks are created with."""
    shapes = {'num_classes': num_classes, 'image_shape': tuple(image_shape)}
    return {**shapes, 'dtype': jnp.dtype(config.dtype), **own_options(config)}


def image_specs(image_shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """Returns the shape ``[1, H, W, C]`` of one float32 image, to trace a network."""
    return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)


def count_exits(model: Any, inputs: Any) -> int:
    """Returns N of a network; traces it."""
    logits = jax.eval_shape(lambda key, x: model.apply(model.init(key, x), x), jax.random.key(0), inputs)
    return len(logits)


@dataclasses.dataclass(frozen=True)
class Networks:
    """A branchy network and its baseline, trained. It can be sent to another process, which creates the networks again.

    Attributes:
        name: of the branchy one.
        options: that both are created with.
        variables: of the branchy one.
        baseline_variables: of the baseline.
        normalization: that both were trained with.
    """

    name: str
    options: Mapping[str, Any]
    variables: Variables
    baseline_variables: Variables
    normalization: bj.Normalization

    @functools.cached_property
    def model(self) -> Any:
        """The branchy network."""
        return bj.models.create(self.name, **self.options)

    @functools.cached_property
    def baseline(self) -> Any:
        """The one-exit network."""
        return bj.models.without_branches(self.model)

    @property
    def inputs(self) -> jax.ShapeDtypeStruct:
        """The shape of one image, with its batch axis."""
        return image_specs(self.options['image_shape'])

    @functools.cached_property
    def fast(self) -> tuple[Any, Variables]:
        """The branchy network as `branchy_jax.inference.optimize` rewrites it, with its variables."""
        return bj.inference.optimize(self.model, self.variables, inputs=self.inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = jax.tree.map(np.asarray, (self.variables, self.baseline_variables, self.normalization))
        return Networks, (self.name, dict(self.options), *arrays)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Refuses to mix two runs in one folder; the criteria and the settings of the clock, read later, may change.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path, settings = workdir / 'config.json', json.loads(config.to_json())
    if path.exists():
        # A field that did not exist yet had its default; one that is gone since says nothing.
        stored = {**json.loads(common.get_config().to_json()), **bj.report.read_json(path)}
        later = ('latency_', 'criteria')
        changed = [key for key, value in settings.items() if value != stored[key] and not key.startswith(later)]
        if changed:
            raise ValueError(
                f'workdir: {workdir} holds a run with other settings ({", ".join(sorted(changed))}); '
                'choose another folder, or delete this one'
            )
    if jax.process_index() == 0:
        bj.report.write_json(path, settings)


def save_weights(workdir: Path, config: ConfigDict, networks: Networks) -> None:
    """Writes both networks into the run's folder, each with the normalisation."""
    normalization = {'mean': networks.normalization.mean, 'deviation': networks.normalization.deviation}
    for name, variables in ((networks.name, networks.variables), (networks.name[2:], networks.baseline_variables)):
        metadata = {'network': name, 'dataset': config.dataset, 'placement': config.placement}
        variables = {**variables, 'normalization': normalization}
        bj.checkpoint.save_weights(workdir / f'{name}.safetensors', variables, metadata=metadata)
