"""Exports B-LeNet, runs it where neither branchy_jax nor flax is, and times it against the library.

    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/exported

Makes a virtual environment with jax, numpy and flatbuffers alone, and lets `experiments/run_exported.py` answer 1,000
test digits there, by each program of the folder. Then the staged program and `branchy_jax.inference.staged` take turns
in one process on one core. Takes two minutes; needs a package index.

With ``--onnx`` instead: the published networks, and B-ViT with random weights, each as one ONNX file, answer test
images in an environment of onnxruntime and numpy alone, and are timed against the files of their baselines. With
``--iree`` the text of their staged and batch programs answers in an environment of numpy and IREE's compiler and
runtime, and is timed. Both leave a page and a record, `report.md` and `report.json`, in ``--workdir``; networks that
are not asked for stay in them as they were.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.report import read_json, write_json, write_text
from experiments import run_exported
from experiments.pages.runtimes import PAGES
from experiments.run import command
from experiments.run.timing import on_device, one_core, staged
from experiments.study import runtimes

_NETWORKS = (*runtimes.PUBLISHED, *runtimes.RANDOM)
_NEEDED = ('jax', 'jaxlib', 'numpy', 'flatbuffers')


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, compares in a fresh environment, times."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='For the exported network and the environment.')
    parser.add_argument('--images', type=command.positive, default=1000, help='Test digits.')
    parser.add_argument('--passes', type=command.positive, default=30, help='Interleaved passes over the digits.')
    runtime = parser.add_mutually_exclusive_group()
    runtime.add_argument('--onnx', action='store_const', dest='runtime', const='onnx', help='ONNX files instead.')
    runtime.add_argument('--iree', action='store_const', dest='runtime', const='iree', help='Text for IREE instead.')
    parser.add_argument('--networks', nargs='+', choices=_NETWORKS, default=_NETWORKS, help='With --onnx and --iree.')
    parser.add_argument('--no_clocks', action='store_true', help='With --onnx and --iree: answers alone.')
    options = parser.parse_args(arguments)
    if options.runtime is not None:
        _run_elsewhere(options)
        return
    workdir, folder = options.workdir, options.workdir / 'b-lenet'
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    point = weights.operating_points[0]
    digits = bj.data.load_dataset('mnist').test.image[: options.images]
    shutil.rmtree(folder, ignore_errors=True)
    manifest = bj.export.save(
        folder, weights.model, weights.variables, point, inputs=weights.inputs, normalization=weights.normalization
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
        arguments = [
            python,
            run_exported.__file__,
            folder,
            f'--images={workdir}/images.npy',
            f'--expect={workdir}/answers.npz',
            f'--program={program}',
        ]
        subprocess.run(arguments, check=True)

    with one_core() as process:
        print(process.submit(_time, str(folder), digits, options.passes).result())


def _run_elsewhere(options: argparse.Namespace) -> None:
    """Runs networks by another runtime, writing what is known after each."""
    workdir, runtime, passes = options.workdir.resolve(), options.runtime, 0 if options.no_clocks else options.passes
    python = _fresh_environment(workdir / 'environment', runtimes.NEEDED[runtime])
    path = workdir / 'report.json'
    rows = read_json(path)['rows'] if path.exists() else []
    for name in options.networks:
        exported = runtimes.load(name, options.images)
        found = runtimes.RUN[runtime](exported, workdir / name, python, passes=passes)
        made_by = command.provenance('exported')
        rows = [row for row in rows if row['network'] != name] + [{**row, **made_by} for row in found]
        rows.sort(key=lambda row: _NETWORKS.index(row['network']))
        print(*found, sep='\n', flush=True)
        record = {'environment': _installed(python), 'rows': rows}
        write_json(path, record)
        write_text(workdir / 'report.md', PAGES[runtime](record))


def _installed(python: Path) -> list[str]:
    found = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, capture_output=True, text=True)
    return sorted(found.stdout.split())


def _fresh_environment(place: Path, needed: Sequence[str] = _NEEDED) -> Path:
    """Makes an environment of the packages that the reader needs, in the versions that are installed here, if any."""
    os.environ.pop('PYTHONPATH', None)  # what lies there would be in the fresh environment, too
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    python = place / 'bin' / 'python'
    subprocess.run(
        [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *map(_pinned, needed)], check=True
    )
    print('fresh environment:', ', '.join(_installed(python)))
    for package in {'branchy_jax', 'flax', 'jax'} - set(needed):
        missing = subprocess.run([python, '-c', f'import {package}'], cwd=place, capture_output=True, check=False)
        if missing.returncode == 0:
            sys.exit(f'{package} is in {place}, which was to be without it')
    return python


def _pinned(package: str) -> str:
    try:
        return f'{package}=={importlib.metadata.version(package)}'
    except importlib.metadata.PackageNotFoundError:  # IREE serves nothing but this command
        return package


def _time(folder: str, digits: np.ndarray, passes: int) -> str:
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    network = run_exported.load(folder, ['staged'])
    outside, thresholds = network.programs['staged'], jnp.asarray(network.thresholds)
    fast = bj.inference.optimize(weights.model, weights.variables, inputs=weights.inputs)
    inside = staged(fast, weights.operating_points[0].policy)
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
