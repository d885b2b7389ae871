"""How the library calls a model: its variables, inputs and logits.

A model is a Flax Linen module that returns the logits of every exit, earliest first, or an object with the same two
methods, such as a `Model`: ``init(key, *inputs)`` and ``apply(variables, *inputs, train=…, frozen_trunk=…, rngs=…,
mutable=…)``.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors

from branchy_jax import modes
from branchy_jax.types import Array, Variables, num_rows


def check_model(model: Any) -> None:
    """Refuses an object that is not a model.

    Raises:
        ValueError: a name, a bound module, or an object without ``init`` and ``apply``.
    """
    if not (callable(getattr(model, 'init', None)) and callable(getattr(model, 'apply', None))):
        raise ValueError(f'model: got {model!r}; give a Flax module, such as branchy_jax.models.create returns')
    if isinstance(model, nn.Module) and model.scope is not None:
        raise ValueError(f'model: got a {type(model).__name__} that is bound; give the module without its variables')


def init(model: Any, key: jax.Array, inputs: Any, flags: modes.Flags = modes.MODE_FLAGS) -> Variables:
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
    variables = _call_linen('init', model, {'params': key, 'dropout': key}, inputs, flags, train=False)
    # Perturbations have the size of the batch in their shapes, and serve gradients alone.
    return {name: leaves for name, leaves in variables.items() if name != 'perturbations'}


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
    flags: modes.Flags = modes.MODE_FLAGS,
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
    if frozen_trunk and 'frozen_trunk' in modes.parameters_of(module):
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
    method: str, module: nn.Module, first: Any, inputs: Any, flags: modes.Flags, *, train: bool, **options: Any
) -> Any:
    positional, named = modes.call_arguments(module, inputs, train=train, flags=flags)
    call = getattr(modes.in_mode(module, train=train, flags=flags), method)
    frozen = options.get('frozen_trunk', False)
    pass_on = functools.partial(modes.pass_mode_on, train=train, flags=flags, frozen_trunk=frozen)
    with nn.intercept_methods(pass_on):
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
            raise ValueError(
                f'model: exit {n} returns {arrived}; return logits [B, …, K] of a float dtype, also for one row (give '
                'squeeze its axis)'
            )
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


def name_of(model: Any) -> str:
    """Returns a short name of a model, without what it holds."""
    return type(model).__name__ if isinstance(model, nn.Module) else repr(model)


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
            f'__call__ an argument train, and BatchNorm use_running_average=not train. {modes.ADVICE}'
        ) from error
    except errors.InvalidRngError as error:
        raise ValueError(
            f'model: draws random numbers in evaluation, where no key is given: {_without_link(error)} An answer must '
            f'depend on its input alone; draw them where train is true. {modes.ADVICE}'
        ) from error
    except errors.ScopeParamShapeError as error:
        raise ValueError(
            'inputs: their shape does not fit the variables, or the variables are of another network: '
            f'{_without_link(error)}'
        ) from error
    except TypeError as error:
        if 'incompatible shapes' not in str(error):
            raise
        raise ValueError(f'inputs: {error} Change only the batch size, and keep it out of every collection') from error


def _without_link(error: Exception) -> str:
    return str(error).split(' (http')[0].rstrip('.') + '.'


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
