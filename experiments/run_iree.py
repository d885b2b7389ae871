"""Runs a network that `branchy_jax.export.save` wrote, with IREE and numpy only.

    python run_iree.py FOLDER --images=images.npy [--program=staged] [--expect=answers.npz] [--passes=10]

Copy this file and `run_exported.py`, which reads the folder, to where it is to run. Needs numpy, iree-base-compiler and
iree-base-runtime. `images.npy` holds stored pixels ``[M, H, W, C]``, or what the network takes where the folder has no
normalisation. The program is ``staged`` (image by image) or ``batch``. `answers.npz` holds ``label`` and ``exit_index``
to compare with, and ``tie``: images whose uncertainty lies so close to a threshold that rounding decides. Prints one
line of JSON.

The text is compiled for the processor at hand after its checksum is verified, and refused if it holds a custom call.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    from experiments import run_exported
except ImportError:  # copied to a place without the repository
    import run_exported

PROGRAMS = {name: run_exported.PROGRAMS[name] for name in ('staged', 'batch')}


def load(folder: Path | str, names: list[str]) -> run_exported.Network:
    """Verifies programs of a folder and compiles their text for this processor.

    Args:
        folder: that `branchy_jax.export.save` wrote.
        names: of the programs; stages and heads take one image.

    Raises:
        ValueError: a file is missing, damaged, altered or of another format, or asks for more than StableHLO.
    """
    return run_exported.read(Path(folder), names, check=lambda folder, manifest: None, compile_program=_program)


def _program(folder: Path, name: str, part: dict[str, Any], own: dict[str, np.ndarray]) -> Callable[..., Any]:
    if part.get('text') is None:
        raise ValueError(f'folder: {name} of {folder} has no text; export the network again with this branchy_jax')
    text = run_exported.read_file(folder, part['text'])
    if b'custom_call' in text:
        raise ValueError(f'folder: {name} of {folder} asks for more than StableHLO: it holds a custom call')
    main, names = _compile(text), [output['name'] for output in part['outputs']]
    weights = [own[key] for key in part['weights']]

    def run(*inputs: np.ndarray) -> dict[str, np.ndarray]:
        made = main(*weights, *inputs)
        arrays = [made] if len(names) == 1 else made  # a single result comes back bare
        return dict(zip(names, map(np.asarray, arrays), strict=True))

    return run


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


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, int]:
    """Counts images whose label or exit differ, apart at ties."""
    same = (found['label'] == expected['label']) & (found['exit_index'] == expected['exit_index'])
    tie = expected.get('tie', np.zeros(len(same), bool))
    return {'differ': int((~same & ~tie).sum()), 'differ at ties': int((~same & tie).sum()), 'ties': int(tie.sum())}


def times(network: run_exported.Network, program: str, images: np.ndarray, passes: int) -> list[float]:
    """Returns milliseconds an image of each pass, on one core."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = []
    for _ in range(passes):
        start = time.perf_counter()
        PROGRAMS[program](network, images)
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
    start = time.perf_counter()
    network = load(options.folder, [options.program])
    compile_s = time.perf_counter() - start
    images = network.normalize(np.load(options.images, allow_pickle=False))
    found = PROGRAMS[options.program](network, images)
    shares = np.bincount(found['exit_index'], minlength=len(network.manifest['exits'])) / len(images)
    result = {'images': len(images), 'shares': shares.tolist()}
    if options.expect is not None:
        with np.load(options.expect, allow_pickle=False) as expected:
            result.update(compare(found, dict(expected)))
    if options.output is not None:
        np.savez(options.output, **found)
    result['ms of each pass'] = times(network, options.program, images, options.passes)
    print(json.dumps({**result, 'compile_s': compile_s}))
    if result.get('differ'):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
