"""Measures the joules per image of a finished run: of the baseline, and of each operating point.

    python -m experiments.energy --workdir=runs/lenet_mnist_tuned

Writes ``energy.json`` into the folder. Where the device has no meter that can be read, the record says so and holds no
figure.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import branchy_jax as bj
from branchy_jax.energy import Meter
from experiments.finished import FinishedRun, read_run
from experiments.records import describe_device

_IMAGES = 200
NO_METER = 'no meter: this device offers no energy counter that nvidia-ml-py or zeus (RAPL) can read; nothing measured'


def main(arguments: list[str]) -> None:
    """Measures the run in ``--workdir``."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    finished = read_run(_WORKDIR.value)
    meter = bj.energy.find_meter()
    batches = [int(size) for size in _BATCHES.value]
    record = {
        'network': finished.config.network,
        'placement': finished.config.placement,
        'dataset': finished.config.dataset,
        'device': describe_device(),
        'command': shlex.join(['python', '-m', 'experiments.energy', *sys.argv[1:]]),
        **measure(finished, meter, batches=batches, seconds=_SECONDS.value),
    }
    bj.report.write_json(Path(_WORKDIR.value) / 'energy.json', record)
    print(record['note'])
    for row in record['rows']:
        print(
            f'{row["network"]} {row["operating_point"]}, batch {row["batch"]}: {1e3 * row["joules"]:.3f} mJ an image '
            f'above {row["idle_watts"]:.0f} W idle ({1e3 * row["joules_with_idle"]:.3f} mJ with it)'
        )


def measure(
    finished: FinishedRun, meter: Meter | None, *, batches: list[int], seconds: float, **clocks: Any
) -> dict[str, Any]:
    """Returns ``meter``, ``note`` and ``rows``; no rows without a meter.

    Args:
        finished: the networks.
        meter: from `branchy_jax.energy.find_meter`.
        batches: images in a call.
        seconds: to run each for, at least.
        **clocks: of `branchy_jax.energy.measure_energy`.
    """
    if meter is None:
        return {'meter': None, 'note': NO_METER, 'rows': []}
    test = finished.dataset().test
    rows, idle_watts = [], None
    for batch in (size for size in batches if size <= len(test)):
        images = np.asarray(finished.normalization(test.image[: max(_IMAGES // batch, 1) * batch]))
        for (network, point), run in _passes(finished, images, batch).items():
            found = bj.energy.measure_energy(run, meter, seconds=seconds, idle_watts=idle_watts, **clocks)
            idle_watts = found.idle_watts
            row = {'network': network, 'operating_point': point, 'batch': batch, **dataclasses.asdict(found)}
            rows.append({**row, **{key: row[key] / len(images) for key in ('joules', 'joules_with_idle')}})
    note = f'{meter.name}; idle power subtracted and shown; every run long enough for a resolution below 2 %'
    return {'meter': meter.name, 'note': note, 'rows': rows}


def _passes(finished: FinishedRun, images: np.ndarray, batch: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """Returns a pass over all images for the baseline and for each operating point."""
    network = finished.config.network
    on_device = [
        jax.block_until_ready(jnp.asarray(images[start] if batch == 1 else images[start : start + batch]))
        for start in range(0, len(images), batch)
    ]
    baseline = bj.inference.optimize(finished.baseline, finished.baseline_variables)
    branchy = bj.inference.optimize(finished.model, finished.variables)
    if batch > 1:
        answer = functools.partial(jax.jit(baseline[0].apply), baseline[1])
        runs: dict[tuple[str, str], Any] = {(network[2:], 'baseline'): answer}
        for name, thresholds in finished.thresholds.items():
            runs[network, name] = bj.inference.plan(
                finished.model, finished.variables, images, thresholds, batch_size=batch
            )
    else:
        runs = {(network[2:], 'baseline'): _staged(baseline, np.zeros(0))}
        runs |= {(network, name): _staged(branchy, values) for name, values in finished.thresholds.items()}
    return {key: bj.measure.one_by_one(run, on_device) for key, run in runs.items()}


def _staged(network: tuple[bj.BranchyNet, Any], thresholds: np.ndarray) -> Callable[[Any], Any]:
    execute, settings = bj.inference.staged(network[0]), jnp.asarray(thresholds, jnp.float32)
    return lambda image: execute(network[1], image, settings)


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished main job.')
    _BATCHES = flags.DEFINE_list('batches', ['1'], 'Batch sizes: one image a call, or batches through the planner.')
    _SECONDS = flags.DEFINE_float('seconds', 10.0, 'To run each for, at least.')
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
