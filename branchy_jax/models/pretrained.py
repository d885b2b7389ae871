"""Trained networks that ship with the package, with the settings they were published at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax import criteria
from branchy_jax.checkpoint import load_weights, save_weights
from branchy_jax.criteria.policy import decode_policy, encode_policy
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.models.registry import create
from branchy_jax.types import Array, ExitPolicy, Normalization, OperatingPoint, Variables

_FORMAT = '1'


@struct.dataclass
class Pretrained:
    """A trained network, ready to run.

    Attributes:
        model: the network.
        variables: its weights.
        normalization: maps stored pixels to what it was trained on.
        operating_points: settings of its thresholds; the first is the one in the table of results.
        card: data set, accuracy of each exit, recipe, licence.
    """

    model: BranchyNet = struct.field(pytree_node=False)
    variables: Variables
    normalization: Normalization
    operating_points: tuple[OperatingPoint, ...]
    card: Mapping[str, Any] = struct.field(pytree_node=False)

    def normalize(self, images: Array) -> Array:
        """Maps uint8 ``images [..., H, W, C]`` to what the network takes."""
        return self.normalization(images)


def pretrained_names() -> tuple[tuple[str, str], ...]:
    """Returns the network and the data set of all weights that ship with the package."""
    files = sorted(path.name for path in _folder().iterdir() if path.name.endswith('.safetensors'))
    return tuple(tuple(name.removesuffix('.safetensors').rsplit('@', 1)) for name in files)


def load_pretrained(network: str, *, dataset: str) -> Pretrained:
    """Loads weights that ship with the package.

    Args:
        network: such as ``'b-lenet'``.
        dataset: that it was trained on, such as ``'mnist'``.

    Raises:
        ValueError: there are no such weights; the message lists what there is.

    Example:
        >>> weights = load_pretrained('b-lenet', dataset='mnist')
        >>> images = np.zeros((1, 28, 28, 1), np.uint8)
        >>> [logits.shape for logits in weights.model.apply(weights.variables, weights.normalize(images))]
        [(1, 10), (1, 10)]
    """
    if (network, dataset) not in pretrained_names():
        known = ', '.join(f'{name!r} on {data!r}' for name, data in pretrained_names())
        raise ValueError(f'network: no weights of {network!r} on {dataset!r}; there are {known}')
    with resources.as_file(_folder() / f'{network}@{dataset}.safetensors') as path:
        return read_pretrained(path)


def read_pretrained(path: Path | str) -> Pretrained:
    """Reads a file that `write_pretrained` wrote.

    Raises:
        ValueError: not such a file, or written by a newer version.
    """
    stored, metadata = load_weights(path)
    if metadata.get('format') != _FORMAT:
        raise ValueError(
            f'path: {path} holds published weights of format {metadata.get("format")!r}, this version reads {_FORMAT!r}'
        )
    card, normalization = json.loads(metadata['card']), stored.pop('normalization')
    points = tuple(
        OperatingPoint(
            _policy(point), point['accuracy'], point['split'], np.array(point['exit_fractions']), point['cost']
        )
        for point in card['operating_points']
    )
    options = dict(card['options'])
    options['image_shape'] = tuple(options['image_shape'])
    options['dtype'] = jnp.dtype(options.get('dtype', 'float32'))
    return Pretrained(
        model=create(card['network'], **options),
        variables=jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), stored),  # may be stored in halves
        normalization=Normalization(**{name: jnp.asarray(value) for name, value in normalization.items()}),
        operating_points=points,
        card=card,
    )


def write_pretrained(
    path: Path | str,
    network: str,
    options: Mapping[str, Any],
    variables: Variables,
    normalization: Normalization,
    operating_points: Sequence[OperatingPoint],
    card: Mapping[str, Any],
) -> None:
    """Writes a trained network with its settings as one safetensors file.

    Args:
        path: the file to write.
        network: name for `create`.
        options: for `create`.
        variables: its weights.
        normalization: that it was trained with.
        operating_points: the first is the one to report.
        card: data set, accuracy of each exit, recipe, licence: whatever JSON holds.
    """
    record = {
        **card,
        'network': network,
        'options': dict(options),
        'operating_points': [
            {
                **_policy_record(point.policy),
                'accuracy': float(point.accuracy),
                'split': point.split,
                'exit_fractions': np.asarray(point.exit_fractions).tolist(),
                'cost': float(point.cost),
            }
            for point in operating_points
        ],
    }
    stored = {**variables, 'normalization': {'mean': normalization.mean, 'deviation': normalization.deviation}}
    save_weights(path, stored, metadata={'format': _FORMAT, 'card': json.dumps(record, allow_nan=False)})


def _policy_record(policy: ExitPolicy) -> dict[str, Any]:
    """Takes a policy apart for JSON, which has no infinity: that becomes text."""
    record, arrays = encode_policy(policy)
    texts = {name: np.vectorize(str, otypes=[object])(values).tolist() for name, values in arrays.items()}
    return {'policy': record, 'arrays': texts, 'thresholds': texts[record['thresholds']['array']]}


def _policy(point: Mapping[str, Any]) -> ExitPolicy:
    if 'policy' not in point:  # written before policies were: the criterion's name, and its thresholds
        return ExitPolicy(getattr(criteria, point['criterion'].replace(' ', '_')), _numbers(point['thresholds']))
    return decode_policy(point['policy'], {name: _numbers(values) for name, values in point['arrays'].items()})


def _numbers(texts: Any) -> Array:
    return jnp.asarray(np.array(texts, np.float32).reshape(np.shape(texts)))


def _folder() -> Any:
    return resources.files('branchy_jax.models') / 'weights'
