"""`BranchyNet`: a trunk cut into stages, with a classifier at the end of each, by composition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import errors

from branchy_jax.models.compose import (
    Hidden,
    Layers,
    apply_named,
    as_logits,
    held_modules,
    is_routed,
    keep_what_is_read,
    module_names,
    named_modules,
    with_names,
)
from branchy_jax.types import Array, Variables, check_inputs


class BranchyNet(nn.Module):
    """A network with N exits: stage i maps hidden to hidden, exit i maps hidden to logits.

    Each stage and each exit is a Flax module, a plain function, a `Route`, or a tuple of those applied in order. A
    layer is told whether it trains through whichever of the arguments ``train``, ``deterministic`` or
    ``use_running_average`` its signature names, so `flax.linen.Dropout` and `flax.linen.BatchNorm` stand in a tuple as
    they are.

    Parameters are named after the module's own ``name`` where it has one, so that a trunk keeps its parameters' names
    wherever it is cut; otherwise after its place, ``stages_0_1``.

    Attributes:
        stages: N stages of the trunk.
        exits: N heads, one after each stage; the last is the trunk's own.
        image_shape: ``(H, W, C)`` if images of another shape or of an integer dtype are to be refused; of other inputs
            than float images a `jax.ShapeDtypeStruct` for each array, without B.

    Raises:
        ValueError: on construction, if there is not one exit per stage.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = BranchyNet(
        ...     stages=(nn.Dense(16), (nn.relu, nn.Dense(16))),
        ...     exits=(nn.Dense(10), (nn.relu, nn.Dense(10))),
        ... )
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
        >>> [logits.shape for logits in model.apply(variables, jnp.ones((2, 8)))]
        [(2, 10), (2, 10)]

    References:
        Teerapittayanon et al., BranchyNet, 2016, section III.
    """

    stages: tuple[Layers, ...]
    exits: tuple[Layers, ...]
    image_shape: Any = None

    preserve_adopted_names = True

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.exits) or not self.stages:
            raise ValueError(
                f'exits: a BranchyNet needs one exit after each of its stages, at least one; '
                f'got {len(self.stages)} stages and {len(self.exits)} exits'
            )
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        """N."""
        return len(self.exits)

    def __call__(self, images: Array, *, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes the logits of every exit, earliest first.

        Args:
            images: ``[B, H, W, C]`` float.
            train: whether dropout drops and BatchNorm uses the batch's statistics. Needs ``rngs={'dropout': key}``
                and ``mutable=['batch_stats']`` where the network has such layers.
            frozen_trunk: keeps the trunk (all stages and the last exit) in evaluation mode while the side heads train.

        Returns:
            N arrays ``[B, K]`` float32.

        Raises:
            ValueError: ``images`` has another shape or dtype than ``image_shape`` asks for.
        """
        hidden, logits = images, []
        for n in range(self.num_exits):
            hidden = self.run_stage(hidden, n, train=train and not frozen_trunk)
            in_trunk = n == self.num_exits - 1
            logits.append(self.run_exit(hidden, n, train=train and not (frozen_trunk and in_trunk)))
        return tuple(logits)

    def run_stage(self, hidden: Hidden, n: int, *, train: bool = False) -> Hidden:
        """Applies stage ``n`` to what stage ``n - 1`` returned, or to the images."""
        if n == 0 and self.image_shape is not None:
            check_inputs(hidden, self.image_shape)
        return apply_named(f'stages[{n}]', self.stages[n], hidden, train=train)

    def run_exit(self, hidden: Hidden, n: int, *, train: bool = False) -> Array:
        """Applies head ``n`` to what stage ``n`` returned. Returns logits ``[B, …, K]`` in float32."""
        return as_logits(f'exits[{n}]', apply_named(f'exits[{n}]', self.exits[n], hidden, train=train))


def run_segment(model: BranchyNet, kind: str, n: int, variables: Variables, hidden: Hidden) -> Any:
    """Runs one stage or one head in evaluation mode.

    Args:
        model: the network.
        kind: ``'stage'`` or ``'exit'``.
        n: its number from 0.
        variables: of the network.
        hidden: what the segment takes.

    Raises:
        ValueError: variables of another network, or its parameters alone.
    """
    with naming_variables(variables):
        return model.apply(variables, hidden, n, method=f'run_{kind}')


@contextlib.contextmanager
def naming_variables(variables: Variables) -> Iterator[None]:
    """Says, when a network is traced, that what it lacks is in the variables it was given.

    Raises:
        ValueError: no collections of variables, or not all that the network reads.
    """
    if not isinstance(variables, Mapping):
        raise ValueError(f'variables: got {type(variables).__name__}; give what model.init returned or training left')
    try:
        yield
    except (errors.ScopeCollectionNotFound, errors.ScopeParamNotFoundError, errors.ScopeVariableNotFoundError) as error:
        raise ValueError(
            f'variables: got the collections {sorted(variables)}, which are not those of this network: '
            f"{str(error).split(' (http')[0]} Give what model.init returned, {{'params': …, 'batch_stats': …}}, whole; "
            'not its parameters alone'
        ) from error


def check_model(model: Any) -> None:
    """Refuses what is no network with exits.

    Raises:
        ValueError: a network's name, or something without exits.
    """
    if not hasattr(model, 'num_exits'):
        raise ValueError(
            f'model: got {model!r}; give a network with exits, such as branchy_jax.models.create makes from a name'
        )


def select_exits(model: BranchyNet, indices: Sequence[int]) -> BranchyNet:
    """Returns the same trunk with only some of its exits.

    Stages between two kept exits are joined; where stages are made of routes, as in a tree of branches, routes that led
    only to exits no longer there are removed. Parameters keep their names, so the variables of ``model`` serve
    the result as they are.

    Args:
        model: the network to thin out.
        indices: the exits to keep, ascending; the last exit must be among them.

    Raises:
        ValueError: ``indices`` is not ascending, out of range, or leaves out the last exit.

    Example:
        >>> model = BranchyNet(stages=(nn.relu, nn.tanh, nn.gelu), exits=(nn.Dense(4), nn.Dense(4), nn.Dense(4)))
        >>> select_exits(model, [1, 2]).num_exits
        2
    """
    check_model(model)
    indices = check_exits('indices', indices, model.num_exits)
    if not isinstance(model, BranchyNet):
        return model.select(indices)
    starts = [0, *(index + 1 for index in indices[:-1])]
    # Modules without a name of their own are named after their place, which is about to change.
    named: dict[int, nn.Module] = {}
    all_stages, all_exits = with_names(model.stages, 'stages', named), with_names(model.exits, 'exits', named)
    stages = tuple(tuple(all_stages[a : b + 1]) for a, b in zip(starts, indices, strict=True))
    exits = tuple(all_exits[index] for index in indices)
    if is_routed((stages, exits)):
        stages, exits = keep_what_is_read(stages, exits)
    return model.clone(stages=stages, exits=exits)


def check_exits(argument: str, exits: Sequence[int], num_exits: int) -> tuple[int, ...]:
    """Returns a choice of exits as a tuple.

    Args:
        argument: its name in the message.
        exits: ascending, the last exit among them.
        num_exits: N.

    Raises:
        ValueError: no integers, not ascending, out of range, or without the last exit.
    """
    if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in exits):
        raise ValueError(f'{argument}: got {list(exits)}; give the numbers of exits, which are integers')
    chosen = tuple(int(n) for n in exits)
    if list(chosen) != sorted(set(chosen)) or not chosen or chosen[0] < 0 or chosen[-1] != num_exits - 1:
        raise ValueError(
            f'{argument}: got {list(chosen)}; give ascending exits in [0, {num_exits}), the last one '
            f'({num_exits - 1}) among them'
        )
    return chosen


def without_branches(model: BranchyNet) -> BranchyNet:
    """Returns the one-exit baseline: the same trunk with its own head only.

    Example:
        >>> without_branches(BranchyNet(stages=(nn.relu, nn.tanh), exits=(nn.Dense(4), nn.Dense(4)))).num_exits
        1
    """
    return select_exits(model, [model.num_exits - 1])


def side_head_names(model: BranchyNet) -> frozenset[str]:
    """Returns the top-level names of the parameters that belong to side branches alone: not to the baseline.

    A module that the trunk holds as well is the trunk's, whatever it is named after.

    Example:
        >>> model = BranchyNet(stages=(nn.relu, nn.tanh), exits=(nn.Dense(4, name='early'), nn.Dense(4)))
        >>> sorted(side_head_names(model))
        ['early']
    """
    if not isinstance(model, BranchyNet):
        return model.side_head_names()
    stages = without_branches(model).stages if is_routed((model.stages, model.exits)) else model.stages
    trunk = module_names(stages, 'stages') | module_names(model.exits[-1], f'exits_{model.num_exits - 1}')
    side = named_modules(model.stages, 'stages') + named_modules(model.exits[:-1], 'exits')
    in_trunk = {id(module) for module in held_modules((stages, model.exits[-1]))}
    # A module that stands in a stage or an exit itself keeps its parameters there, whoever else holds it.
    elsewhere = {id(module) for _, module in (*side, *named_modules(model.exits[-1], 'exits'))}

    def is_shared(module: nn.Module) -> bool:
        first, *inner = (id(held) for held in held_modules(module))
        return first in in_trunk or any(held in in_trunk - elsewhere for held in inner)

    return frozenset({name for name, module in side if not is_shared(module)} - trunk)


Layout = tuple[tuple[Layers, ...], tuple[Layers, ...]]
"""N stages and N - 1 side heads."""


def choose_layout(layouts: dict[str, Layout], *, placement: str, heads: Sequence[Layers | None] | None) -> Layout:
    """Picks the stages and side heads of a placement, with the caller's own heads where given.

    Args:
        layouts: placement to stages and side heads.
        placement: a key of ``layouts``.
        heads: N - 1 replacements; ``None`` in a place keeps that head.

    Raises:
        ValueError: unknown placement, or not one entry per side head.
    """
    if placement not in layouts:
        raise ValueError(f'placement: got {placement!r}; choose from {", ".join(map(repr, layouts))}')
    stages, side_heads = layouts[placement]
    return stages, choose_heads(side_heads, heads)


def choose_heads(own: Sequence[Layers], given: Sequence[Layers | None] | None) -> tuple[Layers, ...]:
    """Returns a network's own side heads, but the caller's where they are given.

    Raises:
        ValueError: not one entry per side head.
    """
    if given is None:
        return tuple(own)
    if len(given) != len(own):
        raise ValueError(
            f'heads: this network has {len(own)} side heads, got {len(given)}; '
            'give one per side branch (None keeps the default), the last exit not counted'
        )
    return tuple(ours if theirs is None else theirs for ours, theirs in zip(own, given, strict=True))
