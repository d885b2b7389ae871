"""Runs a network that `branchy_jax.export.save` wrote, with jax and numpy only: copy this file to where it is to run.

    python run_exported.py FOLDER --images=images.npy [--program=staged] [--expect=answers.npz] [--output=found.npz]

`images.npy` holds stored pixels, uint8 ``[M, H, W, C]``. The program is ``staged`` (image by image), ``batch``, or
``parts``: every stage and head alone, as if each ran in another place. `answers.npz` holds ``label`` and ``exit_index``
to compare with.

Nothing is read before its checksum is verified, and nothing is executed but StableHLO: no custom calls, no host
callbacks. Checksums detect damage, not malice: they are as trustworthy as the source of the folder.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
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


def load(folder: Path | str, names: list[str] | None = None) -> Network:
    """Verifies and reads programs of a folder.

    Args:
        folder: that `branchy_jax.export.save` wrote.
        names: of the programs; all by default.

    Raises:
        ValueError: a file is missing, damaged, altered or too new for this reader or this jax, or would run something
            else than StableHLO.
    """
    import jax

    def compile_program(folder: Path, name: str, part: dict[str, Any], weights: dict[str, Any]) -> Callable[..., Any]:
        return _program(folder, name, part, jax.device_put(weights))

    return read(Path(folder), names, check=_check_jax, compile_program=compile_program)


def read(
    folder: Path, names: list[str] | None, *, check: Callable[..., None], compile_program: Callable[..., Any]
) -> Network:
    """Verifies and reads programs of a folder, for whatever compiles them.

    Args:
        folder: that `branchy_jax.export.save` wrote.
        names: of the programs; all by default.
        check: ``(folder, manifest)``; raises where these programs cannot run.
        compile_program: ``(folder, name, entry in the manifest, weights)`` to a function of arrays.
    """
    manifest = _read_manifest(folder)
    check(folder, manifest)
    found = names or list(manifest['programs'])
    unknown = [name for name in found if name not in manifest['programs']]
    if unknown:
        raise ValueError(f'names: {folder} has no {unknown[0]!r}; choose from {", ".join(manifest["programs"])}')
    weights = _read_weights(folder, manifest['weights'])
    programs = {}
    for name in found:
        part = manifest['programs'][name]
        own = {key: weights[key] for key in part['weights']}
        programs[name] = compile_program(folder, name, part, own)
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


def read_file(folder: Path, part: dict[str, Any]) -> bytes:
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
    content = read_file(folder, part)
    (length,) = struct.unpack('<Q', content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    # That of halves is known by name once jax is there.
    dtypes = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'I32': 'int32', 'BOOL': 'bool'}
    found = {}
    for name, spec in header.items():
        if name != '__metadata__':
            start, end = spec['data_offsets']
            found[name] = np.frombuffer(data[start:end], np.dtype(dtypes[spec['dtype']])).reshape(spec['shape'])
    return found


def _program(folder: Path, name: str, part: dict[str, Any], own: dict[str, Any]) -> Callable[..., Any]:
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(read_file(folder, part)))
    called = re.findall(r'custom_call\s*@"?(\w+)|call_target_name\s*=\s*"(\w+)', exported.mlir_module())
    more = {target for targets in called for target in targets if target} - _HARMLESS_CALLS
    more |= {str(effect) for effect in (*exported.ordered_effects, *exported.unordered_effects)}
    if more:
        raise ValueError(f'folder: {name} of {folder} asks for more than StableHLO: {", ".join(sorted(more))}')
    names = [output['name'] for output in part['outputs']]

    @jax.jit
    def run(own: dict[str, jax.Array], *inputs: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(names, exported.call(own, *inputs), strict=True))

    return lambda *inputs: run(own, *inputs)


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


def run_parts(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers normalised images stage by stage: what goes from line to line is what places would send each other."""
    exits, waiting = len(network.manifest['exits']), np.arange(len(images))
    hidden, carry, found = (images,), (), {}
    for n in range(exits):
        hidden = tuple(network.programs[f'stage {n + 1}'](*hidden).values())
        answers = network.programs[f'exit {n + 1}'](*hidden, *carry)
        answer = {name: np.asarray(values) for name, values in answers.items()}
        carry = tuple(values for name, values in answer.items() if name.startswith('carry'))
        last = n == exits - 1
        leaves = np.ones(len(waiting), bool) if last else answer['uncertainty'] < network.thresholds[n]
        answer['exit_index'] = np.full(len(waiting), n, np.int32)
        for name in ('label', 'exit_index', 'logits', 'uncertainty'):
            values = answer[name]
            every = found.setdefault(name, np.empty((len(images), *values.shape[1:]), values.dtype))
            every[waiting[leaves]] = values[leaves]
        if leaves.all():
            break
        waiting = waiting[~leaves]
        hidden, carry = (tuple(np.asarray(leaf)[~leaves] for leaf in tree) for tree in (hidden, carry))
    return found


PROGRAMS = {'staged': run_staged, 'batch': run_batch, 'parts': run_parts}


def main() -> None:
    """Parses the command line, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--images', type=Path, required=True, help='uint8 [M, H, W, C], .npy')
    parser.add_argument('--program', choices=PROGRAMS, default='staged')
    parser.add_argument('--expect', type=Path, help='.npz with label and exit_index')
    parser.add_argument('--output', type=Path, help='.npz to write the answers to')
    options = parser.parse_args()
    names = [options.program] if options.program != 'parts' else None
    network = load(options.folder, names)
    images = network.normalize(np.load(options.images, allow_pickle=False))
    found = PROGRAMS[options.program](network, images)
    exits = np.bincount(found['exit_index'], minlength=len(network.manifest['exits'])) / len(images)
    print(f'{options.program}: {len(images)} images, shares of the exits {exits.round(4).tolist()}')
    if options.output is not None:
        np.savez(options.output, **found)
    if options.expect is not None:
        with np.load(options.expect, allow_pickle=False) as expected:
            for name in ('label', 'exit_index'):
                wrong = int((found[name] != expected[name]).sum())
                print(f'{name}: {wrong} of {found[name].size} differ')
                if wrong:
                    raise SystemExit(1)


if __name__ == '__main__':
    main()
