"""Runs what `branchy_jax.export` wrote without jax: a folder's text by IREE, or an ONNX file by ONNX Runtime.

    python run_without_jax.py FOLDER --images=images.npy [--program=staged] [--expect=answers.npz]
    python run_without_jax.py FILE.onnx --images=images.npy [--expect=answers.npz]

Copy this file and `run_exported.py`, which reads the folder, to where it is to run. A folder needs numpy,
iree-base-compiler and iree-base-runtime; a file numpy and onnxruntime. `images.npy` holds stored pixels ``[M, H, W,
C]``, or what the network takes where the export has no normalisation. The program is ``staged`` (image by image) or
``batch``; a file takes one image, or runs in batches of 1, 7, 64 and 256, as it was written. `answers.npz` holds
``label`` and ``exit_index`` to compare with, and ``tie``: images whose uncertainty lies so close to a threshold that
rounding decides. Prints one line of JSON.

The text is compiled for the processor at hand after its checksum is verified, and refused if it holds a custom call.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    from experiments import run_exported
except ImportError:  # copied to a place without the repository
    import run_exported

PROGRAMS = {name: run_exported.PROGRAMS[name] for name in ('staged', 'batch')}
BATCHES = (1, 7, 64, 256)
Answers = dict[str, np.ndarray]


def load(folder: Path | str, names: list[str]) -> run_exported.Network:
    """Verifies programs of a folder and compiles their text for this processor by IREE.

    Args:
        folder: that `branchy_jax.export.save` wrote.
        names: of the programs; stages and heads take one image.

    Raises:
        ValueError: a file is missing, damaged, altered or of another format, or asks for more than StableHLO.
    """
    return run_exported.read(Path(folder), names, check=lambda folder, manifest: None, compile_program=_program)


def _program(folder: Path, name: str, part: dict[str, Any], own: Answers) -> Callable[..., Any]:
    if part.get('text') is None:
        raise ValueError(f'folder: {name} of {folder} has no text; export the network again with this branchy_jax')
    text = run_exported.read_file(folder, part['text'])
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


def open_file(path: Path, **settings: object) -> Any:
    """Opens an ONNX file for one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def run_file(session: Any, images: np.ndarray, size: int) -> Answers:
    """Answers images in batches of a size; the last batch is smaller."""
    names = [output.name for output in session.get_outputs()]
    calls = [images[start : start + size] for start in range(0, len(images), size)]
    answers = [session.run(names, {'image': call}) for call in calls]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*answers, strict=True), strict=True)}


def exits_asked(path: Path, images: np.ndarray) -> int:
    """Returns up to which exit any node ran for a batch, from the names of nodes in ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_file(path, enable_profiling=True, profile_file_prefix=os.path.join(folder, 'profile'))
        session.run(None, {'image': images})
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [re.match(r'(?:stage|exit|criterion)_(\d+)/', event['name']) for event in events if event['cat'] == 'Node']
    return max(int(match[1]) for match in ran if match)


def compare(answers: Answers, expected: Answers) -> dict[str, int]:
    """Counts images whose label or exit differ, apart at ties."""
    same = (answers['label'] == expected['label']) & (answers['exit_index'] == expected['exit_index'])
    tie = expected.get('tie', np.zeros(len(same), bool))
    return {'differ': int((~same & ~tie).sum()), 'differ_at_ties': int((~same & tie).sum()), 'ties': int(tie.sum())}


def main() -> None:
    """Parses the command line, runs, compares, times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('export', type=Path, help='a folder, or a file that ends in .onnx')
    parser.add_argument('--images', type=Path, required=True, help='[M, H, W, C], .npy')
    parser.add_argument('--program', choices=PROGRAMS, default='staged', help='of a folder')
    parser.add_argument('--expect', type=Path, help='.npz with label, exit_index and tie')
    options = parser.parse_args()
    images = np.load(options.images, allow_pickle=False)
    if options.export.suffix == '.onnx':
        session = open_file(options.export)
        takes_one = session.get_inputs()[0].shape[0] == 1  # a file for batches has a name in place of that number
        runs = [run_file(session, images, size) for size in BATCHES[: 1 if takes_one else None]]
    else:
        network = load(options.export, [options.program])
        runs = [PROGRAMS[options.program](network, network.normalize(images))]
    exits = runs[0]['exit_index']
    result: dict[str, Any] = {'images': len(images), 'shares': (np.bincount(exits) / len(images)).tolist()}
    result['exits_in_64'] = min(len(set(part.tolist())) for part in np.split(exits, range(64, len(exits), 64)))
    if options.export.suffix == '.onnx':
        groups = [images[exits == n][: 1 if takes_one else None] for n in np.unique(exits)]
        result['exits_asked'] = [exits_asked(options.export, group) for group in groups]
    if options.expect is not None:
        with np.load(options.expect, allow_pickle=False) as expected:
            counts = [compare(answers, dict(expected)) for answers in runs]
        result |= {name: max(count[name] for count in counts) for name in counts[0]}
    print(json.dumps(result))
    if result.get('differ') or result.get('exits_asked', []) > (np.unique(exits) + 1).tolist():
        raise SystemExit(1)


if __name__ == '__main__':
    main()
