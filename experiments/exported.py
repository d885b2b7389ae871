"""Do exported networks give the same answers without this library? Runs them in new environments.

    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/exported            by jax, numpy and flatbuffers
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/onnx --onnx         by onnxruntime and numpy
    TFDS_DATA_DIR=DIR python -m experiments.exported --workdir=runs/iree --iree         by IREE and numpy

The published networks, and a B-ViT and a B-U-Net of random weights, answer 1,000 test images there, at thresholds at
which equal parts leave at every exit; `experiments.peers` times the ONNX files. ``--programs='stage files'`` restricts
a run to files of that kind: here an ONNX file for each stage and head. Some minutes; needs a package index. Writes
``report.json``, a row per network and program, and ``report.md``; other rows of a report that is there stay. Expect no
answer that differs.

    python -m experiments.exported --publish=runs/lenet_mnist --workdir=branchy_jax/models/weights

writes the network of a finished run as one file, for `branchy_jax.models.load_pretrained`, and a page beside it; with
``--halves`` kernels as float16.
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
from experiments.run.report import Row, provenance, store, table
from experiments.study import flags
from experiments.study.cells import table_of
from experiments.study.finished import publish, read_run
from experiments.study.speed import DATASETS

NETWORKS = {**DATASETS, 'b-vit': 'mnist', 'b-unet': 'digit_canvases'}
"""The networks, and the data sets that they are for."""

_UNTRAINED = ('b-vit', 'b-unet')

NEEDED = {
    'jax': ('jax', 'jaxlib', 'numpy', 'flatbuffers'),
    'onnx': ('numpy', 'onnxruntime'),
    'iree': ('numpy', 'iree-base-compiler', 'iree-base-runtime'),
}
"""The packages of each runtime's environment."""

_TIE = 1e-4  # relative distance from a threshold, or between two logits, below which rounding may decide


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, runs in a fresh environment, compares, writes the report."""
    parser = flags.parser(__doc__, 'Folder for exports and report.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--onnx', action='store_const', dest='runtime', const='onnx', default='jax', help='Runs ONNX files.'
    )
    what.add_argument('--iree', action='store_const', dest='runtime', const='iree', help='Runs StableHLO text.')
    what.add_argument('--publish', type=Path, help='A finished run, to write as published weights.')
    parser.add_argument('--halves', action='store_true', help='Publishes kernels as float16.')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), help='Networks to export.')
    parser.add_argument('--programs', nargs='+', help='Kinds of files to run, of those of the runtime.')
    parser.add_argument('--images', type=flags.positive, default=1000, help='Number of test images.')
    options = parser.parse_args(arguments)
    workdir = options.workdir.resolve()
    if options.publish is not None:
        print(publish(read_run(options.publish), workdir, halves=options.halves))
        return
    programs = options.programs or PROGRAMS[options.runtime]
    if set(programs) - set(PROGRAMS[options.runtime]):
        parser.error(f'--programs: got {programs}; choose from {", ".join(PROGRAMS[options.runtime])}')
    python = _fresh_environment(workdir / 'environment', NEEDED[options.runtime])
    rows: list[Row] = []
    for name in options.networks:
        dataset = bj.data.load_dataset(NETWORKS[name])
        images = np.asarray(dataset.test.image[: options.images])
        weights = _write_answers(_weights(name, dataset), images, workdir / name)
        shared = {'runtime': options.runtime, 'network': name, **provenance('exported'), 'images': len(images)}
        rows += [{**shared, **row} for row in run(options.runtime, programs, weights, workdir / name, python)]
        print(table(rows, *_COLUMNS), flush=True)
    made = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, capture_output=True, text=True)
    path, environment = workdir / 'report.json', made.stdout.split()
    if path.exists():  # rows of other networks and programs stay
        earlier, measured = bj.report.read_json(path), {(row['network'], row['program']) for row in rows}
        rows = [row for row in earlier['rows'] if (row['network'], row['program']) not in measured] + rows
        environment += earlier['environment']
    store(path, {'environment': sorted(set(environment)), 'rows': rows}, page)


def _weights(name: str, dataset: bj.data.Dataset) -> Pretrained:
    if name not in _UNTRAINED:
        return bj.models.load_pretrained(name, dataset=NETWORKS[name])
    model, inputs = bj.models.create(name), jax.ShapeDtypeStruct((1, *dataset.test.image.shape[1:]), np.float32)
    variables = model.init(jax.random.key(0), np.zeros(inputs.shape, np.float32))
    return Pretrained(model, variables, inputs, dataset.normalization, (), {})


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


PROGRAMS = {
    'jax': ('staged', 'batch', 'parts'),
    'onnx': ('file', 'file for batches', 'stage files'),
    'iree': ('staged', 'batch'),
}
"""What each runtime runs: programs of a folder, or ONNX files."""


def run(runtime: str, programs: Sequence[str], weights: Pretrained, workdir: Path, python: Path) -> list[Row]:
    """Writes a network below a folder, and runs programs of it in the other environment."""
    folder, rows = workdir / 'folder', []
    shutil.rmtree(folder, ignore_errors=True)
    if runtime != 'onnx':
        _export(bj.export.save, folder, weights)
    for program in programs:
        subject, more = folder, [f'--program={program}', *(['--iree'] if runtime == 'iree' else [])]
        if program == 'stage files':
            more = ['--program=parts']
            _export(bj.export.save_stages, folder, weights)
        elif runtime == 'onnx':
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
    uncertainty = bj.inference.exit_outputs(weights.model, weights.variables, inputs, keep_logits=False).uncertainty
    exits = len(uncertainty)
    thresholds = np.asarray(table_of(uncertainty).for_shares(np.full(exits, 1 / exits)).thresholds)
    tie = (np.abs(uncertainty[:-1].T - thresholds) <= _TIE * thresholds).any(axis=1)
    answer = bj.inference.dense(weights.model)(weights.variables, inputs, thresholds)
    logits = np.sort(answer.logits, axis=-1)
    decided = logits[..., -1] - logits[..., -2] > _TIE * abs(logits).max(axis=-1)
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / 'images.npy', images)
    label = np.where(decided, answer.label, -1)
    np.savez(workdir / 'answers.npz', label=label, exit_index=answer.exit_index, tie=tie)
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
threshold, relatively, are ties, and count apart. A label of an image, or of a pixel of B-U-Net, whose two largest
logits differ by less than 1e-4 of the largest one counts as equal. Stage files are one file for each stage and head,
and run all images in one batch. A file for batches runs in batches of 1, 7, 64 and 256: the largest
count. `exits in 64`: at how many exits images leave, in the batch of 64 where these are fewest. An ONNX file has an
`If` for each side exit; `exits asked` is the last exit that ran a node for the images of each exit, by ONNX
Runtime's profile: 0, 1, … means that no skipped stage ran. A dash: not counted.

{table(rows, *_COLUMNS)}
"""


if __name__ == '__main__':
    main()
