"""Networks by name, for command lines and for the names of published weights."""

import dataclasses
import re
from typing import Any

from branchy_jax.models.alexnet import AlexNet
from branchy_jax.models.lenet import LeNet
from branchy_jax.models.resnet import ResNet
from branchy_jax.models.select import without_branches
from branchy_jax.models.unet import UNet
from branchy_jax.models.vit import ViT

_NETWORKS: dict[str, Any] = {'lenet': LeNet, 'alexnet': AlexNet, 'resnet': ResNet, 'vit': ViT, 'unet': UNet}


def names() -> tuple[str, ...]:
    """Returns the names that `create` knows; ``resnet110`` stands for any depth 6n + 2."""
    trunks = ('lenet', 'alexnet', 'resnet110', 'vit', 'unet')
    return (*(f'b-{name}' for name in trunks), *trunks)


def create(name: str, **options: Any) -> Any:
    """Builds a network by name: ``'b-lenet'`` is branchy, ``'lenet'`` its one-exit baseline.

    Args:
        name: one of `names`, or a ResNet of another depth, such as ``'b-resnet20'``.
        **options: attributes of the network: `LeNet`, `AlexNet`, `ResNet`, `ViT` or `UNet`.

    Returns:
        A Linen module, or of a baseline what `without_branches` returns; two calls with the same arguments return equal
        models.

    Raises:
        ValueError: unknown name or option; the message lists the choices.

    Example:
        >>> create('b-alexnet', placement='released').placement
        'released'
    """
    match = re.fullmatch(r'(b-)?([a-z]+?)(\d+)?', name) if isinstance(name, str) else None
    if match is None or match[2] not in _NETWORKS or (match[2] == 'resnet') != (match[3] is not None):
        raise ValueError(f'name: unknown network {name!r}; choose from {", ".join(names())} (any 6n + 2 for 110)')
    network = _NETWORKS[match[2]]
    if match[3] is not None:
        options = {'depth': int(match[3]), **options}
    known = {field.name for field in dataclasses.fields(network)} - {'parent', 'name'}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f'options: {name!r} takes no {", ".join(unknown)}; choose from {", ".join(sorted(known))}')
    model = network(**options)
    return model if match[1] else without_branches(model)
