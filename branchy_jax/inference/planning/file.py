"""Plans as files: the choice and the measurements as JSON, no code; and whether they hold where they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria.policy import decode_policy, encode_policy
from branchy_jax.inference.compiler_options import num_cores
from branchy_jax.inference.planning.candidates import Candidate, Way
from branchy_jax.inference.planning.segment_times import SegmentTimes
from branchy_jax.measure import Ratio
from branchy_jax.models.branchy import naming_variables
from branchy_jax.types import ExitPolicy, Variables, input_specs

_FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a file holds of a plan.

    Attributes:
        way: the choice.
        policy: as the plan applies it.
        batch_size: that it was planned for.
        inputs: ``jax.ShapeDtypeStruct [1, …]`` of each array of an input, in the order of the pytree's leaves.
        candidates: what was found out.
        times: of stages and heads.
    """

    way: Way
    policy: ExitPolicy
    batch_size: int
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    candidates: tuple[Candidate, ...]
    times: SegmentTimes


def write_plan(path: Path | str, kept: Kept, model: Any, variables: Variables, devices: int) -> None:
    """Writes a plan atomically.

    Args:
        path: the file.
        kept: what to write.
        model: the network that was planned for, not the rewritten one.
        variables: of ``model``.
        devices: that share a batch.

    Raises:
        ValueError: a criterion that cannot be written.
    """
    policy, arrays = encode_policy(kept.policy)
    record = {
        'format': _FORMAT,
        'made_with': _surroundings(devices),
        'network': fingerprint(model, variables, kept.inputs),
        'way': dataclasses.asdict(kept.way),
        'batch_size': int(kept.batch_size),
        'policy': policy,
        'arrays': {name: _encode(value) for name, value in arrays.items()},
        'inputs': [{'shape': list(spec.shape[1:]), 'dtype': str(spec.dtype)} for spec in kept.inputs],
        'times': {field.name: _encode(getattr(kept.times, field.name)) for field in dataclasses.fields(SegmentTimes)},
        'candidates': [_encode_candidate(candidate) for candidate in kept.candidates],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def read_plan(path: Path | str, model: Any, variables: Variables, devices: int) -> Kept:
    """Reads what `write_plan` wrote.

    Raises:
        ValueError: no such file, damaged, or of another device, other versions or another network; the message says
            what was there and what is here. Variables that are none of the model's.
    """
    try:
        record = json.loads(Path(path).read_text(encoding='utf-8'))
        written = record['format']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'path: cannot read a plan from {path} ({type(error).__name__}: {error})') from error
    if written != _FORMAT:
        raise ValueError(f'path: the plan in {path} has format {written}, this version reads {_FORMAT}; plan anew')
    try:
        kept = _decode_plan(record)
        there, network = dict(record['made_with']), record['network']
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'path: the plan in {path} is damaged ({type(error).__name__}: {error}); plan anew') from error
    here = _surroundings(devices)
    other = [f'{name} {there.get(name)} there, {here.get(name)} here' for name in here if there.get(name) != here[name]]
    if other:
        raise ValueError(f'path: the plan in {path} was measured elsewhere ({"; ".join(other)}); plan anew')
    differs = ValueError(
        f'path: the plan in {path} is of another network, whose layers, shapes or exits differ from those of this '
        'model and its variables; plan anew'
    )
    with naming_variables(variables):
        try:
            same = network == fingerprint(model, variables, kept.inputs)
        except (TypeError, ValueError) as error:  # inputs of the plan's network do not fit this one
            raise differs from error
    if not same:
        raise differs
    return kept


def fingerprint(model: Any, variables: Variables, inputs: Sequence[jax.ShapeDtypeStruct]) -> str:
    """Returns what tells networks apart: their program for one input, and names and shapes of their variables."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    program = str(jax.make_jaxpr(model.apply)(shapes, inputs_of(model, inputs)))
    names = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in jax.tree.leaves_with_path(shapes)
    ]
    # Functions in it show where they lie in memory, which is another place in every process.
    text = re.sub(r' at 0x[0-9a-f]+', '', program) + repr(names)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs_of(model: Any, leaves: Sequence[Any]) -> Any:
    """Returns one input of a network from its arrays, or from what describes these."""
    if model.image_shape is None:
        return leaves[0]
    return jax.tree.unflatten(jax.tree.structure(input_specs(model.image_shape, 1)), leaves)


def _surroundings(devices: int) -> dict[str, Any]:
    """Names everything that a measurement depends on, but the network."""
    device = jax.devices()[0]
    return {
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'branchy-jax': _version(),
        'platform': device.platform,
        'device': device.device_kind,
        'processor': _processor(),
        'cores': num_cores(),
        'devices': devices,
    }


def _version() -> str:
    try:
        return importlib.metadata.version('branchy-jax')
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        return 'unknown'


def _processor() -> str:
    """Returns the processor's name; JAX calls every one of them ``cpu``."""
    try:
        found = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
    except OSError:  # not Linux
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _encode(values: Any) -> dict[str, Any]:
    """Returns an array as JSON holds it; numbers that JSON has not are strings."""
    values = np.asarray(values)
    flat = [
        value if isinstance(value, (bool, int)) or math.isfinite(value) else str(value)
        for value in values.ravel().tolist()
    ]
    return {'dtype': str(values.dtype), 'shape': list(values.shape), 'values': flat}


def _decode(record: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(record['dtype'])
    return np.array([dtype.type(value) for value in record['values']], dtype).reshape(record['shape'])


def _encode_candidate(candidate: Candidate) -> dict[str, Any]:
    ratio = candidate.slowdown
    return {
        'way': dataclasses.asdict(candidate.way),
        'predicted_ms': None if math.isnan(candidate.predicted_ms) else float(candidate.predicted_ms),
        'measured_ms': candidate.measured_ms,
        'slowdown': [ratio.median, ratio.low, ratio.high],
        'finalist': candidate.finalist,
    }


def _decode_candidate(record: Mapping[str, Any]) -> Candidate:
    predicted = record['predicted_ms']
    return Candidate(
        way=_decode_way(record['way']),
        predicted_ms=float('nan') if predicted is None else float(predicted),
        measured_ms=float(record['measured_ms']),
        slowdown=Ratio(*record['slowdown']),
        finalist=bool(record['finalist']),
    )


def _decode_way(record: Mapping[str, Any]) -> Way:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    return Way(**fields)


def _decode_plan(record: Mapping[str, Any]) -> Kept:
    arrays = {name: _decode(value) for name, value in record['arrays'].items()}
    return Kept(
        way=_decode_way(record['way']),
        policy=decode_policy(record['policy'], arrays),
        batch_size=int(record['batch_size']),
        inputs=tuple(jax.ShapeDtypeStruct((1, *spec['shape']), np.dtype(spec['dtype'])) for spec in record['inputs']),
        candidates=tuple(map(_decode_candidate, record['candidates'])),
        times=SegmentTimes(**{name: _decode(value) for name, value in record['times'].items()}),
    )
