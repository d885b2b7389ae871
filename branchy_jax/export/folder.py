"""The folder that a network is exported to: one file per program, and a manifest that vouches for all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from branchy_jax.checkpoint import save_weights
from branchy_jax.criteria import as_policy
from branchy_jax.export.programs import (
    PLATFORMS,
    Program,
    Rewritten,
    batch_program,
    part_programs,
    plain_text,
    rewrite,
    staged_program,
)
from branchy_jax.inference.steps import check_chunk_sizes
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Normalization, Variables, input_specs

FORMAT = 1
"""Of the folder. A reader refuses what is newer than itself."""

_MANIFEST, _WEIGHTS = 'manifest.json', 'weights.safetensors'


def save(
    folder: Path | str,
    model: BranchyNet,
    variables: Variables,
    *,
    thresholds: Any,
    normalization: Normalization | None = None,
    batch_size: int = 64,
    chunk_size: int | Sequence[int] | None = None,
    exit_names: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Exports a trained network as StableHLO that runs without this library.

    The folder holds, each lowered for all platforms in one module:

    - ``staged``: one image, with N − 1 conditionals, so that later stages run only if needed;
    - ``batch``: a batch of fixed size, whose later stages run on survivors only;
    - ``stage 1``, ``exit 1``, …: every stage and head alone, for any number of images, to run in different places;
    - beside each of them an ``.mlir``, the same program as text for compilers other than XLA: plain StableHLO in the
      portable form, for one platform, stages and heads for one image. ``experiments/run_iree.py`` runs it with
      IREE, without jax;
    - ``manifest.json``: input, normalisation, thresholds, exits, the bytes that each cut would send per image,
      versions, and the SHA-256 of every file and of itself.

    Thresholds are an input of the programs: those in the manifest are the ones to start with. The network is rewritten
    as `branchy_jax.inference.optimize` does, in two forms, one for CPUs and one for other platforms. Weights of more
    than 16 MiB lie beside the programs as safetensors, and all platforms run one form.

    The folder is written under another name first, then renamed: it is whole or it is not there.

    Args:
        folder: to make; it must not exist.
        model: a network with an ``image_shape``.
        variables: trained.
        thresholds: a policy, whose criterion becomes part of the programs, or ``[N - 1]`` thresholds of entropy.
        normalization: that the images need; ``None`` if they need none.
        batch_size: of the batch program.
        chunk_size: images that a stage of the batch program takes at once, as for `branchy_jax.inference.compacted`;
            by default the batch for the first stage and a quarter of it for the others.
        exit_names: one for each exit.
        platforms: to lower for.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder exists, or an argument does not fit the network.

    Example:
        >>> import branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> place = Path(tempfile.mkdtemp()) / 'digits'
        >>> manifest = save(place, weights.model, weights.variables, platforms=['cpu'],
        ...                 thresholds=weights.operating_points[0].thresholds, normalization=weights.normalization)
        >>> manifest['cuts'][1]
        {'after': 'exit 1', 'bytes_per_image': 3136}
    """
    folder, policy = Path(folder), as_policy(thresholds, model.num_exits)
    criterion = policy.criterion
    names = [f'exit {n + 1}' for n in range(model.num_exits)] if exit_names is None else list(exit_names)
    _check(folder, model, names, platforms, batch_size)
    if chunk_size is None:
        chunk_size = [batch_size] + [max(1, batch_size // 4)] * (model.num_exits - 1)
    chunk_sizes = check_chunk_sizes(chunk_size, model.num_exits)
    network = rewrite(model, variables, platforms)
    parts, cuts = part_programs(network, criterion)

    def programs(network: Rewritten) -> list[Program]:
        whole = [staged_program(network, criterion), batch_program(network, criterion, batch_size, chunk_sizes)]
        return [*whole, *parts]

    in_text = zip(programs(network), programs(dataclasses.replace(network, on_cpu=None)), strict=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}-'))
    try:
        temporary.chmod(0o755)
        manifest = {
            'format': FORMAT,
            'versions': _versions(),
            'platforms': list(platforms),
            'input': {**_input(model.image_shape), **_normalization(normalization)},
            'criterion': criterion.name,
            'exits': names,
            # JSON has no infinity: thresholds that always or never let leave become text.
            'thresholds': [str(x) if math.isinf(x) else x for x in np.asarray(policy.thresholds).tolist()],
            'programs': {
                program.name: {**_write(temporary, program, platforms), 'text': _write_text(temporary, portable)}
                for program, portable in in_text
            },
            'cuts': cuts,
            'weights': None,
        }
        if not network.embedded:
            save_weights(temporary / _WEIGHTS, network.weights)
            manifest['weights'] = _described(temporary / _WEIGHTS)
        manifest['sha256'] = hashlib.sha256(canonical(manifest)).hexdigest()
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + '\n')
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def canonical(manifest: dict[str, Any]) -> bytes:
    """Returns the bytes that a manifest's own SHA-256 is of: everything but that, in one spelling."""
    rest = {key: value for key, value in manifest.items() if key != 'sha256'}
    return json.dumps(rest, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()


def _check(folder: Path, model: BranchyNet, names: list[str], platforms: Sequence[str], batch_size: int) -> None:
    try:
        import flatbuffers  # noqa: F401 - what jax.export writes with
    except ImportError as error:
        raise ValueError('export needs the flatbuffers package; pip install flatbuffers') from error
    if folder.exists():
        raise ValueError(f'folder: {folder} exists; choose another name, or delete it')
    if model.image_shape is None:
        raise ValueError('model: has no image_shape, which the programs need; build it with image_shape=…')
    if len(names) != model.num_exits or len(set(names)) != len(names):
        raise ValueError(f'exit_names: got {names}; give {model.num_exits} different names, one for each exit')
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f'platforms: got {list(platforms)}; choose from {", ".join(PLATFORMS)}')
    if batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected at least 1')


def _write(folder: Path, program: Program, platforms: Sequence[str]) -> dict[str, Any]:
    """Lowers a program, writes it, and returns what the manifest tells of it."""
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.weights)
    lower = jax.export.export(jax.jit(program.function), platforms=list(platforms))
    exported = lower(weights, *program.inputs.values())
    path = folder / f'{program.name.replace(" ", "_")}.stablehlo'
    path.write_bytes(exported.serialize())
    return {
        **_described(path),
        **program.details,
        'weights': sorted(weights),
        'inputs': [_array(name, spec) for name, spec in program.inputs.items()],
        'outputs': [_array(name, spec) for name, spec in zip(program.outputs, exported.out_avals, strict=True)],
    }


def _write_text(folder: Path, program: Program) -> dict[str, Any] | None:
    """Writes a program as text; ``None`` where it has none."""
    text = plain_text(program)
    if text is None:
        return None
    path = folder / f'{program.name.replace(" ", "_")}.mlir'
    path.write_text(text)
    return _described(path)


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {'file': path.name, 'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}


def _array(name: str, spec: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
    return {'name': name, 'shape': shape, 'dtype': str(spec.dtype)}


def _versions() -> dict[str, Any]:
    found = {name: _version(name) for name in ('branchy-jax', 'jax', 'jaxlib', 'flax')}
    config: Any = jax.config
    return {**found, 'calling_convention': config.jax_export_calling_convention_version}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        return 'unknown'


def _input(image_shape: Any) -> dict[str, Any]:
    specs = jax.tree.leaves_with_path(input_specs(image_shape, 1))
    found = [{'shape': list(spec.shape[1:]), 'dtype': str(spec.dtype)} for _, spec in specs]
    if len(found) == 1:
        return found[0]
    return {'arrays': [{'name': jax.tree_util.keystr(p), **f} for (p, _), f in zip(specs, found, strict=True)]}


def _normalization(normalization: Normalization | None) -> dict[str, Any]:
    if normalization is None:
        return {'normalization': None}
    mean, deviation = (np.asarray(value).tolist() for value in (normalization.mean, normalization.deviation))
    formula = '(pixels / 255 - mean) / deviation'
    return {'normalization': {'formula': formula, 'mean': mean, 'deviation': deviation}}
