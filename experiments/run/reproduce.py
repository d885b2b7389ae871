"""Everything of the paper that a CPU cannot do, in one resumable command for a bare machine with a GPU.

    bash experiments/reproduce_gpu.sh

Trains baselines and branchy networks, picks thresholds, times batches through the planner, measures energy, tests the
claims, and packs records and weights into at most eight files of at most 16 MiB below ``--out``. Each step is a command
of its own that resumes; a step that is done is not done again, and none is begun that would not end in the time left.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from branchy_jax.checkpoint import load_weights, save_weights, write_atomically
from branchy_jax.report import read_json, write_json
from experiments.run import command

_MOST_BYTES = 16 * 2**20
_RESERVED_SECONDS = 20.0
_MOST_TO_WAIT_FOR = 90.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step.
        arguments: after ``python -m``.
        makes: the file that it leaves when done.
        seconds: that it should take on an H100.
    """

    name: str
    arguments: list[str]
    makes: Path
    seconds: float


# Training of both networks on an H100; a tuned run takes its baseline from the run beside it.
_TRAINING_SECONDS = {
    'lenet_mnist_tuned': 40,
    'alexnet_cifar10': 60,
    'resnet110_cifar10': 380,
    'resnet110_cifar10_tuned': 190,
    'alexnet_cifar10_tuned': 40,
}


def steps(workdir: Path, *, quick: bool) -> list[Step]:
    """Lists all steps, most wanted first."""
    found = [step for name in _TRAINING_SECONDS for step in _run(workdir, name, quick=quick)]
    claims = workdir / 'claims'
    arguments = [
        'experiments.claims',
        f'--workdir={claims}',
        '--network=b-alexnet',
        '--dataset=cifar10',
        '--batch_size=128',
        '--learning_rate=0.003',
        '--weight_decay=0.01',
        '--dtype=bfloat16',
        *(['--seeds=2', '--epochs=1', '--most_examples=256'] if quick else ['--seeds=5', '--epochs=15']),
    ]
    found.append(Step('claims b-alexnet', arguments, claims / 'claims_b-alexnet.md', 210))
    for network in ('b-plain6', 'b-resnet8') if quick else ('b-plain30', 'b-resnet110'):
        arguments = [
            'experiments.gradients',
            f'--workdir={claims}',
            f'--network={network}',
            '--dataset=cifar10',
            f'--steps={2 if quick else 100}',
            f'--batch_size={4 if quick else 128}',
            f'--seeds={2 if quick else 5}',
        ]
        found.append(Step(f'gradients {network}', arguments, claims / f'gradients_{network}.md', 50))
    figures = ['experiments.figures', f'--workdir={workdir / "figures"}', f'--runs={workdir}']
    return [*found, Step('figures', figures, workdir / 'figures' / 'figures.md', 10)]


def _run(workdir: Path, name: str, *, quick: bool) -> list[Step]:
    """Returns the steps of one run: training and thresholds, batches and, for tuned ones, energy and controls."""
    folder = workdir / name
    quick_flags = [
        '--config.epochs=1',
        '--config.epochs_baseline=1',
        '--config.epochs_start=0',
        '--config.most_examples=300',
        '--config.latency_images=5',
        '--config.latency_passes=2',
        '--config.batch_size=32',
        '--config.shallow_depth=0',
    ]
    if quick and 'resnet' in name:
        quick_flags += ['--config.network=b-resnet8']
    settings = quick_flags if quick else ['--config.banded=False']
    sizes = ['--batches=8', '--passes=2'] if quick else ['--batches=256,2048']
    on_folder = f'--workdir={folder}'
    variant = ':gpu' if 'cifar10' in name else ''  # recipes for many epochs, not those for two CPU cores
    main = ['experiments.main', f'--config=experiments/configs/{name}.py{variant}', on_folder, *settings]
    energy = ['experiments.energy', on_folder, '--batches=1,8' if quick else '--batches=1,2048']
    found = [
        Step(f'{name}: train', main, folder / 'report.json', _TRAINING_SECONDS[name]),
        Step(f'{name}: batches', ['experiments.batches', on_folder, *sizes], folder / 'batches.json', 25),
    ]
    if name.endswith('_tuned'):
        found.append(Step(f'{name}: energy', energy, folder / 'energy.json', 90))
        if 'resnet' not in name:
            found.append(Step(f'{name}: static', [*main, '--static'], folder / 'static.json', 30))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what is not done yet, then packs."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, default=Path('runs/gpu'), help='Of all runs; later calls resume there.')
    parser.add_argument('--out', type=Path, help='Folder for what is to be brought back.')
    parser.add_argument('--minutes', type=float, default=9.0, help='Wall clock of this call.')
    parser.add_argument('--quick', action='store_true', help='One epoch on few images, small networks: to try it out.')
    parser.add_argument('--only', default='', help='Parts of the names of steps to do, such as lenet,claims.')
    options = parser.parse_args(arguments)
    workdir, end = options.workdir, time.monotonic() + 60 * options.minutes
    workdir.mkdir(parents=True, exist_ok=True)
    all_steps = steps(workdir, quick=options.quick)
    for step in all_steps:
        if any(part in step.name for part in options.only.split(',')):
            _share_baselines(workdir)
            _do(step, workdir, end, quick=options.quick)
    left = [step.name for step in all_steps if not step.makes.exists()]
    print('left to do: ' + (', '.join(left) or 'nothing'))
    if options.out is not None:
        pack(workdir, options.out)


def _do(step: Step, workdir: Path, end: float, *, quick: bool) -> None:
    remaining = end - time.monotonic() - _RESERVED_SECONDS
    if step.makes.exists() or remaining <= 0:
        return
    if remaining < min(step.seconds, _MOST_TO_WAIT_FOR) and not quick:  # longer ones resume where they stop
        print(f'{step.name}: left for the next call, {remaining:.0f} s remain', flush=True)
        return
    start = time.monotonic()
    log = workdir / 'logs' / f'{step.name.replace(": ", "_").replace(" ", "_")}.log'
    log.parent.mkdir(exist_ok=True)
    with log.open('a') as file:
        arguments = [sys.executable, '-m', *step.arguments]
        try:
            code = subprocess.run(arguments, stdout=file, stderr=file, timeout=remaining, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 'out of time, it will resume'
    seconds = time.monotonic() - start
    state = 'done' if step.makes.exists() else f'not done ({code})'
    print(f'{step.name}: {state}, {seconds:.0f} s', flush=True)
    times = read_json(workdir / 'seconds.json') if (workdir / 'seconds.json').exists() else {}
    write_json(workdir / 'seconds.json', {**times, step.name: times.get(step.name, 0.0) + seconds})
    if not step.makes.exists():
        print(''.join(f'    {line}\n' for line in log.read_text().splitlines()[-5:]), flush=True)


def _share_baselines(workdir: Path) -> None:
    """A tuned run has the trunk of the run beside it: the same baseline, trained once."""
    for name in ('alexnet_cifar10', 'resnet110_cifar10'):
        pair = [workdir / name, workdir / f'{name}_tuned']
        done = next((folder for folder in pair if (folder / 'report.json').exists()), None)
        for folder in pair:
            if done is not None and not folder.exists():
                ignored = shutil.ignore_patterns('b-*', 'static*')
                shutil.copytree(done / 'checkpoints', folder / 'checkpoints', ignore=ignored)


def pack(workdir: Path, out: Path) -> list[Path]:
    """Packs records into one archive and the branchy networks' weights, in half precision if need be, into others.

    Args:
        workdir: of all runs.
        out: for at most eight files of at most 16 MiB.

    Raises:
        ValueError: a file would be too large.
    """
    out.mkdir(parents=True, exist_ok=True)
    endings = {'.json', '.md', '.png', '.log'}
    records = [path for path in workdir.rglob('*') if path.suffix in endings and 'checkpoints' not in path.parts]
    made = [_tar(out / 'records.tar.gz', workdir, records)]
    for name in ('lenet', 'alexnet', 'resnet110'):
        paths = sorted(workdir.glob(f'{name}_*/*.safetensors'))
        weights = [_halved(path, out / 'half' / path.relative_to(workdir)) for path in paths]
        if weights:
            made.append(_tar(out / f'weights_{name}.tar.gz', out / 'half', weights))
    shutil.rmtree(out / 'half', ignore_errors=True)
    for path in made:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f'out: {path} has {path.stat().st_size / 2**20:.1f} MiB, more than can be brought back')
    return made


def _halved(path: Path, into: Path) -> Path:
    """Stores weights of two bytes a number: float16 holds float32's first eleven bits, accuracies keep four digits."""
    variables, metadata = load_weights(path)

    def half(value: np.ndarray) -> np.ndarray:
        value = np.asarray(value)
        small = value.dtype == np.float32 and value.size > 16 and np.abs(value).max(initial=0) < 6e4
        return value.astype(np.float16) if small else value

    into.parent.mkdir(parents=True, exist_ok=True)
    save_weights(into, jax.tree.map(half, variables), metadata=metadata)
    return into


def _tar(path: Path, root: Path, members: list[Path]) -> Path:
    def write(temporary: Path) -> None:
        with tarfile.open(temporary, 'w:gz') as archive:
            for member in members:
                archive.add(member, arcname=str(member.relative_to(root)))

    write_atomically(path, write)
    print(f'{path}: {len(members)} files, {os.path.getsize(path) / 2**20:.1f} MiB')
    return path


if __name__ == '__main__':
    main()
