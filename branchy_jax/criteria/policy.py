"""What goes for a policy, what is refused, and how one is written to a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.checkpoint import load_weights, save_weights
from branchy_jax.criteria import criterion as _criterion
from branchy_jax.criteria import learned as _learned
from branchy_jax.criteria import named as _named
from branchy_jax.criteria.criterion import check_criterion
from branchy_jax.types import Array, ExitPolicy

_ROOMS = (_criterion, _named, _learned)


def as_policy(given: Any, num_exits: int) -> ExitPolicy:
    """Returns what executors take as a policy whose thresholds are float32, or says what is wrong with it.

    NaN is refused where values can be seen; inside `jax.jit` they cannot, and NaN never exits.

    Args:
        given: an `ExitPolicy`; whatever holds one as ``policy``, such as an `OperatingPoint`; or thresholds
            ``[N - 1]`` alone, which are of `entropy`.
        num_exits: N.

    Raises:
        ValueError: neither of these, thresholds that are not one per side exit, NaN, or a criterion that was learned
            for another number of exits.

    Example:
        >>> as_policy([0.5], 2).criterion.name
        'entropy'
    """
    policy = getattr(given, 'policy', given)
    if not isinstance(policy, ExitPolicy):
        policy = ExitPolicy(_named.entropy, policy)
    check_criterion(policy.criterion, num_exits)
    policy = policy.replace(thresholds=_checked_thresholds(policy.thresholds, num_exits))
    for leaf in jax.tree.leaves(policy.criterion):
        if not isinstance(leaf, jax.core.Tracer) and np.isnan(np.asarray(leaf)).any():
            raise ValueError(f'criterion: {policy.criterion.name!r} has learned NaN; fit it again')
    return policy


def _checked_thresholds(thresholds: Any, num_exits: int) -> Array:
    if not isinstance(thresholds, jax.Array):
        try:
            thresholds = np.asarray(thresholds, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f'thresholds: expected {num_exits - 1} numbers, got {thresholds!r}') from error
    if thresholds.shape != (num_exits - 1,):
        raise ValueError(
            f'thresholds: a network with {num_exits} exits takes {num_exits - 1} thresholds, shape '
            f'({num_exits - 1},); got shape {tuple(thresholds.shape)}; the last exit always answers and has none'
        )
    if not jnp.issubdtype(thresholds.dtype, jnp.floating):
        raise ValueError(f'thresholds: expected floats, got {thresholds.dtype}')
    if not isinstance(thresholds, jax.core.Tracer) and np.isnan(values := np.asarray(thresholds)).any():
        raise ValueError(f'thresholds: got NaN in {values.tolist()}; use -inf to never exit and +inf to always do')
    return thresholds.astype(np.float32)  # a tie is decided alike, whatever the caller's precision


def save_policy(path: Path | str, policy: ExitPolicy) -> None:
    """Writes a policy as a safetensors file, atomically: its arrays, and what its criterion is made of.

    Args:
        path: the file to write.
        policy: with a criterion of `branchy_jax.criteria`.

    Raises:
        ValueError: a criterion that holds a function which is not one of `branchy_jax.criteria`.
    """
    record, arrays = encode_policy(policy)
    save_weights(path, arrays, metadata={'policy': json.dumps(record)})


def load_policy(path: Path | str) -> ExitPolicy:
    """Reads what `save_policy` wrote.

    Raises:
        ValueError: the file is missing, damaged, or holds no policy.
    """
    arrays, metadata = load_weights(path)
    if 'policy' not in metadata:
        raise ValueError(f'path: {path} holds no policy; expected a file that save_policy wrote')
    return decode_policy(json.loads(metadata['policy']), arrays)


def encode_policy(policy: ExitPolicy) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns what a policy is made of, as JSON holds it, and its arrays by the names used there."""
    arrays: dict[str, Array] = {}
    return {'criterion': _encode(policy.criterion, arrays), 'thresholds': _encode(policy.thresholds, arrays)}, arrays


def decode_policy(record: Mapping[str, Any], arrays: Mapping[str, Array]) -> ExitPolicy:
    """Makes the policy that `encode_policy` took apart.

    Raises:
        ValueError: a record of something else, or of a newer version.
    """
    try:
        return ExitPolicy(**{name: _decode(value, arrays) for name, value in record.items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'policy: cannot be read ({type(error).__name__}: {error}); is it of a newer version?'
        ) from error


def _encode(value: Any, arrays: dict[str, Array]) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _encode(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {'kind': _name_of(type(value)), 'fields': fields}
    if isinstance(value, (jax.Array, np.ndarray)):
        name = f'array{len(arrays)}'
        arrays[name] = np.asarray(value)
        return {'array': name}
    return {'function': _name_of(value)} if callable(value) else value


def _name_of(value: Callable[..., Any]) -> str:
    name = getattr(value, '__name__', repr(value))
    if not any(getattr(room, name, None) is value for room in _ROOMS):
        raise ValueError(
            f'policy: its criterion holds {name!r}, which is not one of branchy_jax.criteria and cannot be found again '
            'when the file is read; keep the thresholds alone, and name the criterion in your code'
        )
    return name


def _decode(record: Any, arrays: Mapping[str, Array]) -> Any:
    if not isinstance(record, dict):
        return record
    if 'array' in record:
        return jnp.asarray(arrays[record['array']])
    name = record['kind'] if 'kind' in record else record['function']
    named = (getattr(room, name, None) for room in _ROOMS)
    found = next(
        (value for value in named if getattr(value, '__module__', '').startswith('branchy_jax.criteria')), None
    )
    if found is None or isinstance(found, type) != ('kind' in record):
        raise KeyError(name)
    if 'function' in record:
        return found
    return found(**{field: _decode(value, arrays) for field, value in record['fields'].items()})
