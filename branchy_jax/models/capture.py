"""Whole networks as pure functions that also give what they compute at places inside them: Flax Linen and NNX."""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from flax.linen import transforms
from flax.nnx import tracers

from branchy_jax import calling, modes
from branchy_jax.types import Array, Variables

_COLLECTION, _CALLED, _OTHER = '<places>', '<called>', '<other method>'
"""Names that no submodule and no collection of a network has."""

Values = dict[str, tuple[Any, ...]]
"""Place to what a network computes there, once for each time that it passes the place; '' is its result.

Empty for a place inside a loop, of which no single value exists.
"""


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Flax Linen module; variables are its own.

    Attributes:
        module: unbound.
        flags: that give it its mode.
        loops: places that are modules made by `flax.linen.scan` or `flax.linen.vmap`, to be read too.
    """

    module: nn.Module
    flags: modes.Flags
    loops: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return type(self.module).__name__

    def init(self, key: jax.Array, inputs: Any) -> Variables:
        """Returns fresh variables."""
        return calling.init(self.module, key, inputs, self.flags)

    def run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Values, Variables]:
        """Runs the network once; returns the values at the paths of all submodules, and the updated collections."""
        inside: list[str] = []
        unreadable: Values = {}

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, method = context.module, context.method_name
            path = modes.path_of(module)
            # A module may call its own methods, and a rematerialised one calls itself once more inside.
            if not path or path in inside or method == 'setup' or not hasattr(type(module), method):
                return call(*args, **kwargs)
            inside.append(path)
            value = call(*args, **kwargs)
            inside.pop()
            if not module.sow(_COLLECTION, _CALLED if method == '__call__' else _OTHER, value):
                unreadable[path] = ()
            return value

        def keep_loop(module: nn.Module, value: Any) -> None:
            if '/'.join(module.path) in self.loops:
                module.sow(_COLLECTION, _CALLED, value)

        options = {**vars(mode), 'mutable': [*mode.mutable, _COLLECTION], 'flags': self.flags}
        with nn.intercept_methods(keep), _returns(keep_loop) if self.loops else contextlib.nullcontext():
            output, updates = calling.apply_linen(self.module, variables, inputs, **options)
        updates = dict(updates)
        tree = updates.pop(_COLLECTION, {})
        return {**unreadable, **_values(tree, _OTHER), **_values(tree, _CALLED), '': (output,)}, updates

    def trained(self, variables: Variables) -> Variables:
        """Returns the network's own variables as Flax takes them."""
        return variables


@contextlib.contextmanager
def _returns(keep: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Passes on what Flax returns for a module made by a transformation, whose call no interceptor sees."""

    def profile(frame: Any, event: str, value: Any) -> None:
        code = frame.f_code
        if event == 'return' and code.co_filename == transforms.__file__ and 'self' in code.co_varnames:
            module = frame.f_locals['self']
            if isinstance(module, nn.Module) and value is not None:
                keep(module, value)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


class _Place(nnx.Intermediate):
    """What an NNX module at a place returned where Flax works on a copy of the module, as in `flax.nnx.vmap`."""


_ATTRIBUTE = 'to_nnx__place'
"""Holds the `_Place`. `flax.nnx.bridge.ToNNX` takes attributes whose names start otherwise for its variables."""


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
        flags: that give it its mode.
        places: values at these paths are kept inside of Flax's transforms too.
    """

    definition: nnx.GraphDef
    structure: Any
    names: tuple[tuple[str, ...], ...]
    state: tuple[Any, ...] = dataclasses.field(compare=False, repr=False)
    streams: nnx.State = dataclasses.field(compare=False, repr=False)
    flags: modes.Flags = dataclasses.field(default_factory=lambda: modes.MODE_FLAGS)
    places: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f'NnxNetwork({len(self.names)} arrays)'

    def run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Values, Variables]:
        """Runs the network once, as `LinenNetwork.run` does."""
        module = nnx.merge(self.definition, self.trained(variables), self._streams(mode.rngs.get('dropout')))
        (nnx.Module.train if mode.train else nnx.Module.eval)(module)
        parts = {'/'.join(map(str, path)): part for path, part in nnx.iter_modules(module)}
        for part in parts.values():
            for name, flag in self.flags.items():
                if modes.is_flag(getattr(part, name, None), flag):
                    setattr(part, name, flag[mode.train])
        called = getattr(module, 'to_nnx__module', module)
        positional, named = modes.call_arguments(called, inputs, train=mode.train, flags=self.flags)
        if 'rngs' in list(modes.parameters_of(called))[1 + len(positional) :] and named.get('rngs') is None:
            named['rngs'] = nnx.Rngs(mode.rngs.get('dropout', 0))
        with _kept(parts, self.places, train=mode.train) as values:
            try:
                output = module(*positional, **named)
            except (TypeError, ValueError) as error:
                if _ATTRIBUTE not in str(error):
                    raise
                inside = [place for place in self.places if place not in values]
                raise ValueError(
                    f'exits: {inside} lie inside a loop or conditional; choose places around it'
                ) from error
        after = _by_name(nnx.state(module))  # a network may have put more into it
        collections = self._collections([after[keys].get_value() for keys in self.names])
        return {**values, '': (output,)}, {name: collections.get(name, {}) for name in mode.mutable}

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
            fresh = (jax.random.split(jax.random.fold_in(key, n), leaf.shape) for n, leaf in enumerate(leaves))
            leaves = [new if is_key[n] else leaf for n, (new, leaf) in enumerate(zip(fresh, leaves, strict=True))]
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
    return NnxNetwork(
        definition, jax.tree.structure(state), tuple(_by_name(state)), tuple(jax.tree.leaves(state)), streams
    )


def _by_name(state: nnx.State) -> dict[tuple[str, ...], Any]:
    """Returns the variables of a state by their collections and paths."""
    variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {(_collection(v), *(str(getattr(part, 'key', part)) for part in path)): v for path, v in variables}


def _collection(variable: Any) -> str:
    kinds = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats'}
    return next((name for kind, name in kinds.items() if isinstance(variable, kind)), type(variable).__name__)


@contextlib.contextmanager
def _kept(parts: Mapping[str, nnx.Module], copied: Iterable[str], *, train: bool) -> Iterator[Values]:
    """Keeps what the calls of modules return, by their paths.

    The classes of the modules are wrapped meanwhile, as `flax.nnx.capture` does, whose own variables break networks
    that carry a module through a scan or a conditional.

    Args:
        parts: the modules by path.
        copied: the paths of modules whose copies in Flax's transforms are to keep values too.
        train: whether to warn of layers that drop nothing.
    """
    values: Values = {}
    places, outside = {id(part): place for place, part in parts.items()}, tracers.TraceState()
    holders = {place: parts[place] for place in copied if place in parts}
    for part in holders.values():
        setattr(part, _ATTRIBUTE, _Place(()))

    def keep(part: Any, given: Any, value: Any) -> None:
        place = places.get(id(part))
        if train:
            modes.warn_if_idle(part, place or '', given, value)
        if place is not None and outside.is_valid():
            values[place] = (*values.get(place, ()), value)
        elif place is None and hasattr(part, _ATTRIBUTE):
            kept = getattr(part, _ATTRIBUTE)
            kept.set_value((*kept.get_value(), value))

    owners = {kind: _owner(kind) for kind in map(type, filter(callable, parts.values()))}
    calls: dict[Any, Any] = {owner: vars(owner)['__call__'] for owner in owners.values()}
    try:
        for owner, call in calls.items():
            owner.__call__ = _keeping(call, keep, {kind for kind, its in owners.items() if its is owner})
        with warnings.catch_warnings():  # what a network sows for itself is left out
            warnings.filterwarnings('ignore', "Using 'Module.sow", DeprecationWarning)
            yield values
    finally:
        for owner, call in calls.items():
            owner.__call__ = call
    inside = {place: getattr(part, _ATTRIBUTE).get_value() for place, part in holders.items()}
    values.update({place: several for place, several in inside.items() if several and place not in values})


def _owner(kind: type) -> type:
    return next(base for base in kind.__mro__ if '__call__' in vars(base))


def _keeping(call: Any, keep: Callable[[Any, Any, Any], None], kinds: Set[type]) -> Any:
    @functools.wraps(call)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = call.__get__(self)(*args, **kwargs)
        if type(self) in kinds:  # else a subclass with a call of its own
            keep(self, args, value)
        return value

    return wrapper


def _values(tree: Any, leaf: str) -> Values:
    """Returns the values stored under the name ``leaf``, by the path of the module that stored them."""
    flat = traverse_util.flatten_dict(tree)
    return {'/'.join(map(str, keys[:-1])): x for keys, x in flat.items() if keys[-1] == leaf and isinstance(x, tuple)}
