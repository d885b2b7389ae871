"""The mode of a network: training or evaluation, given by flags among the arguments and attributes of its modules."""

import copy
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.core import FrozenDict

Flags = Mapping[str, tuple[Any, Any]]
"""Names of arguments and attributes that give a module its mode, with their values in evaluation and in training."""

MODE_FLAGS: Flags = {
    **dict.fromkeys(('train', 'training', 'is_train', 'is_training'), (False, True)),
    **dict.fromkeys(('enable_dropout', 'update_stats'), (False, True)),
    **dict.fromkeys(('deterministic', 'inference', 'use_running_average'), (True, False)),
    **dict.fromkeys(('eval', 'is_eval', 'evaluate', 'is_evaluating'), (True, False)),
}

ADVICE = (
    f'Arguments and attributes that give a module its mode are recognised by the names {", ".join(MODE_FLAGS)}; '
    'name others in attach(…, train={name: (value in evaluation, value in training)})'
)

_ANY_NUMBER = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

UNLESS_MEANT = f'Unless that is meant, its mode does not reach it. {ADVICE}'


def call_arguments(
    module: Any, inputs: Any, *, train: bool, flags: Flags = MODE_FLAGS
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and named arguments of a call, mode flags included.

    Raises:
        ValueError: the module's call takes other arguments. Random streams may be missing.
    """
    parameters = parameters_of(module)
    by_name = isinstance(inputs, Mapping) and set(inputs) <= set(parameters) - set(flags)
    in_order = inputs if isinstance(inputs, tuple) and not hasattr(inputs, '_fields') else (inputs,)
    given = ((), inputs) if by_name else (in_order, {})
    positional, named = _with_flags(module, *given, train=train, flags=flags)
    try:
        bound = inspect.Signature(list(parameters.values())).bind_partial(module, *positional, **named).arguments
        needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in _ANY_NUMBER]
        missing = [name for name in needed if name not in (*bound, 'rngs')]
        reason = f'missing {", ".join(missing)}' if missing else ''
    except TypeError as error:
        reason = str(error)
    if reason:
        raise ValueError(
            f'inputs: do not fit the call of {type(module).__name__} ({reason}); give a tuple in the order of its '
            'arguments or a dictionary by their names; name other mode flags in attach(…, train=…)'
        )
    return positional, named


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


def pass_mode_on(
    call: Any, args: Any, kwargs: Any, context: Any, *, train: bool, flags: Flags, frozen_trunk: bool = False
) -> Any:
    """Passes the mode to a layer that was passed none, or a flag that it does not take.

    A `flax.linen.Sequential` passes no flag to its layers; a layer around another may pass on every flag.
    """
    layer = context.module
    if context.method_name != '__call__':
        return call(*args, **kwargs)
    in_sequence = isinstance(layer.parent, nn.Sequential)
    if kwargs or in_sequence:
        parameters = parameters_of(layer)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        fitting = {name: x for name, x in kwargs.items() if takes_any or name in parameters or name not in flags}
        if len(fitting) < len(kwargs) or in_sequence:
            args, kwargs = _with_flags(layer, args, fitting, train=train, flags=flags)
    value = call(*args, **kwargs)
    if train and not frozen_trunk:
        warn_if_idle(layer, path_of(layer), args, value)
    return value


def warn_if_idle(layer: Any, place: str, given: Iterable[Any], value: Any) -> None:
    """Warns of a layer that drops units and returned what it was given, in training."""
    rates = [x for x in vars(layer).values() if isinstance(x, float) and 0 < x < 1]
    kind = type(layer).__name__
    if rates and 'drop' in kind.lower() and any(value is x for x in given):
        warnings.warn(f'model: {kind} {place!r} drops nothing in training. {UNLESS_MEANT}', stacklevel=2)


def path_of(module: nn.Module) -> str:
    """Returns the path of a module in its network; '' for the network itself and for an unbound module."""
    return '' if module.scope is None else '/'.join(module.path)


def parameters_of(module: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a module's call by name; of a `flax.nnx.bridge.ToLinen` those of its NNX module."""
    return inspect.signature(getattr(module, 'nnx_class', type(module)).__call__).parameters
