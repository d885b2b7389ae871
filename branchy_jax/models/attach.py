"""`attach`: exits on a network that is left as it is. `from_nnx`: an NNX module that returns all logits, as a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from branchy_jax import calling, program
from branchy_jax.jaxprs import flatten, variables_of
from branchy_jax.models.capture import LinenNetwork, NnxNetwork, collection_names
from branchy_jax.types import Array, Variables

_RESULT = ''
"""The place of the network's result."""


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


class FunctionHead(nn.Module):
    """A head without parameters.

    Attributes:
        function: of the activation.
    """

    function: Any

    def __call__(self, activation: Any) -> Any:
        """Applies the function."""
        return self.function(activation)


def from_nnx(module: nnx.Module) -> NnxNetwork:
    """Gives an NNX module that returns the logits of every exit the methods ``init`` and ``apply``.

    Args:
        module: an NNX module with its weights; its call returns a tuple of logits, earliest exit first.

    Returns:
        A model. ``init`` returns the module's current weights and statistics; dropout follows the key of each step.

    Raises:
        ValueError: not an NNX module.

    Example:
        >>> import jax.numpy as jnp
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
    return NnxNetwork.of(module)


@dataclasses.dataclass(frozen=True)
class Attached:
    """A network with heads at places inside it: what `attach` returns. A model with ``init`` and ``apply``.

    Attributes:
        network: the network.
        heads: place to head, in the order of computation; the last place is the network's result.
        inputs: shapes and dtypes of one set of inputs.
    """

    network: LinenNetwork | NnxNetwork
    heads: tuple[tuple[str, nn.Module], ...]
    inputs: Any

    def init(self, key: Any, *inputs: Any) -> Variables:
        """Returns the network's variables, an NNX network's being its current weights, and fresh heads."""
        given = calling.one_input(inputs)
        calling.check_inputs(given, self.inputs)
        keys = jax.random.split(key, len(self.heads) + 1)
        variables = self.network.init(keys[0], given)
        run = self.network.run(variables, given, self._places())
        collections = {collection: dict(values) for collection, values in variables.items()}
        for (place, head), own in zip(self.heads, keys[1:], strict=True):
            for collection, values in calling.init(head, own, (run.activation(place),)).items():
                collections.setdefault(collection, {})[_head_name(place)] = values
        return collections

    def apply(
        self,
        variables: Variables,
        *inputs: Any,
        train: bool = False,
        frozen_trunk: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Computes the logits of every exit, as `flax.linen.Module.apply` would.

        Args:
            variables: of the network and of the heads.
            *inputs: of the network.
            train: whether dropout drops and BatchNorm uses the batch's statistics.
            frozen_trunk: keeps the network in evaluation mode while the side heads train.
            rngs: ``{'dropout': key}``, where anything drops.
            mutable: names of collections to update.

        Raises:
            ValueError: inputs of another shape or type than the network was attached with.
        """
        given = calling.one_input(inputs)
        calling.check_inputs(given, self.inputs)
        collections = collection_names(mutable, variables)
        key = None if rngs is None else rngs.get('dropout')
        keys: Any = [None] * (len(self.heads) + 1) if key is None else jax.random.split(key, len(self.heads) + 1)
        own = self._split(variables)
        learns = train and not frozen_trunk
        run = self.network.run(own, given, self._places(), train=learns, key=keys[0], mutable=collections)
        updates = {name: {**variables.get(name, {}), **run.updates.get(name, {})} for name in collections}
        logits = []
        for (place, head), head_key in zip(self.heads, keys[1:], strict=True):
            name = _head_name(place)
            value, changed = calling.apply_linen(
                head,
                {collection: values[name] for collection, values in variables.items() if name in values},
                (run.activation(place),),
                train=learns if place == _RESULT else train,
                rngs=None if head_key is None else {'dropout': head_key},
                mutable=collections,
            )
            if not hasattr(value, 'shape'):
                raise ValueError(f'exits[{place!r}]: a head returns one array of logits, got {type(value).__name__}')
            logits.append(value)
            for collection, values in changed.items():
                updates[collection][name] = values
        return calling.as_logits(logits) if mutable is False else (calling.as_logits(logits), updates)

    def without_weights(self) -> Attached:
        """Returns the model without the arrays that `init` returns: executors keep this."""
        return dataclasses.replace(self, network=calling.without_weights(self.network))

    def trained(self, variables: Variables) -> Any:
        """Returns the network's own variables without the heads'.

        Args:
            variables: of this network with its heads.

        Returns:
            For a Linen network what its ``apply`` takes; for an NNX network a state for `flax.nnx.update`.
        """
        return self.network.trained(self._split(variables))

    def _places(self) -> tuple[str, ...]:
        return tuple(place for place, _ in self.heads[:-1])

    def _split(self, variables: Variables) -> Variables:
        """Returns the network's own variables."""
        heads = {_head_name(place) for place, _ in self.heads}
        own = {c: {name: v for name, v in values.items() if name not in heads} for c, values in variables.items()}
        return {collection: values for collection, values in own.items() if values}


def attach(network: nn.Module | nnx.Module, exits: Mapping[str, Any] | Sequence[str], *, inputs: Any) -> Attached:
    """Puts exits on a network that is left as it is, its parameters under their own names.

    Exits are asked in the order in which the network computes what they read; the last is the network's own result.

    Args:
        network: a Flax Linen module, or an NNX module with its weights. A flag that tells it whether it trains is
            recognised by name (``train``, ``training``, ``is_train``, ``is_training``, ``deterministic``,
            ``inference``, ``use_running_average``), in the signature of its call or as an attribute.
        exits: paths of submodules, such as ``'encoder/layer_3'``, each with its head: a Linen module or a function that
            reads what the submodule returns; ``None``, or paths alone, for a mean over all positions and a dense layer
            (for a dense prediction, a dense layer at every position, resized). The path ``''`` is the network's result,
            of which its head makes logits.
        inputs: an example, or its shapes: an array ``[B, …]`` or a pytree of them. A tuple is passed argument by
            argument, a dictionary by name if all its keys are names of arguments. Inputs to come must have the same
            shapes, B aside.

    Returns:
        The network with its exits. Parameters of the head at ``'encoder/layer_3'`` are ``'exit_encoder_layer_3'``.

    Raises:
        ValueError: a place that is not there (the message lists those that are), is passed more than once, or whose
            value does not depend on the inputs; two places whose heads would have the same name; rows of a batch that
            influence one another; a result that is not logits.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> network = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> model = attach(network, ['layers_0', 'layers_2'], inputs=jnp.ones((1, 4)))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> sorted(variables['params'])
        ['exit_layers_0', 'exit_layers_2', 'layers_0', 'layers_2', 'layers_4']
        >>> bj.inference.dense(model)(variables, jnp.ones((2, 4)), [-jnp.inf, -jnp.inf]).exit_index.tolist()
        [2, 2]
    """
    if not isinstance(network, (nn.Module, nnx.Module)):
        raise ValueError(f'network: got {type(network).__name__}; give a Flax Linen or NNX module')
    if isinstance(exits, str):
        raise ValueError(f'exits: got {exits!r}; give a list of places')
    whole = LinenNetwork(network) if isinstance(network, nn.Module) else NnxNetwork.of(network)
    heads = dict(exits) if isinstance(exits, Mapping) else dict.fromkeys(exits)
    last = heads.pop(_RESULT, None)
    specs = calling.with_batch(inputs, 2)
    variables = jax.eval_shape(whole.init, jax.random.key(0), specs)
    passed, result = _activations(whole, variables, specs)
    _check_places(heads, passed)
    named = []
    for place in passed:
        if place in heads:
            head = heads[place]
            named.append((place, _default(place, passed[place][0], result) if head is None else _as_module(head)))
    named.append((_RESULT, FunctionHead(_as_it_is) if last is None else _as_module(last)))
    taken = {_head_name(place) for place, _ in named} & {name for values in variables.values() for name in values}
    if taken:
        raise ValueError(f'network: already has a module {sorted(taken)[0]!r}, which is to be the name of a head')
    attached = Attached(whole, tuple(named), calling.with_batch(inputs, 1))
    # Traced once with its heads, so that a fault shows now.
    stages = program.stages(attached, jax.eval_shape(attached.init, jax.random.key(0), specs), specs)
    if stages.num_exits != len(named):
        raise ValueError(f'network: returns logits of {stages.num_exits} exits for {len(named)} heads')
    return attached


def _activations(whole: LinenNetwork | NnxNetwork, variables: Any, specs: Any) -> tuple[dict[str, Any], Any]:
    """Returns shapes of the values at all places, in the order of computation, and of the result.

    Only places whose values are arrays count.
    """

    def everything(variables: Variables, inputs: Any) -> Any:
        run = whole.run(variables, inputs, None)
        return {place: values for place, values in run.at.items() if place and _are_arrays(values)}, run.output

    closed, shapes = jax.make_jaxpr(everything, return_shape=True)(variables, specs)
    flat = flatten(closed)
    producer = {v: n for n, equation in enumerate(flat.equations, 1) for v in equation.outvars}
    values, _ = jax.tree.unflatten(jax.tree.structure(shapes), flat.outputs)
    computed = {
        place: max((producer.get(v, 0) for v in variables_of(jax.tree.leaves(value))), default=0)
        for place, value in values.items()
    }
    at, result = shapes
    return {place: at[place] for place in sorted(at, key=computed.__getitem__)}, result


def _are_arrays(values: Any) -> bool:
    return all(hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(values))


def _check_places(places: Iterable[str], passed: Mapping[str, tuple[Any, ...]]) -> None:
    names: dict[str, str] = {}
    for place in places:
        other = names.setdefault(_head_name(place), place)
        if other != place:
            raise ValueError(f'exits: heads at {other!r} and {place!r} would both be {_head_name(place)!r}; choose one')
        if place not in passed:
            raise ValueError(f'exits: the network passes no {place!r}; it passes {", ".join(map(repr, passed))}')
        if len(passed[place]) > 1:
            raise ValueError(
                f'exits: the network passes {place!r} {len(passed[place])} times; choose a place passed once'
            )


def _as_module(head: Any) -> nn.Module:
    if isinstance(head, nn.Module):
        return head
    if callable(head):
        return FunctionHead(head)
    raise ValueError(f'exits: got a head of type {type(head).__name__}; give a Linen module, a function or None')


def _as_it_is(result: Any) -> Any:
    return result


def _default(place: str, activation: Any, output: Any) -> nn.Module:
    """Returns a head for a place: pooling and a dense layer, or a dense layer and resizing."""
    for what, tree in (('the result of the network', output), ('what the network computes there', activation)):
        if not isinstance(tree, jax.ShapeDtypeStruct) or len(tree.shape) < 2:
            raise ValueError(f'exits[{place!r}]: {what} is not one array [B, …, C]; give a head that takes it')
    if len(output.shape) not in (2, len(activation.shape)):
        raise ValueError(f'exits[{place!r}]: makes {output.shape} of {activation.shape}; give a head that can')
    return DenseHead(output.shape[1:])


def _head_name(place: str) -> str:
    return 'exit_' + place.replace('/', '_') if place else 'exit'
