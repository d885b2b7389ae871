"""The data of a run: as the library loads it, or from an unpacked folder on machines without TensorFlow Datasets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import branchy_jax as bj
from experiments.trainings import Data


def load(config: ConfigDict) -> Data:
    """Loads what ``config.dataset`` names.

    Where the environment variable ``BRANCHY_JAX_PACKS`` names a folder with ``NAME.npz``, as ``unpack.py`` writes them
    from ``shared/packs``, the arrays come from there: the same images in the same order as TFDS gives. With
    ``config.stream`` the training images stay on disk.
    """
    options = {'validation_fraction': config.validation_fraction, 'seed': config.seed}
    arrays = {**options, 'task': config.task, 'image_size': tuple(config.image_size) or None}
    if config.stream:
        return bj.streaming.open_dataset(
            config.dataset, **options, workers=config.stream_workers, prefetch=config.stream_prefetch
        )
    unpacked = Path(os.environ.get('BRANCHY_JAX_PACKS', ''), f'{config.dataset}.npz')
    name = str(unpacked) if unpacked.is_absolute() and unpacked.exists() else config.dataset
    found = bj.data.load_dataset(name, **arrays)
    if config.most_examples:
        found = found.replace(**{
            split: bj.Batch(*(values[: config.most_examples] for values in (part.image, part.label)))
            for split, part in (('train', found.train), ('validation', found.validation), ('test', found.test))
        })  # fmt: skip
    return found.replace(name=config.dataset)


def network_options(config: ConfigDict, dataset: Data) -> dict[str, Any]:
    """Returns the arguments that a run's network is created with."""
    return {
        'num_classes': dataset.num_classes,
        'image_shape': tuple(dataset.image_shape),
        'dtype': jnp.dtype(config.dtype),
        **own_options(config),
    }


def own_options(config: ConfigDict) -> dict[str, Any]:
    """Returns those that do not depend on the data."""
    return {**({'placement': config.placement} if config.placement else {}), **config.network_options.to_dict()}
