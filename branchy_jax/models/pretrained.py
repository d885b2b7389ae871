"""Networks by name: new ones, and trained ones from the package, a folder or the Hugging Face hub."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax import calling
from branchy_jax.checkpoint import load_weights, save_weights, write_atomically
from branchy_jax.criteria.policy import decode_policy, encode_policy
from branchy_jax.models.efficientnet import efficientnet_lite0
from branchy_jax.models.paper import AlexNet, LeNet, ResNet
from branchy_jax.models.select import without_branches
from branchy_jax.models.unet import UNet
from branchy_jax.models.vit import ViT
from branchy_jax.types import Array, Normalization, OperatingPoint, Variables

_NETWORKS: dict[str, Any] = {
    'lenet': LeNet,
    'alexnet': AlexNet,
    'resnet': ResNet,
    'vit': ViT,
    'unet': UNet,
    'efficientnet-lite0': efficientnet_lite0,
}
_FORMAT = '1'
_FILE = 'model.safetensors'
_WEIGHTS = Path(__file__).parent / 'weights'


def names() -> tuple[str, ...]:
    """Returns the names that `create` knows; ``resnet110`` stands for any depth 6n + 2."""
    trunks = ['resnet110' if name == 'resnet' else name for name in _NETWORKS]
    return (*(f'b-{name}' for name in trunks), *trunks)


def create(name: str, **options: Any) -> Any:
    """Builds a network by name: ``'b-lenet'`` is branchy, ``'lenet'`` its one-exit baseline.

    Args:
        name: one of `names`, or a ResNet of another depth, such as ``'b-resnet20'``.
        **options: attributes of the network: `LeNet`, `AlexNet`, `ResNet`, `ViT` or `UNet`; of EfficientNet-Lite0
            ``num_classes``, ``image_shape``, ``side``, ``dtype`` and ``convolution``.

    Returns:
        A Linen module, or what `attach` or `without_branches` returns; two calls with the same arguments return equal
        models.

    Raises:
        ValueError: unknown name or option; the message lists the choices.

    Example:
        >>> create('b-alexnet', placement='released').placement
        'released'
    """
    match = re.fullmatch(rf'(b-)?(?:({"|".join(_NETWORKS)})|resnet(\d+))', name) if isinstance(name, str) else None
    if match is None or match[2] == 'resnet':
        raise ValueError(f'name: unknown network {name!r}; choose from {", ".join(names())} (any 6n + 2 for 110)')
    network = _NETWORKS[match[2] or 'resnet']
    if match[3] is not None:
        options = {'depth': int(match[3]), **options}
    known = inspect.signature(network).parameters.keys() - {'parent', 'name'}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f'options: {name!r} takes no {", ".join(unknown)}; choose from {", ".join(sorted(known))}')
    model = network(**options)
    return model if match[1] else without_branches(model)


def image_shape(model: Any) -> tuple[int, int, int] | None:
    """Returns ``(H, W, C)`` of the images of a network that `create` made; ``None`` where any size will do."""
    whole = getattr(model, 'model', model)
    return whole.inputs.shape[1:] if hasattr(whole, 'inputs') else whole.image_shape


@struct.dataclass
class Pretrained:
    """A trained network, ready to run.

    Attributes:
        model: the network.
        variables: its weights.
        inputs: shape and dtype of one image, ``[1, H, W, C]``.
        normalization: maps stored pixels to what it was trained on.
        operating_points: settings of its thresholds; the first is the one in the table of results.
        card: data set, accuracy of each exit, recipe, licence.
    """

    model: Any = struct.field(pytree_node=False)
    variables: Variables
    inputs: jax.ShapeDtypeStruct = struct.field(pytree_node=False)
    normalization: Normalization
    operating_points: tuple[OperatingPoint, ...]
    card: Mapping[str, Any] = struct.field(pytree_node=False)

    def __repr__(self) -> str:
        name, data = self.card['network'], self.card.get('dataset', '?')
        return f'Pretrained({name} on {data}, {len(self.operating_points)} operating points)'

    def normalize(self, images: Array) -> Array:
        """Maps uint8 ``images [..., H, W, C]`` to what the network takes."""
        return self.normalization(images)


def pretrained_names() -> tuple[tuple[str, str], ...]:
    """Returns the network and the data set of all weights that ship with the package."""
    stems = [path.stem.rpartition('@') for path in sorted(_WEIGHTS.glob('*.safetensors'))]
    return tuple((network, dataset) for network, _, dataset in stems)


def load_pretrained(network: Path | str, *, dataset: str | None = None, revision: str | None = None) -> Pretrained:
    """Loads weights that ship with the package, lie in a folder, or are on the Hugging Face hub.

    What comes from the hub is checked against the SHA-256 that the hub tells.

    Args:
        network: such as ``'b-lenet'``; without ``dataset`` a folder that `save_pretrained` wrote, or ``'owner/name'``
            of a repository on the hub (``pip install '.[hub]'``).
        dataset: that it was trained on, such as ``'mnist'``: the weights in the package.
        revision: of the repository: a branch, tag or commit; its newest by default.

    Raises:
        ValueError: there are no such weights (the message lists what there is), or they are not what the hub says.

    Example:
        >>> weights = load_pretrained('b-lenet', dataset='mnist')
        >>> images = np.zeros((1, 28, 28, 1), np.uint8)
        >>> [logits.shape for logits in weights.model.apply(weights.variables, weights.normalize(images))]
        [(1, 10), (1, 10)]
    """
    if dataset is None and Path(network).is_dir():
        return read_pretrained(Path(network) / _FILE)
    if dataset is None and str(network).count('/') == 1:
        return read_pretrained(_from_hub(str(network), revision))
    if (network, dataset) not in pretrained_names():
        known = ', '.join(f'{name!r} on {data!r}' for name, data in pretrained_names())
        sought = f'no folder {str(network)!r}' if dataset is None else f'no weights of {str(network)!r} on {dataset!r}'
        known += ", any folder that save_pretrained wrote, and 'owner/name' on the hub"
        raise ValueError(f'network: {sought}; there are {known}')
    return read_pretrained(_WEIGHTS / f'{network}@{dataset}.safetensors')


def read_pretrained(path: Path | str) -> Pretrained:
    """Reads the file of weights that `save_pretrained` wrote.

    Raises:
        ValueError: not such a file, or written by a newer version.
    """
    stored, metadata = load_weights(path)
    if (version := metadata.get('format')) != _FORMAT:
        raise ValueError(f'path: {path} holds weights of format {version!r}; this version reads {_FORMAT!r}')
    card, normalization = json.loads(metadata['card']), stored.pop('normalization')
    return Pretrained(
        model=create(card['network'], **_options(card['options'])),
        inputs=jax.ShapeDtypeStruct((1, *card['options']['image_shape']), jnp.float32),
        variables=jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), stored),  # may be stored in halves
        normalization=Normalization(**normalization),
        operating_points=tuple(map(_decoded, card['operating_points'])),
        card=card,
    )


def save_pretrained(
    folder: Path | str,
    network: str,
    variables: Variables,
    *,
    normalization: Normalization,
    operating_points: Sequence[OperatingPoint],
    options: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Saves a trained network of the library, with all that it needs to run, as a folder for the Hugging Face hub.

    The folder holds ``model.safetensors`` and ``README.md``. To share it:
    ``huggingface_hub.upload_folder(repo_id='owner/name', folder_path=folder)``.

    Args:
        folder: is made if missing; what it holds under these names is replaced.
        network: name for `create`. For a model of your own use `branchy_jax.checkpoint.save_weights`, with the
            normalisation as one more collection, and `branchy_jax.criteria.save_policy`.
        variables: its weights.
        normalization: that it was trained with.
        operating_points: the first is the one to report.
        options: for `create`.
        card: data set, licence, recipe, …: whatever JSON holds.

    Raises:
        ValueError: no operating point, or weights that are not those of the network.

    Example:
        >>> import tempfile
        >>> weights = load_pretrained('b-lenet', dataset='mnist')
        >>> folder, options = tempfile.mkdtemp(), weights.card['options']
        >>> save_pretrained(folder, 'b-lenet', weights.variables, normalization=weights.normalization, options=options,
        ...                 operating_points=weights.operating_points, card={'dataset': 'mnist'})
        >>> load_pretrained(folder).operating_points == weights.operating_points
        True
    """
    if not isinstance(network, str):
        advice = 'for a model of your own use checkpoint.save_weights and criteria.save_policy'
        raise ValueError(f'network: got {type(network).__name__}; give a name of a network of the library; {advice}')
    options, card = _options(options or {}), dict(card or {})
    model = create(network, **options)
    if not operating_points:
        raise ValueError('operating_points: got none; give at least one, as ExitTable.screen().knee() finds it')
    options['image_shape'] = image_shape(model)
    if options['image_shape'] is None:
        raise ValueError(f"options: {network!r} needs an 'image_shape' here")
    images = jnp.zeros((1, *options['image_shape']))
    expected = jax.eval_shape(lambda key: calling.init(model, key, images), jax.random.key(0))
    if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, expected):
        raise ValueError(f'variables: are not those of {network!r} with {options}; give options as to create')
    options = {name: str(value) if name == 'dtype' else value for name, value in options.items()}
    points = [_encoded(point) for point in operating_points]
    record = {**card, 'network': network, 'options': options, 'operating_points': points}
    metadata = {'format': _FORMAT, 'card': json.dumps(record, allow_nan=False)}
    stored = {**variables, 'normalization': {'mean': normalization.mean, 'deviation': normalization.deviation}}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_weights(path / _FILE, stored, metadata=metadata)
    write_atomically(path / 'README.md', lambda temporary: temporary.write_text(_readme(network, card)))


def _encoded(point: OperatingPoint) -> dict[str, Any]:
    results = {'accuracy': float(point.accuracy), 'split': point.split, 'cost': float(point.cost)}
    return {**encode_policy(point.policy), **results, 'exit_fractions': np.asarray(point.exit_fractions).tolist()}


def _decoded(record: Mapping[str, Any]) -> OperatingPoint:
    results = {name: record[name] for name in ('accuracy', 'split', 'cost')}
    return OperatingPoint(decode_policy(record), exit_fractions=np.array(record['exit_fractions']), **results)


def _readme(network: str, card: Mapping[str, Any]) -> str:
    lines = '\n'.join(f'- {name}: {value}' for name, value in card.items())
    licence = f'license: {str(card["licence"]).lower()}\n' if 'licence' in card else ''
    return f"""---
library_name: branchy_jax
{licence}---
# {network}

{lines}

```python
import branchy_jax as bj
weights = bj.models.load_pretrained('owner/name')  # this repository, or the folder
answer = bj.inference.staged(weights.model)(weights.variables, weights.normalize(image), weights.operating_points[0])
```
"""


def _from_hub(repository: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        advice = "to look for it on the hub, pip install '.[hub]' in a clone"
        raise ValueError(f'network: no folder {repository!r}; {advice}') from error
    info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    stored = next((file for file in info.siblings or () if file.rfilename == _FILE), None)
    if stored is None or stored.lfs is None:
        raise ValueError(f'network: {repository!r} on the hub has no {_FILE} with a checksum; save_pretrained makes it')
    path = Path(huggingface_hub.hf_hub_download(repository, _FILE, revision=info.sha))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != stored.lfs.sha256:
        raise ValueError(f'network: {_FILE} of {repository!r} has SHA-256 {digest}, the hub says {stored.lfs.sha256}')
    return path


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as `create` takes them, whether JSON held them or not."""
    kinds: dict[str, Any] = {'image_shape': tuple, 'dtype': jnp.dtype}
    return {n: kinds[n](value) if n in kinds and value is not None else value for n, value in given.items()}
