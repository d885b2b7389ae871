"""Times, joules and cache misses of a finished run, written as rows into its folder."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.measure import Meter
from experiments.run.report import Row, provenance
from experiments.run.timing import on_device
from experiments.study.cells import measure
from experiments.study.finished import FinishedRun, read_run

NO_METER = 'no meter: this device offers no energy counter that nvidia-ml-py or zeus (RAPL) can read; nothing measured'
CACHES = ('--I1=32768,8,64', '--D1=32768,8,64', '--LL=33554432,16,64')
NO_VALGRIND = 'valgrind: not found; install it (apt install valgrind): cache misses are not measured without it'
_ENERGY_IMAGES = 200


def _write(finished: FinishedRun, name: str, rows: Sequence[Row], **more: Any) -> list[Row]:
    """Adds a file of rows to the folder of a run."""
    dataset, network = finished.report['dataset'], finished.networks.name
    record = {'network': network, 'dataset': dataset, **provenance('benchmark'), **more, 'rows': list(rows)}
    bj.report.write_json(finished.workdir / f'{name}.json', record)
    return list(rows)


def batches(finished: FinishedRun, sizes: Sequence[int], *, images: int, passes: int) -> list[Row]:
    """Times all operating points, one batch size after the other, and writes ``batches.json`` after each.

    Args:
        finished: the run.
        sizes: images in a call; those above the images are left out.
        images: test images in a pass, so that exits are taken in their true shares.
        passes: interleaved pairs.
    """
    test, rows = np.asarray(finished.networks.normalization(finished.dataset().test.image[:images])), []
    for batch in (size for size in sizes if size <= len(test)):
        rows += measure(finished.networks, test, finished.policies, batch, passes=passes)
        _write(finished, 'batches', rows)
    return rows


def energy(
    finished: FinishedRun, meter: Meter | None, sizes: Sequence[int], *, seconds: float, **clocks: Any
) -> list[Row]:
    """Measures joules per image of the baseline and each operating point, and writes ``energy.json`` after each.

    Args:
        finished: the run.
        meter: from `branchy_jax.measure.find_meter`; without one there are no rows, and the note says so.
        sizes: images in a call.
        seconds: to run each for, at least.
        **clocks: of `branchy_jax.measure.measure_energy`.
    """
    if meter is None:
        return _write(finished, 'energy', [], meter=None, note=NO_METER)
    networks, test, rows, idle_watts = finished.networks, finished.dataset().test, [], None
    note = f'{meter.name}; idle power subtracted and shown; every run long enough for a resolution below 2 %'
    served = {'baseline': (networks.baseline, networks.baseline_variables, finished.policy(()))}
    served |= {name: (networks.model, networks.variables, policy) for name, policy in finished.policies.items()}
    for batch in (size for size in sizes if size <= len(test)):
        images = np.asarray(networks.normalization(test.image[: max(_ENERGY_IMAGES // batch, 1) * batch]))
        earlier = None
        for point, (model, variables, policy) in served.items():
            planned = bj.inference.plan(model, variables, images, policy, batch_size=batch, earlier=earlier)
            earlier = None if point == 'baseline' else planned
            one_pass = bj.measure.one_by_one(planned, on_device(images, batch))
            energy = bj.measure.measure_energy(one_pass, meter, seconds=seconds, idle_watts=idle_watts, **clocks)
            idle_watts = energy.idle_watts
            per_image = {name: getattr(energy, name) / len(images) for name in ('joules', 'joules_with_idle')}
            network = networks.name[2:] if point == 'baseline' else networks.name
            row = {'network': network, 'operating_point': point, 'batch': batch}
            rows.append({**row, **dataclasses.asdict(energy), **per_image})
            _write(finished, 'energy', rows, meter=meter.name, note=note)
    return rows


def cache(workdir: Path, *, images: int, settings: int) -> list[Row]:
    """Counts cache misses of a finished run, and writes ``cache.json``.

    Valgrind's simulation of caches (callgrind) counts them, only while images run: virtual machines have no counters
    for ``perf``. Times come from the run itself and were measured without valgrind.

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
        ours = ['--tool=callgrind', '--cache-sim=yes', '--instr-atstart=no', '--fair-sched=yes']
        program = (
            f'from experiments.study import on_a_run; on_a_run.run_under_valgrind{(str(workdir), images, settings)}'
        )
        done = subprocess.run(
            ['valgrind', *ours, *CACHES, f'--callgrind-out-file={folder}/counts', sys.executable, '-c', program],
            env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_CPU_ENABLE_ASYNC_DISPATCH': '0'},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ValueError(f'valgrind: failed with {done.returncode}: {done.stderr[-500:]}')
        tried = json.loads(done.stdout.splitlines()[-1])
        rows = [{**row, **misses(Path(folder, f'counts.{n}').read_text())} for n, row in enumerate(tried, 1)]
    simulated_by = f'valgrind callgrind, caches {" ".join(CACHES)}'
    return _write(read_run(workdir), 'cache', rows, simulated_by=simulated_by, images=images)


def misses(text: str) -> Row:
    """Reads a dump of callgrind: misses per data access in the first and the last level, and data accesses."""
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


def run_under_valgrind(workdir: str, images: int, settings: int) -> None:
    """Runs the baseline and settings of the frontier, and counts only while images run; prints their rows."""
    finished = read_run(workdir)
    networks, frontier = finished.networks, finished.report['frontier']
    chosen = np.unique(np.linspace(0, len(frontier) - 1, settings).round().astype(int))
    tried = [finished.report['rows'][0], *({**frontier[n], 'network': networks.name} for n in chosen)]
    inputs = on_device(np.asarray(networks.normalization(finished.dataset().test.image[:images])), batch=1)
    baseline = bj.inference.optimize(networks.baseline, networks.baseline_variables, inputs=networks.inputs)
    for row in tried:
        model, variables = baseline if row is tried[0] else networks.fast
        policy = finished.policy(row['thresholds'])
        run = functools.partial(bj.inference.sequential(model), variables, policy=policy)
        jax.block_until_ready(run(inputs[0]))
        _control('-i', 'on')
        bj.measure.one_by_one(run, inputs)()
        _control('-i', 'off')
        _control('-d')
    print(json.dumps([{name: row[name] for name in ('network', 'thresholds', 'latency_ms')} for row in tried]))


def _control(*arguments: str) -> None:
    subprocess.run(['callgrind_control', *arguments, str(os.getpid())], capture_output=True, check=True)
