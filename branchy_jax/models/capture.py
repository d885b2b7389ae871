"""Whole networks as pure functions that also give what they compute at places inside them: Flax Linen and NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from branchy_jax import calling
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

    def activation(self, place: str) -> Any:
        """Returns the value at a place; '' is the result."""
        return self.at[place][0] if place else self.output


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Flax Linen module; variables are its own.

    Attributes:
        module: unbound.
    """

    module: nn.Module

    def init(self, key: jax.Array, inputs: Any) -> Variables:
        """Returns fresh variables."""
        return calling.init(self.module, key, inputs)

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

        rngs = {} if key is None else {'dropout': key}
        with nn.intercept_methods(keep):
            output, updates = calling.apply_linen(
                self.module, variables, inputs, train=train, rngs=rngs, mutable=[*mutable, _COLLECTION]
            )
        updates = dict(updates)
        return Run(output, _paths(updates.pop(_COLLECTION, {}), 'output'), updates)

    def trained(self, variables: Variables) -> Variables:
        """Returns the network's own variables as Flax takes them."""
        return variables


class _Place(nnx.Intermediate):
    """What an NNX network computes at a place."""


@dataclasses.dataclass(frozen=True)
class NnxNetwork:
    """A Flax NNX module, taken apart; a model if the module returns the logits of every exit.

    Variables are stored by kind, as Linen's are: ``params``, ``batch_stats`` and others.

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
        variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        names = tuple(
            (_collection(variable), tuple(str(getattr(part, 'key', part)) for part in path))
            for path, variable in variables
            for _ in jax.tree.leaves(variable)
        )
        return cls(definition, jax.tree.structure(state), names, tuple(jax.tree.leaves(state)))

    def init(self, key: Any, *inputs: Any) -> Variables:
        """Returns the weights that the module came with; zeros where it was left without weights."""
        leaves = [jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in self.state]
        return self._collections(leaves)

    def apply(
        self,
        variables: Variables,
        *inputs: Any,
        train: bool = False,
        frozen_trunk: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Computes the logits of every exit, as `flax.linen.Module.apply` would."""
        names, key = collection_names(mutable, variables), (rngs or {}).get('dropout')
        learns = train and not frozen_trunk
        run = self.run(variables, calling.one_input(inputs), (), train=learns, key=key, mutable=names)
        logits = calling.as_logits(run.output)
        return logits if mutable is False else (logits, {name: run.updates.get(name, {}) for name in names})

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
            for name, value in calling.mode_flags(train=train).items():
                if isinstance(getattr(part, name, None), bool):
                    setattr(part, name, value)
        positional, named = calling.call_arguments(type(module).__call__, module, inputs, train=train)
        output, captured = nnx.capture(module, _Place, method_outputs=_Place)(*positional, **named)
        at = _paths(nnx.to_pure_dict(captured), '__call__')
        after = self._collections(jax.tree.leaves(nnx.state(module, nnx.Not(_Place))))
        updates = {name: after[name] for name in mutable if name in after}
        return Run(output, at if places is None else {place: at[place] for place in places if place in at}, updates)

    def without_weights(self) -> NnxNetwork:
        """Returns the network without its weights; the state of random streams stays."""
        shapes = [
            leaf if collection is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for (collection, _), leaf in zip(self.names, self.state, strict=True)
        ]
        return dataclasses.replace(self, state=tuple(shapes))

    def trained(self, variables: Variables) -> nnx.State:
        """Returns a state that `flax.nnx.update` puts back into the module."""
        state = jax.tree.unflatten(self.structure, self._leaves(variables, None))
        return nnx.filter_state(state, nnx.Not(nnx.RngState))

    def _leaves(self, variables: Variables, key: Array | None) -> list[Any]:
        given, leaves = traverse_util.flatten_dict(dict(variables)), []
        for n, ((collection, path), own) in enumerate(zip(self.names, self.state, strict=True)):
            if collection is None:
                is_key = jnp.issubdtype(own.dtype, jax.dtypes.prng_key)
                leaves.append(own if key is None or not is_key else jax.random.fold_in(key, n))
                continue
            if (collection, *path) not in given:
                raise ValueError(f'variables: have no {collection}/{"/".join(path)}; give those of this network')
            leaves.append(given[collection, *path])
        return leaves

    def _collections(self, leaves: Sequence[Any]) -> Variables:
        named = zip(self.names, leaves, strict=True)
        return traverse_util.unflatten_dict({(collection, *path): x for (collection, path), x in named if collection})


def _collection(variable: nnx.Variable) -> str | None:
    if isinstance(variable, nnx.RngState):
        return None
    kinds = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}
    return next((name for kind, name in kinds.items() if isinstance(variable, kind)), type(variable).__name__)


def _paths(tree: Any, leaf: str) -> dict[str, tuple[Any, ...]]:
    """Returns the values stored under the name ``leaf``, by the path of the module that stored them."""
    flat = traverse_util.flatten_dict(tree)
    return {'/'.join(map(str, keys[:-1])): x for keys, x in flat.items() if keys[-1] == leaf and isinstance(x, tuple)}


def collection_names(mutable: Any, variables: Variables) -> list[str]:
    """Returns the names of the collections that ``mutable`` means."""
    if mutable is False:
        return []
    if mutable is True:
        return [name for name in variables if name != 'params']
    return [mutable] if isinstance(mutable, str) else list(mutable)
