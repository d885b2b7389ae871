"""The control: static networks smaller than the baseline, trained by its recipe. Does early exit beat shrinking?

    python -m experiments.smaller --workdir=runs/lenet_mnist_tuned

For every side exit of a finished run, its stages and its head alone are trained from scratch as a network of their
own, as long as the baseline was. Writes ``smaller.json`` into the folder.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.finished import FinishedRun, read_run
from experiments.records import describe_device
from experiments.timing import time_static
from experiments.trainings import train_network


def main(arguments: list[str]) -> None:
    """Trains and times the controls of the run in ``--workdir``."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    for row in run(read_run(_WORKDIR.value))['rows']:
        print(
            f'{row["network"]}: test accuracy {100 * row["test_accuracy"]:.2f} %, {row["latency_ms"]:.4f} ms, '
            f'{row["gain"]:.2f} times faster than the baseline'
        )


def run(finished: FinishedRun) -> dict[str, Any]:
    """Trains, evaluates and times every static network; returns the record."""
    dataset, config = finished.dataset(), finished.config
    static: dict[str, tuple[bj.BranchyNet, Variables]] = {}
    options = dict(finished.options)
    if config.banded:
        options['convolution'] = bj.models.banded_convolution
    trained_form = bj.models.create(config.network, **options)
    for n in range(finished.model.num_exits - 1):
        name = f'{config.network[2:]}, first {n + 1} of {finished.model.num_exits} stages'
        model = first_stages(trained_form, n)
        start = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, *dataset.image_shape)))
        variables = train_network(
            model, start, jax.random.key(config.seed + 1), [1.0], name=f'static{n + 1}',
            epochs=config.epochs_baseline, config=config, dataset=dataset, workdir=finished.workdir,
        )  # fmt: skip
        static[name] = (first_stages(finished.model, n), variables)
    images = np.asarray(dataset.normalization(dataset.test.image[: config.latency_images]))
    baseline = (finished.baseline, finished.baseline_variables)
    seconds = time_static({'baseline': baseline, **static}, images, passes=config.latency_passes)
    rows = []
    for name, (model, variables) in static.items():
        outputs = bj.inference.exit_outputs(model, variables, dataset.test.image, prepare=dataset.normalization)
        gain = bj.measure.paired_ratio(seconds['baseline'], seconds[name])
        rows.append({
            'network': name,
            'test_accuracy': float(bj.thresholds.accuracy_statistics(outputs.logits, dataset.test.label).mean()),
            'latency_ms': float(np.median(seconds[name])) / len(images) * 1e3,
            'gain': gain.median,
            'macs': bj.costs.count_macs(model, dataset.image_shape).trunk,
        })  # fmt: skip
    record = {
        'network': config.network,
        'dataset': config.dataset,
        'device': describe_device(),
        'command': shlex.join(['python', '-m', 'experiments.smaller', *sys.argv[1:]]),
        'rows': rows,
    }
    bj.report.write_json(Path(finished.workdir) / 'smaller.json', record)
    return record


def first_stages(model: bj.BranchyNet, n: int) -> bj.BranchyNet:
    """Returns the network that ends at exit n, with that exit alone."""
    return bj.BranchyNet(stages=(tuple(model.stages[: n + 1]),), exits=(model.exits[n],), image_shape=model.image_shape)


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished main job.')
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
