"""Trees: branches that have branches, as a chain of stages whose hidden value holds the live activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.costs import count_macs
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.models.compose import Layers, Route, keep_what_is_read, with_names
from branchy_jax.types import Array

_IMAGES = 'images'


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a tree, the trunk's pieces included.

    Attributes:
        layers: from the activation of the branch it leaves to its own.
        after: the branch that it leaves at the end of; ``None`` takes the images.
        head: its classifier, if it has one.
    """

    layers: Layers
    after: str | None = None
    head: Layers | None = None


def tree(branches: Mapping[str, Branch], *, image_shape: tuple[int, ...]) -> BranchyNet:
    """Builds a network whose branches may branch again.

    Exits are asked in order of cost: of all multiply-accumulates between the image and that answer. Each stage of the
    result computes what the next exit needs and no exit before has computed; activations live as long as something
    reads them. Whatever works on a chain works on the result, and `branchy_jax.models.without_branches` leaves the
    path to the last exit, the costliest.

    Args:
        branches: by name; the order does not matter, but for exits of equal cost. Modules without a name of their own
            are named after their branch: ``side_0``, ``side_head_0``.
        image_shape: ``(H, W, C)``.

    Returns:
        `BranchyNet` with as many exits as branches have heads.

    Raises:
        ValueError: no branches, a branch after one that does not exist, a cycle, or a branch that ends without a head.

    Example:
        >>> from branchy_jax.models.layers import flatten
        >>> model = tree({
        ...     'stem': Branch((flatten, nn.Dense(8))),
        ...     'side': Branch((nn.relu, nn.Dense(4)), after='stem', head=nn.Dense(3)),
        ...     'twig': Branch((nn.relu, nn.Dense(4)), after='side', head=nn.Dense(3)),
        ...     'trunk': Branch((nn.relu, nn.Dense(64), nn.relu), after='stem', head=nn.Dense(3)),
        ... }, image_shape=(4, 4, 1))
        >>> model.num_exits
        3

    References:
        BranchyNet, 2016, section III: branches may themselves branch.
    """
    paths = {name: _path(branches, name) for name in _checked(branches)}
    named: dict[int, nn.Module] = {}
    branches = {
        name: Branch(
            with_names(branch.layers, name, named), branch.after, with_names(branch.head, f'{name}_head', named)
        )
        for name, branch in branches.items()
    }
    exits = _by_cost(branches, paths, image_shape)
    computed: set[str] = set()
    stages: list[tuple[Route, ...]] = []
    for name in exits:
        new = [step for step in paths[name] if step not in computed]
        stages.append(tuple(_route(branches, step) for step in new))
        computed.update(new)
    stages[0] = (Route(_as_they_are, None, _IMAGES), *stages[0])
    heads = tuple(Route(branches[name].head, name) for name in exits)
    kept, heads = keep_what_is_read(tuple(stages), heads)
    return BranchyNet(stages=kept, exits=heads, image_shape=tuple(image_shape))


def _checked(branches: Mapping[str, Branch]) -> Mapping[str, Branch]:
    if not branches:
        raise ValueError('branches: got none; a tree has at least one, with a head')
    if _IMAGES in branches:
        raise ValueError(f'branches: the name {_IMAGES!r} stands for the input; choose another')
    parents = {branch.after for branch in branches.values()}
    for name, branch in branches.items():
        if branch.after is not None and branch.after not in branches:
            raise ValueError(f'branches[{name!r}].after: no branch {branch.after!r}; choose from {sorted(branches)}')
        if branch.head is None and name not in parents:
            raise ValueError(f'branches[{name!r}].head: nothing leaves this branch, so it needs a head')
    return branches


def _path(branches: Mapping[str, Branch], name: str) -> tuple[str, ...]:
    """Returns the branches between the images and this one, in order."""
    path = [name]
    while (before := branches[path[-1]].after) is not None:
        if before in path:
            raise ValueError(f'branches[{path[-1]!r}].after: {" after ".join([*path, before])} is a cycle')
        path.append(before)
    return tuple(reversed(path))


def _route(branches: Mapping[str, Branch], name: str) -> Route:
    return Route(branches[name].layers, branches[name].after or _IMAGES, name)


def _by_cost(
    branches: Mapping[str, Branch], paths: Mapping[str, tuple[str, ...]], image_shape: tuple[int, ...]
) -> list[str]:
    """Returns the branches with heads by the cost of their answer, none before one that it grows on."""
    order = sorted(branches, key=lambda name: len(paths[name]))  # parents first
    stages: list[tuple[Route, ...]] = [(_route(branches, name),) for name in order]
    stages[0] = (Route(_as_they_are, None, _IMAGES), *stages[0])
    heads = [_no_head if branches[name].head is None else Route(branches[name].head, name) for name in order]
    costs = count_macs(BranchyNet(stages=tuple(stages), exits=tuple(heads)), image_shape)
    layers, head = dict(zip(order, costs.stages, strict=True)), dict(zip(order, costs.exits, strict=True))

    def answer(name: str) -> float:
        return sum(layers[step] for step in paths[name]) + head[name]

    place = {name: n for n, name in enumerate(branches)}
    with_heads = [name for name in branches if branches[name].head is not None]
    rank = {name: max(answer(step) for step in paths[name] if step in with_heads) for name in with_heads}
    return sorted(with_heads, key=lambda name: (rank[name], len(paths[name]), place[name]))


def _as_they_are(images: Array) -> Array:
    return images


def _no_head(hidden: Any) -> Array:
    return jnp.zeros((1, 1))
