"""Figure 6: cache misses against run time on the CPU, as the thresholds vary.

    python -m experiments.cache --workdir=runs/alexnet_cifar10

Cache misses come from valgrind's simulation of this machine's caches (callgrind), switched on only while images run:
virtual machines offer ``perf`` no counters. Run times are the run's own, measured without valgrind. Writes
``cache.json`` into the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import branchy_jax as bj
from experiments.run import command
from experiments.run.networks import read_run
from experiments.run.records import decode
from experiments.run.timing import on_device, staged
from experiments.study.folders import CacheRow, write_rows

CACHES = ('--I1=32768,8,64', '--D1=32768,8,64', '--LL=33554432,16,64')
NO_VALGRIND = 'valgrind: not found; install it (apt install valgrind): cache misses are not measured without it'


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs itself under valgrind, then collects."""
    parser = command.parser_of_a_run(__doc__)
    parser.add_argument('--images', type=command.positive, default=8, help='Test images per setting.')
    parser.add_argument('--settings', type=command.positive, default=5, help='Thresholds of the frontier.')
    parser.add_argument('--inside', type=Path, help='Set by this command where it calls itself under valgrind.')
    options = parser.parse_args(arguments)
    if options.inside is not None:
        _run_images(options.workdir, options.inside, images=options.images, settings=options.settings)
        return
    for row in run(options.workdir, images=options.images, settings=options.settings):
        print(
            f'{row.network} {list(row.thresholds)}: {row.latency_ms:.3f} ms, first-level misses '
            f'{100 * row.first_level:.3f} %, last-level {100 * row.last_level:.4f} % of data accesses'
        )


def run(workdir: Path, *, images: int, settings: int) -> list[CacheRow]:
    """Counts cache misses of a finished run under valgrind, and writes ``cache.json``.

    Args:
        workdir: folder of the run.
        images: test images per setting.
        settings: how many of the frontier.

    Raises:
        ValueError: there is no valgrind, or it failed.
    """
    if shutil.which('valgrind') is None or shutil.which('callgrind_control') is None:
        raise ValueError(NO_VALGRIND)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            'valgrind',
            '--tool=callgrind',
            '--cache-sim=yes',
            '--instr-atstart=no',
            '--fair-sched=yes',
            *CACHES,
            f'--callgrind-out-file={folder}/counts',
            sys.executable,
            '-m',
            'experiments.cache',
            f'--workdir={workdir}',
            f'--images={images}',
            f'--settings={settings}',
            f'--inside={folder}',
        ]
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_CPU_ENABLE_ASYNC_DISPATCH': '0'}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f'valgrind: failed with {done.returncode}: {done.stderr[-500:]}')
        rows = [
            decode(CacheRow, {**setting, **misses(Path(folder, f'counts.{n + 1}').read_text())})
            for n, setting in enumerate(bj.report.read_json(Path(folder, 'settings.json'))['settings'])
        ]
    simulated_by = f'valgrind callgrind, caches {" ".join(CACHES)}'
    write_rows(read_run(workdir), 'cache', rows, by='cache', key='points', simulated_by=simulated_by, images=images)
    return rows


def misses(text: str) -> dict[str, float]:
    r"""Reads a dump of callgrind: misses per data access in the first and the last level, and data accesses.

    Example:
        >>> misses('events: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw\ntotals: 9 60 40 0 4 1 0 2 0')['first_level']
        0.05
    """
    names = re.search(r'^events: (.*)$', text, re.M)
    totals = re.search(r'^totals: (.*)$', text, re.M)
    if names is None or totals is None:
        raise ValueError('counts: not a dump of callgrind with cache simulation')
    figures = [int(value) for value in totals[1].split()]
    count = dict(zip(names[1].split(), figures + [0] * len(names[1].split()), strict=False))
    accesses = count['Dr'] + count['Dw']
    return {
        'first_level': (count['D1mr'] + count['D1mw']) / accesses,
        'last_level': (count['DLmr'] + count['DLmw']) / accesses,
        'accesses': accesses,
    }


def _run_images(workdir: Path, folder: Path, *, images: int, settings: int) -> None:
    """Runs the baseline and settings of the frontier, counting only while images run."""
    finished = read_run(workdir)
    networks, frontier = finished.networks, finished.record.frontier
    chosen = np.unique(np.linspace(0, len(frontier) - 1, settings).round().astype(int))
    tried: list[tuple[str, Sequence[float], float]] = [
        (networks.name[2:], (), finished.record.baseline.clock.latency_ms),
        *((networks.name, frontier[n].thresholds, frontier[n].latency_ms) for n in chosen),
    ]
    pixels = finished.dataset().test.image[:images]
    inputs = on_device(np.asarray(networks.normalization(pixels)))
    for _, thresholds, _ in tried:
        run = staged(networks.fast if thresholds else networks.fast_baseline, finished.policy(thresholds))
        jax.block_until_ready(run(inputs[0]))
        _control('-i', 'on')
        bj.measure.one_by_one(run, inputs)()
        _control('-i', 'off')
        _control('-d')
    record = [
        {'network': name, 'thresholds': thresholds, 'latency_ms': latency_ms} for name, thresholds, latency_ms in tried
    ]
    bj.report.write_json(folder / 'settings.json', {'settings': record})


def _control(*arguments: str) -> None:
    subprocess.run(['callgrind_control', *arguments, str(os.getpid())], capture_output=True, check=True)


if __name__ == '__main__':
    main()
