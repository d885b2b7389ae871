"""The control: static networks smaller than the baseline, trained by its recipe. Does early exit beat shrinking?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.run.networks import FinishedRun, first_stages
from experiments.run.tasks import TASKS
from experiments.run.timing import time_static
from experiments.run.trainings import builder, train_network
from experiments.study.folders import StaticRow, write_rows


def run(finished: FinishedRun, *, mesh: Mesh | None = None) -> list[StaticRow]:
    """Trains, evaluates and times the first stages with each side exit, and writes ``static.json``.

    Args:
        finished: whose baseline's recipe it is.
        mesh: the devices that share training.
    """
    dataset, config, networks = finished.dataset(), finished.config, finished.networks
    static: list[Variables] = []
    build, exits = builder(config, networks.options), networks.num_exits
    for n in range(exits - 1):

        def build_static(n: int = n, **changed: Any) -> Any:
            return first_stages(build(**changed), n)

        start = jax.jit(build_static().init)(jax.random.key(config.seed), jnp.zeros((1, *dataset.image_shape)))
        static.append(
            train_network(
                build_static,
                start,
                jax.random.key(config.seed + 1),
                [1.0],
                name=f'static{n + 1}',
                epochs=config.epochs_baseline,
                config=config,
                dataset=dataset,
                workdir=finished.workdir,
                mesh=mesh,
            )
        )
    images = np.asarray(dataset.normalization(dataset.test.image[: config.latency_images]))
    clocks = time_static(networks, static, images, passes=config.latency_passes)
    task, rows = TASKS[config.task], []
    for n, (variables, clock) in enumerate(zip(static, clocks, strict=True)):
        table = bj.inference.exit_table(
            first_stages(networks.model, n),
            variables,
            dataset.test,
            split='test',
            statistics=task.statistics,
            metric=task.metric,
            criterion=task.criteria[0],
            preprocess=dataset.normalization,
        )
        name = f'{config.network[2:]}, first {n + 1} of {exits} stages'
        rows.append(StaticRow(name, float(table.anytime().accuracy[-1]), clock, float(table.costs.trunk)))
    write_rows(finished, 'static', rows, by='main')
    for row in rows:
        print(
            f'{row.network}: test {task.label} {100 * row.accuracy:.2f} %, {row.clock.latency_ms:.4f} ms, '
            f'{row.clock.gain:.2f} times faster than the baseline'
        )
    return rows
