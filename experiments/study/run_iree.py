"""Runs a network that `branchy_jax.export.save` wrote, with IREE and numpy only: copy this file to where it is to run.

    python run_iree.py FOLDER --images=images.npy [--program=staged] [--expect=answers.npz] [--passes=10]

Needs numpy, iree-base-compiler and iree-base-runtime. `images.npy` holds stored pixels ``[M, H, W, C]``, or what the
network takes where the folder has no normalisation. The program is ``staged`` (image by image) or ``batch``.
`answers.npz` holds ``label`` and ``exit_index`` to compare with, and ``tie``: images whose uncertainty lies so close to
a threshold that rounding decides. Prints one line of JSON.

The text is compiled for the processor at hand after its checksum is verified, and refused if it holds a custom call.
Checksums tell damage, not malice: they are as trustworthy as the place that the folder came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Network:
    """One program of an exported network, compiled.

    Attributes:
        manifest: of the folder.
        program: its entry in the manifest.
        run: arrays to a dict of arrays.
        thresholds: ``[N - 1]`` to start with.
        compile_s: how long the compiler took.
    """

    manifest: dict[str, Any]
    program: dict[str, Any]
    run: Callable[..., dict[str, np.ndarray]]
    thresholds: np.ndarray
    compile_s: float

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Maps stored pixels to what the program takes."""
        scale, images = self.manifest['input']['normalization'], np.asarray(pixels, np.float32)
        if scale is None:
            return images
        mean, deviation = (np.array(scale[name], np.float32) for name in ('mean', 'deviation'))
        return (images / np.float32(255) - mean) / deviation


def load(folder: Path | str, name: str) -> Network:
    """Verifies a program of a folder and compiles it for this processor.

    Args:
        folder: that `branchy_jax.export.save` wrote.
        name: of the program.

    Raises:
        ValueError: a file is missing, damaged, altered or of another format, or asks for more than StableHLO.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if name not in manifest['programs']:
        raise ValueError(f'name: {folder} has no {name!r}; choose from {", ".join(manifest["programs"])}')
    program = manifest['programs'][name]
    if program.get('text') is None:
        raise ValueError(f'folder: {name} of {folder} has no text; export the network again with this branchy_jax')
    text = _read(folder, program['text'])
    if b'custom_call' in text:
        raise ValueError(f'folder: {name} of {folder} asks for more than StableHLO: it holds a custom call')
    held = {} if manifest['weights'] is None else _read_weights(_read(folder, manifest['weights']))
    start = time.perf_counter()
    main = _compile(text)
    compile_s = time.perf_counter() - start
    weights, names = [held[key] for key in program['weights']], [output['name'] for output in program['outputs']]

    def run(*inputs: np.ndarray) -> dict[str, np.ndarray]:
        made = main(*weights, *inputs)
        arrays = [made] if len(names) == 1 else made  # a single result comes back bare
        return dict(zip(names, map(np.asarray, arrays), strict=True))

    thresholds = np.array([float(value) for value in manifest['thresholds']], np.float32)
    return Network(manifest, program, run, thresholds, compile_s)


def _compile(text: bytes) -> Callable[..., Any]:
    """Compiles the text of a module for one thread of this processor, and returns its function."""
    import iree.compiler
    import iree.runtime

    content = iree.compiler.compile_str(
        text, input_type='stablehlo', target_backends=['llvm-cpu'], extra_args=['--iree-llvmcpu-target-cpu=host']
    )
    context = iree.runtime.SystemContext(config=iree.runtime.Config('local-sync'))
    context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, content))
    return context.modules.network['main']


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / 'manifest.json'
    try:
        manifest = json.loads(path.read_text())
        written, claimed = manifest['format'], manifest['sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'folder: {path} is missing, truncated or no manifest ({error})') from error
    if written != FORMAT:
        raise ValueError(f'folder: {folder} is of format {written}, this reader knows {FORMAT}')
    rest = {key: value for key, value in manifest.items() if key != 'sha256'}
    canonical = json.dumps(rest, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()
    if hashlib.sha256(canonical).hexdigest() != claimed:
        raise ValueError(f'folder: {path} was altered after it was written; export the network again')
    return manifest


def _read(folder: Path, part: dict[str, Any]) -> bytes:
    if not re.fullmatch(r'\w[\w.-]*', part['file']):
        raise ValueError(f'folder: {part["file"]!r} is no name of a file within {folder}')
    path = folder / part['file']
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f'folder: {path} is missing ({error})') from error
    if len(content) != part['bytes'] or hashlib.sha256(content).hexdigest() != part['sha256']:
        raise ValueError(f'folder: {path} is truncated or was altered: its SHA-256 is not the one in the manifest')
    return content


def _read_weights(content: bytes) -> dict[str, np.ndarray]:
    """Reads a safetensors file: the length of a header, the header as JSON, then the arrays."""
    (length,) = struct.unpack('<Q', content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    dtypes, found = {'F32': np.float32, 'F16': np.float16, 'I32': np.int32, 'BOOL': np.bool_}, {}
    for name, spec in header.items():
        if name != '__metadata__':
            if spec['dtype'] not in dtypes:
                raise ValueError(f'folder: weights {name} are of {spec["dtype"]}, which numpy does not have')
            start, end = spec['data_offsets']
            found[name] = np.frombuffer(data[start:end], dtypes[spec['dtype']]).reshape(spec['shape'])
    return found


def run_staged(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers normalised images ``[M, H, W, C]`` one by one."""
    answers = [network.run(image, network.thresholds) for image in images]
    return {name: np.stack([answer[name] for answer in answers]) for name in answers[0]}


def run_batch(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers normalised images in batches of the program's size; the last one is padded."""
    size, count, answers = network.program['batch_size'], len(images), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        answers.append(network.run(images[rows], network.thresholds))
    return {name: np.concatenate([answer[name] for answer in answers])[:count] for name in answers[0]}


PROGRAMS = {'staged': run_staged, 'batch': run_batch}


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, int]:
    """Counts images whose label or exit differ, apart at ties."""
    same = (found['label'] == expected['label']) & (found['exit_index'] == expected['exit_index'])
    tie = expected.get('tie', np.zeros(len(same), bool))
    return {'differ': int((~same & ~tie).sum()), 'differ at ties': int((~same & tie).sum()), 'ties': int(tie.sum())}


def times(network: Network, program: Callable[..., Any], images: np.ndarray, passes: int) -> list[float]:
    """Returns milliseconds an image of each pass, on one core."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = []
    for _ in range(passes):
        start = time.perf_counter()
        program(network, images)
        found.append((time.perf_counter() - start) / len(images) * 1e3)
    return found


def main() -> None:
    """Parses the command line, compiles, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--images', type=Path, required=True, help='[M, H, W, C], .npy')
    parser.add_argument('--program', choices=PROGRAMS, default='staged')
    parser.add_argument('--expect', type=Path, help='.npz with label, exit_index and tie')
    parser.add_argument('--output', type=Path, help='.npz to write the answers to')
    parser.add_argument('--passes', type=int, default=0, help='over the images, to time, on one core')
    options = parser.parse_args()
    network = load(options.folder, options.program)
    images = network.normalize(np.load(options.images, allow_pickle=False))
    found = PROGRAMS[options.program](network, images)
    shares = np.bincount(found['exit_index'], minlength=len(network.manifest['exits'])) / len(images)
    told = {'images': len(images), 'shares': shares.tolist()}
    if options.expect is not None:
        with np.load(options.expect, allow_pickle=False) as expected:
            told.update(compare(found, dict(expected)))
    if options.output is not None:
        np.savez(options.output, **found)
    told['ms of each pass'] = times(network, PROGRAMS[options.program], images, options.passes)
    print(json.dumps({**told, 'compile_s': network.compile_s}))
    if told.get('differ'):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
