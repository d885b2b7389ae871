"""How the library calls a model: its inputs, the flag that tells whether it trains, and its logits.

A model is a Flax Linen module that returns the logits of every exit, earliest first, or an object with the same two
methods, such as a `Model`: ``init(key, *inputs)`` and ``apply(variables, *inputs, train=…, frozen_trunk=…, rngs=…,
mutable=…)``.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from flax.core import FrozenDict

from branchy_jax.types import Array, Variables, num_rows

Flags = Mapping[str, tuple[Any, Any]]
"""Names of arguments and attributes that give a module its mode, with their values in evaluation and in training."""

MODE_FLAGS: Flags = {
    **dict.fromkeys(('train', 'training', 'is_train', 'is_training', 'update_stats'), (False, True)),
    **dict.fromkeys(('deterministic', 'inference', 'use_running_average'), (True, False)),
    **dict.fromkeys(('eval', 'is_eval', 'evaluate', 'is_evaluating'), (True, False)),
}

_FLAGS = (
    f'Arguments and attributes that give a module its mode are recognised by the names {", ".join(MODE_FLAGS)}; '
    'name others in attach(…, train={name: (value in evaluation, value in training)})'
)


def check_model(model: Any) -> None:
    """Refuses an object that is not a model.

    Raises:
        ValueError: a name, a bound module, or an object without ``init`` and ``apply``.
    """
    if not (callable(getattr(model, 'init', None)) and callable(getattr(model, 'apply', None))):
        raise ValueError(f'model: got {model!r}; give a Flax module, such as branchy_jax.models.create returns')
    if isinstance(model, nn.Module) and model.scope is not None:
        raise ValueError(f'model: got a {type(model).__name__} that is bound; give the module without its variables')


def init(model: Any, key: jax.Array, inputs: Any, flags: Flags = MODE_FLAGS) -> Variables:
    """Returns fresh variables of a model.

    Args:
        model: see the module's docstring.
        key: PRNG key.
        inputs: an array, tuple or dictionary; every leaf leads with B.
        flags: that give a Linen module its mode.
    """
    check_model(model)
    if not isinstance(model, nn.Module):
        return model.init(key, inputs)
    return _call_linen('init', model, {'params': key, 'dropout': key}, inputs, flags, train=False)


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
    flags: Flags = MODE_FLAGS,
    **options: Any,
) -> Any:
    """Applies any Linen module in a mode; returns what the module returns.

    Collections keep the structure that they have in ``variables``: what a module sows does not accumulate in them.

    Args:
        module: unbound.
        variables: of the module.
        inputs: as for `apply`.
        train: whether the module trains.
        frozen_trunk: is passed on to a module with such an argument.
        flags: that give the module its mode.
        **options: ``rngs`` and ``mutable`` of `flax.linen.Module.apply`.
    """
    if frozen_trunk and 'frozen_trunk' in parameters_of(module):
        options['frozen_trunk'] = True
    elif frozen_trunk:
        train = False
    result = _call_linen('apply', module, variables, inputs, flags, train=train, **options)
    if options.get('mutable', False) is False:
        return result
    kept = {
        name: _in_form(variables[name], values) if name in variables else values for name, values in result[1].items()
    }
    return result[0], kept


def _in_form(given: Any, changed: Any) -> Any:
    """Returns changed variables in the structure of the given ones."""
    if isinstance(given, Mapping):
        return {name: _in_form(value, changed.get(name, value)) for name, value in given.items()}
    structure: Any = jax.tree.structure(given)
    return changed if structure == jax.tree.structure(changed) else given


def _call_linen(
    method: str, module: nn.Module, first: Any, inputs: Any, flags: Flags, *, train: bool, **options: Any
) -> Any:
    positional, named = call_arguments(module, inputs, train=train, flags=flags)
    call = getattr(in_mode(module, train=train, flags=flags), method)
    with nn.intercept_methods(functools.partial(_pass_mode_on, train=train, flags=flags)):
        return _with_axes(functools.partial(call, first, *positional, **named, **options))


def _with_axes(call: Callable[[], Any]) -> Any:
    """Calls a function; device axes that the function names and no caller bound have size 1."""
    try:
        return call()
    except NameError as error:
        axis = re.search(r'unbound axis name: (\w+)', str(error))
        if axis is None:
            raise
    return _with_axes(jax.vmap(call, out_axes=None, axis_size=1, axis_name=axis[1]))


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
            f'__call__ an argument train, and BatchNorm use_running_average=not train. {_FLAGS}'
        ) from error
    except errors.InvalidRngError as error:
        raise ValueError(
            f'model: draws random numbers in evaluation, where no key is given: {_without_link(error)} An answer must '
            f'depend on its input alone; draw them where train is true. {_FLAGS}'
        ) from error
    except errors.ScopeParamShapeError as error:
        raise ValueError(f'inputs: their shape does not fit the variables: {_without_link(error)}') from error


def _without_link(error: Exception) -> str:
    return str(error).split(' (http')[0]


def call_arguments(
    module: Any, inputs: Any, *, train: bool, flags: Flags = MODE_FLAGS
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and named arguments of a call, mode flags included."""
    if isinstance(inputs, Mapping) and set(inputs) <= set(parameters_of(module)) - set(flags):
        return _with_flags(module, (), inputs, train=train, flags=flags)
    given = inputs if isinstance(inputs, tuple) and not hasattr(inputs, '_fields') else (inputs,)
    return _with_flags(module, given, {}, train=train, flags=flags)


def _with_flags(
    layer: Any, given: Sequence[Any], named: Mapping[str, Any], *, train: bool, flags: Flags
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with mode flags.

    These are the flags that the signature names and the layer does not hold as an attribute; where the signature takes
    any keyword and names no flag but ``update_stats``, ``train``. A flag between the inputs or right behind them goes
    by its place: `flax.linen.remat` and `flax.linen.jit` can take arguments as static by place alone.

    Args:
        layer: a module.
        given: positional arguments, without flags.
        named: arguments by name; flags among them stay.
        train: whether this is training.
        flags: that give a module its mode.
    """
    if isinstance(layer, (nn.Sequential, nnx.Sequential)):  # hands every argument on to its first layer
        return tuple(given), dict(named)
    parameters = parameters_of(layer)
    held = {name for name, values in flags.items() if is_flag(getattr(layer, name, None), values)}
    absent = {name: values[train] for name, values in flags.items() if name not in held and name not in named}
    own = {name: value for name, value in absent.items() if name in parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_any and not held and not set(own) - {'update_stats'}:
        own['train'] = train
    positional: list[Any] = []
    rest = list(given)
    for name, parameter in parameters.items():
        by_place = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if name in own and by_place:
            positional.append(own.pop(name))
        elif name != 'self' and rest and by_place and name not in named:
            positional.append(rest.pop(0))
        elif name != 'self':
            break
    return (*positional, *rest), {**own, **named}


def flags_with(others: Flags | None) -> Flags:
    """Returns the recognised mode flags and others.

    Raises:
        ValueError: a flag without its two values.
    """
    if any(not isinstance(values, tuple) or len(values) != 2 for values in (others or {}).values()):
        raise ValueError(f'train: got {others}; give for each name a tuple (value in evaluation, value in training)')
    return {**MODE_FLAGS, **(others or {})}


def is_flag(value: Any, values: tuple[Any, Any]) -> bool:
    """Whether a value is one of the two values of a flag."""
    return any(type(value) is type(known) and bool(value == known) for known in values)


def in_mode(module: nn.Module, *, train: bool, flags: Flags = MODE_FLAGS) -> nn.Module:
    """Returns an unbound module in which the mode flags held as attributes, at any depth, have a mode's values.

    Flags may lie in modules, configurations (data classes and other objects), dictionaries, tuples and
    `functools.partial`. A module that several attributes hold stays one module, with one set of parameters.
    """
    done: dict[int, Any] = {}

    def inside(value: Any) -> Any:
        if id(value) not in done:
            done[id(value)] = value  # a value that holds itself stays as it is
            parts = _parts(value)
            new = {name: inside(part) for name, part in parts.items()}
            for name, values in flags.items():
                if is_flag(parts.get(name), values) and not (_may_be_frozen(value) and parts[name] is True):
                    new[name] = values[train]
            if any(new[name] is not part for name, part in parts.items()):
                done[id(value)] = _rebuilt(value, new)
        return done[id(value)]

    return inside(module)


def _may_be_frozen(value: Any) -> bool:
    """Whether a value is a layer that its author can build for evaluation alone, or makes such layers."""
    kind = value.func if isinstance(value, functools.partial) else type(value)
    return isinstance(kind, type) and issubclass(kind, (nn.BatchNorm, nn.Dropout))


def _parts(value: Any) -> dict[Any, Any]:
    """Returns what a container, a `functools.partial`, a module or a configuration holds, by name or number."""
    if isinstance(value, (dict, FrozenDict)):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, functools.partial):
        return {**dict(enumerate(value.args)), **value.keywords}
    if isinstance(value, type):
        return {}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init and field.name != 'parent']
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    held = {} if callable(value) else getattr(value, '__dict__', {})
    return {name: part for name, part in held.items() if isinstance(part, (bool, str, dict, type(value)))}


def _rebuilt(value: Any, parts: Mapping[Any, Any]) -> Any:
    """Returns a copy of a value that holds other parts."""
    if isinstance(value, FrozenDict):
        return FrozenDict(parts)
    if isinstance(value, (tuple, list)):
        return type(value)(*parts.values()) if hasattr(value, '_fields') else type(value)(parts.values())
    if isinstance(value, functools.partial):
        keywords = {name: parts[name] for name in value.keywords}
        return functools.partial(value.func, *(parts[n] for n in range(len(value.args))), **keywords)
    if isinstance(value, nn.Module):
        return value.clone(**parts)
    new = copy.copy(value)
    if isinstance(value, dict):
        new.update(parts)
        return new
    for name, part in parts.items():
        object.__setattr__(new, name, part)  # also where the class is frozen
    return new


def _pass_mode_on(call: Any, args: Any, kwargs: Any, context: Any, *, train: bool, flags: Flags) -> Any:
    """Passes the mode to a layer that was passed none, or a flag that it does not take.

    A `flax.linen.Sequential` passes no flag to its layers; a layer around another may pass on every flag.
    """
    layer = context.module
    if context.method_name != '__call__' or not (kwargs or isinstance(layer.parent, nn.Sequential)):
        return call(*args, **kwargs)
    parameters = parameters_of(layer)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    fitting = {name: value for name, value in kwargs.items() if takes_any or name in parameters or name not in flags}
    if len(fitting) < len(kwargs) or isinstance(layer.parent, nn.Sequential):
        args, fitting = _with_flags(layer, args, fitting, train=train, flags=flags)
    return call(*args, **fitting)


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
