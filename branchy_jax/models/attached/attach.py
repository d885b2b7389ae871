"""`attach`: exits on a network that is left as it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from branchy_jax.models.attached.program import Cut, cut, in_order, trace, values_of
from branchy_jax.models.attached.whole import LinenNetwork, NnxNetwork
from branchy_jax.models.compose import Hidden, Layers, apply_named, as_logits
from branchy_jax.types import Array, Variables, check_inputs, input_specs, num_rows

_ALTOGETHER = ''
"""The place of the whole network, whose head makes logits of its result."""


class Head(nn.Module):
    """The layers of a head, all under one name.

    Attributes:
        layers: what it is made of.
        place: where it reads.
    """

    layers: Layers
    place: str

    preserve_adopted_names = True

    @nn.compact
    def __call__(self, activation: Any, *, train: bool = False) -> Array:
        """Computes logits ``[B, …, K]`` float32."""
        where = f'exits[{self.place!r}]'
        return as_logits(where, apply_named(where, self.layers, activation, train=train))


class DenseHead(nn.Module):
    """A dense layer on the mean over all positions; for a dense prediction at every position, resized.

    Attributes:
        shape: of the logits of one input, ``(K,)`` or ``(…, K)``.
    """

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, activation: Array) -> Array:
        """Computes logits ``[B, …, K]``."""
        *size, classes = self.shape
        if not size:
            return nn.Dense(classes)(activation.mean(tuple(range(1, activation.ndim - 1))))
        return jax.image.resize(nn.Dense(classes)(activation), (activation.shape[0], *self.shape), 'bilinear')


@dataclasses.dataclass(frozen=True)
class Layout:
    """How activations lie between the stages, whatever the batch size.

    Attributes:
        axes: for each stage but the last, where the batch is in each array that it hands on. All lead with the batch
            while they are handed on.
        shapes: of those arrays, the batch left out.
        read: for each stage but the last, which of them its exit reads.
        structures: of what each exit reads.
    """

    axes: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    read: tuple[tuple[int, ...], ...]
    structures: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Attached:
    """A whole network with heads at places inside it: what `attach` builds. Goes wherever a `BranchyNet` goes.

    In training the network runs once, and its heads on what it computes at their places. Otherwise its traced program
    is cut there: a stage computes what its exit needs and no stage before has computed, and hands on only what its exit
    or a later stage reads.

    Attributes:
        network: the network.
        heads: place to head, in the order of computation; the last place is the whole network.
    """

    network: LinenNetwork | NnxNetwork
    heads: tuple[tuple[str, Head], ...]
    _input: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]  # structure and leaves of one input
    _layout: Layout = dataclasses.field(compare=False, repr=False)
    _cuts: dict[Any, Cut] = dataclasses.field(compare=False, repr=False, default_factory=dict)

    @property
    def num_exits(self) -> int:
        """N."""
        return len(self.heads)

    @property
    def image_shape(self) -> Any:
        """Of one input, as that of `branchy_jax.BranchyNet`."""
        return jax.tree.unflatten(*self._input)

    def init(self, key: Array, inputs: Any) -> Variables:
        """Returns the network's variables, an NNX network's being the weights it came with, and fresh heads."""
        check_inputs(inputs, self.image_shape)
        keys = jax.random.split(key, self.num_exits + 1)
        variables = self.network.init(keys[0], inputs)
        activations = self._activations(variables, inputs)
        found = {collection: dict(values) for collection, values in variables.items()}
        for (place, head), activation, own in zip(self.heads, activations, keys[1:], strict=True):
            for collection, values in head.init({'params': own, 'dropout': own}, activation).items():
                found.setdefault(collection, {})[_head_name(place)] = values
        return found

    def apply(
        self,
        variables: Variables,
        hidden: Any,
        n: int | None = None,
        *,
        method: str | None = None,
        train: bool = False,
        frozen_trunk: bool = False,
        rngs: Mapping[str, Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Computes the logits of every exit, or runs one stage or one head, as `flax.linen.Module.apply` would.

        Args:
            variables: of the network and of the heads.
            hidden: inputs, or what the stage or head takes.
            n: number of the stage or head.
            method: ``'run_stage'`` or ``'run_exit'``, which run in evaluation mode; ``None`` for all exits.
            train: whether dropout drops and BatchNorm uses the batch's statistics.
            frozen_trunk: keeps the network in evaluation mode while the side heads train.
            rngs: ``{'dropout': key}``, where anything drops.
            mutable: names of collections to update.

        Returns:
            Logits of N exits, or what the stage or head computes; with ``mutable`` in a pair with the updates.

        Raises:
            ValueError: inputs of another shape or type than the network was attached with, or stages in training.
        """
        if method is not None:
            runs = {'run_stage': self.run_stage, 'run_exit': self.run_exit}
            if method not in runs or train or mutable is not False:
                raise ValueError(
                    f"method: got {method!r} with train={train}, mutable={mutable}; 'run_stage' and 'run_exit' run in "
                    'evaluation mode'
                )
            return runs[method](variables, hidden, 0 if n is None else n)
        check_inputs(hidden, self.image_shape)
        collections = _names(mutable, variables)
        key = None if rngs is None else rngs.get('dropout')
        keys: Any = [None] * (self.num_exits + 1) if key is None else jax.random.split(key, self.num_exits + 1)
        own, places = self._split(variables), [place for place, _ in self.heads[:-1]]
        run = self.network.run(own, hidden, places, train=train and not frozen_trunk, key=keys[0], mutable=collections)
        updates = {name: {**variables.get(name, {}), **run.updates.get(name, {})} for name in collections}
        logits = []
        for n, (place, head) in enumerate(self.heads):
            learns = train and not (frozen_trunk and n == self.num_exits - 1)
            activation = run.output if place == _ALTOGETHER else run.at[place][0]
            found, changed = head.apply(
                self._of_head(variables, place),
                activation,
                train=learns,
                rngs=None if key is None else {'dropout': keys[n + 1]},
                mutable=collections,
            )
            logits.append(found)
            for name, values in changed.items():
                updates[name][_head_name(place)] = values
        return tuple(logits) if mutable is False else (tuple(logits), updates)

    def run_stage(self, variables: Variables, hidden: Hidden, n: int) -> Hidden:
        """Applies stage ``n`` to what stage ``n - 1`` returned, or to the inputs."""
        if n == 0:
            check_inputs(hidden, self.image_shape)
        size, own = num_rows(hidden), self._split(variables)
        program = self._cut(own, size)
        if program is None:  # a batch of one that is traced to something else: run as the first of two
            twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), hidden)
            return jax.tree.map(lambda x: x[:1], self.run_stage(variables, twice, n))
        incoming = jax.tree.leaves(hidden)
        if n > 0:
            incoming = [jnp.moveaxis(x, 0, axis) for x, axis in zip(incoming, self._layout.axes[n - 1], strict=True)]
        found = program.run(n, jax.tree.leaves(own), incoming)
        if n == self.num_exits - 1:
            return jax.tree.unflatten(self._layout.structures[-1], found)
        return tuple(jnp.moveaxis(x, axis, 0) for x, axis in zip(found, self._layout.axes[n], strict=True))

    def run_exit(self, variables: Variables, hidden: Hidden, n: int) -> Array:
        """Applies head ``n`` to what stage ``n`` returned. Returns logits ``[B, …, K]`` in float32."""
        if n < self.num_exits - 1:
            axes, read = self._layout.axes[n], self._layout.read[n]
            leaves = [jnp.moveaxis(hidden[place], 0, axes[place]) for place in read]
            hidden = jax.tree.unflatten(self._layout.structures[n], leaves)
        place, head = self.heads[n]
        logits: Any = head.apply(self._of_head(variables, place), hidden)
        return logits

    def select(self, indices: Sequence[int]) -> Attached:
        """Returns the same network with some of its exits; `branchy_jax.models.select_exits` checks which."""
        heads = tuple(self.heads[n] for n in indices)
        shapes = jax.eval_shape(self.network.init, jax.random.key(0), input_specs(self.image_shape, 2))
        draft = Attached(self.network, heads, self._input, Layout((), (), (), ()))
        return _laid_out(draft, draft._traced(shapes, 2), draft._traced(shapes, 3))

    def side_head_names(self) -> frozenset[str]:
        """Returns the names of the parameters that the network itself does not have."""
        return frozenset(_head_name(place) for place, _ in self.heads[:-1])

    def trained(self, variables: Variables) -> Any:
        """Returns the network's own variables without the heads'.

        Args:
            variables: of this network with its heads.

        Returns:
            For a Linen network what its ``apply`` takes; for an NNX network a state for `flax.nnx.update`.
        """
        return self.network.trained(self._split(variables))

    def _activations(self, variables: Variables, inputs: Any) -> tuple[Any, ...]:
        run = self.network.run(variables, inputs, [place for place, _ in self.heads[:-1]])
        return (*(run.at[place][0] for place, _ in self.heads[:-1]), run.output)

    def _traced(self, shapes: Variables, size: int) -> Cut:
        closed, structure = trace(self._activations, shapes, input_specs(self.image_shape, size))
        return cut(closed, len(jax.tree.leaves(shapes)), values_of(closed, structure))

    def _split(self, variables: Variables) -> Variables:
        """Returns the network's own variables."""
        heads = {_head_name(place) for place, _ in self.heads}
        own = {c: {name: v for name, v in values.items() if name not in heads} for c, values in variables.items()}
        return {collection: values for collection, values in own.items() if values}

    def _of_head(self, variables: Variables, place: str) -> Variables:
        name = _head_name(place)
        return {collection: values[name] for collection, values in variables.items() if name in values}

    def _cut(self, variables: Variables, size: int) -> Cut | None:
        """Returns the program for a batch size; ``None`` where a batch of one has another than all others."""
        leaves, structure = jax.tree.flatten(variables)
        specs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if (size, structure, specs) not in self._cuts:
            shapes = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*spec) for spec in specs])
            self._cuts[size, structure, specs] = self._traced(shapes, size)
        found = self._cuts[size, structure, specs]
        if _fits(found, self._layout, size):
            return found
        if size == 1:
            return None
        raise ValueError(
            f'inputs: in batches of {size} the network hands on other arrays than in batches of 2; exits can only be '
            'attached where its program does not depend on the batch size'
        )


def attach(
    network: nn.Module | nnx.Module, exits: Mapping[str, Layers | None] | Sequence[str], *, inputs: Any
) -> Attached:
    """Puts exits on a network that is left as it is, its parameters under their own names.

    The result goes wherever a `BranchyNet` goes: training, every executor, planning, costs, sharding, export. Exits
    are asked in the order in which the network computes what they read; the last is the network's own result.

    Args:
        network: a Flax Linen module, or an NNX module with its weights. A flag that tells it whether it trains is found
            by name (``train``, ``training``, ``is_train``, ``is_training``, ``deterministic``, ``inference``,
            ``use_running_average``), in the signature of its call or as an attribute.
        exits: paths of submodules, such as ``'encoder/layer_3'``, each with the layers of its head, which read what the
            submodule returns; ``None``, or paths alone, for a mean over all positions and a dense layer (for a dense
            prediction, a dense layer at every position, resized). The path ``''`` is the whole network: its layers make
            logits of its result.
        inputs: an example, or its shapes: an array ``[B, …]`` or a pytree of them. A tuple is passed argument by
            argument, a dictionary by name if all its keys are names of arguments. Inputs to come must have the same
            shapes, B aside.

    Returns:
        The network with its exits. Parameters of the head at ``'encoder/layer_3'`` are ``'exit_encoder_layer_3'``.

    Raises:
        ValueError: a place that is not there (the message lists those that are), is passed more than once, or where
            what is computed does not depend on each input alone; two places whose heads would have the same name; a
            result that is not logits.

    Example:
        >>> import branchy_jax as bj
        >>> network = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> model = attach(network, ['layers_0', 'layers_2'], inputs=jnp.ones((1, 4)))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> sorted(variables['params'])
        ['exit_layers_0', 'exit_layers_2', 'layers_0', 'layers_2', 'layers_4']
        >>> bj.inference.dense(model)(variables, jnp.ones((2, 4)), [-jnp.inf, -jnp.inf]).exit_index.tolist()
        [2, 2]
    """
    if isinstance(network, nn.Module):
        whole: LinenNetwork | NnxNetwork = LinenNetwork(network)
    elif isinstance(network, nnx.Module):
        whole = NnxNetwork.of(network)
    else:
        raise ValueError(f'network: got {type(network).__name__}; give a Flax Linen or NNX module')
    image_shape = jax.tree.map(_spec, inputs)
    leaves, structure = jax.tree.flatten(image_shape)
    if isinstance(exits, str):
        raise ValueError(f'exits: got {exits!r}; give a list of places')
    heads = dict(exits) if isinstance(exits, Mapping) else dict.fromkeys(exits)
    last = heads.pop(_ALTOGETHER, ())
    specs = input_specs(image_shape, 2)
    variables = jax.eval_shape(whole.init, jax.random.key(0), specs)
    closed, result = trace(functools.partial(_everything, whole), variables, specs)
    passed, output = values_of(closed, result)
    passed = {place: passed[place] for place in in_order(closed, passed)}
    _check_places(heads, passed)
    at = {place: passed[place][0] for place in heads}
    ordered = [place for place in passed if place in heads]
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype), {**at, _ALTOGETHER: output})
    own = {p: _default(p, shapes[p], shapes[_ALTOGETHER]) if heads[p] is None else heads[p] for p in ordered}
    named = [(p, _checked(Head(layers, p), shapes[p])) for p, layers in {**own, _ALTOGETHER: last}.items()]
    taken = {_head_name(place) for place, _ in named} & {name for values in variables.values() for name in values}
    if taken:
        raise ValueError(f'network: already has a module {sorted(taken)[0]!r}, which is to be the name of a head')
    two = cut(closed, len(jax.tree.leaves(variables)), (*(at[place] for place in ordered), output))
    draft = Attached(whole, tuple(named), (structure, tuple(leaves)), Layout((), (), (), ()))
    return _laid_out(draft, two, draft._traced(variables, 3))


def _spec(example: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(example.shape[1:], jax.dtypes.canonicalize_dtype(example.dtype))


def _everything(network: LinenNetwork | NnxNetwork, variables: Variables, inputs: Any) -> Any:
    """Returns the activations at all places that have nothing but arrays, and the result."""
    run = network.run(variables, inputs, None)
    at = {place: values for place, values in run.at.items() if place and _are_arrays(values)}
    return at, run.output


def _are_arrays(values: Any) -> bool:
    return all(hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(values))


def _check_places(places: Iterable[str], passed: Mapping[str, tuple[Any, ...]]) -> None:
    named: dict[str, str] = {}
    for place in places:
        other = named.setdefault(_head_name(place), place)
        if other != place:
            raise ValueError(f'exits: heads at {other!r} and {place!r} would both be {_head_name(place)!r}; choose one')
        if place not in passed:
            raise ValueError(f'exits: the network passes no {place!r}; it passes {", ".join(map(repr, passed))}')
        if len(passed[place]) > 1:
            raise ValueError(
                f'exits: the network passes {place!r} {len(passed[place])} times; choose a place passed once'
            )


def _checked(head: Head, activation: Any) -> Head:
    """Returns a head that takes what lies at its place; another says so now."""
    jax.eval_shape(head.init, jax.random.key(0), activation)
    return head


def _laid_out(draft: Attached, two: Cut, three: Cut) -> Attached:
    """Finds out how activations lie between the stages, from programs for two batch sizes."""
    axes, shapes, read = [], [], []
    for (place, _), here, there, activation in zip(
        draft.heads, two.carried, three.carried, two.activations, strict=False
    ):
        if len(here) != len(there):
            raise ValueError(f'network: what it computes up to {place!r} depends on the batch size')
        axes.append(tuple(_batch_axis(place, a.aval.shape, b.aval.shape) for a, b in zip(here, there, strict=True)))
        shapes.append(tuple(_without(v.aval.shape, axis) for v, axis in zip(here, axes[-1], strict=True)))
        wanted = jax.tree.leaves(activation)
        if not wanted or any(v not in here for v in wanted):
            raise ValueError(f'exits: what the network computes at {place!r} does not depend on its inputs')
        read.append(tuple(here.index(v) for v in wanted))
    structures = tuple(jax.tree.structure(activation) for activation in two.activations)
    return dataclasses.replace(draft, _layout=Layout(tuple(axes), tuple(shapes), tuple(read), structures), _cuts={})


def _batch_axis(place: str, with_two: tuple[int, ...], with_three: tuple[int, ...]) -> int:
    differ = [n for n, (a, b) in enumerate(zip(with_two, with_three, strict=True)) if a != b]
    if len(differ) != 1 or (with_two[differ[0]], with_three[differ[0]]) != (2, 3):
        raise ValueError(
            f'exits: up to {place!r} the network computes {with_two} for 2 inputs and {with_three} for 3, which is not '
            'one entry for each input: it mixes the inputs of a batch, or folds the batch into another axis; choose '
            'another place'
        )
    return differ[0]


def _fits(found: Cut, layout: Layout, size: int) -> bool:
    """Tells whether a program hands on what programs of other batch sizes do."""
    return all(
        len(values) == len(axes)
        and all(
            v.aval.ndim == len(shape) + 1 and v.aval.shape[axis] == size and _without(v.aval.shape, axis) == shape
            for v, axis, shape in zip(values, axes, shapes, strict=True)
        )
        for values, axes, shapes in zip(found.carried, layout.axes, layout.shapes, strict=True)
    )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _default(place: str, activation: Any, output: Any) -> Layers:
    """Returns a head for what lies at a place: pooling and a dense layer, or a dense layer and resizing."""
    for what, tree in (('the result of the network', output), ('what the network computes there', activation)):
        if not isinstance(tree, jax.ShapeDtypeStruct) or len(tree.shape) < 2:
            raise ValueError(f'exits[{place!r}]: {what} is not one array [B, …, C]; give a head that takes it')
    if len(output.shape) not in (2, len(activation.shape)):
        raise ValueError(f'exits[{place!r}]: makes {output.shape} of {activation.shape}; give a head that can')
    return DenseHead(output.shape[1:])


def _head_name(place: str) -> str:
    return 'exit_' + place.replace('/', '_') if place else 'exit'


def _names(mutable: Any, variables: Variables) -> list[str]:
    if mutable is False:
        return []
    if mutable is True:
        return [name for name in variables if name != 'params']
    return [mutable] if isinstance(mutable, str) else list(mutable)
