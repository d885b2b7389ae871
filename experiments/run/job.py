"""The main job, step by step: data, two trainings, thresholds, one look at the test data, clocks, record."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.sharding import check_divisible
from branchy_jax.thresholds import ExitTable, Screen
from experiments.configs import common
from experiments.pages import paper, report
from experiments.run import masks
from experiments.run.command import provenance
from experiments.run.networks import Networks, count_exits, image_specs, network_options, own_options, save_weights
from experiments.run.records import Baseline, FrontierPoint, LeavingFirst, Point, RunRecord, Timed, Tried
from experiments.run.tasks import TASKS, Task, load
from experiments.run.timing import time_batches, time_images
from experiments.run.trainings import builder, train_both

TABLE = 'table'
_FIGURE_4_POINTS = 41
_CHOICES = {
    'task': tuple(TASKS),
    'placement': ('text', 'released', 'tuned', ''),
    'dtype': ('float32', 'bfloat16'),
    'optimizer': ('adam', 'adamw', 'sgd'),
    'schedule': ('cosine', 'linear', 'constant'),
    'regime': ('baseline', 'joint', 'frozen'),
    'choose': ('accuracy', 'baseline', 'knee'),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen on validation data.

    Attributes:
        screened: every setting of the criterion that was chosen.
        points: the settings chosen, by name; the first is the table's.
        tried: the table's setting under every criterion.
    """

    screened: Screen
    points: Mapping[str, bj.OperatingPoint]
    tried: tuple[bj.OperatingPoint, ...] = ()


def run(config: ConfigDict, workdir: Path, *, mesh: Mesh | None = None) -> RunRecord | None:
    """Runs or resumes the whole job and writes ``report.json``, ``report.md``, ``tradeoff.png`` and weights.

    Args:
        config: as in ``experiments/configs``.
        workdir: where everything goes; the same for all processes, where there are several.
        mesh: the devices that share training and evaluation.

    Returns:
        The record; ``None`` in processes other than the first, which alone times and writes.

    Raises:
        ValueError: a setting that does not exist, a data set that is not at hand, or a folder of another run; all
            before any work.
    """
    _check(config)
    if mesh is not None:
        for field in ('batch_size', 'batch_size_grown') if config.shallow_depth else ('batch_size',):
            check_divisible(f'config.{field}', config[field], mesh)
    dataset, task = load(config), TASKS[config.task]
    options = network_options(config, num_classes=dataset.num_classes, image_shape=dataset.image_shape)
    _check_beside_the_data(config, dataset, options)
    model, inputs = bj.models.create(config.network, **options), image_specs(dataset.image_shape)
    costs = bj.costs.count_macs(model, inputs=inputs)
    claim(workdir, config)
    baseline_variables, variables = train_both(config, options, dataset, workdir, mesh)
    networks = Networks(config.network, options, variables, baseline_variables, dataset.normalization)
    look = functools.partial(
        bj.inference.exit_table,
        statistics=task.statistics,
        metric=task.metric,
        preprocess=dataset.normalization,
        mesh=mesh,
    )
    choice = _choose(config, task, dataset.validation, costs, networks, look)

    # The one look at the test data: everything above is settled.
    look = functools.partial(look, criterion=choice.screened.criterion, split='test')
    branchy = look(networks.model, networks.variables, dataset.test, costs=costs)
    baseline = look(networks.baseline, networks.baseline_variables, dataset.test)
    if jax.process_index() > 0:
        return None
    timed = _time(config, dataset, networks, choice)
    record = assemble(config, dataset, choice, branchy, baseline, timed)
    if config.task == 'segmentation':
        record = dataclasses.replace(
            record,
            class_iou=masks.class_iou(branchy, baseline, choice.points[TABLE]),
            pixelwise=masks.anytime(networks, dataset.test, costs),
        )
        masks.picture(workdir / 'masks.png', dataset, networks, branchy, choice.points)
    save_weights(workdir, config, networks)
    report.write(workdir, record, config)
    return record


def _check(config: ConfigDict) -> None:
    for field, choices in _CHOICES.items():
        if config[field] not in choices:
            raise ValueError(f'config.{field}: got {config[field]!r}; choose from {", ".join(choices)}')
    for field in ('epochs', 'epochs_baseline', 'batch_size', 'latency_images', 'latency_passes', 'latency_batch'):
        if config[field] < 1:
            raise ValueError(f'config.{field}: got {config[field]}; expected at least 1')
    if not 0 <= config.distillation < 1:
        raise ValueError(f'config.distillation: got {config.distillation}; give a share in [0, 1)')
    if config.most_examples and not config.in_memory:
        raise ValueError('config.most_examples: is for data in memory; leave config.in_memory as it is')
    if config.shallow_depth and config.regime == 'baseline':
        raise ValueError(
            'config.shallow_depth: a network that starts from its trained baseline does not grow; give config.regime '
            "'joint' or 'frozen', or a depth of 0"
        )
    if not config.network.startswith('b-'):
        raise ValueError(f'config.network: got {config.network!r}; give the branchy one, its baseline is trained too')
    model, weights = bj.models.create(config.network, **own_options(config)), len(config.exit_weights)
    exits = count_exits(model, image_specs(model.image_shape))
    if weights != exits:
        raise ValueError(f'config.exit_weights: {config.network} has {exits} exits, got {weights} weights')


def _check_beside_the_data(config: ConfigDict, dataset: bj.data.Dataset, options: Mapping[str, Any]) -> None:
    fewest = min(len(dataset.validation), len(dataset.test), config.latency_images)
    if config.latency_batch > fewest:
        raise ValueError(
            f'config.latency_batch: got {config.latency_batch}, but to plan on and to time there are {fewest} images '
            '(config.latency_images, or the data); give fewer'
        )
    if config.shallow_depth:
        build, example = builder(config, options), image_specs(dataset.image_shape)
        deep, shallow = build(), build(depth=config.shallow_depth)
        states = (jax.eval_shape(model.init, jax.random.key(0), example) for model in (deep, shallow))
        jax.eval_shape(lambda *both: bj.training.initialize_from_shallower(deep, both[0], shallow, both[1]), *states)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Refuses to mix two runs in one folder; how the run is timed in the end may change.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path, settings = workdir / 'config.json', json.loads(config.to_json())
    if path.exists():
        # A field that did not exist yet had its default; one that is gone since says nothing.
        found = {**json.loads(common.get_config().to_json()), **bj.report.read_json(path)}
        changed = sorted(
            key for key, value in settings.items() if value != found.get(key) and not key.startswith('latency_')
        )
        if changed:
            raise ValueError(
                f'workdir: {workdir} holds a run with other settings ({", ".join(changed)}); '
                'choose another folder, or delete this one'
            )
    if jax.process_index() == 0:
        bj.report.write_json(path, settings)


def _choose(
    config: ConfigDict,
    task: Task,
    validation: bj.Batch,
    costs: bj.costs.StageCosts,
    networks: Networks,
    look: Callable[..., ExitTable],
) -> Choice:
    """Screens the thresholds of each criterion on validation data; picks the table's setting and others worth showing.

    With ``choose = 'accuracy'``: the cheapest that is at most one standard error (or as many as the settings say)
    below the best setting (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), and reaches the
    baseline if any does. Reaching the baseline alone, as ``choose = 'baseline'`` does, is less: of many settings the
    cheapest that just reaches a bar owes that partly to luck, and falls short of it on other data.
    """
    # With one exit all criteria agree.
    alone = look(networks.baseline, networks.baseline_variables, validation, criterion=task.criteria[0])
    baseline = float(alone.anytime().accuracy[-1])
    found = []
    for criterion in task.criteria:
        table = look(networks.model, networks.variables, validation, criterion=criterion, costs=costs)
        screened = table.screen()
        found.append(Choice(screened, _points(config, table, screened, baseline)))
    best = min(found, key=lambda choice: choice.points[TABLE].cost)
    return dataclasses.replace(best, tried=tuple(choice.points[TABLE] for choice in found))


def _points(config: ConfigDict, table: ExitTable, screened: Screen, baseline: float) -> dict[str, bj.OperatingPoint]:
    best = screened.point(int(screened.accuracy.argmax()))
    standard_error = table.standard_error(best)
    wanted = baseline if config.choose == 'baseline' else best.accuracy - config.standard_errors * standard_error
    if baseline <= best.accuracy:
        wanted = max(wanted, baseline)
    knee = at_table = screened.knee()
    if config.choose != 'knee':
        at_table = screened.for_accuracy(min(wanted - config.tolerance, best.accuracy))
    # One standard error dearer than asked, so that on other data too it is within one point.
    within = screened.for_accuracy(min(best.accuracy, baseline - 0.01 + standard_error))
    points = {TABLE: at_table, 'within 1 point': within, 'knee': knee}
    settings = [_numbers(point.thresholds) for point in points.values()]
    return {name: points[name] for n, name in enumerate(points) if settings[n] not in settings[:n]}


def _time(config: ConfigDict, dataset: bj.data.Dataset, networks: Networks, choice: Choice) -> Timed:
    policies = {name: point.policy for name, point in choice.points.items()}
    images = np.asarray(dataset.normalization(dataset.test.image[: config.latency_images]))
    if config.latency_batch == 1:
        return time_images(networks, images, policies, passes=config.latency_passes)
    planned_on, batch = np.asarray(dataset.normalization(dataset.validation.image)), config.latency_batch
    return time_batches(networks, planned_on, images, policies, batch=batch, passes=config.latency_passes)


def assemble(
    config: ConfigDict, dataset: bj.data.Dataset, choice: Choice, branchy: ExitTable, baseline: ExitTable, timed: Timed
) -> RunRecord:
    """Puts the run's figures into one record.

    Args:
        config: settings of the run.
        dataset: its name and shapes.
        choice: thresholds, chosen on validation data.
        branchy: every exit of the branchy network on test data.
        baseline: the one exit of its baseline, likewise.
        timed: latencies.
    """
    costs = branchy.costs
    tried = tuple(
        Tried(
            criterion=point.policy.criterion.name,
            validation_accuracy=float(point.accuracy),
            mac_gain=float(costs.trunk / point.cost),
            thresholds=_numbers(point.thresholds),
        )
        for point in choice.tried
    )
    return RunRecord(
        network=config.network,
        dataset=config.dataset,
        task=config.task,
        **provenance('main'),
        num_classes=dataset.num_classes,
        image_shape=tuple(dataset.image_shape),
        criterion=choice.screened.criterion.name,
        tried=tried,
        baseline=Baseline(float(baseline.anytime().accuracy[-1]), timed.baseline, float(costs.trunk)),
        exit_accuracy=_numbers(branchy.anytime().accuracy),
        points=tuple(_point(name, point, branchy, timed) for name, point in choice.points.items()),
        frontier=_frontier(choice.screened, branchy, timed),
        first_and_last=_first_and_last(branchy),
        exit_latency_ms=timed.exit_latency_ms,
        trunk_only_ms=timed.trunk_only_ms,
        stage_macs=_numbers(costs.stages),
        exit_macs=_numbers(costs.exits),
        paper=tuple(paper.rows_beside(config.network)),
    )


def _point(name: str, chosen: bj.OperatingPoint, table: ExitTable, timed: Timed) -> Point:
    found = table.evaluate(chosen).point(0)
    fractions = np.asarray(found.exit_fractions)
    reaching = 1 - np.concatenate([[0], np.cumsum(fractions)[:-1]])
    *stages, last_head = timed.trunk_only_ms  # as in the paper's protocol: side heads and their softmax untimed
    trunk_only = float(reaching @ np.array(stages) + reaching[-1] * last_head)
    return Point(
        name=name,
        accuracy=float(found.accuracy),
        thresholds=_numbers(found.thresholds),
        exit_fractions=_numbers(fractions),
        clock=timed.points[name],
        trunk_only_ms=trunk_only,
        trunk_only_gain=sum(timed.trunk_only_ms) / trunk_only,
        macs=float(found.cost),
        mac_gain=float(table.costs.trunk / found.cost),
        validation_accuracy=float(chosen.accuracy),
        validation_exit_fractions=_numbers(chosen.exit_fractions),
    )


def _frontier(screened: Screen, table: ExitTable, timed: Timed) -> tuple[FrontierPoint, ...]:
    frontier, knee = screened.frontier(), _numbers(screened.knee().thresholds)
    on_test = table.evaluate(frontier)
    return tuple(
        FrontierPoint(
            thresholds=_numbers(frontier.thresholds[n]),
            validation_accuracy=float(frontier.accuracy[n]),
            accuracy=float(on_test.accuracy[n]),
            exit_fractions=_numbers(on_test.exit_fractions[n]),
            macs=float(on_test.cost[n]),
            latency_ms=float(on_test.exit_fractions[n] @ np.array(timed.exit_latency_ms)),
            knee=_numbers(frontier.thresholds[n]) == knee,
        )
        for n in range(len(frontier))
    )


def _first_and_last(table: ExitTable) -> tuple[LeavingFirst, ...]:
    """Returns the metric against the share that leaves first, the exits between never asked (the paper's Figure 4)."""
    first = np.sort(np.asarray(table.uncertainty)[0])
    places = np.linspace(0, len(first), _FIGURE_4_POINTS).round().astype(int)
    limits = np.append(first, np.inf)[places]  # strictly below: as many as asked leave
    settings = np.full((len(limits), table.num_exits - 1), -np.inf)
    settings[:, 0] = limits
    found = table.evaluate(settings)
    return tuple(
        LeavingFirst(share=float(found.exit_fractions[n, 0]), accuracy=float(found.accuracy[n]), threshold=float(limit))
        for n, limit in enumerate(limits)
    )


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(np.asarray(values).tolist())
