"""The main job, step by step: data, two trainings, thresholds, one look at the test data, clocks, report."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.inference import ExitStatistics
from branchy_jax.types import Variables
from experiments import datasets, masks
from experiments.configs import common
from experiments.networks import TABLE, Choice, Networks
from experiments.records import assemble, write
from experiments.tasks import TASKS, Task
from experiments.timing import time_networks
from experiments.timing_batches import time_batches
from experiments.trainings import train_both

_CHOICES = {
    'task': tuple(TASKS),
    'placement': ('text', 'released', 'tuned', ''),
    'dtype': ('float32', 'bfloat16'),
    'optimizer': ('adam', 'adamw', 'sgd'),
    'schedule': ('cosine', 'linear', 'constant'),
    'regime': ('baseline', 'joint', 'frozen'),
    'choose': ('accuracy', 'baseline', 'knee'),
}


def run(config: ConfigDict, workdir: Path, *, mesh: Mesh | None = None) -> dict[str, Any] | None:
    """Runs or resumes the whole job and writes ``report.json``, ``report.md``, ``tradeoff.png`` and weights.

    Args:
        config: as in ``experiments/configs``.
        workdir: where everything goes; the same for all processes, where there are several.
        mesh: the devices that share training and evaluation.

    Returns:
        The report; ``None`` in processes other than the first, which alone times and writes.

    Raises:
        ValueError: a setting that does not exist, a data set that is not at hand, or a folder of another run; all
            before any work.
    """
    _check(config)
    if mesh is not None:
        bj.sharding.check_divisible('config.batch_size', config.batch_size, mesh)
    dataset, task = datasets.load(config), TASKS[config.task]
    options = datasets.network_options(config, dataset)
    model = bj.models.create(config.network, **options)
    baseline = bj.models.without_branches(model)
    _claim(workdir, config)

    baseline_variables, variables = train_both(config, options, dataset, workdir, mesh)
    networks = Networks(options, model, variables, baseline, baseline_variables)
    costs = bj.costs.count_macs(model, dataset.image_shape)
    look = functools.partial(_look, task=task, normalization=dataset.normalization, mesh=mesh)
    choice = _choose(config, task, dataset.validation, costs, networks, look)

    # The one look at the test data: everything above is settled.
    outputs = look(model, variables, dataset.test, criterion=choice.criterion)
    baseline_outputs = look(baseline, baseline_variables, dataset.test, criterion=choice.criterion)
    if jax.process_index() > 0:
        return None
    images = dataset.normalization(dataset.test.image[: config.latency_images])
    thresholds = {name: point.thresholds for name, point in choice.points.items()}
    if config.latency_batch == 1:
        timed = time_networks(
            config.network, options, variables, baseline_variables, images, thresholds, passes=config.latency_passes,
            criterion=(config.task, choice.criterion.name),
        )  # fmt: skip
    else:
        timed = time_batches(
            networks, np.asarray(dataset.normalization(dataset.validation.image)), np.asarray(images), thresholds,
            batch=config.latency_batch, passes=config.latency_passes, criterion=choice.criterion,
        )  # fmt: skip
    report = assemble(config, task, dataset, choice, costs, outputs, baseline_outputs, timed)
    write(workdir, report, config, task, dataset, {config.network: variables, config.network[2:]: baseline_variables})
    if config.task == 'segmentation':
        masks.write(workdir, dataset, networks, choice, outputs, baseline_outputs, costs)
    return report


def _check(config: ConfigDict) -> None:
    for field, choices in _CHOICES.items():
        if config[field] not in choices:
            raise ValueError(f'config.{field}: got {config[field]!r}; choose from {", ".join(choices)}')
    for field in ('epochs', 'epochs_baseline', 'batch_size', 'latency_images', 'latency_passes', 'latency_batch'):
        if config[field] < 1:
            raise ValueError(f'config.{field}: got {config[field]}; expected at least 1')
    if not 0 <= config.distillation < 1:
        raise ValueError(f'config.distillation: got {config.distillation}; give a share in [0, 1)')
    if not config.network.startswith('b-'):
        raise ValueError(f'config.network: got {config.network!r}; give the branchy one, its baseline is trained too')
    exits = bj.models.create(config.network, **datasets.own_options(config)).num_exits
    if len(config.exit_weights) != exits:
        raise ValueError(
            f'config.exit_weights: {config.network} has {exits} exits, got {len(config.exit_weights)} weights'
        )


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Refuses to mix two runs in one folder."""
    path, settings = workdir / 'config.json', json.loads(config.to_json())
    if path.exists():
        # A field that did not exist yet had its default.
        found = {**json.loads(common.get_config().to_json()), **bj.report.read_json(path)}
        changed = sorted(key for key in {*settings, *found} if settings.get(key) != found.get(key))
        if changed:
            raise ValueError(
                f'workdir: {workdir} holds a run with other settings ({", ".join(changed)}); '
                'choose another folder, or delete this one'
            )
    if jax.process_index() == 0:
        bj.report.write_json(path, settings)


def _look(
    model: bj.BranchyNet,
    variables: Variables,
    split: bj.Batch,
    *,
    criterion: Criterion,
    task: Task,
    normalization: bj.Normalization,
    mesh: Mesh | None,
) -> ExitStatistics:
    return bj.inference.exit_statistics(
        model, variables, split, task.statistics, criterion=criterion, prepare=normalization, mesh=mesh
    )


def _choose(
    config: ConfigDict,
    task: Task,
    validation: bj.Batch,
    costs: bj.costs.StageCosts,
    networks: Networks,
    look: Callable[..., ExitStatistics],
) -> Choice:
    """Screens the thresholds of each criterion on validation data; picks the table's setting and others worth showing.

    With ``choose = 'accuracy'``: the cheapest that is at most one standard error (or as many as the settings say)
    below the best setting (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), and reaches the
    baseline if any does. Reaching the baseline alone, as ``choose = 'baseline'`` does, is less: of many settings the
    cheapest that just reaches a bar owes that partly to luck, and falls short of it on other data.
    """
    candidates = []
    any_criterion = next(iter(task.criteria.values()))  # with one exit they all agree
    target = look(networks.baseline, networks.baseline_variables, validation, criterion=any_criterion)
    baseline = float(task.metric(target.statistics[0].sum(axis=0), len(validation)))
    for criterion in task.criteria.values():
        outputs = look(networks.model, networks.variables, validation, criterion=criterion)
        screened = bj.thresholds.screen(
            outputs.uncertainty, outputs.statistics, costs, metric=task.metric, criterion=criterion.name
        )
        points = _points(config, task, screened, outputs, baseline)
        candidates.append(Choice(criterion, screened, points))
    best = min(candidates, key=lambda candidate: candidate.points[TABLE].cost)
    return dataclasses.replace(best, tried={found.criterion.name: found.points[TABLE] for found in candidates})


def _points(
    config: ConfigDict,
    task: Task,
    screened: bj.thresholds.Screen,
    outputs: ExitStatistics,
    baseline: float,
) -> dict[str, bj.OperatingPoint]:
    best = int(screened.accuracy.argmax())
    first = bj.thresholds.answering_exits(outputs.uncertainty, screened.thresholds[best])
    answers = outputs.statistics[first, np.arange(len(first))]
    standard_error = bj.thresholds.standard_error(answers, task.metric)
    highest = screened.accuracy[best]
    wanted = baseline if config.choose == 'baseline' else highest - config.standard_errors * standard_error
    if baseline <= highest:
        wanted = max(wanted, baseline)
    knee = bj.thresholds.knee(screened)
    at_table = knee
    if config.choose != 'knee':
        at_table = bj.thresholds.for_accuracy(screened, min(wanted - config.tolerance, highest))
    # One standard error dearer than asked, so that on other data too it is within one point.
    within = min(highest, baseline - 0.01 + standard_error)
    points = {TABLE: at_table, 'within 1 point': bj.thresholds.for_accuracy(screened, within), 'knee': knee}
    settings = [tuple(point.thresholds) for point in points.values()]
    return {name: points[name] for n, name in enumerate(points) if settings[n] not in settings[:n]}
