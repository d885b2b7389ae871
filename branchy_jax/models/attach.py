"""`attach`: exits on a network that is left as it is."""

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge

from branchy_jax import calling, modes, program
from branchy_jax.jaxprs import Program, Value, flatten, variables_of
from branchy_jax.models.capture import LinenNetwork, NnxNetwork, Values, from_nnx
from branchy_jax.types import Array, Variables

_RESULT = ''
"""The place of the network's result."""


Axes = dict[str, tuple[int | None, ...]]


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
        axes: for each head, the axis that is the batch in each array that it reads; ``None`` where no axis is.
    """

    network: LinenNetwork | NnxNetwork
    heads: tuple[tuple[str, Any], ...]
    inputs: Any
    axes: Axes

    def __repr__(self) -> str:
        return f'Attached({self.network!r}, exits at {", ".join(repr(place) for place, _ in self.heads)})'

    def _init(self, key: Any, inputs: Any) -> Variables:
        calling.check_inputs(inputs, self.inputs)
        keys = jax.random.split(key, len(self.heads) + 1)
        variables = self.network.init(keys[0], inputs)
        return self.with_heads(variables, keys[1:], self.network.run(variables, inputs, calling.Mode())[0])

    def with_heads(self, variables: Variables, keys: Array, values: Values) -> Variables:
        """Returns the network's variables with those of fresh heads.

        Args:
            variables: of the network.
            keys: a PRNG key for each head.
            values: what the network computes at the places of the heads.
        """
        collections = {collection: dict(leaves) for collection, leaves in variables.items()}
        for (place, head), head_key in zip(self.heads, keys, strict=True):
            own = calling.init(head, head_key, (self._read(place, values),)) if isinstance(head, nn.Module) else {}
            for collection, leaves in own.items():
                collections.setdefault(collection, {})[_head_name(place)] = leaves
        return collections

    def _run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        calling.check_inputs(inputs, self.inputs)
        split = {name: jax.random.split(key, len(self.heads) + 1) for name, key in mode.rngs.items()}
        rngs = [{name: keys[n] for name, keys in split.items()} for n in range(len(self.heads) + 1)]
        trunk = calling.Mode(mode.train and not mode.frozen_trunk, False, rngs[0], mode.mutable)
        values, changed = self.network.run(variables, inputs, trunk)
        updates = {name: {**variables.get(name, {}), **changed.get(name, {})} for name in mode.mutable}
        logits = []
        for (place, head), own_rngs in zip(self.heads, rngs[1:], strict=True):
            value = self._read(place, values)
            if not isinstance(head, nn.Module):
                logits.append(value if head is None else head(value))
                continue
            name, train = _head_name(place), mode.train if place else trunk.train
            own = {collection: leaves[name] for collection, leaves in variables.items() if name in leaves}
            options: Any = {'train': train, 'rngs': own_rngs, 'mutable': list(mode.mutable)}
            result, changed = calling.apply_linen(head, own, (value,), **options)
            logits.append(result)
            for collection, leaves in changed.items():
                updates[collection][name] = leaves
        return logits, updates

    def _read(self, place: str, values: Values) -> Any:
        """Returns what the network computes at a place, the batch first."""
        return _batch_first(values[place][0], self.axes[place])

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


def attach(
    network: nn.Module | nnx.Module,
    exits: Mapping[str, Any] | Sequence[str],
    *,
    inputs: Any,
    train: modes.Flags | None = None,
) -> Attached:
    """Puts exits on a network that is left as it is, its parameters under their own names.

    Exits are asked in the order in which the network computes what they read; the last is the network's own result.

    Args:
        network: a Flax Linen module, or an NNX module with its weights. A flag that tells it whether it trains is
            recognised by name (``train``, ``training``, ``is_train``, ``is_training``, ``enable_dropout``,
            ``deterministic``, ``inference``, ``use_running_average``, ``eval``, ``is_eval``, ``evaluate``,
            ``is_evaluating``), in the signature of its call, as an attribute or in a configuration that is an
            attribute.
        exits: paths of submodules, such as ``'encoder/layer_3'``, each with its head: a Linen module or a function that
            reads what the submodule returns, the batch first; ``None``, or paths alone, for a mean over all positions
            and a dense layer (for a dense prediction, a dense layer at every position, resized). The path ``''`` is the
            network's result, of which its head makes logits.
        inputs: an example, or its shapes: an array ``[B, …]`` or a pytree of them. A tuple is passed argument by
            argument, a dictionary by name if all its keys are names of arguments. Inputs to come must have the same
            shapes, B aside.
        train: flags under other names, with their values in evaluation and in training, such as
            ``{'mode': ('eval', 'train')}``.

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
    _check_arguments(network, exits)
    flags = modes.flags_with(train)
    whole = LinenNetwork(network, flags) if isinstance(network, nn.Module) else from_nnx(network)
    heads = dict(exits) if isinstance(exits, Mapping) else dict.fromkeys(exits)
    heads = {**heads, _RESULT: heads.pop(_RESULT, None)}
    if isinstance(whole, NnxNetwork):
        whole = dataclasses.replace(whole, flags=flags, places=tuple(place for place in heads if place))
    specs = calling.with_batch(inputs, 2)
    with calling.explained_variables({}):
        variables = jax.eval_shape(whole.init, jax.random.key(0), specs)
        check_result = heads[_RESULT] is None
        passed, axes = _passed(whole, variables, inputs, check_result=check_result)
        if isinstance(whole, LinenNetwork) and any(passed.get(place) == () for place in heads):
            whole = dataclasses.replace(whole, loops=tuple(place for place in heads if passed.get(place) == ()))
            passed, axes = _passed(whole, variables, inputs, check_result=False)
    _check_places(heads, passed)
    axes = {place: axes[place] for place in heads}
    read = {
        place: jax.eval_shape(functools.partial(_batch_first, axes=axes[place]), passed[place][0]) for place in heads
    }
    logits = _result_of(heads[_RESULT], read[_RESULT])
    for place, head in heads.items():
        if head is None and place:
            heads[place] = _default(place, read[place], axes[place], logits)
        elif head is not None and not callable(head):
            raise ValueError(f'exits: got a head of type {type(head).__name__}; give a Linen module or a function')
    named = tuple((place, heads[place]) for place in passed if place in heads)
    taken = {_head_name(place) for place in heads} & {name for values in variables.values() for name in values}
    if taken:
        raise ValueError(f'network: already has a module {sorted(taken)[0]!r}, which is to be the name of a head')
    attached = Attached(whole, named, calling.with_batch(inputs, 1), axes)
    # Traced once with its heads, so that a fault shows now.
    try:
        keys = jax.random.split(jax.random.key(0), len(named))
        fresh = jax.eval_shape(attached.with_heads, variables, keys, {place: passed[place] for place in heads})
        program.check_rows_by_trial(attached, fresh, specs)
    except ValueError as error:
        order = ', '.join(repr(place) for place, _ in named)
        raise ValueError(f'{error} (exits, from exit 0 on: {order}; heads read the batch first)') from error
    return attached


def _check_arguments(network: Any, exits: Any) -> None:
    if not isinstance(network, (nn.Module, nnx.Module)):
        raise ValueError(f'network: got {type(network).__name__}; give a Flax Linen or NNX module')
    if isinstance(network, bridge.ToNNX):
        raise ValueError(
            'network: is a Linen module in flax.nnx.bridge.ToNNX, whose submodules are no places; give the Linen '
            'module itself, network.to_nnx__module'
        )
    if isinstance(exits, str):
        raise ValueError(f'exits: got {exits!r}; give a list of places')


def _passed(
    whole: LinenNetwork | NnxNetwork, variables: Any, inputs: Any, *, check_result: bool
) -> tuple[Values, Axes]:
    """Returns the shapes of all values that are arrays, in the order of computation, and the axes of the batch.

    The axis that is the batch is the one whose size follows the number of inputs. ``check_result`` warns of a result
    that is probabilities.
    """

    def everything(variables: Variables, inputs: Any) -> Any:
        values, _ = whole.run(variables, inputs, calling.Mode())
        return {
            place: several
            for place, several in values.items()
            if place == _RESULT or all(hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(several))
        }

    closed, shapes = jax.make_jaxpr(everything, return_shape=True)(variables, calling.with_batch(inputs, 2))
    longer = jax.eval_shape(everything, variables, calling.with_batch(inputs, 3))
    axes = {
        place: tuple(map(_batch_axis, jax.tree.leaves(shapes[place]), jax.tree.leaves(longer[place])))
        for place in shapes
    }
    flat = flatten(closed)
    producer = {v: n for n, equation in enumerate(flat.equations, 1) for v in equation.outvars}
    values = jax.tree.unflatten(jax.tree.structure(shapes), flat.outputs)

    def computed(place: str) -> int:
        return max((producer.get(v, 0) for v in variables_of(jax.tree.leaves(values[place]))), default=0)

    if check_result and any(_ends_in_probabilities(flat, v) for v in jax.tree.leaves(values[_RESULT])):
        warnings.warn(
            "network: its result is exp, sigmoid or softmax of logits; exits read logits: give a head of '' that takes "
            "their logarithm, exits={…, '': jnp.log}, or a network without its last step",
            stacklevel=3,
        )
    result = shapes.pop(_RESULT)
    return {**{place: shapes[place] for place in sorted(shapes, key=computed)}, _RESULT: result}, axes


def _ends_in_probabilities(flat: Program, result: Value) -> bool:
    """Whether a result is an exponential or a sigmoid, perhaps divided by a sum."""
    made = {v: equation for equation in flat.equations for v in equation.outvars}
    while variables_of([result]) and result in made:
        name, result = made[result].primitive.name, made[result].invars[0]
        if name not in ('div', 'convert_element_type', 'reshape', 'transpose', 'squeeze'):
            return name in ('exp', 'logistic')
    return False


def _batch_axis(two: Any, three: Any) -> int | None:
    """Returns the axis that is the batch in an array computed from two inputs and from three."""
    axes = [axis for axis, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes[0] != sizes[1]]
    return axes[0] if len(axes) == 1 and two.shape[axes[0]] == 2 and three.shape[axes[0]] == 3 else None


def _batch_first(value: Any, axes: Sequence[int | None]) -> Any:
    leaves, structure = jax.tree.flatten(value)
    return jax.tree.unflatten(structure, [jnp.moveaxis(x, n or 0, 0) for x, n in zip(leaves, axes, strict=True)])


def _check_places(places: Iterable[str], passed: Mapping[str, tuple[Any, ...]]) -> None:
    names: dict[str, str] = {}
    for place in places:
        other = names.setdefault(_head_name(place), place)
        if other != place:
            raise ValueError(f'exits: heads at {other!r} and {place!r} would both be {_head_name(place)!r}; choose one')
        if place not in passed:
            raise ValueError(f'exits: the network passes no {place!r}; it passes {_listed(place, passed)}')
        if not passed[place]:
            around = [name for name, several in passed.items() if not several and place.startswith(f'{name}/')]
            loop = ''.join(f'{name!r}, ' for name in sorted(around, key=len)[:1])
            raise ValueError(
                f'exits: {place!r} lies inside a loop, or another transformation of Flax (nn.scan, nn.vmap, …), that '
                f'returns no value of it; choose a place around it: {loop}{_listed(place, passed)}'
            )
        if len(passed[place]) > 1:
            raise ValueError(f'exits: the network passes {place!r} {len(passed[place])} times; choose another place')


def _listed(place: str, passed: Mapping[str, tuple[Any, ...]]) -> str:
    """Returns the places that a network passes, those of similar names first."""
    names = [name for name, several in passed.items() if name and several]
    ordered = [*dict.fromkeys([*difflib.get_close_matches(place, names, n=5), *names])]
    more = f', … ({len(names)} in all)' if len(names) > 30 else ''
    return ', '.join(map(repr, ordered[:30])) + more


def _result_of(head: Any, value: Any) -> Any:
    """Returns the shapes of what a head computes."""

    def compute(key: Any, value: Any) -> Any:
        if isinstance(head, nn.Module):
            return calling.apply_linen(head, calling.init(head, key, (value,)), (value,))
        return head(value) if callable(head) else value

    return jax.eval_shape(compute, jax.random.key(0), value)


def _default(place: str, activation: Any, axes: Sequence[int | None], logits: Any) -> nn.Module:
    """Returns a head for a place: pooling and a dense layer, or a dense layer and resizing."""
    if not isinstance(logits, jax.ShapeDtypeStruct) or len(logits.shape) < 2:
        raise ValueError(
            "exits['']: the result of the network is not one array [B, …, C]; give a head that makes logits of it, "
            "such as exits={…, '': lambda result: result[0]}"
        )
    if not isinstance(activation, jax.ShapeDtypeStruct) or len(activation.shape) < 2 or axes == (None,):
        raise ValueError(
            f'exits[{place!r}]: what the network computes there is not one array [B, …, C]; give a head that takes it'
        )
    if len(logits.shape) not in (2, len(activation.shape)):
        raise ValueError(f'exits[{place!r}]: makes {logits.shape} of {activation.shape}; give a head that can')
    return DenseHead(logits.shape[1:])


def _head_name(place: str) -> str:
    return 'exit_' + place.replace('/', '_') if place else 'exit'
