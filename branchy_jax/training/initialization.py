"""Starting a branchy network from its trained baseline."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax import struct, traverse_util

from branchy_jax.models.branchy import BranchyNet
from branchy_jax.models.compose import flatten_layers
from branchy_jax.models.layers import ResidualBlock
from branchy_jax.types import Array, Variables


@struct.dataclass
class Initialization:
    """What a branchy network took from its baseline, as parameter paths such as ``params/conv1/kernel``.

    Attributes:
        taken: arrays copied from the baseline.
        fresh: arrays of the branchy network that the baseline does not have; they keep their own values.
        left: arrays of the baseline that found no place.
    """

    taken: tuple[str, ...] = struct.field(pytree_node=False)
    fresh: tuple[str, ...] = struct.field(pytree_node=False)
    left: tuple[str, ...] = struct.field(pytree_node=False)


def initialize_from_baseline(
    variables: Variables, baseline: Variables, *, strict: bool = False
) -> tuple[Variables, Initialization]:
    """Copies the trained baseline's arrays into a branchy network, matched by name and shape.

    Args:
        variables: of the branchy network, freshly initialised; taken arrays get the dtypes of its own.
        baseline: of the trained one-exit network.
        strict: refuses a baseline of which anything found no place, or that lacks part of a module it has.

    Returns:
        The variables to start from, and what was taken, what stayed fresh, and what was left.

    Raises:
        ValueError: nothing at all matched, the two are not the same trunk; or what ``strict`` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> ours = {'params': {'conv1': jnp.zeros(3), 'exit1': jnp.zeros(2)}}
        >>> start, report = initialize_from_baseline(ours, {'params': {'conv1': jnp.ones(3)}})
        >>> report.taken, report.fresh
        (('params/conv1',), ('params/exit1',))

    References:
        BranchyNet, 2016, section III-B: "several percent" better than a random start.
    """
    ours = traverse_util.flatten_dict(dict(variables), sep='/')
    theirs = traverse_util.flatten_dict(dict(baseline), sep='/')
    taken = [path for path in ours if path in theirs and ours[path].shape == theirs[path].shape]
    if not taken:
        raise ValueError(
            f'baseline: none of its {len(theirs)} arrays ({", ".join(list(theirs)[:3])}, …) has the name and shape '
            f"of one of the network ({', '.join(list(ours)[:3])}, …); name the trunk's layers alike in both"
        )
    merged = {path: jnp.asarray(theirs[path], ours[path].dtype) if path in taken else ours[path] for path in ours}
    report = Initialization(
        taken=tuple(taken),
        fresh=tuple(path for path in ours if path not in taken),
        left=tuple(path for path in theirs if path not in taken),
    )
    if strict:
        _check_complete(report, theirs)
    return traverse_util.unflatten_dict(merged, sep='/'), report


def _check_complete(report: Initialization, theirs: dict[str, Array]) -> None:
    if report.left:
        told = [f'{path} {theirs[path].shape}' for path in report.left[:3]]
        raise ValueError(
            f'baseline: {len(report.left)} of its {len(theirs)} arrays found no place of their name and shape in the '
            f"network ({', '.join(told)}{', …' if report.left[3:] else ''}); name the trunk's layers alike in both"
        )
    begun = {_module_of(path) for path in report.taken}  # side heads are modules of which the baseline has nothing
    missing = [path for path in report.fresh if _module_of(path) in begun]
    if missing:
        raise ValueError(
            f'baseline: lacks {", ".join(missing[:3])}{", …" if missing[3:] else ""}, though it has other arrays of '
            'the same modules; give all of its variables, batch_stats included'
        )


def _module_of(path: str) -> str:
    return path.split('/')[1]


def initialize_from_shallower(
    model: BranchyNet, variables: Variables, shallower: BranchyNet, trained: Variables
) -> Variables:
    """Grows a trained residual network into a deeper one that answers exactly as it did.

    Within every stage the shallower network's blocks are spread over the deeper one's, each group of equal features
    on its own; a block in between starts as the identity, its last BatchNorm scale 0. All other layers are taken over
    by name. Every exit then gives the shallower network's logits, and training may go on at the full depth.

    Args:
        model: the deeper network.
        variables: of it, freshly initialised.
        shallower: a network with the same layers but fewer `ResidualBlock` in its stages.
        trained: its variables.

    Raises:
        ValueError: the two differ in more than the number of blocks.

    References:
        Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, 2016; Goyal et al., Accurate, Large
        Minibatch SGD, 2017, section 5.1 (scale 0).
    """
    source = _source_of_blocks(model, shallower)
    grown = {collection: dict(modules) for collection, modules in variables.items()}
    for collection, modules in grown.items():
        for name in modules:
            given = source.get(name, name)
            if given is None:
                if collection == 'params':
                    norm = modules[name]['norm2']
                    modules[name] = {**modules[name], 'norm2': {**norm, 'scale': jnp.zeros_like(norm['scale'])}}
            elif given in trained.get(collection, {}):
                modules[name] = trained[collection][given]
            else:
                raise ValueError(f'trained: has no {collection}/{given}; give the variables of the shallower network')
    return grown


def _source_of_blocks(model: BranchyNet, shallower: BranchyNet) -> dict[str, str | None]:
    """Returns for every block of the deeper network the block that it is taken from; ``None`` for an identity."""
    if model.num_exits != shallower.num_exits:
        raise ValueError(f'shallower: has {shallower.num_exits} exits, the network {model.num_exits}; give it as many')
    source: dict[str, str | None] = {}
    for stage, (deep, shallow) in enumerate(zip(model.stages, shallower.stages, strict=True)):
        deep_blocks, shallow_blocks = _blocks_by_features(deep), _blocks_by_features(shallow)
        if list(deep_blocks) != list(shallow_blocks):
            raise ValueError(f'shallower: its stage {stage} has other blocks than that of the network')
        for features, blocks in deep_blocks.items():
            given = shallow_blocks[features]
            if len(given) > len(blocks):
                raise ValueError(
                    f'shallower: has more blocks of {features} features in stage {stage}: it is the deeper'
                )
            source.update(dict.fromkeys(blocks))
            source.update({blocks[n * len(blocks) // len(given)]: name for n, name in enumerate(given)})
    return source


def _blocks_by_features(stage: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for layer in flatten_layers(stage):
        if isinstance(layer, ResidualBlock):
            found.setdefault(layer.features, []).append(str(layer.name))
    return found
