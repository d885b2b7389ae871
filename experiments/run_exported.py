"""Runs what `branchy_jax.export` wrote, without this library: copy this file to where it is to run.

    python run_exported.py FOLDER --images=images.npy [--program=staged] [--iree] [--expect=answers.npz]
    python run_exported.py FILE.onnx --images=images.npy [--expect=answers.npz]

A folder needs numpy, jax and flatbuffers, or with ``--iree`` numpy, iree-base-compiler and iree-base-runtime; a file,
or a folder of ONNX files, numpy and onnxruntime. `images.npy` holds stored pixels ``[M, H, W, C]``, or what the network
takes where the export has no normalisation. The program is ``staged`` (image by image), ``batch``, or ``parts`` (every
stage and head alone, as `save_stages` writes them; not by IREE). A file for batches runs in batches of 1, 7, 64 and
256, any other file on one image at a time. `answers.npz` holds ``label`` and ``exit_index`` to compare with, −1 for a
label that rounding decides, and ``tie``: images whose uncertainty lies so close to a threshold that rounding decides.
Prints one line of JSON; ``--output=found.npz`` writes the answers.

Nothing is read before its checksum is verified, and nothing is executed but StableHLO or ONNX: no custom calls, no host
callbacks. Checksums detect damage, not malice: they are as trustworthy as the source of the folder.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 2  # 1 counted stages and exits from 1
BATCHES = (1, 7, 64, 256)
Answers = dict[str, np.ndarray]
# What JAX itself writes for programs that take any number of images: a check of shapes, at compile time.
_HARMLESS_CALLS = {'shape_assertion', 'Sharding'}


@dataclasses.dataclass(frozen=True)
class Network:
    """An exported network.

    Attributes:
        manifest: input, normalisation, thresholds, exits, cuts, versions.
        programs: name to compiled function of arrays, which returns a dict of arrays.
        thresholds: ``[N - 1]`` to start with.
    """

    manifest: dict[str, Any]
    programs: dict[str, Callable[..., dict[str, Any]]]
    thresholds: np.ndarray

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Maps stored pixels to what the programs take."""
        scale, images = self.manifest['input']['normalization'], np.asarray(pixels, np.float32)
        if scale is None:
            return images
        mean, deviation = (np.array(scale[name], np.float32) for name in ('mean', 'deviation'))
        return (images / np.float32(255) - mean) / deviation


def load(folder: Path | str, names: list[str] | None = None, *, iree: bool = False) -> Network:
    """Verifies and reads programs of a folder.

    Args:
        folder: that `branchy_jax.export.save` or `save_stages` wrote.
        names: of the programs; all by default.
        iree: whether IREE compiles their text for this processor, where stages and heads take one image; or jax runs
            their modules. ONNX Runtime runs ONNX files.

    Raises:
        ValueError: a file is missing, damaged, altered or too new for this reader or this jax, or would run something
            else than StableHLO.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    is_onnx = all(part['file'].endswith('.onnx') for part in manifest['programs'].values())
    if not iree and not is_onnx:
        _check_jax(folder, manifest)
    chosen = names or list(manifest['programs'])
    unknown = [name for name in chosen if name not in manifest['programs']]
    if unknown:
        raise ValueError(f'names: {folder} has no {unknown[0]!r}; choose from {", ".join(manifest["programs"])}')
    weights, programs = _read_weights(folder, manifest['weights']), {}
    make = _by_iree if iree else _by_onnx if is_onnx else _by_jax
    for name in chosen:
        part = manifest['programs'][name]
        own = {key: weights[key] for key in part['weights']}
        programs[name] = make(folder, name, part, own)
    return Network(manifest, programs, np.array([float(value) for value in manifest['thresholds']], np.float32))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / 'manifest.json'
    try:
        manifest = json.loads(path.read_text())
        written, claimed = manifest['format'], manifest['sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'folder: {path} is missing, truncated or no manifest ({error})') from error
    if written != FORMAT:
        raise ValueError(
            f'folder: {folder} is of format {written}, this reader knows {FORMAT}; get the run_exported.py of '
            f'branchy_jax {manifest.get("versions", {}).get("branchy-jax", "of that time")}'
        )
    rest = {key: value for key, value in manifest.items() if key != 'sha256'}
    canonical = json.dumps(rest, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()
    if hashlib.sha256(canonical).hexdigest() != claimed:
        raise ValueError(f'folder: {path} was altered after it was written; export the network again')
    return manifest


def _check_jax(folder: Path, manifest: dict[str, Any]) -> None:
    import jax
    import jax.export

    backend = jax.default_backend()
    platform = 'cuda' if backend == 'gpu' else backend
    convention = manifest['versions']['calling_convention']
    if convention > jax.export.maximum_supported_calling_convention_version:
        raise ValueError(
            f'folder: {folder} was written by jax {manifest["versions"]["jax"]}, whose calling convention {convention} '
            f'is too new for jax {jax.__version__}; upgrade jax'
        )
    if platform not in manifest['platforms']:
        raise ValueError(f'folder: {folder} was lowered for {", ".join(manifest["platforms"])}, not for {platform}')


def _read_file(folder: Path, part: dict[str, Any]) -> bytes:
    """Returns the content of a file of the folder once its checksum is verified."""
    if not re.fullmatch(r'\w[\w.-]*', part['file']):
        raise ValueError(f'folder: {part["file"]!r} is no name of a file within {folder}')
    path = folder / part['file']
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f'folder: {path} is missing ({error})') from error
    if len(content) != part['bytes']:
        raise ValueError(f'folder: {path} has {len(content)} bytes, not {part["bytes"]}: it is truncated or altered')
    if hashlib.sha256(content).hexdigest() != part['sha256']:
        raise ValueError(f'folder: {path} was altered: its SHA-256 is not the one in the manifest')
    return content


def _read_weights(folder: Path, part: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """Reads a safetensors file: the length of a header, the header as JSON, then the arrays."""
    if part is None:
        return {}
    content = _read_file(folder, part)
    (length,) = struct.unpack('<Q', content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    # That of halves is known by name once jax is there.
    dtypes = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'I32': 'int32', 'BOOL': 'bool'}
    arrays = {}
    for name, spec in header.items():
        if name != '__metadata__':
            start, end = spec['data_offsets']
            arrays[name] = np.frombuffer(data[start:end], np.dtype(dtypes[spec['dtype']])).reshape(spec['shape'])
    return arrays


def _by_jax(folder: Path, name: str, part: dict[str, Any], weights: Answers) -> Callable[..., Any]:
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(_read_file(folder, part)))
    called = re.findall(r'custom_call\s*@"?(\w+)|call_target_name\s*=\s*"(\w+)', exported.mlir_module())
    more = {target for targets in called for target in targets if target} - _HARMLESS_CALLS
    more |= {str(effect) for effect in (*exported.ordered_effects, *exported.unordered_effects)}
    if more:
        raise ValueError(f'folder: {name} of {folder} asks for more than StableHLO: {", ".join(sorted(more))}')
    own, names = jax.device_put(weights), [output['name'] for output in part['outputs']]

    @jax.jit
    def run(own: dict[str, jax.Array], *inputs: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(names, exported.call(own, *inputs), strict=True))

    return lambda *inputs: run(own, *inputs)


def _by_onnx(folder: Path, name: str, part: dict[str, Any], own: Answers) -> Callable[..., Any]:
    session = open_file(_read_file(folder, part))
    given, made = ([array['name'] for array in part[key]] for key in ('inputs', 'outputs'))
    return lambda *inputs: dict(zip(made, session.run(made, dict(zip(given, inputs, strict=True))), strict=True))


def _by_iree(folder: Path, name: str, part: dict[str, Any], own: Answers) -> Callable[..., Any]:
    if part.get('text') is None:
        raise ValueError(f'folder: {name} of {folder} has no text; export the network again with this branchy_jax')
    text = _read_file(folder, part['text'])
    if b'custom_call' in text:
        raise ValueError(f'folder: {name} of {folder} asks for more than StableHLO: it holds a custom call')
    main, names = compile_text(text), [output['name'] for output in part['outputs']]
    weights = [own[key] for key in part['weights']]

    def run(*inputs: np.ndarray) -> Answers:
        made = main(*weights, *inputs)
        arrays = [made] if len(names) == 1 else made  # a single result comes back bare
        return dict(zip(names, map(np.asarray, arrays), strict=True))

    return run


def compile_text(text: bytes) -> Callable[..., Any]:
    """Compiles the text of a module for one thread of this processor, and returns its function."""
    import iree.compiler
    import iree.runtime

    content = iree.compiler.compile_str(
        text, input_type='stablehlo', target_backends=['llvm-cpu'], extra_args=['--iree-llvmcpu-target-cpu=host']
    )
    context = iree.runtime.SystemContext(config=iree.runtime.Config('local-sync'))
    context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, content))
    return context.modules.network['main']


def run_staged(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers normalised images ``[M, H, W, C]`` one by one."""
    answers = [network.programs['staged'](image, network.thresholds) for image in images]
    return {name: np.stack([np.asarray(answer[name]) for answer in answers]) for name in answers[0]}


def run_batch(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers normalised images in batches of the program's size; the last one is padded."""
    size, count, answers = network.manifest['programs']['batch']['batch_size'], len(images), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        answer = network.programs['batch'](images[rows], network.thresholds)
        answers.append({name: np.asarray(values) for name, values in answer.items()})
    return {name: np.concatenate([answer[name] for answer in answers])[:count] for name in answers[0]}


def run_parts(network: Network, images: np.ndarray) -> Answers:
    """Answers normalised images stage by stage, as several machines would, each with some stages."""
    return run_exits(network, {'image': images})[0]


def run_exits(
    network: Network, values: Answers, first: int = 0, until: int | None = None
) -> tuple[Answers, np.ndarray, Answers]:
    """Asks some exits in turn, each for the rows that did not leave before.

    Args:
        network: with the stages and heads of these exits.
        values: the arrays that the parts before ``first`` handed on, by name; ``image`` for exit 0.
        first: the first exit to ask.
        until: the first exit not to ask; by default the last exit answers all rows.

    Returns:
        Each row's answer, for a row that goes on that of the last exit asked; the numbers of the rows that go on; the
        arrays that go on with them.

    Raises:
        ValueError: an array is missing, since another part comes first.
    """
    num_exits, result = len(network.manifest['exits']), {}
    waiting = np.arange(len(next(iter(values.values()))))
    for n in range(first, num_exits if until is None else until):
        values = _run_part(network, f'exit {n}', _run_part(network, f'stage {n}', values))
        values['exit_index'] = np.full(len(waiting), n, np.int32)
        for name in ('label', 'exit_index', 'logits', 'uncertainty'):
            rows = values[name]
            result.setdefault(name, np.empty((len(waiting), *rows.shape[1:]), rows.dtype))[waiting] = rows
        if n == num_exits - 1:
            return result, waiting[:0], {}
        goes_on = ~(values['uncertainty'] < network.thresholds[n])
        waiting, handed_on = waiting[goes_on], network.manifest['cuts'][n + 1]['arrays']
        values = {name: values[name][goes_on] for name in handed_on}
        if not len(waiting):
            break
    return result, waiting, values


def _run_part(network: Network, name: str, values: Answers) -> Answers:
    """Returns the arrays by name with the results of a stage or head."""
    needed = [array['name'] for array in network.manifest['programs'][name]['inputs']]
    missing = [key for key in needed if key not in values]
    if missing:
        order = ', '.join(network.manifest['order'])
        raise ValueError(f'values: {name} takes {missing[0]!r}, got {", ".join(values)}; run the parts as {order}')
    made = network.programs[name](*(values[key] for key in needed))
    return {**values, **{key: np.asarray(array) for key, array in made.items()}}


PROGRAMS = {'staged': run_staged, 'batch': run_batch, 'parts': run_parts}


def open_file(path: Path | bytes, **settings: object) -> Any:
    """Opens an ONNX file, or its content, for one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in settings.items():
        setattr(options, name, value)
    file = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])


def run_file(session: Any, images: np.ndarray, size: int) -> Answers:
    """Answers images in batches of a size; the last batch is smaller."""
    names = [output.name for output in session.get_outputs()]
    calls = [images[start : start + size] for start in range(0, len(images), size)]
    answers = [session.run(names, {'image': call}) for call in calls]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*answers, strict=True), strict=True)}


def exits_asked(path: Path, images: np.ndarray) -> int:
    """Returns the last exit that ran a node for a batch, by the names of nodes in ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_file(path, enable_profiling=True, profile_file_prefix=os.path.join(folder, 'profile'))
        session.run(None, {'image': images})
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [re.match(r'(?:stage|exit|criterion)_(\d+)/', event['name']) for event in events if event['cat'] == 'Node']
    return max(int(match[1]) for match in ran if match)


def compare(answers: Answers, expected: Answers) -> dict[str, int]:
    """Counts images whose label, of any pixel, or exit differs, separately at ties."""
    alike = (answers['label'] == expected['label']) | (expected['label'] < 0)
    same = alike.reshape(len(alike), -1).all(axis=1) & (answers['exit_index'] == expected['exit_index'])
    tie = expected.get('tie', np.zeros(len(same), bool))
    return {'differ': int((~same & ~tie).sum()), 'differ_at_ties': int((~same & tie).sum()), 'ties': int(tie.sum())}


def main() -> None:
    """Parses the command line, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('export', type=Path, help='a folder, or a file that ends in .onnx')
    parser.add_argument('--images', type=Path, required=True, help='[M, H, W, C], .npy')
    parser.add_argument('--program', choices=PROGRAMS, default='staged', help='of a folder')
    parser.add_argument('--iree', action='store_true', help='runs the text of a folder by IREE instead of jax')
    parser.add_argument('--expect', type=Path, help='.npz with label, exit_index and tie')
    parser.add_argument('--output', type=Path, help='.npz to write the answers to')
    options = parser.parse_args()
    if options.iree and options.program == 'parts':
        parser.error('--program=parts: the text of stages and heads takes one image; run parts without --iree')
    images = np.load(options.images, allow_pickle=False)
    is_file, batches = options.export.suffix == '.onnx', BATCHES
    if is_file:
        session = open_file(options.export)
        if session.get_inputs()[0].shape[0] == 1:  # a file for batches has a name in place of that number
            batches = (1,)
        runs = [run_file(session, images, size) for size in batches]
    else:
        names = [options.program] if options.program != 'parts' else None
        network = load(options.export, names, iree=options.iree)
        runs = [PROGRAMS[options.program](network, network.normalize(images))]
    exits = runs[0]['exit_index']
    result: dict[str, Any] = {'images': len(images), 'shares': (np.bincount(exits) / len(images)).tolist()}
    result['exits_in_64'] = min(len(set(part.tolist())) for part in np.split(exits, range(64, len(exits), 64)))
    if is_file:
        groups = [images[exits == n][: 1 if batches == (1,) else None] for n in np.unique(exits)]
        result['exits_asked'] = [exits_asked(options.export, group) for group in groups]
    if options.output is not None:
        np.savez(options.output, **runs[0])
    if options.expect is not None:
        with np.load(options.expect, allow_pickle=False) as expected:
            counts = [compare(answers, dict(expected)) for answers in runs]
        result |= {name: max(count[name] for count in counts) for name in counts[0]}
    print(json.dumps(result))
    if result.get('differ') or result.get('exits_asked', []) > np.unique(exits).tolist():
        raise SystemExit(1)


if __name__ == '__main__':
    main()
