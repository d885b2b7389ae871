"""Plans as files: the choice and the measurements as JSON, without weights or code."""

import dataclasses
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from branchy_jax import program
from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria.policy import as_policy, decode_policy, encode_policy
from branchy_jax.inference.compiler_options import num_cores
from branchy_jax.inference.planning.candidates import Candidate
from branchy_jax.inference.planning.onnx_engine import check_onnxruntime
from branchy_jax.inference.planning.programs import Programs
from branchy_jax.inference.planning.times import SegmentTimes
from branchy_jax.types import Variables

_FORMAT = 4


def write_plan(path: Path | str, plan: Any, programs: Programs) -> None:
    """Writes a plan atomically.

    Args:
        path: the file.
        plan: a `Plan`.
        programs: of its network.

    Raises:
        ValueError: a criterion that cannot be stored.
    """
    record = {
        'format': _FORMAT,
        'made_with': _surroundings(programs.mesh, plan.chosen),
        'network': _identity(programs.model, programs.variables, programs.inputs),
        'chosen': plan.candidates.index(plan.chosen),
        'batch_size': plan.batch_size,
        'policy': encode_policy(plan.policy),
        'remark': plan.remark,
        'inputs': _encode_inputs(programs.inputs),
        'times': {name: values.tolist() for name, values in vars(plan.times).items()},
        'candidates': [dataclasses.asdict(candidate) for candidate in plan.candidates],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def read_plan(path: Path | str, model: Any, variables: Variables, mesh: Mesh | None) -> tuple[dict[str, Any], Any]:
    """Returns the fields of a `Plan` that `write_plan` wrote, and the shapes of its inputs.

    Raises:
        ValueError: no such file, a damaged one, one of version 0.2, or a plan of another device, of other versions, of
            another network or for ONNX Runtime where that is missing; the message says which.
    """
    try:
        record = json.loads(Path(path).read_text(encoding='utf-8'))
        written = record['format']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'path: cannot read a plan from {path} ({type(error).__name__}: {error})') from error
    if written != _FORMAT:
        formats = f'format {written}; this version reads format {_FORMAT}, and version 0.2 wrote 1 to 3'
        raise ValueError(f'path: the plan in {path} has {formats}; plan anew')
    try:
        fields, inputs = _decode(record), _decode_inputs(record['inputs'])
        there, network = dict(record['made_with']), record['network']
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'path: the plan in {path} is damaged ({type(error).__name__}: {error}); plan anew') from error
    if fields['chosen'].executor == 'onnx':
        check_onnxruntime(mesh)
    here = _surroundings(mesh, fields['chosen'])
    other = [f'{name} {there.get(name)} there, {here[name]} here' for name in here if there.get(name) != here[name]]
    if other:
        raise ValueError(f'path: the plan in {path} was measured elsewhere ({"; ".join(other)}); plan anew')
    if network != _identity(model, variables, inputs):
        differs = 'names, shapes or dtypes of its variables, or the multiply-accumulates of its stages, differ'
        raise ValueError(f'path: the plan in {path} is of another network: {differs}; plan anew')
    return fields, inputs


def _identity(model: Any, variables: Variables, inputs: Any) -> dict[str, Any]:
    """Returns paths, shapes and dtypes of all variables, and the multiply-accumulates of stages and heads."""
    leaves = jax.tree.leaves_with_path(variables)
    names = [[jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves]
    try:
        macs = program.stages(model, variables, inputs).macs
    except Exception as error:  # a network may raise anything at the variables or inputs of another one
        return {'error': str(error)}
    return {'leaves': names, 'macs': [macs.stages.tolist(), macs.exits.tolist()]}


def _surroundings(mesh: Mesh | None, chosen: Candidate) -> dict[str, Any]:
    """Returns everything that a measurement depends on beside the network."""
    device = jax.devices()[0]
    return {
        **versions('jax', 'jaxlib', 'branchy-jax', *(['onnxruntime'] if chosen.executor == 'onnx' else [])),
        'platform': device.platform,
        'device': device.device_kind,
        'processor': _processor(),
        'cores': num_cores(),
        'devices': 1 if mesh is None else mesh.size,
    }


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package; ``'unknown'`` for one that runs from its source folder."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = 'unknown'
    return installed


def _processor() -> str:
    """Returns the processor's name; JAX calls every one of them ``cpu``."""
    cpuinfo = Path('/proc/cpuinfo')  # of Linux
    match = re.search(r'model name\s*:\s*(.+)', cpuinfo.read_text(encoding='utf-8') if cpuinfo.exists() else '')
    return match.group(1) if match else platform.processor() or platform.machine()


def _encode_inputs(inputs: Any) -> Any:
    """Returns shapes as text in the tuples (JSON's lists) and dictionaries that hold them."""
    record = jax.tree.map(lambda spec: f'{spec.dtype}{list(spec.shape)}', inputs)
    structure: Any = jax.tree.structure(inputs)
    if structure != jax.tree.structure(_decode_inputs(record)):
        raise ValueError('inputs: a file of a plan holds an array, tuples and dictionaries with names as keys')
    return record


def _decode_inputs(record: Any) -> Any:
    if isinstance(record, str):
        dtype, shape = record[:-1].split('[')
        return jax.ShapeDtypeStruct(tuple(map(int, shape.split(','))), jnp.dtype(dtype))
    if isinstance(record, dict):
        return {str(name): _decode_inputs(value) for name, value in record.items()}
    return tuple(map(_decode_inputs, record))


def _decode_candidate(record: Mapping[str, Any]) -> Candidate:
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Candidate(**fields)


def _decode(record: Mapping[str, Any]) -> dict[str, Any]:
    candidates = tuple(map(_decode_candidate, record['candidates']))
    return {
        'chosen': candidates[record['chosen']],
        'policy': as_policy(decode_policy(record['policy'])),  # refuses NaN
        'remark': str(record['remark']),
        'batch_size': int(record['batch_size']),
        'candidates': candidates,
        'times': SegmentTimes(**{name: np.array(values) for name, values in record['times'].items()}),
    }
