"""The folder that a network is exported to: one file per program, and a manifest with the checksums of all of them."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
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
from branchy_jax.inference.onnx_program import check_onnx, described, onnx_part, untranslatable_named
from branchy_jax.inference.planning.plan import versions
from branchy_jax.inference.staged import staged
from branchy_jax.types import ExitPolicy, Normalization, Variables

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
        {'after': 'exit 0', 'arrays': ['hidden_0'], 'bytes_per_image': 3136}
    """
    if batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected at least 1')
    policy, manifest = _start(folder, model, variables, policy, inputs, normalization, exit_names, platforms)
    if chunk_size is None:
        chunk_size = [batch_size] + [max(1, batch_size // 4)] * (len(manifest['exits']) - 1)
    chunk_sizes = compacted(model, chunk_size=chunk_size).network.chunk_sizes(len(manifest['exits']))
    network = rewrite(model, variables, policy.criterion, inputs, platforms)
    whole = _whole(network, batch_size, chunk_sizes)
    return _finish(folder, manifest, network, whole, functools.partial(_write, platforms=platforms))


def save_stages(
    folder: Path | str,
    model: Any,
    variables: Variables,
    policy: Any,
    *,
    inputs: Any,
    format: str = 'onnx',  # noqa: A002 - the field's own word
    normalization: Normalization | None = None,
    exit_names: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Exports a trained network in parts: a file for every stage and every head, to run on different machines.

    Every file takes any number of images. ``stage_0`` takes ``image`` and returns ``hidden_0``; ``exit_0`` takes
    ``hidden_0`` and returns ``label``, ``logits`` and ``uncertainty``, and ``carry_0`` if the criterion uses earlier
    exits; ``stage_1`` takes ``hidden_0``, and so on. Several arrays of one name are numbered, ``hidden_0_1``, …. The
    criterion is part of the heads: a reader compares ``uncertainty < threshold``, and the last exit always answers.

    ``manifest.json`` is that of `save`: the order of the files, the arrays of each file with shapes and dtypes, input,
    normalisation, criterion, thresholds, the arrays and the bytes per image that each cut hands on, and the SHA-256 of
    every file and of the manifest itself. `experiments/run_exported.py` verifies the folder and runs it, with numpy and
    onnxruntime, or with numpy and jax. A weight that two parts read is in the files of both.

    Args:
        folder: to make; it must not exist.
        model: a network with N exits that runs at any batch size.
        variables: trained.
        policy: its criterion becomes part of the heads; ``[N - 1]`` thresholds alone are of entropy.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`.
        format: ``'onnx'``, or ``'stablehlo'`` for the stages and heads that `save` writes, without whole networks.
        normalization: that the images need, for the manifest; ``None`` if they need none.
        exit_names: one for each exit.
        platforms: some of cpu, cuda and tpu, to lower StableHLO for.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder exists, an argument does not fit the network, or a part has no ONNX form (the message
            names the primitive and its place).

    Example:
        >>> import tempfile, branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> folder = Path(tempfile.mkdtemp()) / 'digits'
        >>> manifest = save_stages(folder, weights.model, weights.variables, weights.operating_points[0],
        ...                        inputs=weights.inputs, normalization=weights.normalization)
        >>> manifest['order'], manifest['cuts'][1]['bytes_per_image']
        (['stage 0', 'exit 0', 'stage 1', 'exit 1'], 3136)
    """
    if format not in ('onnx', 'stablehlo'):
        raise ValueError(f"format: got {format!r}; choose 'onnx' or 'stablehlo'")
    is_onnx = format == 'onnx'
    policy, manifest = _start(
        folder, model, variables, policy, inputs, normalization, exit_names, None if is_onnx else platforms
    )
    if is_onnx:
        check_onnx(variables, [], None)
    network = rewrite(model, variables, policy.criterion, inputs, platforms=())
    if not is_onnx:
        return _finish(folder, manifest, network, [], functools.partial(_write, platforms=platforms))
    network = dataclasses.replace(network, weights={})  # all are constants of the files
    with untranslatable_named(model, variables, calling.with_batch(inputs, program.BATCH), policy.criterion):
        return _finish(folder, manifest, network, [], _write_onnx)


def _start(
    folder: Path | str,
    model: Any,
    variables: Variables,
    policy: Any,
    inputs: Any,
    normalization: Normalization | None,
    exit_names: Sequence[str] | None,
    platforms: Sequence[str] | None,
) -> tuple[ExitPolicy, dict[str, Any]]:
    """Checks the arguments of an export, and returns the policy and the manifest so far; no platforms for ONNX."""
    num_exits = program.stages(model, variables, inputs).num_exits
    policy = as_policy(policy, num_exits)
    names = [f'exit {n}' for n in range(num_exits)] if exit_names is None else list(exit_names)
    _check(Path(folder), num_exits, names, platforms)
    config: Any = jax.config
    convention = {'calling_convention': config.jax_export_calling_convention_version}
    manifest = {
        'format': _FORMAT,
        'versions': versions('branchy-jax', 'jax', 'jaxlib', 'flax') | convention,
        'platforms': list(platforms or []),
        'input': _input(inputs) | {'normalization': None if normalization is None else described(normalization)},
        'criterion': policy.criterion.name,
        'exits': names,
        # JSON has no infinity: thresholds that are not finite become text.
        'thresholds': [str(x) if math.isinf(x) else x for x in np.asarray(policy.thresholds).tolist()],
        'policy': None,
        'weights': None,
    }
    with contextlib.suppress(ValueError):  # a criterion of the user's own is not stored
        manifest['policy'] = encode_policy(policy)
    return policy, manifest


def _finish(
    folder: Path | str,
    manifest: dict[str, Any],
    network: Network,
    whole: Sequence[Program],
    write: Callable[[Path, Program], dict[str, Any]],
) -> dict[str, Any]:
    """Writes the programs of whole networks and those of all parts, and returns the manifest."""
    parts, manifest['cuts'] = network.parts()
    manifest['order'] = [part.name for part in parts]

    def write_all(temporary: Path) -> None:
        temporary.mkdir()
        manifest['programs'] = {part.name: write(temporary, part) for part in [*whole, *parts]}
        if network.weights:
            save_weights(temporary / _WEIGHTS, network.weights)
            manifest['weights'] = _described(temporary / _WEIGHTS)
        manifest['sha256'] = hashlib.sha256(canonical(manifest)).hexdigest()
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + '\n')

    write_atomically(folder, write_all)
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


def _check(folder: Path, num_exits: int, names: list[str], platforms: Sequence[str] | None) -> None:
    """Refuses impossible arguments; ``platforms`` is ``None`` for ONNX."""
    if folder.exists():
        raise ValueError(f'folder: {folder} exists; choose another name, or delete it')
    if len(names) != num_exits or len(set(names)) != len(names):
        raise ValueError(f'exit_names: got {names}; give {num_exits} different names, one for each exit')
    if platforms is None:
        return
    try:
        import flatbuffers  # noqa: F401 - what jax.export writes with
    except ImportError as error:
        raise ValueError("export needs the flatbuffers package; pip install '.[export]' in a clone") from error
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f'platforms: got {list(platforms)}; choose from {", ".join(PLATFORMS)}')


def _write(folder: Path, part: Program, platforms: Sequence[str]) -> dict[str, Any]:
    """Writes a program as a module and as text, and returns its entry of the manifest."""
    lower = jax.export.export(jax.jit(part.function), platforms=list(platforms))
    exported, text = lower(calling.specs(part.weights), *part.inputs.values()), plain_text(part)
    module_path, text_path = _path(folder, part, 'stablehlo'), _path(folder, part, 'mlir')
    module_path.write_bytes(exported.serialize())
    if text is not None:
        text_path.write_text(text)
    return _entry(module_path, part, exported.out_avals, None if text is None else _described(text_path))


def _write_onnx(folder: Path, part: Program) -> dict[str, Any]:
    """Writes a program as an ONNX file, and returns its entry of the manifest."""
    content, results = onnx_part(functools.partial(part.portable, part.weights), part.inputs, part.outputs)
    path = _path(folder, part, 'onnx')
    path.write_bytes(content)
    return _entry(path, part, results, None)


def _path(folder: Path, part: Program, suffix: str) -> Path:
    return folder / f'{part.name.replace(" ", "_")}.{suffix}'


def _entry(path: Path, part: Program, results: Sequence[Any], text: dict[str, Any] | None) -> dict[str, Any]:
    outputs = zip(part.outputs, results, strict=True)
    return {
        **_described(path),
        **part.details,
        'weights': sorted(part.weights),
        'inputs': [_array(name, spec.shape, spec.dtype) for name, spec in part.inputs.items()],
        'outputs': [_array(name, spec.shape, spec.dtype) for name, spec in outputs],
        'text': text,
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
