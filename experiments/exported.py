"""Do exported networks give the same answers without this library? Runs them in new environments.

    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/exported            by jax, numpy and flatbuffers
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/onnx --onnx         by onnxruntime and numpy
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/iree --iree         by IREE and numpy

The published networks and a B-ViT of random weights answer 1,000 test images there, at thresholds at which equal parts
leave at every exit; `experiments.peers` times the ONNX files. Some minutes; needs a package index. Writes
``report.json``, a row per network and program, and ``report.md``. Expect no answer that differs.

    python -m experiments.exported --publish=runs/lenet_mnist --workdir=branchy_jax/models/weights

writes the network of a finished run as one file, for `branchy_jax.models.load_pretrained`.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.models import Pretrained
from experiments import run_exported
from experiments.run.report import Row, provenance, table
from experiments.study import flags
from experiments.study.cells import table_of
from experiments.study.finished import publish, read_run

NETWORKS = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10', 'b-vit': 'mnist'}
"""The networks, and the data sets that they are for."""

NEEDED = {
    'jax': ('jax', 'jaxlib', 'numpy', 'flatbuffers'),
    'onnx': ('numpy', 'onnxruntime'),
    'iree': ('numpy', 'iree-base-compiler', 'iree-base-runtime'),
}
"""The packages of each runtime's environment."""

_TIE = 1e-4  # relative distance from a threshold below which rounding may decide


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, runs in a fresh environment, compares, writes the report."""
    parser = flags.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for exports and report.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--onnx', action='store_const', dest='runtime', const='onnx', default='jax', help='Runs ONNX files.'
    )
    what.add_argument('--iree', action='store_const', dest='runtime', const='iree', help='Runs StableHLO text.')
    what.add_argument('--publish', type=Path, help='A finished run, to write as published weights.')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), help='Networks to export.')
    parser.add_argument('--images', type=flags.positive, default=1000, help='Number of test images.')
    options = parser.parse_args(arguments)
    workdir = options.workdir.resolve()
    if options.publish is not None:
        print(publish(read_run(options.publish), workdir))
        return
    python = _fresh_environment(workdir / 'environment', NEEDED[options.runtime])
    rows: list[Row] = []
    for name in options.networks:
        images = np.asarray(bj.data.load_dataset(NETWORKS[name]).test.image[: options.images])
        weights = _write_answers(_weights(name), images, workdir / name)
        shared = {'runtime': options.runtime, 'network': name, **provenance('exported'), 'images': len(images)}
        rows += [{**shared, **row} for row in run(options.runtime, weights, workdir / name, python)]
        print(table(rows, *_COLUMNS), flush=True)
    made = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, capture_output=True, text=True)
    record = {'environment': sorted(made.stdout.split()), 'rows': rows}
    bj.report.write_json(workdir / 'report.json', record)
    bj.report.write_text(workdir / 'report.md', page(record))


def _weights(name: str) -> Pretrained:
    if name != 'b-vit':
        return bj.models.load_pretrained(name, dataset=NETWORKS[name])
    of_digits, model = bj.models.load_pretrained('b-lenet', dataset=NETWORKS[name]), bj.models.create(name)
    return of_digits.replace(model=model, variables=model.init(jax.random.key(0), np.zeros(of_digits.inputs.shape)))


def _fresh_environment(place: Path, needed: Sequence[str]) -> Path:
    """Makes an environment of the packages that the reader needs."""
    os.environ.pop('PYTHONPATH', None)  # what lies there would be in the fresh environment, too
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    python = place / 'bin' / 'python'
    install = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    subprocess.run([*install, *needed], check=True)
    for package in {'branchy_jax', 'flax', 'jax'} - set(needed):
        missing = subprocess.run([python, '-c', f'import {package}'], cwd=place, capture_output=True, check=False)
        if missing.returncode == 0:
            sys.exit(f'{package} is in {place}, which was to be without it')
    return python


PROGRAMS = {'jax': ('staged', 'batch', 'parts'), 'onnx': ('file', 'file for batches'), 'iree': ('staged', 'batch')}
"""What each runtime runs: programs of a folder, or ONNX files."""


def run(runtime: str, weights: Pretrained, workdir: Path, python: Path) -> list[Row]:
    """Writes a network below a folder, and runs each of its programs in the other environment."""
    folder, rows = workdir / 'folder', []
    if runtime != 'onnx':
        shutil.rmtree(folder, ignore_errors=True)
        _export(bj.export.save, folder, weights)
    for program in PROGRAMS[runtime]:
        subject, more = folder, [f'--program={program}', *(['--iree'] if runtime == 'iree' else [])]
        if runtime == 'onnx':
            subject, more = workdir / f'{program}.onnx', []
            _export(functools.partial(bj.export.save_onnx, batch=program != 'file'), subject, weights)
        arguments = [f'--images={workdir}/images.npy', f'--expect={workdir}/answers.npz', *more]
        ran = subprocess.run(
            [python, run_exported.__file__, subject, *arguments],
            cwd=workdir,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise SystemExit(f'{subject}: {ran.stdout}{ran.stderr}')
        rows.append({'program': program, **json.loads(ran.stdout)})
    return rows


def _export(save: Callable[..., Any], path: Path, weights: Pretrained) -> None:
    policy, options = weights.operating_points[0], {'inputs': weights.inputs, 'normalization': weights.normalization}
    save(path, weights.model, weights.variables, policy, **options)


def _write_answers(weights: Pretrained, images: np.ndarray, workdir: Path) -> Pretrained:
    """Writes images and the answers of `dense`, with marked ties; returns the weights with the thresholds used."""
    inputs = weights.normalize(images)
    uncertainty = bj.inference.exit_outputs(weights.model, weights.variables, inputs).uncertainty
    exits = len(uncertainty)
    thresholds = np.asarray(table_of(uncertainty).for_shares(np.full(exits, 1 / exits)).thresholds)
    tie = (np.abs(uncertainty[:-1].T - thresholds) <= _TIE * thresholds).any(axis=1)
    answer = bj.inference.dense(weights.model)(weights.variables, inputs, thresholds)
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / 'images.npy', images)
    np.savez(workdir / 'answers.npz', label=answer.label, exit_index=answer.exit_index, tie=tie)
    return weights.replace(operating_points=(bj.ExitPolicy(bj.criteria.entropy, thresholds),))


_COLUMNS = ('network', 'program', 'images', 'differ', 'ties', 'differ_at_ties', 'shares', 'exits_in_64', 'exits_asked')
_TITLES = {'jax': 'Exported programs by jax', 'onnx': 'ONNX files in ONNX Runtime', 'iree': 'StableHLO text by IREE'}


def page(record: Row) -> str:
    """Lays out the record in Markdown."""
    rows = record['rows']
    commands = '\n'.join(sorted({f'- `{row["command"]}`, {row["device"]}' for row in rows}))
    return f"""# {_TITLES[rows[0]['runtime']]}

{commands}

In an environment of {', '.join(record['environment'])}.

`differ` counts images whose label or exit is not that of `dense`; images whose uncertainty is within 1e-4 of a
threshold, relatively, are ties, and count apart. A file for batches runs in batches of 1, 7, 64 and 256: the largest
count. `exits in 64`: at how many exits images leave, in the batch of 64 where these are fewest. An ONNX file has an
`If` for each side exit; `exits asked` is the last exit of which a node ran for the images of each exit, by ONNX
Runtime's profile: 0, 1, … means that no skipped stage ran. A dash: not counted.

{table(rows, *_COLUMNS)}
"""


if __name__ == '__main__':
    main()
