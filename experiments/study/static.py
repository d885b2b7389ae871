"""The control: static networks smaller than the baseline, trained by its recipe. Does early exit beat shrinking?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.run.networks import FinishedRun, training_options
from experiments.run.timing import time_static
from experiments.run.trainings import train_network
from experiments.study.folders import StaticRow, write_rows


def run(finished: FinishedRun) -> list[StaticRow]:
    """Trains, evaluates and times the first stages with each side exit, and writes ``static.json``."""
    dataset, config, networks = finished.dataset(), finished.config, finished.networks
    static: dict[str, tuple[bj.BranchyNet, Variables]] = {}
    trained_form = bj.models.create(config.network, **training_options(config, networks.options))
    for n in range(networks.model.num_exits - 1):
        name = f'{config.network[2:]}, first {n + 1} of {networks.model.num_exits} stages'
        model = first_stages(trained_form, n)
        start = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, *dataset.image_shape)))
        variables = train_network(
            model, start, jax.random.key(config.seed + 1), [1.0], name=f'static{n + 1}',
            epochs=config.epochs_baseline, config=config, dataset=dataset, workdir=finished.workdir,
        )  # fmt: skip
        static[name] = (first_stages(networks.model, n), variables)
    images = np.asarray(dataset.normalization(dataset.test.image[: config.latency_images]))
    baseline = (networks.baseline, networks.baseline_variables)
    clocks = time_static({'baseline': baseline, **static}, images, passes=config.latency_passes)
    rows = []
    for name, network in static.items():
        table = bj.inference.exit_table(*network, dataset.test, split='test', prepare=dataset.normalization)
        rows.append(StaticRow(name, float(table.anytime().accuracy[-1]), clocks[name], float(table.costs.trunk)))
    write_rows(finished, 'static', rows, by='main')
    for row in rows:
        print(
            f'{row.network}: test accuracy {100 * row.accuracy:.2f} %, {row.clock.latency_ms:.4f} ms, '
            f'{row.clock.gain:.2f} times faster than the baseline'
        )
    return rows


def first_stages(model: bj.BranchyNet, n: int) -> bj.BranchyNet:
    """Returns the network that ends at exit n, with that exit alone."""
    return bj.BranchyNet(stages=(tuple(model.stages[: n + 1]),), exits=(model.exits[n],), image_shape=model.image_shape)
