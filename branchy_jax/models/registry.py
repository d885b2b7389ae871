"""Networks by name, for command lines and for the names of published weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from branchy_jax.models.alexnet import b_alexnet
from branchy_jax.models.branchy import BranchyNet, without_branches
from branchy_jax.models.lenet import b_lenet
from branchy_jax.models.resnet import b_resnet
from branchy_jax.models.unet import b_unet
from branchy_jax.models.vit import b_vit

_BUILDERS: dict[str, Callable[..., BranchyNet]] = {
    'lenet': b_lenet,
    'alexnet': b_alexnet,
    'resnet': b_resnet,
    'unet': b_unet,
    'vit': b_vit,
}


def names() -> tuple[str, ...]:
    """Returns the names that `create` knows; ``resnet110`` stands for any depth 6n + 2."""
    trunks = ('lenet', 'alexnet', 'resnet110', 'vit', 'unet')
    return (*(f'b-{name}' for name in trunks), *trunks)


def create(name: str, **options: Any) -> BranchyNet:
    """Builds a network by name: ``'b-lenet'`` is branchy, ``'lenet'`` its one-exit baseline.

    Args:
        name: one of `names`, or a ResNet of another depth, such as ``'b-resnet20'``.
        **options: keyword arguments of the builder: `b_lenet`, `b_alexnet`, `b_resnet`, `b_vit` or `b_unet`.

    Returns:
        `BranchyNet`; two calls with the same arguments return equal models.

    Raises:
        ValueError: unknown name or option; the message lists the choices.

    Example:
        >>> create('b-alexnet').num_exits, create('alexnet').num_exits
        (3, 1)
    """
    match = re.fullmatch(r'(b-)?([a-z]+?)(\d+)?', name) if isinstance(name, str) else None
    if match is None or match[2] not in _BUILDERS or (match[2] == 'resnet') != (match[3] is not None):
        raise ValueError(f'name: unknown network {name!r}; choose from {", ".join(names())} (any 6n + 2 for 110)')
    build = _BUILDERS[match[2]]
    if match[3] is not None:
        options = {'depth': int(match[3]), **options}
    known = inspect.signature(build).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f'options: {name!r} takes no {", ".join(unknown)}; choose from {", ".join(known)}')
    model = build(**options)
    return model if match[1] else without_branches(model)
