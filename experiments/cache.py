"""Figure 6: cache misses against run time on the CPU, as the thresholds vary.

    python -m experiments.cache --workdir=runs/alexnet_cifar10_brief

Cache misses come from valgrind's simulation of this machine's caches (callgrind), switched on only while images run:
virtual machines offer ``perf`` no counters. Run times are the run's own, measured without valgrind. Writes
``cache.json`` into the folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

CACHES = ('--I1=32768,8,64', '--D1=32768,8,64', '--LL=33554432,16,64')
NO_VALGRIND = 'valgrind: not found; install it (apt install valgrind): cache misses are not measured without it'


def main(arguments: list[str]) -> None:
    """Runs itself under valgrind, then collects."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    if _INSIDE.value is not None:
        _run_images(Path(_WORKDIR.value), Path(_INSIDE.value))
        return
    record = measure(Path(_WORKDIR.value), images=_IMAGES.value, settings=_SETTINGS.value)
    for point in record['points']:
        print(
            f'{point["network"]} {point["thresholds"]}: {point["latency_ms"]:.3f} ms, first-level misses '
            f'{100 * point["first_level"]:.3f} %, last-level {100 * point["last_level"]:.4f} % of data accesses'
        )


def measure(workdir: Path, *, images: int, settings: int) -> dict[str, Any]:
    """Counts cache misses of a finished run under valgrind, and writes ``cache.json``.

    Raises:
        ValueError: there is no valgrind, or it failed.
    """
    if shutil.which('valgrind') is None or shutil.which('callgrind_control') is None:
        raise ValueError(NO_VALGRIND)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            'valgrind', '--tool=callgrind', '--cache-sim=yes', '--instr-atstart=no', '--fair-sched=yes',
            *CACHES,
            f'--callgrind-out-file={folder}/counts', sys.executable, '-m', 'experiments.cache', f'--workdir={workdir}',
            f'--images={images}', f'--settings={settings}', f'--inside={folder}',
        ]  # fmt: skip
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_CPU_ENABLE_ASYNC_DISPATCH': '0'}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f'valgrind: failed with {done.returncode}: {done.stderr[-500:]}')
        from branchy_jax.report import read_json, write_json
        from experiments.records import describe_device

        found = read_json(Path(folder, 'settings.json'))
        points = [
            {**setting, **misses(Path(folder, f'counts.{n + 1}').read_text())}
            for n, setting in enumerate(found['settings'])
        ]
    record = {
        **{key: found[key] for key in ('network', 'dataset')},
        'device': describe_device(),
        'command': shlex.join(['python', '-m', 'experiments.cache', *sys.argv[1:]]),
        'simulated_by': f'valgrind callgrind, caches {" ".join(CACHES)}',
        'images': images,
        'points': points,
    }
    write_json(workdir / 'cache.json', record)
    return record


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


def _run_images(workdir: Path, folder: Path) -> None:
    """Runs the baseline and settings of the frontier, counting only while images run."""
    import jax
    import jax.numpy as jnp

    import branchy_jax as bj
    from experiments.finished import read_run

    finished = read_run(workdir)
    frontier = finished.report['frontier']
    chosen = np.unique(np.linspace(0, len(frontier) - 1, _SETTINGS.value).round().astype(int))
    baseline_row = finished.report['rows'][0]
    settings = [
        {'network': finished.config.network[2:], 'thresholds': [], 'latency_ms': baseline_row['latency_ms']},
        *(
            {'network': finished.config.network, **{key: frontier[n][key] for key in ('thresholds', 'latency_ms')}}
            for n in chosen
        ),
    ]
    test = finished.dataset().test
    images = [jnp.asarray(image) for image in np.asarray(finished.normalization(test.image[: _IMAGES.value]))]
    networks = {
        finished.config.network[2:]: bj.inference.optimize(finished.baseline, finished.baseline_variables),
        finished.config.network: bj.inference.optimize(finished.model, finished.variables),
    }
    executors = {name: bj.inference.staged(model) for name, (model, _) in networks.items()}
    for setting in settings:
        name = setting['network']
        thresholds = jnp.asarray(setting['thresholds'], jnp.float32)
        execute = executors[name]
        jax.block_until_ready(execute(networks[name][1], images[0], thresholds))
        _control('-i', 'on')
        for image in images:
            jax.block_until_ready(execute(networks[name][1], image, thresholds))
        _control('-i', 'off')
        _control('-d')
    bj.report.write_json(
        folder / 'settings.json',
        {'network': finished.config.network, 'dataset': finished.config.dataset, 'settings': settings},
    )


def _control(*arguments: str) -> None:
    subprocess.run(['callgrind_control', *arguments, str(os.getpid())], capture_output=True, check=True)


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished main job.')
    _IMAGES = flags.DEFINE_integer('images', 8, 'Test images per setting.', lower_bound=1)
    _SETTINGS = flags.DEFINE_integer('settings', 5, 'Thresholds of the frontier.', lower_bound=1)
    _INSIDE = flags.DEFINE_string('inside', None, 'Set by this command where it calls itself under valgrind.')
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
