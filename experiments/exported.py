"""Exports B-LeNet, runs it where neither branchy_jax nor flax is, and times it against the library.

    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/exported

Makes a virtual environment with jax, numpy and flatbuffers alone, and lets `experiments/run_exported.py` answer 1,000
test digits there, by each program of the folder. Then the staged program and `branchy_jax.inference.staged` take turns
in one process on one core. Takes two minutes; needs a package index.

With ``--onnx`` instead: B-LeNet and B-ResNet-110 as published, B-AlexNet and B-ViT with random weights, each as one
ONNX file, answer in an environment of onnxruntime and numpy alone, and are timed against the files of their baselines.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from experiments import run_exported
from experiments.run import command
from experiments.run.timing import on_device, one_core, staged
from experiments.study import onnx_files

ONNX_NETWORKS = (*onnx_files.PUBLISHED, *onnx_files.RANDOM)
_NEEDED = ('jax', 'jaxlib', 'numpy', 'flatbuffers')


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, compares in a fresh environment, times."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='For the exported network and the environment.')
    parser.add_argument('--images', type=command.positive, default=1000, help='Test digits.')
    parser.add_argument('--passes', type=command.positive, default=30, help='Interleaved passes over the digits.')
    parser.add_argument('--onnx', action='store_true', help='ONNX files instead of the folder of StableHLO.')
    parser.add_argument('--networks', nargs='+', choices=ONNX_NETWORKS, default=ONNX_NETWORKS, help='With --onnx.')
    options = parser.parse_args(arguments)
    if options.onnx:
        python = _fresh_environment(options.workdir / 'environment', ('numpy', 'onnxruntime'))
        for name in options.networks:
            exported = onnx_files.load(name, options.images)
            print(onnx_files.compare(exported, options.workdir / name, python, passes=options.passes), flush=True)
        print(command.describe_device())
        return
    workdir, folder = options.workdir, options.workdir / 'b-lenet'
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    point = weights.operating_points[0]
    digits = bj.data.load_dataset('mnist').test.image[: options.images]
    shutil.rmtree(folder, ignore_errors=True)
    manifest = bj.export.save(
        folder, weights.model, weights.variables, thresholds=point, normalization=weights.normalization
    )
    for name, part in manifest['programs'].items():
        print(f'{name}: {part["bytes"]:,} bytes')
    for cut in manifest['cuts']:
        print(f'a cut after {cut["after"]} would send {cut["bytes_per_image"]:,} bytes per image')

    answer = bj.inference.dense(weights.model)(weights.variables, weights.normalize(digits), point)
    np.save(workdir / 'images.npy', digits)
    np.savez(workdir / 'answers.npz', label=answer.label, exit_index=answer.exit_index)
    python = _fresh_environment(workdir / 'environment')
    for program in run_exported.PROGRAMS:
        arguments = [python, run_exported.__file__, folder, f'--images={workdir}/images.npy',
                     f'--expect={workdir}/answers.npz', f'--program={program}']  # fmt: skip
        subprocess.run(arguments, check=True)

    with one_core() as process:
        print(process.submit(_time, str(folder), digits, options.passes).result())


def _fresh_environment(place: Path, needed: Sequence[str] = _NEEDED) -> Path:
    """Makes an environment of the packages that the reader needs, in the versions that are installed here."""
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    python = place / 'bin' / 'python'
    pinned = [f'{name}=={importlib.metadata.version(name)}' for name in needed]
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *pinned], check=True)
    found = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, capture_output=True, text=True)
    print('fresh environment:', ', '.join(sorted(found.stdout.split())))
    for package in {'branchy_jax', 'flax', 'jax'} - set(needed):
        missing = subprocess.run([python, '-c', f'import {package}'], cwd=place, capture_output=True, check=False)
        if missing.returncode == 0:
            sys.exit(f'{package} is in {place}, which was to be without it')
    return python


def _time(folder: str, digits: np.ndarray, passes: int) -> str:
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    network = run_exported.load(folder, ['staged'])
    outside, thresholds = network.programs['staged'], jnp.asarray(network.thresholds)
    inside = staged(bj.inference.optimize(weights.model, weights.variables), weights.operating_points[0].policy)
    images = on_device(weights.normalize(digits))
    functions = {
        'in the library': bj.measure.one_by_one(inside, images),
        'exported': bj.measure.one_by_one(lambda image: outside(image, thresholds), images),
    }
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    lines = [f'{name}: {np.median(values) / len(images) * 1e3:.4f} ms per image' for name, values in seconds.items()]
    ratio = bj.measure.paired_ratio(seconds['exported'], seconds['in the library'])
    lines.append(
        f'exported ÷ in the library: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], batch 1, {len(images)} '
        f'test digits, {passes} interleaved passes on one core; {command.describe_device()}'
    )
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
