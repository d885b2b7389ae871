"""How the library calls a model: its inputs, the flag that tells whether it trains, and its logits.

A model is a Flax Linen module that returns the logits of every exit, earliest first, or an object with the same two
methods, such as a `Model`: ``init(key, *inputs)`` and ``apply(variables, *inputs, train=…, frozen_trunk=…, rngs=…,
mutable=…)``.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx

from branchy_jax.types import Array, Variables, num_rows

MODE_FLAGS = ('train', 'training', 'is_train', 'is_training', 'deterministic', 'inference', 'use_running_average')
"""Names of arguments and attributes that tell a module whether it trains; the last three are true in evaluation."""

_TRUE_IN_EVALUATION = MODE_FLAGS[4:]


def check_model(model: Any) -> None:
    """Refuses an object that is not a model.

    Raises:
        ValueError: a name, a bound module, or an object without ``init`` and ``apply``.
    """
    if not (callable(getattr(model, 'init', None)) and callable(getattr(model, 'apply', None))):
        raise ValueError(f'model: got {model!r}; give a Flax module, such as branchy_jax.models.create returns')
    if isinstance(model, nn.Module) and model.scope is not None:
        raise ValueError(f'model: got a {type(model).__name__} that is bound; give the module without its variables')


def init(model: Any, key: jax.Array, inputs: Any) -> Variables:
    """Returns fresh variables of a model.

    Args:
        model: see the module's docstring.
        key: PRNG key.
        inputs: an array, tuple or dictionary; every leaf leads with B.
    """
    check_model(model)
    if not isinstance(model, nn.Module):
        return model.init(key, inputs)
    return _call_linen('init', model, {'params': key, 'dropout': key}, inputs, train=False)


def apply(model: Any, variables: Variables, inputs: Any, *, mutable: Any = False, **mode: Any) -> Any:
    """Computes the logits of every exit.

    Args:
        model: see the module's docstring.
        variables: of the model.
        inputs: an array, tuple or dictionary; every leaf leads with B. A tuple is passed argument by argument, a
            dictionary by name where all its keys are names of arguments.
        mutable: collections to update.
        **mode: ``train``, ``frozen_trunk`` and ``rngs``, as in `Mode`; evaluation by default. A Linen module without an
            argument ``frozen_trunk`` runs in evaluation mode altogether where that is true.

    Returns:
        N arrays ``[B, …, K]`` float32; with ``mutable`` a pair of these and the updated collections.

    Raises:
        ValueError: not a model, variables of another model, or a result that is not the logits of exits.
    """
    check_model(model)
    call = functools.partial(apply_linen, model) if isinstance(model, nn.Module) else model.apply
    with explained_variables(variables):
        result = call(variables, inputs, mutable=mutable, **mode)
    return as_logits(result) if mutable is False else (as_logits(result[0]), result[1])


def apply_linen(
    module: nn.Module,
    variables: Variables,
    inputs: Any,
    *,
    train: bool = False,
    frozen_trunk: bool = False,
    **options: Any,
) -> Any:
    """Applies any Linen module in a mode; returns what the module returns.

    Args:
        module: unbound.
        variables: of the module.
        inputs: as for `apply`.
        train: whether the module trains.
        frozen_trunk: is passed on to a module with such an argument.
        **options: ``rngs`` and ``mutable`` of `flax.linen.Module.apply`.
    """
    if frozen_trunk and 'frozen_trunk' in parameters_of(module):
        options['frozen_trunk'] = True
    elif frozen_trunk:
        train = False
    return _call_linen('apply', module, variables, inputs, train=train, **options)


def _call_linen(method: str, module: nn.Module, first: Any, inputs: Any, *, train: bool, **options: Any) -> Any:
    positional, named = call_arguments(module, inputs, train=train)
    with nn.intercept_methods(functools.partial(_pass_mode_through_sequential, train=train)):
        return getattr(in_mode(module, train=train), method)(first, *positional, **named, **options)


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a model is run.

    Attributes:
        train: whether dropout drops and BatchNorm uses the batch's statistics.
        frozen_trunk: whether the trunk stays in evaluation mode while the side heads train.
        rngs: PRNG keys by name.
        mutable: names of the collections to update.
    """

    train: bool = False
    frozen_trunk: bool = False
    rngs: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    mutable: Sequence[str] = ()


class Model:
    """A model that is no Linen module: gives ``init`` and ``apply`` to a class with ``_init`` and ``_run``.

    ``_init(key, inputs)`` returns variables; ``_run(variables, inputs, mode)`` returns logits and updated collections.
    """

    _init: Callable[..., Variables]
    _run: Callable[..., tuple[Any, Variables]]

    def init(self, key: Any, *inputs: Any) -> Variables:
        """Returns variables to start from.

        Args:
            key: PRNG key.
            *inputs: of the model.
        """
        return self._init(key, inputs[0] if len(inputs) == 1 else inputs)

    def apply(self, variables: Variables, *inputs: Any, mutable: Any = False, **mode: Any) -> Any:
        """Computes the logits of every exit, as `flax.linen.Module.apply` would.

        Args:
            variables: of the model.
            *inputs: of the model.
            mutable: names of collections to update; ``True`` for all but ``params``.
            **mode: ``train``, ``frozen_trunk`` and ``rngs``, as in `Mode`; evaluation by default.

        Raises:
            ValueError: variables or inputs of another model.
        """
        names = [mutable] if isinstance(mutable, str) else mutable or ()
        if mutable is True:
            names = [name for name in variables if name != 'params']
        given = {name: value for name, value in mode.items() if value is not None}
        how = Mode(**given, mutable=tuple(names))
        logits, updates = self._run(variables, inputs[0] if len(inputs) == 1 else inputs, how)
        return as_logits(logits) if mutable is False else (as_logits(logits), updates)


def as_logits(result: Any) -> tuple[Array, ...]:
    """Returns what a model returned as a tuple of float32 logits.

    Raises:
        ValueError: the result is not one array per exit, or an array is not ``[B, …, K]`` of a float dtype.
    """
    exits = (result,) if hasattr(result, 'dtype') else result
    if not isinstance(exits, (tuple, list)) or not exits:
        raise ValueError(f'model: returns a {type(result).__name__}; return a tuple of the logits of every exit')
    for n, value in enumerate(exits):
        if not (hasattr(value, 'dtype') and jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 1):
            arrived = f'{value.dtype} {value.shape}' if hasattr(value, 'dtype') else type(value).__name__
            raise ValueError(f'model: exit {n} returns {arrived}; return logits [B, …, K] of a float dtype')
    return tuple(value.astype(jnp.float32) for value in exits)


def specs(tree: Any) -> Any:
    """Returns shapes and dtypes of a pytree of arrays, in the dtypes that JAX gives them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), tree)


def with_batch(inputs: Any, size: Any) -> Any:
    """Returns shapes and dtypes of inputs whose batch has another size.

    Args:
        inputs: arrays or their shapes, every leaf leading with B.
        size: the new B.
    """
    num_rows(inputs)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), specs(inputs))


def check_inputs(inputs: Any, expected: Any) -> None:
    """Refuses inputs of another structure, rank, size or kind of dtype than were recorded.

    Args:
        inputs: arrays ``[B, …]``.
        expected: `jax.ShapeDtypeStruct` of each, of any batch size.

    Raises:
        ValueError: the message says what arrived and what to do.
    """
    structure: Any = jax.tree.structure(expected)
    arrived: Any = jax.tree.structure(inputs)
    if arrived != structure:
        raise ValueError(f'inputs: expected a pytree {structure}, got {arrived}')
    for (path, spec), value in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(inputs), strict=True):
        check_array(f'inputs{jax.tree_util.keystr(path)}', value, spec.shape[1:], spec.dtype)
    num_rows(inputs)


def check_array(name: str, value: Any, shape: Sequence[Any], dtype: Any) -> None:
    """Refuses what is not an array of a rank, size and kind of dtype.

    Args:
        name: of the argument.
        value: to check.
        shape: without B; a letter stands for any size.
        dtype: a float dtype stands for any float dtype.

    Raises:
        ValueError: the message says what arrived and what to do.
    """
    expected = f'[{", ".join(("B", *map(str, shape)))}]'
    if not hasattr(value, 'shape') or not hasattr(value, 'dtype'):
        raise ValueError(f'{name}: expected an array {expected} of {dtype}, got {type(value).__name__}')
    arrived = tuple(value.shape)
    fits = len(arrived) == len(shape) + 1
    if not fits or any(not isinstance(size, str) and size != own for size, own in zip(shape, arrived[1:], strict=True)):
        raise ValueError(
            f'{name}: expected {expected}, got shape {arrived}; resize or pad them; a single input needs a leading '
            'batch axis of 1'
        )
    if jnp.issubdtype(dtype, jnp.floating):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f'{name}: expected a float dtype, got {value.dtype}; normalise them first')
    elif _dtype(value) != dtype:
        raise ValueError(f'{name}: expected {dtype}, got {value.dtype}; convert them')


def without_weights(model: Any) -> Any:
    """Returns a model that keeps no arrays: an NNX model is given without its weights, another as it is."""
    strip = getattr(model, 'without_weights', None)
    return model if strip is None else strip()


def _dtype(value: Any) -> Any:
    dtype = value.dtype if hasattr(value, 'dtype') else np.asarray(value).dtype
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


@contextlib.contextmanager
def explained_variables(variables: Variables) -> Iterator[None]:
    """Raises ValueError if ``variables`` lacks a collection or parameter that the network reads."""
    if not isinstance(variables, Mapping):
        raise ValueError(f'variables: got {type(variables).__name__}; give what model.init returned or training left')
    try:
        yield
    except (errors.ScopeCollectionNotFound, errors.ScopeParamNotFoundError, errors.ScopeVariableNotFoundError) as error:
        raise ValueError(
            f'variables: got the collections {sorted(variables)}, which are not those of this network: '
            f"{_without_link(error)} Give what model.init returned, {{'params': …, 'batch_stats': …}}, whole; "
            'not its parameters alone'
        ) from error
    except errors.ModifyScopeVariableError as error:
        raise ValueError(
            f'model: changes variables that are fixed, as all are in evaluation: {_without_link(error)} Give its '
            '__call__ an argument train, and BatchNorm use_running_average=not train'
        ) from error
    except errors.ScopeParamShapeError as error:
        raise ValueError(f'inputs: their shape does not fit the variables: {_without_link(error)}') from error


def _without_link(error: Exception) -> str:
    return str(error).split(' (http')[0]


def mode_flags(*, train: bool) -> dict[str, bool]:
    """Returns the recognised flags with their values for training or evaluation."""
    return {name: train != (name in _TRUE_IN_EVALUATION) for name in MODE_FLAGS}


def call_arguments(module: Any, inputs: Any, *, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and named arguments of a call, mode flags included."""
    names = set(parameters_of(module)) - set(MODE_FLAGS)
    if isinstance(inputs, Mapping) and set(inputs) <= names:
        return (), {**inputs, **_flag_arguments(module, None, train=train)[1]}
    given = inputs if isinstance(inputs, tuple) and not hasattr(inputs, '_fields') else (inputs,)
    flags, named = _flag_arguments(module, len(given), train=train)
    return (*given, *flags), named


def _flag_arguments(layer: Any, inputs: int | None, *, train: bool) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Returns the mode flags that follow the inputs of a call.

    These are the flags that the signature names and the layer does not hold as an attribute; where the signature takes
    any keyword and names no flag, ``train``. A flag right behind the inputs goes by its place: `flax.linen.remat` and
    `flax.linen.jit` can take arguments as static by place alone.

    Args:
        layer: a module.
        inputs: how many positional arguments come before; ``None`` if the inputs go by name.
        train: whether this is training.
    """
    parameters = parameters_of(layer)
    flags = {
        name: value
        for name, value in mode_flags(train=train).items()
        if name in parameters and not isinstance(getattr(layer, name, None), bool)
    }
    if isinstance(layer, (nn.Sequential, nnx.Sequential)):  # hands every argument on to its first layer
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
    """Returns an unbound module in which the mode flags held as attributes, at any depth, have a mode's values.

    A module that several attributes hold stays one module, with one set of parameters.
    """
    done: dict[int, Any] = {}

    def inside(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(inside, value))
        if not isinstance(value, nn.Module):
            return value
        if id(value) not in done:
            names = [field.name for field in dataclasses.fields(value) if field.init and field.name != 'parent']
            parts = {name: inside(getattr(value, name)) for name in names}
            done[id(value)] = value.clone(**{**parts, **_held_flags(value, train=train)})
        return done[id(value)]

    return inside(module)


def _held_flags(layer: Any, *, train: bool) -> dict[str, bool]:
    """Returns the flags that a module holds as attributes, with a mode's values.

    A BatchNorm or dropout that was built for evaluation is frozen: its flag stays.
    """
    if not isinstance(layer, nn.Module):
        return {}
    fields = {field.name for field in dataclasses.fields(layer)}
    flags = mode_flags(train=train).items()
    held = {name: value for name, value in flags if name in fields and isinstance(getattr(layer, name), bool)}
    if isinstance(layer, (nn.BatchNorm, nn.Dropout)):
        return {name: value for name, value in held.items() if getattr(layer, name) is not True}
    return held


def _pass_mode_through_sequential(call: Any, args: Any, kwargs: Any, context: Any, *, train: bool) -> Any:
    """Passes the mode to each layer of a `flax.linen.Sequential`, which passes no flag on."""
    if context.method_name == '__call__' and isinstance(context.module.parent, nn.Sequential):
        flags, named = _flag_arguments(context.module, len(args), train=train)
        return call(*args, *flags, **{**named, **kwargs})
    return call(*args, **kwargs)


def parameters_of(module: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a module's call by name."""
    return inspect.signature(type(module).__call__).parameters


def check_exits(argument: str, exits: Sequence[int], num_exits: int | None = None) -> tuple[int, ...]:
    """Returns a choice of exits as a tuple.

    Args:
        argument: its name in the message.
        exits: ascending, the last exit among them.
        num_exits: N, if known.

    Raises:
        ValueError: not integers, not ascending, out of range, or without the last exit.
    """
    chosen = list(exits)
    numbers = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in chosen)
    ascending = numbers and chosen and chosen == sorted(set(chosen))
    if not ascending or num_exits not in (None, chosen[-1] + 1):
        raise ValueError(f'{argument}: got {chosen}; give ascending exits, integers in [0, N), the last among them')
    return tuple(map(int, chosen))
