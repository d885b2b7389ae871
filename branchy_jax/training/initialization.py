"""Starts a network with exits from trained variables: of its baseline, or of a shallower ResNet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from branchy_jax import program
from branchy_jax.models.paper import ResNet
from branchy_jax.types import Array, Variables


class Initialization(NamedTuple):
    """Paths of arrays, such as ``params/conv1/kernel``, by their origin.

    Attributes:
        taken: arrays copied from the trained variables.
        fresh: arrays that the trained variables lack; they keep their values.
        left: arrays of the trained variables that match no array of the network.
    """

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]


def initialize_from_baseline(
    variables: Variables, trained: Variables, *, strict: bool = False, model: Any = None, inputs: Any = None
) -> tuple[Variables, Initialization]:
    """Copies the arrays of a trained baseline into a network with exits, matched by path and shape.

    Flax numbers unnamed modules in the order of their creation: with a head inserted, ``Dense_0`` of the baseline is
    not ``Dense_0`` of the network with exits. ``strict=True`` with ``model`` and ``inputs`` finds such a shift.

    Args:
        variables: of the network with exits, freshly initialised; copied arrays are cast to the dtypes of these.
        trained: variables of the trained baseline.
        strict: refuses a baseline with an array that matches nothing, or that lacks an array of the trunk.
        model: the network with exits. With it, ``strict`` checks every array that the last exit reads; without it, the
            other arrays of modules that the baseline has a part of.
        inputs: an example of the model's inputs, or `jax.ShapeDtypeStruct` of them; needed with ``model``.

    Returns:
        The variables to start from, and which arrays were taken, stayed fresh, and were left.

    Raises:
        ValueError: if nothing matches, or ``strict`` refuses the baseline.

    Example:
        >>> import jax.numpy as jnp
        >>> ours = {'params': {'conv1': jnp.zeros(3), 'exit1': jnp.zeros(2)}}
        >>> start, report = initialize_from_baseline(ours, {'params': {'conv1': jnp.ones(3)}})
        >>> report.taken, report.fresh
        (('params/conv1',), ('params/exit1',))

    References:
        BranchyNet, 2016, section III-B: "several percent" better than a random start.
    """
    ours, theirs = _by_path(variables), _by_path(trained)
    taken = tuple(path for path in ours if path in theirs and jnp.shape(ours[path]) == jnp.shape(theirs[path]))
    fresh, left = (tuple(path for path in tree if path not in taken) for tree in (ours, theirs))
    names = "name the trunk's modules alike in both"
    if not taken or (strict and left):
        unmatched = ', '.join(f'{path} {jnp.shape(theirs[path])}' for path in left[:3])
        examples = f'{len(left)} of its {len(theirs)} arrays match no array of the network'
        raise ValueError(f'trained: {examples} ({unmatched}, …); {names}')
    missing: list[str] = []
    if strict and model is not None:
        trunk = program.leaves_read(model, variables, inputs, [-1])
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables)]
        missing = [name for name, path in zip(ours, paths, strict=True) if name in fresh and path in trunk]
    elif strict:
        modules = {path.split('/')[1] for path in taken}  # a side head is a module that the baseline lacks
        missing = [path for path in fresh if path.split('/')[1] in modules]
    if missing:
        lacking = f'lacks {", ".join(missing[:3])}, which belong to the trunk'
        raise ValueError(f'trained: {lacking}; give all variables, batch_stats included, and {names}')
    leaves = [jnp.asarray(theirs[path], leaf.dtype) if path in taken else leaf for path, leaf in ours.items()]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves), Initialization(taken, fresh, left)


def _by_path(tree: Variables) -> dict[str, Array]:
    leaves = jax.tree.leaves_with_path(meta.unbox(tree))
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def initialize_from_shallower(model: Any, variables: Variables, shallower: Any, trained: Variables) -> Variables:
    """Grows a trained ResNet into a deeper one with equal outputs at every exit.

    The blocks of the shallower network are spread over those of the deeper one, separately for each stage and number
    of features. A block in between starts as the identity: its last BatchNorm scale is 0. All other layers are copied
    by name. Training may continue at the full depth.

    Args:
        model: the deeper ResNet of `branchy_jax.models`.
        variables: of ``model``, freshly initialised.
        shallower: the same network with fewer blocks.
        trained: variables of ``shallower``.

    Raises:
        ValueError: if the networks differ in more than the number of blocks.

    References:
        Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, 2016; Goyal et al., Accurate, Large
        Minibatch SGD, 2017, section 5.1 (scale 0).
    """
    is_resnet = isinstance(model, ResNet) and isinstance(shallower, ResNet)
    if not is_resnet or model.placement != shallower.placement or shallower.depth > model.depth:
        raise ValueError(f'shallower: expected the same ResNet with fewer blocks, got {shallower} for {model}')
    shallow, deep = _groups_of_blocks(shallower), _groups_of_blocks(model)
    if set(shallow) != set(deep):
        raise ValueError(f'shallower: depth {shallower.depth} has no block in some group of depth {model.depth}')
    origin: dict[str, str | None] = {}
    for group, blocks in deep.items():
        names = shallow[group]
        origin |= dict.fromkeys(blocks)  # a block without an origin starts as the identity
        origin |= {blocks[n * len(blocks) // len(names)]: name for n, name in enumerate(names)}
    theirs, grown = traverse_util.flatten_dict(trained), traverse_util.flatten_dict(variables)
    for path, value in grown.items():
        collection, module, *rest = path
        name = origin.get(module, module)
        if name is not None and (collection, name, *rest) not in theirs:
            raise ValueError(f'trained: has no {collection}/{name}; give the variables of the shallower network')
        if name is not None:
            grown[path] = theirs[collection, name, *rest]
        elif rest == ['norm2', 'scale']:
            grown[path] = jnp.zeros_like(value)
    return traverse_util.unflatten_dict(grown)


def _groups_of_blocks(model: ResNet) -> dict[tuple[int, int], list[str]]:
    """Returns the names of the blocks by their group of equal features and the number of branches before them."""
    blocks = (model.depth - 2) // 6
    groups: dict[tuple[int, int], list[str]] = {}
    for n in range(1, 3 * blocks + 1):
        key = (n - 1) // blocks, sum(branch < n for branch in model.branches_after())
        groups.setdefault(key, []).append(f'block{n}')
    return groups
