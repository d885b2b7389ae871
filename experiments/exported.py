"""Do exported networks answer elsewhere as they do here? In fresh environments without this library.

    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/exported            by jax, numpy and flatbuffers
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/onnx --onnx         by onnxruntime and numpy
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/iree --iree         by IREE and numpy

The published networks answer 1,000 test images there; `experiments.peers` times the ONNX files. Some minutes; needs a
package index. Writes ``report.json``, a row per network and program, and ``report.md``; networks that are not asked for
stay in them as they were. Expect no answer that differs.

    python -m experiments.exported --publish=runs/lenet_mnist --workdir=branchy_jax/models/weights

writes the network of a finished run as one file, for `branchy_jax.models.load_pretrained`.
"""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import branchy_jax as bj
from branchy_jax.models import Pretrained
from experiments import run_exported, run_without_jax
from experiments.run.report import Row, provenance, table
from experiments.study import flags
from experiments.study.finished import publish, read_run

PUBLISHED = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}
"""Networks whose published weights are taken, and the data sets that they are for."""

NEEDED = {
    'jax': ('jax', 'jaxlib', 'numpy', 'flatbuffers'),
    'onnx': ('numpy', 'onnxruntime'),
    'iree': ('numpy', 'iree-base-compiler', 'iree-base-runtime'),
}
"""The packages of each runtime's environment."""

_TIE = 1e-4  # relative distance from a threshold below which rounding may decide


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, runs in a fresh environment, compares, writing what is known after each network."""
    parser = flags.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='For the exports, the environment and the report.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--onnx', action='store_const', dest='runtime', const='onnx', default='jax', help='ONNX files.')
    what.add_argument('--iree', action='store_const', dest='runtime', const='iree', help='StableHLO text.')
    what.add_argument('--publish', type=Path, help='A finished run, to write as published weights.')
    parser.add_argument('--networks', nargs='+', choices=PUBLISHED, default=list(PUBLISHED), help='Some of them.')
    parser.add_argument('--images', type=flags.positive, default=1000, help='Test images.')
    options = parser.parse_args(arguments)
    workdir = options.workdir.resolve()
    if options.publish is not None:
        print(publish(read_run(options.publish), workdir))
        return
    python = _fresh_environment(workdir / 'environment', NEEDED[options.runtime])
    path = workdir / 'report.json'
    rows = bj.report.read_json(path)['rows'] if path.exists() else []
    for name in options.networks:
        weights = bj.models.load_pretrained(name, dataset=PUBLISHED[name])
        images = np.asarray(bj.data.load_dataset(PUBLISHED[name]).test.image[: options.images])
        _write_answers(weights, images, workdir / name)
        shared = {'runtime': options.runtime, 'network': name, **provenance('exported'), 'images': len(images)}
        made = [{**shared, **row} for row in RUN[options.runtime](weights, workdir / name, python)]
        rows = sorted([*(row for row in rows if row['network'] != name), *made], key=lambda row: row['network'])
        print(table(made, *_COLUMNS), flush=True)
        record = {'environment': _installed(python), 'rows': rows}
        bj.report.write_json(path, record)
        bj.report.write_text(workdir / 'report.md', page(record))


def _installed(python: Path) -> list[str]:
    made = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, capture_output=True, text=True)
    return sorted(made.stdout.split())


def _fresh_environment(place: Path, needed: Sequence[str]) -> Path:
    """Makes an environment of the packages that the reader needs, in the versions that are installed here, if any."""
    os.environ.pop('PYTHONPATH', None)  # what lies there would be in the fresh environment, too
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    python = place / 'bin' / 'python'
    install = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    subprocess.run([*install, *map(_pinned, needed)], check=True)
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


def run_files(weights: Pretrained, workdir: Path, python: Path) -> list[Row]:
    """Writes a network as ONNX files, for one image and for batches; runs them there with onnxruntime and numpy."""
    rows = []
    for program, batch in (('file', False), ('file for batches', True)):
        path = workdir / f'{program}.onnx'
        _export(functools.partial(bj.export.save_onnx, batch=batch), path, weights)
        rows.append({'program': program, **json.loads(_in(python, run_without_jax.__file__, path, workdir))})
    return rows


def run_folder(weights: Pretrained, workdir: Path, python: Path, *, script: Any) -> list[Row]:
    """Writes a network as a folder of programs, and runs each there by a script for jax or for IREE."""
    folder, rows = workdir / 'folder', []
    shutil.rmtree(folder, ignore_errors=True)
    _export(bj.export.save, folder, weights)
    for program in script.PROGRAMS:
        printed = _in(python, script.__file__, folder, workdir, f'--program={program}')
        row = json.loads(printed) if script is run_without_jax else {'differ': 0}
        rows.append({'program': program, **row})
    return rows


RUN = {
    'jax': functools.partial(run_folder, script=run_exported),
    'onnx': run_files,
    'iree': functools.partial(run_folder, script=run_without_jax),
}
"""What writes a network below a folder and runs it in another environment, by its runtime."""


def _export(save: Callable[..., Any], path: Path, weights: Pretrained) -> None:
    policy, options = weights.operating_points[0], {'inputs': weights.inputs, 'normalization': weights.normalization}
    save(path, weights.model, weights.variables, policy, **options)


def _write_answers(weights: Pretrained, images: np.ndarray, workdir: Path) -> None:
    """Writes images and the answers of `dense`, ties marked."""
    policy, inputs = weights.operating_points[0].policy, weights.normalize(images)
    answer = bj.inference.dense(weights.model)(weights.variables, inputs, policy)
    outputs = bj.inference.exit_outputs(weights.model, weights.variables, inputs, criterion=policy.criterion)
    thresholds = np.asarray(policy.thresholds)[:, None]
    near = np.abs(outputs.uncertainty[:-1] - thresholds) <= _TIE * np.abs(thresholds)
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / 'images.npy', images)
    np.savez(workdir / 'answers.npz', label=answer.label, exit_index=answer.exit_index, tie=near.any(axis=0))


def _in(python: Path, script: str, subject: Path, workdir: Path, *more: str) -> str:
    """Runs a script on a subject with the images and answers of a folder; returns what it prints."""
    arguments = [python, script, subject, f'--images={workdir}/images.npy', f'--expect={workdir}/answers.npz', *more]
    ran = subprocess.run(arguments, cwd=workdir, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f'{subject}: {ran.stdout}{ran.stderr}')
    return ran.stdout


_COLUMNS = ('network', 'program', 'images', 'differ', 'ties', 'differ_at_ties', 'shares', 'exits_asked')
_TITLES = {'jax': 'Exported programs by jax', 'onnx': 'ONNX files in ONNX Runtime', 'iree': 'StableHLO text by IREE'}


def page(record: Row) -> str:
    """Lays out the record in Markdown."""
    rows = record['rows']
    commands = '\n'.join(sorted({f'- `{row["command"]}`, {row["device"]}' for row in rows}))
    return f"""# {_TITLES[rows[0]['runtime']]}

{commands}

In an environment of {', '.join(record['environment'])}.

`differ` counts images whose label or exit is not that of `dense`; images whose uncertainty is within 1e-4 of a
threshold, relatively, are ties, and count apart. Of an ONNX file, which has an `If` for each side exit, `exits asked`
is up to which exit any node ran for an image of each exit, by ONNX Runtime's profile: 1, 2, … means that nothing ran
for nothing. A dash: not counted.

{table(rows, *_COLUMNS)}
"""


if __name__ == '__main__':
    main()
