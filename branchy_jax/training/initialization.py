"""Starting a branchy network from its trained baseline."""

from __future__ import annotations

from flax import struct, traverse_util

from branchy_jax.types import Variables


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


def initialize_from_baseline(variables: Variables, baseline: Variables) -> tuple[Variables, Initialization]:
    """Copies the trained baseline's arrays into a branchy network, matched by name and shape.

    Args:
        variables: of the branchy network, freshly initialised.
        baseline: of the trained one-exit network.

    Returns:
        The variables to start from, and what was taken, what stayed fresh, and what was left.

    Raises:
        ValueError: nothing at all matched; the two are not the same trunk.

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
    merged = {path: theirs[path] if path in taken else ours[path] for path in ours}
    report = Initialization(
        taken=tuple(taken),
        fresh=tuple(path for path in ours if path not in taken),
        left=tuple(path for path in theirs if path not in taken),
    )
    return traverse_util.unflatten_dict(merged, sep='/'), report
