"""Whole networks as pure functions that also give what they compute at places inside them: Flax Linen and NNX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from branchy_jax.models.compose import call_arguments, in_mode, mode_flags, parameters_of
from branchy_jax.types import Array, Variables

_COLLECTION = 'places'


@dataclasses.dataclass(frozen=True)
class Run:
    """What a network computed.

    Attributes:
        output: its result.
        at: place to the activations there, one for each time that the place was passed.
        updates: the collections that were mutable, as they are now.
    """

    output: Any
    at: dict[str, tuple[Any, ...]]
    updates: Variables


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Flax Linen module; variables are its own.

    Attributes:
        module: unbound.
    """

    module: nn.Module

    def init(self, key: Array, inputs: Any) -> Variables:
        """Returns fresh variables."""
        positional, named = _call(type(self.module).__call__, self.module, inputs, train=False)
        parameters, dropout = jax.random.split(key)
        with nn.intercept_methods(functools.partial(_tell_layers_of_sequences, train=False)):
            return in_mode(self.module, train=False).init(
                {'params': parameters, 'dropout': dropout}, *positional, **named
            )

    def run(
        self,
        variables: Variables,
        inputs: Any,
        places: Sequence[str] | None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        mutable: Sequence[str] = (),
    ) -> Run:
        """Runs the network once.

        Args:
            variables: of the network.
            inputs: what it takes.
            places: paths of submodules, such as ``encoder/layer_3``; ``None`` for all there are.
            train: whether dropout drops and BatchNorm uses the batch's statistics.
            key: for dropout.
            mutable: collections to update.
        """
        inside: list[str] = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = '/'.join(context.module.path)
            wanted = path if places is None else path in places
            # A rematerialised module calls itself once more inside.
            if context.method_name != '__call__' or not wanted or path in inside:
                return call(*args, **kwargs)
            inside.append(path)
            try:
                value = call(*args, **kwargs)
            finally:
                inside.pop()
            context.module.sow(_COLLECTION, 'output', value)
            return value

        positional, named = _call(type(self.module).__call__, self.module, inputs, train=train)
        rngs = {} if key is None else {'dropout': key}
        tell = functools.partial(_tell_layers_of_sequences, train=train)
        with nn.intercept_methods(tell), nn.intercept_methods(keep):
            output, updates = in_mode(self.module, train=train).apply(
                variables, *positional, **named, rngs=rngs, mutable=[*mutable, _COLLECTION]
            )
        updates = dict(updates)
        return Run(output, _paths(updates.pop(_COLLECTION, {}), 'output'), updates)

    def trained(self, variables: Variables) -> Variables:
        """Returns the network's own variables as Flax takes them."""
        return variables


def _tell_layers_of_sequences(call: Any, args: Any, kwargs: Any, context: Any, *, train: bool) -> Any:
    """Tells each layer of a `flax.linen.Sequential`, which hands nothing on to it, whether it trains."""
    if context.method_name == '__call__' and isinstance(context.module.parent, nn.Sequential):
        flags, named = call_arguments(context.module, len(args), train=train)
        return call(*args, *flags, **{**named, **kwargs})
    return call(*args, **kwargs)


class _Place(nnx.Intermediate):
    """What an NNX network computes at a place."""


@dataclasses.dataclass(frozen=True)
class NnxNetwork:
    """A Flax NNX module; its variables are kept by kind, as Linen's are: ``params``, ``batch_stats`` and others.

    Attributes:
        definition: the module without its arrays.
        structure: of its state.
        names: for each leaf of the state its collection and its path; a random stream's has no collection.
        state: its leaves when it was given: its weights.
    """

    definition: nnx.GraphDef
    structure: Any
    names: tuple[tuple[str | None, tuple[str, ...]], ...]
    state: tuple[Any, ...] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, module: nnx.Module) -> NnxNetwork:
        """Takes a module apart."""
        definition, state = nnx.split(module)
        found, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        names = tuple(
            (_collection(variable), tuple(str(getattr(part, 'key', part)) for part in path))
            for path, variable in found
            for _ in jax.tree.leaves(variable)
        )
        return cls(definition, jax.tree.structure(state), names, tuple(jax.tree.leaves(state)))

    def init(self, key: Array, inputs: Any) -> Variables:
        """Returns the weights that the module came with."""
        return self._collections(self.state)

    def run(
        self,
        variables: Variables,
        inputs: Any,
        places: Sequence[str] | None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        mutable: Sequence[str] = (),
    ) -> Run:
        """Runs the network once, as `LinenNetwork.run` does."""
        module = nnx.merge(self.definition, jax.tree.unflatten(self.structure, self._leaves(variables, key)))
        (module.train if train else module.eval)()
        for _, part in nnx.iter_modules(module):
            for name, value in mode_flags(train=train).items():
                if isinstance(getattr(part, name, None), bool):
                    setattr(part, name, value)
        positional, named = _call(type(module).__call__, module, inputs, train=train)
        output, found = nnx.capture(module, _Place, method_outputs=_Place)(*positional, **named)
        at = _paths(nnx.to_pure_dict(found), '__call__')
        after = self._collections(jax.tree.leaves(nnx.state(module, nnx.Not(_Place))))
        updates = {name: after[name] for name in mutable if name in after}
        return Run(output, at if places is None else {place: at[place] for place in places if place in at}, updates)

    def trained(self, variables: Variables) -> nnx.State:
        """Returns a state that `flax.nnx.update` puts back into the module."""
        state = jax.tree.unflatten(self.structure, self._leaves(variables, None))
        return nnx.filter_state(state, nnx.Not(nnx.RngState))

    def _leaves(self, variables: Variables, key: Array | None) -> list[Any]:
        leaves = []
        for n, ((collection, path), own) in enumerate(zip(self.names, self.state, strict=True)):
            if collection is None:
                is_key = jnp.issubdtype(own.dtype, jax.dtypes.prng_key)
                leaves.append(own if key is None or not is_key else jax.random.fold_in(key, n))
                continue
            value = variables.get(collection, {})
            for part in path:
                if part not in value:
                    raise ValueError(f'variables: have no {collection}/{"/".join(path)}; give those of this network')
                value = value[part]
            leaves.append(value)
        return leaves

    def _collections(self, leaves: Sequence[Any]) -> Variables:
        found: Variables = {}
        for (collection, path), value in zip(self.names, leaves, strict=True):
            if collection is not None:
                place = found.setdefault(collection, {})
                for part in path[:-1]:
                    place = place.setdefault(part, {})
                place[path[-1]] = value
        return found


def _collection(variable: nnx.Variable) -> str | None:
    if isinstance(variable, nnx.RngState):
        return None
    kinds = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}
    return next((name for kind, name in kinds.items() if isinstance(variable, kind)), type(variable).__name__)


def _call(function: Any, module: Any, inputs: Any, *, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call: a tuple of inputs one by one, a dictionary by name where its keys are names."""
    names = set(parameters_of(function)) - set(mode_flags(train=train))
    if isinstance(inputs, dict) and set(inputs) <= names:
        return (), {**inputs, **call_arguments(module, None, train=train)[1]}
    given = inputs if isinstance(inputs, tuple) and not hasattr(inputs, '_fields') else (inputs,)
    flags, named = call_arguments(module, len(given), train=train)
    return (*given, *flags), named


def _paths(tree: Any, leaf: str) -> dict[str, tuple[Any, ...]]:
    """Returns what was kept under the name ``leaf``, by the path of the module that kept it."""
    found: dict[str, tuple[Any, ...]] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        for name, value in node.items():
            if name == leaf and isinstance(value, tuple):
                found['/'.join(path)] = value
            elif hasattr(value, 'items'):
                walk(value, (*path, str(name)))

    walk(tree, ())
    return found
