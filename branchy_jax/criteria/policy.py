"""Policies: what is accepted as one, what is refused, and the one form in which a policy is stored."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria import criterion as plain
from branchy_jax.criteria import learned  # noqa: F401 - its kind of criterion may be stored
from branchy_jax.criteria.criterion import Criterion, as_criterion, check_criterion, entropy
from branchy_jax.types import Array, ExitPolicy

# What a stored policy may name. While this file is imported, the only kinds of criteria are the library's own.
_FUNCTIONS = (plain.most_likely_class, plain.entropy_of_logits, plain.max_probability_of_logits, plain.margin_of_logits)
_NAMED: list[Any] = [dict, *Criterion.__subclasses__(), *_FUNCTIONS]
_STORED = {named.__name__.removeprefix('_'): named for named in _NAMED}


def as_policy(given: Any, num_exits: int | None = None) -> ExitPolicy:
    """Returns a policy with float32 thresholds and a criterion that is called.

    NaN is refused where values can be seen. Inside `jax.jit` they cannot; there NaN never exits.

    Args:
        given: an `ExitPolicy`; an object with an attribute ``policy``, such as an `OperatingPoint`; or thresholds
            ``[N - 1]`` alone, which are of `entropy`.
        num_exits: N, if known.

    Raises:
        ValueError: none of these, thresholds that are not one per side exit, NaN, or a criterion that was fitted for
            another number of exits.

    Example:
        >>> as_policy([0.5], 2).criterion.name
        'entropy'
    """
    policy = getattr(given, 'policy', given)
    if not isinstance(policy, ExitPolicy):
        policy = ExitPolicy(entropy, policy)
    policy = ExitPolicy(as_criterion(policy.criterion), _as_float32(policy.thresholds))
    if num_exits is not None:
        check_policy(policy, num_exits)
    if _has_nan(policy.thresholds):
        values = np.asarray(policy.thresholds).tolist()
        raise ValueError(f'thresholds: got NaN in {values}; use -inf to never exit and +inf to always do')
    if any(_has_nan(leaf) for leaf in jax.tree.leaves(policy.criterion)):
        raise ValueError(f'criterion: {policy.criterion.name!r} has learned NaN; fit it again')
    return policy


def check_policy(policy: ExitPolicy, num_exits: int) -> None:
    """Raises ValueError if a policy does not fit a network of N exits; looks at shapes alone, so also under jit."""
    shape = np.shape(policy.thresholds)
    if shape != (num_exits - 1,):
        expected = f'a network with {num_exits} exits takes {num_exits - 1} thresholds'
        raise ValueError(f'thresholds: {expected}; got shape {shape}; the last exit always answers and has none')
    check_criterion(policy.criterion, num_exits)


def save_policy(path: Path | str, policy: Any) -> None:
    """Writes a policy as a JSON file, atomically.

    Args:
        path: the file to write.
        policy: whatever executors take as a policy, with a criterion of `branchy_jax.criteria`.

    Raises:
        ValueError: no policy, or a criterion with a function that is not one of `branchy_jax.criteria`.
    """
    text = json.dumps(encode_policy(as_policy(policy)), allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def load_policy(path: Path | str) -> ExitPolicy:
    """Reads a file that `save_policy` wrote.

    Raises:
        ValueError: the file is missing, damaged, holds no policy, or was written by version 0.2.
    """
    try:
        return decode_policy(json.loads(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        advice = 'give a file that save_policy of this version wrote; version 0.2 reads its own safetensors files'
        raise ValueError(f'path: {path} holds no policy ({error}); {advice}') from error


def encode_policy(policy: ExitPolicy) -> dict[str, Any]:
    """Returns a policy as JSON can hold it: arrays as lists, in which values that are not finite are text.

    Raises:
        ValueError: a criterion with a function that is not one of `branchy_jax.criteria`.
    """
    return {'criterion': _encode(as_criterion(policy.criterion)), 'thresholds': _encode(np.asarray(policy.thresholds))}


def decode_policy(record: Mapping[str, Any]) -> ExitPolicy:
    """Builds the policy that `encode_policy` took apart, or that of an operating point on a card of version 0.2.

    Args:
        record: a dictionary with ``criterion`` and ``thresholds``; other keys are ignored.

    Raises:
        ValueError: a record of something else, or of a newer version.
    """
    try:
        if isinstance(record['thresholds'], list):
            return ExitPolicy(_criterion_of_card(record), jnp.asarray(np.array(record['thresholds'], np.float32)))
        return ExitPolicy(as_criterion(_decode(record['criterion'])), _decode(record['thresholds']))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'policy: cannot be read ({error!r}); is it of a newer version?') from error


def _as_float32(thresholds: Any) -> Array:
    # One precision for all callers, so that a tie is decided alike.
    if isinstance(thresholds, jax.Array):
        if not jnp.issubdtype(thresholds.dtype, jnp.floating):
            raise ValueError(f'thresholds: expected floats, got {thresholds.dtype}')
        return thresholds if thresholds.dtype == np.float32 else thresholds.astype(np.float32)
    try:
        return np.asarray(thresholds, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f'thresholds: expected a number for each side exit, got {thresholds!r}') from error


def _has_nan(leaf: Array) -> bool:
    return not isinstance(leaf, jax.core.Tracer) and bool(np.isnan(np.asarray(leaf)).any())


def _criterion_of_card(point: Mapping[str, Any]) -> Criterion:
    """Returns the criterion of an operating point as version 0.2 wrote it; only plain criteria of logits are read."""
    if 'policy' not in point:  # the first cards
        name = point['criterion']
        return as_criterion(_STORED[f'{name.replace(" ", "_")}_of_logits'], name=name)
    fields = point['policy']['criterion']['fields']
    if fields['pool'] != {'function': 'mean_over_pixels'}:
        raise KeyError(fields['pool'])
    return as_criterion(_STORED[fields['uncertainty_of']['function']], name=fields['name'])


def _encode(value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(value)
        numbers = [number if math.isfinite(number) else str(number) for number in array.ravel().tolist()]
        return {'dtype': array.dtype.name, 'shape': list(array.shape), 'values': numbers}
    if isinstance(value, (Criterion, dict)):
        fields = value if isinstance(value, dict) else vars(value)
        return {'kind': _name_of(type(value)), 'fields': {name: _encode(field) for name, field in fields.items()}}
    return {'function': _name_of(value)} if callable(value) else value


def _name_of(thing: Any) -> str:
    name = getattr(thing, '__name__', repr(thing)).removeprefix('_')
    if _STORED.get(name) is not thing:
        advice = 'store the thresholds alone, and name the criterion in your code'
        raise ValueError(f'policy: its criterion holds {name!r}, which is not one of branchy_jax.criteria; {advice}')
    return name


def _decode(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    if 'values' in record:
        numbers = np.array(record['values'], float).reshape(record['shape'])
        return jnp.asarray(numbers.astype(jnp.dtype(record['dtype'])))
    if 'function' in record:
        return _STORED[record['function']]
    return _STORED[record['kind']](**{name: _decode(field) for name, field in record['fields'].items()})
