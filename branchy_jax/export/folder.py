"""The folder that a network is exported to: one file per program, and a manifest with the checksums of all of them."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from branchy_jax import calling, program
from branchy_jax.checkpoint import save_weights, write_atomically
from branchy_jax.criteria.policy import as_policy, encode_policy
from branchy_jax.export.programs import PLATFORMS, Network, Program, plain_text, rewrite
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.onnx_program import described
from branchy_jax.inference.planning.plan import versions
from branchy_jax.inference.staged import staged
from branchy_jax.types import Normalization, Variables

_FORMAT = 2  # of the folder; a reader refuses every other one
_MANIFEST, _WEIGHTS = 'manifest.json', 'weights.safetensors'


def save(
    folder: Path | str,
    model: Any,
    variables: Variables,
    policy: Any,
    *,
    inputs: Any,
    normalization: Normalization | None = None,
    batch_size: int = 64,
    chunk_size: int | Sequence[int] | None = None,
    exit_names: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Exports a trained network as StableHLO that runs without this library.

    The folder holds these programs, each lowered for all platforms in one module:

    - ``staged``: one image, with N − 1 conditionals, so that later stages run only if needed;
    - ``batch``: a batch of fixed size, whose later stages run on the remaining rows only;
    - ``stage 0``, ``exit 0``, …: every stage and head alone, for any number of images, to run on different machines;
    - beside each of them an ``.mlir``, the same program as text for compilers other than XLA: plain StableHLO in the
      portable form, for one platform, stages and heads for one image. ``experiments/run_exported.py --iree`` runs
      it with IREE, without jax;
    - ``manifest.json``: input, normalisation, policy, exits, the bytes per image that each stage receives, versions,
      and the SHA-256 of every file and of the manifest itself.

    Thresholds are an input of the programs: those in the manifest are the ones to start with. The network is rewritten
    as `branchy_jax.inference.optimize` does, in two forms, one for CPUs and one for other platforms. Weights of more
    than 16 MiB lie beside the programs as safetensors; all platforms then run one form.

    The folder is written under another name first, then renamed, so that a failed export leaves no folder.

    Args:
        folder: to make; it must not exist.
        model: a network with N exits that runs at any batch size.
        variables: trained.
        policy: its criterion becomes part of the programs; ``[N - 1]`` thresholds alone are of entropy.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`.
        normalization: that the images need; ``None`` if they need none.
        batch_size: of the batch program.
        chunk_size: images that a stage of the batch program takes at once, as for `branchy_jax.inference.compacted`;
            by default the batch for the first stage and a quarter of it for the others.
        exit_names: one for each exit.
        platforms: some of cpu, cuda and tpu, to lower for.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder exists, or an argument does not fit the network.

    Example:
        >>> import tempfile, branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> folder = Path(tempfile.mkdtemp()) / 'digits'
        >>> manifest = save(folder, weights.model, weights.variables, weights.operating_points[0],
        ...                 inputs=weights.inputs, normalization=weights.normalization, platforms=['cpu'])
        >>> manifest['cuts'][1]
        {'after': 'exit 0', 'bytes_per_image': 3136}
    """
    folder = Path(folder)
    stages = program.stages(model, variables, inputs)
    policy = as_policy(policy, stages.num_exits)
    names = [f'exit {n}' for n in range(stages.num_exits)] if exit_names is None else list(exit_names)
    _check(folder, stages.num_exits, names, platforms, batch_size)
    if chunk_size is None:
        chunk_size = [batch_size] + [max(1, batch_size // 4)] * (stages.num_exits - 1)
    chunk_sizes = compacted(model, chunk_size=chunk_size).network.chunk_sizes(stages.num_exits)
    network = rewrite(model, variables, policy.criterion, inputs, platforms)
    parts, cuts = network.parts()
    programs = [*_whole(network, batch_size, chunk_sizes), *parts]
    config: Any = jax.config
    convention = {'calling_convention': config.jax_export_calling_convention_version}
    manifest = {
        'format': _FORMAT,
        'versions': versions('branchy-jax', 'jax', 'jaxlib', 'flax') | convention,
        'platforms': list(platforms),
        'input': _input(inputs) | {'normalization': None if normalization is None else described(normalization)},
        'criterion': policy.criterion.name,
        'exits': names,
        # JSON has no infinity: thresholds that are not finite become text.
        'thresholds': [str(x) if math.isinf(x) else x for x in np.asarray(policy.thresholds).tolist()],
        'policy': None,
        'cuts': cuts,
        'weights': None,
    }
    with contextlib.suppress(ValueError):  # a criterion of the user's own is not stored
        manifest['policy'] = encode_policy(policy)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        manifest['programs'] = {part.name: _write(temporary, part, platforms) for part in programs}
        if network.weights:
            save_weights(temporary / _WEIGHTS, network.weights)
            manifest['weights'] = _described(temporary / _WEIGHTS)
        manifest['sha256'] = hashlib.sha256(canonical(manifest)).hexdigest()
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + '\n')

    write_atomically(folder, write)
    return manifest


def _whole(network: Network, batch_size: int, chunk_sizes: Sequence[int]) -> list[Program]:
    """Returns the programs of one image and of a batch."""
    image = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), network.inputs)
    images = {'images': calling.with_batch(network.inputs, batch_size)}
    in_batches = functools.partial(compacted, chunk_size=tuple(chunk_sizes), on_host=False)
    return [
        network.whole('staged', staged, {'image': image}, conditionals=network.stages.num_exits - 1),
        network.whole('batch', in_batches, images, batch_size=batch_size, chunk_sizes=list(chunk_sizes)),
    ]


def canonical(manifest: dict[str, Any]) -> bytes:
    """Returns the bytes that a manifest's own SHA-256 is of: all other entries, with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != 'sha256'}
    return json.dumps(rest, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()


def _check(folder: Path, num_exits: int, names: list[str], platforms: Sequence[str], batch_size: int) -> None:
    try:
        import flatbuffers  # noqa: F401 - what jax.export writes with
    except ImportError as error:
        raise ValueError("export needs the flatbuffers package; pip install '.[export]' in a clone") from error
    if folder.exists():
        raise ValueError(f'folder: {folder} exists; choose another name, or delete it')
    if len(names) != num_exits or len(set(names)) != len(names):
        raise ValueError(f'exit_names: got {names}; give {num_exits} different names, one for each exit')
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f'platforms: got {list(platforms)}; choose from {", ".join(PLATFORMS)}')
    if batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected at least 1')


def _write(folder: Path, part: Program, platforms: Sequence[str]) -> dict[str, Any]:
    """Writes a program as a module and as text, and returns its entry of the manifest."""
    lower = jax.export.export(jax.jit(part.function), platforms=list(platforms))
    exported, text = lower(calling.specs(part.weights), *part.inputs.values()), plain_text(part)
    name = part.name.replace(' ', '_')
    module_path, text_path = folder / f'{name}.stablehlo', folder / f'{name}.mlir'
    module_path.write_bytes(exported.serialize())
    if text is not None:
        text_path.write_text(text)
    outputs = zip(part.outputs, exported.out_avals, strict=True)
    return {
        **_described(module_path),
        **part.details,
        'weights': sorted(part.weights),
        'inputs': [_array(name, spec.shape, spec.dtype) for name, spec in part.inputs.items()],
        'outputs': [_array(name, spec.shape, spec.dtype) for name, spec in outputs],
        'text': None if text is None else _described(text_path),
    }


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {'file': path.name, 'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}


def _array(name: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else 'batch' for size in shape]
    return {'name': name, 'shape': sizes, 'dtype': str(dtype)}


def _input(inputs: Any) -> dict[str, Any]:
    specs = jax.tree.leaves_with_path(calling.specs(inputs))
    arrays = [_array(jax.tree_util.keystr(path), spec.shape[1:], spec.dtype) for path, spec in specs]
    return {'arrays': arrays} if len(arrays) > 1 else {name: arrays[0][name] for name in ('shape', 'dtype')}
