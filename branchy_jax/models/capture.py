"""Whole networks as pure functions that also give what they compute at places inside them: Flax Linen and NNX."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from branchy_jax import calling
from branchy_jax.types import Array, Variables

_COLLECTION = 'places'

Values = dict[str, tuple[Any, ...]]
"""Place to what a network computes there, once for each time that it passes the place; '' is its result."""


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

    def run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Values, Variables]:
        """Runs the network once; returns the values at the paths of all submodules, and the updated collections."""
        inside: list[str] = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = '/'.join(context.module.path)
            # A rematerialised module calls itself once more inside.
            if context.method_name != '__call__' or not path or path in inside:
                return call(*args, **kwargs)
            inside.append(path)
            value = call(*args, **kwargs)
            inside.pop()
            context.module.sow(_COLLECTION, 'output', value)
            return value

        options = {**vars(mode), 'mutable': [*mode.mutable, _COLLECTION]}
        with nn.intercept_methods(keep):
            output, updates = calling.apply_linen(self.module, variables, inputs, **options)
        updates = dict(updates)
        return {**_values(updates.pop(_COLLECTION, {}), 'output'), '': (output,)}, updates

    def trained(self, variables: Variables) -> Variables:
        """Returns the network's own variables as Flax takes them."""
        return variables


class _Place(nnx.Intermediate):
    """What an NNX network computes at a place."""


@dataclasses.dataclass(frozen=True)
class NnxNetwork(calling.Model):
    """A Flax NNX module, taken apart; a model if the module returns the logits of every exit.

    Variables are stored by kind, as Linen's are: ``params``, ``batch_stats`` and others. ``init`` returns the weights
    that the module came with.

    Attributes:
        definition: the module without its arrays.
        structure: of its state, random streams left out.
        names: for each leaf of the state its collection and its path.
        state: its leaves when it was given: its weights.
        streams: its random streams.
    """

    definition: nnx.GraphDef
    structure: Any
    names: tuple[tuple[str, ...], ...]
    state: tuple[Any, ...] = dataclasses.field(compare=False, repr=False)
    streams: nnx.State = dataclasses.field(compare=False, repr=False)

    def run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Values, Variables]:
        """Runs the network once, as `LinenNetwork.run` does."""
        module = nnx.merge(self.definition, self.trained(variables), self._streams(mode.rngs.get('dropout')))
        (module.train if mode.train else module.eval)()
        for _, part in nnx.iter_modules(module):
            for name, value in calling.mode_flags(train=mode.train).items():
                if isinstance(getattr(part, name, None), bool):
                    setattr(part, name, value)
        positional, named = calling.call_arguments(module, inputs, train=mode.train)
        output, captured = nnx.capture(module, _Place, method_outputs=_Place)(*positional, **named)
        _, _, state = nnx.state(module, nnx.RngState, _Place, ...)
        after = self._collections(jax.tree.leaves(state))
        updates = {name: after.get(name, {}) for name in mode.mutable}
        return {**_values(nnx.to_pure_dict(captured), '__call__'), '': (output,)}, updates

    def without_weights(self) -> 'NnxNetwork':
        """Returns the network without its weights; random streams stay."""
        return dataclasses.replace(self, state=tuple(calling.specs(self.state)))

    def trained(self, variables: Variables) -> nnx.State:
        """Returns a state that `flax.nnx.update` puts back into the module."""
        given = traverse_util.flatten_dict(dict(variables))
        missing = ['/'.join(keys) for keys in self.names if keys not in given]
        if missing:
            raise ValueError(f'variables: have no {missing[0]}; give those of this network')
        return jax.tree.unflatten(self.structure, [given[keys] for keys in self.names])

    def _init(self, key: Any, inputs: Any) -> Variables:
        """Returns zeros where the network was left without its weights."""
        return self._collections(
            [jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in self.state]
        )

    def _run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        learns = mode.train and not mode.frozen_trunk
        values, updates = self.run(variables, inputs, dataclasses.replace(mode, train=learns))
        return values[''][0], updates

    def _streams(self, key: Array | None) -> nnx.State:
        leaves = jax.tree.leaves(self.streams)
        if key is not None:
            is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
            leaves = [jax.random.fold_in(key, n) if is_key[n] else leaf for n, leaf in enumerate(leaves)]
        return jax.tree.unflatten(jax.tree.structure(self.streams), leaves)

    def _collections(self, leaves: list[Any]) -> Variables:
        return traverse_util.unflatten_dict(dict(zip(self.names, leaves, strict=True)))


def from_nnx(module: nnx.Module) -> NnxNetwork:
    """Gives an NNX module that returns the logits of every exit the methods ``init`` and ``apply``.

    Args:
        module: an NNX module with its weights; its call returns a tuple of logits, earliest exit first.

    Returns:
        A model. ``init`` returns the module's current weights and statistics; dropout follows the key of each step.

    Raises:
        ValueError: not an NNX module.

    Example:
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.first, self.early, self.last = (nnx.Linear(4, n, rngs=rngs) for n in (4, 3, 3))
        ...     def __call__(self, x):
        ...         x = nnx.relu(self.first(x))
        ...         return self.early(x), self.last(x)
        >>> model = from_nnx(Net(nnx.Rngs(0)))
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> [logits.shape for logits in model.apply(variables, jnp.ones((2, 4)))]
        [(2, 3), (2, 3)]
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(f'module: got {type(module).__name__}; give an NNX module')
    definition, streams, *(state,) = nnx.split(module, nnx.RngState, ...)
    variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = tuple(
        (_collection(variable), *(str(getattr(part, 'key', part)) for part in path)) for path, variable in variables
    )
    return NnxNetwork(definition, jax.tree.structure(state), names, tuple(jax.tree.leaves(state)), streams)


def _collection(variable: Any) -> str:
    kinds = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}
    return next((name for kind, name in kinds.items() if isinstance(variable, kind)), type(variable).__name__)


def _values(tree: Any, leaf: str) -> Values:
    """Returns the values stored under the name ``leaf``, by the path of the module that stored them."""
    flat = traverse_util.flatten_dict(tree)
    return {'/'.join(map(str, keys[:-1])): x for keys, x in flat.items() if keys[-1] == leaf and isinstance(x, tuple)}
