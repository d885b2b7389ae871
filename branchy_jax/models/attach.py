"""`attach`: exits on a network that is left as it is."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from branchy_jax import calling, program
from branchy_jax.jaxprs import flatten, variables_of
from branchy_jax.models.capture import LinenNetwork, NnxNetwork, Values, from_nnx
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


@dataclasses.dataclass(frozen=True)
class Attached(calling.Model):
    """A network with heads at places inside it: what `attach` returns. A model with ``init`` and ``apply``.

    ``init`` returns the network's variables, an NNX network's being its current weights, and fresh heads. Inputs of
    another shape or type than the network was attached with raise ValueError.

    Attributes:
        network: the network.
        heads: place to head, a module or a function, in the order of computation; the last place is the network's
            result, and its head may be ``None``.
        inputs: shapes and dtypes of one set of inputs.
    """

    network: LinenNetwork | NnxNetwork
    heads: tuple[tuple[str, Any], ...]
    inputs: Any

    def _init(self, key: Any, inputs: Any) -> Variables:
        calling.check_inputs(inputs, self.inputs)
        keys = jax.random.split(key, len(self.heads) + 1)
        variables = self.network.init(keys[0], inputs)
        values, _ = self.network.run(variables, inputs, calling.Mode())
        collections = {collection: dict(leaves) for collection, leaves in variables.items()}
        for (place, head), head_key in zip(self.heads, keys[1:], strict=True):
            own = calling.init(head, head_key, values[place]) if isinstance(head, nn.Module) else {}
            for collection, leaves in own.items():
                collections.setdefault(collection, {})[_head_name(place)] = leaves
        return collections

    def _run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        calling.check_inputs(inputs, self.inputs)
        rngs: Any = [{}] * (len(self.heads) + 1)
        if 'dropout' in mode.rngs:
            rngs = [{'dropout': key} for key in jax.random.split(mode.rngs['dropout'], len(rngs))]
        trunk = calling.Mode(mode.train and not mode.frozen_trunk, False, rngs[0], mode.mutable)
        values, changed = self.network.run(variables, inputs, trunk)
        updates = {name: {**variables.get(name, {}), **changed.get(name, {})} for name in mode.mutable}
        logits = []
        for (place, head), own_rngs in zip(self.heads, rngs[1:], strict=True):
            if not isinstance(head, nn.Module):
                logits.append(values[place][0] if head is None else head(values[place][0]))
                continue
            name, train = _head_name(place), mode.train if place else trunk.train
            own = {collection: leaves[name] for collection, leaves in variables.items() if name in leaves}
            options = {'train': train, 'rngs': own_rngs, 'mutable': list(mode.mutable)}
            value, changed = calling.apply_linen(head, own, values[place], **options)
            logits.append(value)
            for collection, leaves in changed.items():
                updates[collection][name] = leaves
        return logits, updates

    def without_weights(self) -> 'Attached':
        """Returns the model without the arrays that `init` returns: executors keep this."""
        return dataclasses.replace(self, network=calling.without_weights(self.network))

    def trained(self, variables: Variables) -> Any:
        """Returns the network's own variables without the heads'.

        Args:
            variables: of this network with its heads.

        Returns:
            For a Linen network what its ``apply`` takes; for an NNX network a state for `flax.nnx.update`.
        """
        heads = {_head_name(place) for place, _ in self.heads}
        own = {c: {name: v for name, v in values.items() if name not in heads} for c, values in variables.items()}
        return self.network.trained({collection: values for collection, values in own.items() if values})


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
    whole = LinenNetwork(network) if isinstance(network, nn.Module) else from_nnx(network)
    heads = dict(exits) if isinstance(exits, Mapping) else dict.fromkeys(exits)
    last = heads.pop(_RESULT, None)
    specs = calling.with_batch(inputs, 2)
    variables = jax.eval_shape(whole.init, jax.random.key(0), specs)
    passed = _passed(whole, variables, specs)
    result = passed.pop(_RESULT)[0]
    _check_places(heads, passed)
    for place, head in heads.items():
        if head is None:
            heads[place] = _default(place, passed[place][0], result)
        elif not callable(head):
            raise ValueError(f'exits: got a head of type {type(head).__name__}; give a Linen module or a function')
    named = (*((place, heads[place]) for place in passed if place in heads), (_RESULT, last))
    taken = {_head_name(place) for place, _ in named} & {name for values in variables.values() for name in values}
    if taken:
        raise ValueError(f'network: already has a module {sorted(taken)[0]!r}, which is to be the name of a head')
    attached = Attached(whole, named, calling.with_batch(inputs, 1))
    # Traced once with its heads, so that a fault shows now.
    program.stages(attached, jax.eval_shape(attached.init, jax.random.key(0), specs), specs)
    return attached


def _passed(whole: LinenNetwork | NnxNetwork, variables: Any, specs: Any) -> Values:
    """Returns shapes of the values at all places where they are arrays, in the order of computation."""

    def everything(variables: Variables, inputs: Any) -> Any:
        values, _ = whole.run(variables, inputs, calling.Mode())
        return {
            place: several
            for place, several in values.items()
            if place == _RESULT or all(hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(several))
        }

    closed, shapes = jax.make_jaxpr(everything, return_shape=True)(variables, specs)
    flat = flatten(closed)
    producer = {v: n for n, equation in enumerate(flat.equations, 1) for v in equation.outvars}
    values = jax.tree.unflatten(jax.tree.structure(shapes), flat.outputs)

    def computed(place: str) -> int:
        return max((producer.get(v, 0) for v in variables_of(jax.tree.leaves(values[place]))), default=0)

    return {place: shapes[place] for place in sorted(shapes, key=computed)}


def _check_places(places: Iterable[str], passed: Mapping[str, tuple[Any, ...]]) -> None:
    names: dict[str, str] = {}
    for place in places:
        other = names.setdefault(_head_name(place), place)
        if other != place:
            raise ValueError(f'exits: heads at {other!r} and {place!r} would both be {_head_name(place)!r}; choose one')
        if place not in passed:
            raise ValueError(f'exits: the network passes no {place!r}; it passes {", ".join(map(repr, passed))}')
        if len(passed[place]) > 1:
            raise ValueError(f'exits: the network passes {place!r} {len(passed[place])} times; choose another place')


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
