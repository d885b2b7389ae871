"""Measures the joules per image of a finished run: of the baseline, and of each operating point.

    python -m experiments.energy --workdir=runs/lenet_mnist_tuned

Writes ``energy.json`` into the folder. Where the device has no meter that can be read, the record says so and holds no
figure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import branchy_jax as bj
from branchy_jax.measure import Meter
from experiments.run import command
from experiments.run.networks import FinishedRun, read_run
from experiments.run.timing import on_device, staged, whole
from experiments.study.folders import EnergyRow, write_rows

_IMAGES = 200
NO_METER = 'no meter: this device offers no energy counter that nvidia-ml-py or zeus (RAPL) can read; nothing measured'


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the run in ``--workdir``."""
    parser = command.parser_of_a_run(__doc__)
    parser.add_argument(
        '--batches', type=command.positives, default=[1], help='One image a call, or batches through the planner.'
    )
    parser.add_argument('--seconds', type=float, default=10.0, help='To run each for, at least.')
    options = parser.parse_args(arguments)
    record = run(read_run(options.workdir), bj.measure.find_meter(), batches=options.batches, seconds=options.seconds)
    print(record['note'])
    for row in record['rows']:
        print(
            f'{row["network"]} {row["operating_point"]}, batch {row["batch"]}: {1e3 * row["joules"]:.3f} mJ an image '
            f'above {row["idle_watts"]:.0f} W idle ({1e3 * row["joules_with_idle"]:.3f} mJ with it)'
        )


def run(
    finished: FinishedRun, meter: Meter | None, *, batches: Sequence[int], seconds: float, **clocks: Any
) -> Mapping[str, Any]:
    """Writes ``energy.json`` with ``meter``, ``note`` and ``rows``, and returns it; no rows without a meter.

    Args:
        finished: the networks.
        meter: from `branchy_jax.measure.find_meter`.
        batches: images in a call.
        seconds: to run each for, at least.
        **clocks: of `branchy_jax.measure.measure_energy`.
    """
    rows, note, name = [], NO_METER, None
    if meter is not None:
        rows = _measure(finished, meter, batches, seconds=seconds, **clocks)
        note = f'{meter.name}; idle power subtracted and shown; every run long enough for a resolution below 2 %'
        name = meter.name
    return write_rows(finished, 'energy', rows, by='energy', meter=name, note=note)


def _measure(finished: FinishedRun, meter: Meter, batches: Sequence[int], **options: Any) -> list[EnergyRow]:
    test = finished.dataset().test
    rows, idle_watts = [], None
    for batch in (size for size in batches if size <= len(test)):
        images = np.asarray(finished.networks.normalization(test.image[: max(_IMAGES // batch, 1) * batch]))
        for (network, point), one_pass in _passes(finished, images, batch).items():
            found = bj.measure.measure_energy(one_pass, meter, idle_watts=idle_watts, **options)
            idle_watts = found.idle_watts
            per_image = {name: getattr(found, name) / len(images) for name in ('joules', 'joules_with_idle')}
            figures = {**dataclasses.asdict(found), **per_image}
            rows.append(EnergyRow(network=network, operating_point=point, batch=batch, **figures))
    return rows


def _passes(finished: FinishedRun, images: np.ndarray, batch: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """Returns a pass over all images for the baseline and for each operating point."""
    networks = finished.networks
    inputs = on_device(images, batch if batch > 1 else None)
    if batch > 1:
        plan = functools.partial(bj.inference.plan, networks.model, networks.variables, images, batch_size=batch)
        baseline = whole(*networks.fast_baseline)
    else:
        plan = functools.partial(staged, networks.fast)
        baseline = staged(networks.fast_baseline, finished.policy(()))
    runs = {(networks.name[2:], 'baseline'): baseline}
    runs |= {(networks.name, name): plan(policy) for name, policy in finished.policies.items()}
    return {key: bj.measure.one_by_one(run, inputs) for key, run in runs.items()}


if __name__ == '__main__':
    main()
