"""What a stage or a head may be made of: modules, plain functions, tuples of them, and routes between activations."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import errors, struct

from branchy_jax.types import Array

Layer = Callable[..., Any]
"""A Flax module or a plain function of the hidden value."""

Layers = Any
"""One `Layer`, a `Route`, or a tuple of these applied in order; tuples nest freely."""

Hidden = Any
"""What a stage hands to the next: any pytree whose leaves lead with B."""


@struct.dataclass
class Route:
    """Layers that read entries of a hidden dictionary and, in a stage, write another.

    With routes a stage hands on more than one activation: the skip connections of an encoder-decoder, or the live
    activations of a tree of branches (`branchy_jax.models.tree`). Give the modules in a route names: where only some
    exits of a network are kept, routes are removed, and places shift.

    Attributes:
        layers: what is applied.
        source: the entry read, or several, which the layers get as a tuple; ``None`` takes the whole hidden value,
            such as the images.
        target: the entry written; ``None``, in a head, returns the result itself.
        drop: entries that nothing reads any more.

    Example:
        >>> import jax.numpy as jnp
        >>> stage = (Route(nn.relu, None, 'a'), Route(nn.tanh, 'a', 'b', drop=('a',)))
        >>> sorted(apply_layers(stage, jnp.ones((1, 2)), train=False))
        ['b']
    """

    layers: Layers
    source: str | tuple[str, ...] | None = struct.field(pytree_node=False)
    target: str | None = struct.field(pytree_node=False, default=None)
    drop: tuple[str, ...] = struct.field(pytree_node=False, default=())

    @property
    def reads(self) -> tuple[str, ...]:
        """The entries read."""
        return (self.source,) if isinstance(self.source, str) else self.source or ()


def apply_layers(layers: Layers, hidden: Hidden, *, train: bool) -> Hidden:
    """Applies layers in order; each is told whether it trains through the argument its signature names for that."""
    if isinstance(layers, (tuple, list)):
        for layer in layers:
            hidden = apply_layers(layer, hidden, train=train)
        return hidden
    if isinstance(layers, Route):
        return _follow(layers, hidden, train=train)
    flags = {'train': train, 'deterministic': not train, 'use_running_average': not train}
    accepted = _arguments(type(layers).__call__ if isinstance(layers, nn.Module) else layers)
    return layers(hidden, **{name: value for name, value in flags.items() if name in accepted})


def _follow(route: Route, hidden: Hidden, *, train: bool) -> Hidden:
    missing = [name for name in route.reads if name not in hidden]
    if missing:
        raise ValueError(f'source: no activation {missing[0]!r} among {sorted(hidden)}; a stage before must write it')
    read = tuple(hidden[name] for name in route.reads)
    value = hidden if route.source is None else read[0] if isinstance(route.source, str) else read
    result = apply_layers(route.layers, value, train=train)
    if route.target is None:
        return result
    live = hidden if isinstance(hidden, dict) else {}
    return {name: value for name, value in {**live, route.target: result}.items() if name not in route.drop}


def apply_named(place: str, layers: Layers, hidden: Hidden, *, train: bool) -> Hidden:
    """Applies the layers of a stage or a head, and names it where they cannot take what arrives.

    Args:
        place: such as ``stages[1]``.
        layers: what is applied.
        hidden: what arrives.
        train: whether this is training.

    Raises:
        ValueError: the layers do not take a hidden value of these shapes, or parameters have other shapes.
    """
    try:
        return apply_layers(layers, hidden, train=train)
    except (ValueError, TypeError, errors.ScopeParamShapeError) as error:
        if isinstance(error, jax.errors.JAXTypeError):  # a layer that cannot be traced, not one that does not fit
            raise
        shapes = jax.tree.map(lambda value: tuple(getattr(value, 'shape', ())), hidden)
        raise ValueError(f'{place}: cannot take a hidden value of shape {shapes}: {error}') from error


class Functional(nn.Module):
    """A layer given as a pure function of its parameters: the way in for NNX, Equinox, Haiku or plain JAX networks.

    Attributes:
        function: ``(parameters, hidden) → hidden``.
        initialize: ``key → parameters``, any pytree of nested dictionaries.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = Functional(lambda p, x: x @ p['w'], lambda key: {'w': jax.random.normal(key, (4, 2))})
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 4)))[0].shape
        (3, 2)
    """

    function: Callable[[Any, Hidden], Hidden]
    initialize: Callable[[Array], Any]

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """Applies the function with this layer's parameters."""
        return self.function(self.param('parameters', self.initialize), hidden)


def keep_what_is_read(
    stages: tuple[Layers, ...], exits: tuple[Layers, ...]
) -> tuple[tuple[tuple[Route, ...], ...], tuple[Layers, ...]]:
    """Removes routes whose result nothing reads, and drops each activation as soon as nothing will read it.

    Args:
        stages: of routes only, in tuples however nested.
        exits: heads, each a route that reads one activation.
    """
    flat = [flatten_layers(stage) for stage in stages]
    live, kept = set(), []
    for routes, head in zip(reversed(flat), reversed(exits), strict=True):  # backwards: what is read later is live
        live = live | set(head.reads)
        stage = []
        for route in reversed(routes):
            if route.target in live:
                stage.append((route, frozenset(live)))
                live = live - {route.target} | set(route.reads)
        kept.append(stage[::-1])
    held, result = set(), []
    for stage in reversed(kept):
        routes = []
        for route, live_after in stage:
            held = held | {route.target}
            routes.append(route.replace(drop=tuple(sorted(held - live_after))))
            held = held & live_after
        result.append(tuple(routes))
    return tuple(result), exits


def flatten_layers(layers: Layers) -> tuple[Any, ...]:
    """Returns nested tuples of layers as one tuple."""
    if isinstance(layers, (tuple, list)):
        return tuple(inner for layer in layers for inner in flatten_layers(layer))
    return (layers,)


def is_routed(layers: Layers) -> bool:
    """Tells layers that are routes, and nothing else."""
    return all(isinstance(layer, Route) for layer in flatten_layers(layers))


def module_names(layers: Layers, place: str) -> set[str]:
    """Returns the top-level names under which the parameters of some layers are kept.

    Args:
        layers: of stages or of exits.
        place: where they stand, such as ``stages``: what modules without a name of their own are named after.
    """
    return {name for name, _ in named_modules(layers, place)}


def named_modules(layers: Layers, place: str) -> list[tuple[str, nn.Module]]:
    """Returns the modules among some layers, each with its name as in `module_names`."""
    if isinstance(layers, (tuple, list)):
        return [found for n, layer in enumerate(layers) for found in named_modules(layer, f'{place}_{n}')]
    if isinstance(layers, Route):
        return named_modules(layers.layers, f'{place}_layers')
    return [(layers.name or place, layers)] if isinstance(layers, nn.Module) else []


def held_modules(layers: Any) -> list[nn.Module]:
    """Returns the modules among some layers, and those that these were given as attributes, however deep."""
    if isinstance(layers, (tuple, list)):
        return [module for layer in layers for module in held_modules(layer)]
    if isinstance(layers, Route):
        return held_modules(layers.layers)
    if not isinstance(layers, nn.Module):
        return []
    attributes = [field.name for field in dataclasses.fields(layers) if field.name != 'parent']
    return [layers, *held_modules([getattr(layers, name, None) for name in attributes])]


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Returns the names of a function's arguments. A cache would keep every function ever run, and what it holds."""
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins and some ufuncs tell nothing: they take the hidden value alone
        return frozenset()
