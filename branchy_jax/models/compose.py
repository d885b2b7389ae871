"""What a stage or a head may be made of: modules, plain functions, tuples of them, and routes between activations."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors, nnx, struct

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
    if isinstance(layers, nn.Sequential):  # tells none of its layers whether they train
        return apply_layers(tuple(layers.layers), hidden, train=train)
    flags, named = call_arguments(layers, 1, train=train)
    held = _held_flags(layers, train=train)
    if held:
        layers = layers.clone(parent=layers.scope, **held)
    return layers(hidden, *flags, **named)


def mode_flags(*, train: bool) -> dict[str, bool]:
    """Returns what networks call the flag that tells them whether they train, and its value."""
    trains = dict.fromkeys(('train', 'training', 'is_train', 'is_training'), train)
    return {**trains, **dict.fromkeys(('deterministic', 'inference', 'use_running_average'), not train)}


def call_arguments(layer: Layer, inputs: int | None, *, train: bool) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Returns what a call says after its inputs, so that a layer trains or does not.

    Flags are those that the signature names and the layer does not hold as an attribute; where it takes any keyword
    and names none, ``train``. A flag right behind the inputs goes by its place: `flax.linen.remat` and `flax.linen.jit`
    can take arguments as static by place alone.

    Args:
        layer: a module or a function.
        inputs: how many arguments come before; ``None`` if they go by name.
        train: whether this is training.
    """
    function = type(layer).__call__ if isinstance(layer, (nn.Module, nnx.Module)) else layer
    parameters = parameters_of(function)
    flags = {
        name: value
        for name, value in mode_flags(train=train).items()
        if name in parameters and not isinstance(getattr(layer, name, None), bool)
    }
    if isinstance(layer, (nn.Sequential, nnx.Sequential)):  # would hand all on to its first layer
        return (), {}
    if not flags and not _held_flags(layer, train=train):
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return (), {'train': train} if anything else {}
    places = [name for name in parameters if name != 'self']
    following = places[inputs] if inputs is not None and inputs < len(places) else ''
    if following in flags and parameters[following].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return (flags.pop(following),), flags
    return (), flags


def in_mode(module: nn.Module, *, train: bool) -> nn.Module:
    """Returns an unbound module whose flags held as attributes, its own and its parts', say whether it trains."""

    def inside(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(inside(part) for part in value)
        if not isinstance(value, nn.Module):
            return value
        parts = {
            field.name: inside(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and field.name != 'parent' and held_modules(getattr(value, field.name))
        }
        changed = {**_held_flags(value, train=train), **parts}
        return value.clone(**changed) if changed else value

    return inside(module)


def _held_flags(layer: Layer, *, train: bool) -> dict[str, bool]:
    """Returns the flags that a module holds as attributes, with the values that they are to have.

    A BatchNorm or dropout that was built for evaluation is frozen for good: it stays so.
    """
    if not isinstance(layer, nn.Module):
        return {}
    fields = {field.name for field in dataclasses.fields(layer)}
    flags = mode_flags(train=train).items()
    held = {name: value for name, value in flags if name in fields and isinstance(getattr(layer, name), bool)}
    if isinstance(layer, (nn.BatchNorm, nn.Dropout)):
        return {name: value for name, value in held.items() if getattr(layer, name) is not True}
    return held


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


def as_logits(place: str, value: Any) -> Array:
    """Returns what a head made as float32, if it is logits ``[B, …, K]``.

    Raises:
        ValueError: it is something else; the message names the place.
    """
    if not (hasattr(value, 'dtype') and jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 1):
        found = f'{value.dtype} {value.shape}' if hasattr(value, 'dtype') else type(value).__name__
        raise ValueError(f'{place}: a head returns logits [B, …, K] of a float dtype; got {found}')
    return value.astype(jnp.float32)


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
    live: set[str | None] = set()
    kept = []
    for routes, head in zip(reversed(flat), reversed(exits), strict=True):  # backwards: what is read later is live
        live = live | set(head.reads)
        stage = []
        for route in reversed(routes):
            if route.target in live:
                stage.append((route, frozenset(live)))
                live = live - {route.target} | set(route.reads)
        kept.append(stage[::-1])
    held: set[str | None] = set()
    result = []
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


def with_names(layers: Layers, place: str, named: dict[int, nn.Module]) -> Layers:
    """Gives modules without a name the one that their place gives them, so that they keep it elsewhere.

    Args:
        layers: of stages or of exits.
        place: where they stand, such as ``stages``.
        named: what was named so far, by identity: a module that stands in several places is named after the first.
    """
    if isinstance(layers, (tuple, list)):
        return tuple(with_names(layer, f'{place}_{n}', named) for n, layer in enumerate(layers))
    if isinstance(layers, Route):
        return dataclasses.replace(layers, layers=with_names(layers.layers, f'{place}_layers', named))
    if not isinstance(layers, nn.Module) or layers.name is not None:
        return layers
    return named.setdefault(id(layers), layers.clone(name=place))


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function by name; none for builtins and ufuncs, which tell nothing of themselves."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
