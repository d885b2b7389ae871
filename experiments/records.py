"""What a run leaves behind: ``report.json``, ``report.md``, ``tradeoff.png`` and weights."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.inference import ExitStatistics
from branchy_jax.types import Variables
from experiments import paper
from experiments.networks import Choice
from experiments.tasks import Task
from experiments.timing import Timed
from experiments.trainings import Data

_LIKE_WITH_LIKE = {
    True: 'both networks as `inference.optimize` rewrites them',
    False: "the planner's choice over the faster of the baselines, plain or rewritten",
}


def assemble(
    config: ConfigDict,
    task: Task,
    dataset: Data,
    choice: Choice,
    costs: bj.costs.StageCosts,
    outputs: ExitStatistics,
    baseline_outputs: ExitStatistics,
    timed: Timed,
) -> dict[str, Any]:
    """Puts the run's figures into one record, as ``report.json`` holds it.

    Args:
        config: settings of the run.
        task: what was counted.
        dataset: its name and shapes.
        choice: thresholds, chosen on validation data.
        costs: MACs.
        outputs: of the branchy network on test data.
        baseline_outputs: of the baseline on test data.
        timed: latencies.
    """
    count = outputs.statistics.shape[1]
    alone = task.metric(outputs.statistics.sum(axis=1), count)
    baseline_alone = task.metric(baseline_outputs.statistics.sum(axis=1), count)
    operating_points = [
        _operating_point(name, point, task, outputs, costs, timed) for name, point in choice.points.items()
    ]
    screened = choice.screened
    rows = [
        {
            'network': config.network[2:],
            f'test_{task.key}': float(baseline_alone[0]),
            f'exit_{task.key}': baseline_alone.tolist(),
            'thresholds': [],
            'exit_fractions': [1.0],
            **timed.baseline,
            'macs': costs.trunk,
            'mac_gain': 1.0,
        },
        {
            'network': config.network,
            f'exit_{task.key}': alone.tolist(),
            **{key: value for key, value in operating_points[0].items() if key != 'name'},
        },
    ]
    frontier = bj.thresholds.pareto_frontier(screened)
    on_test = bj.thresholds.evaluate(
        outputs.uncertainty, outputs.statistics, costs, frontier.thresholds, metric=task.metric
    )
    knee = bj.thresholds.knee(screened)
    return {
        'dataset': config.dataset,
        'command': shlex.join(['python', '-m', 'experiments.main', *sys.argv[1:]]),
        'device': describe_device(),
        'task': config.task,
        'criterion': choice.criterion.name,
        'criteria_tried': [
            {
                'criterion': name,
                f'validation_{task.key}': point.accuracy,
                'mac_gain': costs.trunk / point.cost,
                'thresholds': point.thresholds.tolist(),
            }
            for name, point in choice.tried.items()
        ],
        'num_classes': dataset.num_classes,
        'image_shape': list(dataset.image_shape),
        'rows': rows,
        'operating_points': operating_points,
        'frontier': [
            {
                'thresholds': frontier.thresholds[n].tolist(),
                f'validation_{task.key}': float(frontier.accuracy[n]),
                f'test_{task.key}': float(on_test.accuracy[n]),
                'exit_fractions': on_test.exit_fractions[n].tolist(),
                'macs': float(on_test.cost[n]),
                'latency_ms': float(on_test.exit_fractions[n] @ np.array(timed.exit_latency_ms)),
                'knee': bool(np.array_equal(frontier.thresholds[n], knee.thresholds)),
            }
            for n in range(len(frontier))
        ],
        'first_and_last': _first_and_last(task, outputs, costs),
        'exit_latency_ms': timed.exit_latency_ms,
        'trunk_only_ms': timed.trunk_only_ms,
        'stage_macs': costs.stages.tolist(),
        'exit_macs': costs.exits.tolist(),
        'paper': paper.rows_beside(config.network),
    }


_FIGURE_4_POINTS = 41


def _first_and_last(task: Task, outputs: ExitStatistics, costs: bj.costs.StageCosts) -> list[dict[str, float]]:
    """Returns the metric against the share that leaves first, the exits between never asked (the paper's Figure 4)."""
    first = np.sort(outputs.uncertainty[0])
    places = np.linspace(0, len(first), _FIGURE_4_POINTS).round().astype(int)
    limits = np.append(first, np.inf)[places]  # strictly below: as many as asked leave
    never = np.full((len(limits), outputs.uncertainty.shape[0] - 2), -np.inf)
    thresholds = np.concatenate([limits[:, None], never], axis=1)
    found = bj.thresholds.evaluate(outputs.uncertainty, outputs.statistics, costs, thresholds, metric=task.metric)
    return [
        {'share': float(share), f'test_{task.key}': float(accuracy), 'threshold': float(limit)}
        for share, accuracy, limit in zip(found.exit_fractions[:, 0], found.accuracy, limits, strict=True)
    ]


def _operating_point(
    name: str,
    point: bj.OperatingPoint,
    task: Task,
    outputs: ExitStatistics,
    costs: bj.costs.StageCosts,
    timed: Timed,
) -> dict[str, Any]:
    found = bj.thresholds.evaluate(
        outputs.uncertainty, outputs.statistics, costs, point.thresholds[None], metric=task.metric
    ).point(0)
    reaching = 1 - np.concatenate([[0], np.cumsum(found.exit_fractions)[:-1]])
    *stages, last_head = timed.trunk_only_ms  # as in the paper's protocol: side heads and their softmax untimed
    trunk_only = float(reaching @ np.array(stages) + reaching[-1] * last_head)
    return {
        'name': name,
        f'test_{task.key}': found.accuracy,
        'thresholds': found.thresholds.tolist(),
        'exit_fractions': found.exit_fractions.tolist(),
        **timed.points[name],
        'trunk_only_ms': trunk_only,
        'trunk_only_gain': sum(timed.trunk_only_ms) / trunk_only,
        'macs': found.cost,
        'mac_gain': costs.trunk / found.cost,
        f'validation_{task.key}': point.accuracy,
        'validation_exit_fractions': point.exit_fractions.tolist(),
    }


def write(
    workdir: Path,
    report: Mapping[str, Any],
    config: ConfigDict,
    task: Task,
    dataset: Data,
    trained: Mapping[str, Variables],
) -> None:
    """Writes weights, record, table and picture into the run's folder, and prints the table.

    Args:
        workdir: the folder.
        report: from `assemble`.
        config: settings of the run.
        task: what was counted.
        dataset: its normalisation goes with the weights.
        trained: variables by network name.
    """
    normalization = {'mean': dataset.normalization.mean, 'deviation': dataset.normalization.deviation}
    for name, variables in trained.items():
        bj.checkpoint.save_weights(
            workdir / f'{name}.safetensors',
            {**variables, 'normalization': normalization},
            metadata={'network': name, 'dataset': config.dataset, 'placement': config.placement},
        )
    bj.report.write_json(workdir / 'report.json', report)
    baseline, branchy = report['rows']
    table = bj.report.table_of_networks([baseline, branchy, *report['paper']], metric=task.key, label=task.label)
    bj.report.write_text(workdir / 'report.md', _page(report, config, task, table))
    bj.plots.tradeoff(
        workdir / 'tradeoff.png', report['frontier'], baseline, branchy,
        knee=next((point for point in report['frontier'] if point['knee']), None),
        title=f'{config.network} on {config.dataset}: {task.label} against time as the thresholds vary',
        metric=task.key, label=task.label, batch=config.latency_batch,
    )  # fmt: skip
    print(f'\n{table}\n\nWritten to {workdir}/report.md')


def _page(report: Mapping[str, Any], config: ConfigDict, task: Task, table: str) -> str:
    branchy = report['rows'][1]
    alone = config.latency_batch == 1 and jax.default_backend() == 'cpu'
    cores = ', on one core, where each network is fastest' if alone else ''
    clock = (
        f'Batch {config.latency_batch}, mean over {branchy["latency_images"]} test images, end to end, median of '
        f'{branchy["latency_passes"]} passes, interleaved{cores}. `gain` compares like with like: '
        f'{_LIKE_WITH_LIKE[config.latency_batch == 1]} (95 % interval of the median {branchy["gain_low"]:.2f} to '
        f'{branchy["gain_high"]:.2f}); `gain over plain` is over the baseline as written.'
    )
    choice = (
        f'Each exit on its own: {", ".join(f"{100 * value:.2f} %" for value in branchy[f"exit_{task.key}"])}. '
        f'Thresholds, of {report["criterion"]}, were picked on validation data ({config.choose}); test data served '
        'for the figures alone.'
    )
    if report['paper']:
        choice += (
            " The paper's times count trunk segments only, on other machines; by that protocol ours gain "
            f'{branchy["trunk_only_gain"]:.2f}.'
        )
    note = '\nThis CIFAR-10 is a copy re-encoded as JPEG (quality 75).\n' if config.dataset == 'cifar10' else ''
    return f"""# {config.network} on {config.dataset}

`{report['command']}`

{report['device']}.
{textwrap.fill(clock, 120)}

{table}

{textwrap.fill(choice, 120)}

{_points_table(report, task)}
{_criteria_table(report, task)}{note}
![{task.label} against time](tradeoff.png)
"""


def _points_table(report: Mapping[str, Any], task: Task) -> str:
    columns = ['operating point', f'{task.label} %', 'gain', 'gain over plain', 'MAC gain', 'thresholds', 'exits %']
    return bj.report.markdown_table(
        columns,
        [
            [
                point['name'],
                f'{100 * point[f"test_{task.key}"]:.2f}',
                f'{point["gain"]:.2f}',
                f'{point["gain_plain"]:.2f}',
                f'{point["mac_gain"]:.2f}',
                ', '.join(f'{threshold:.4g}' for threshold in point['thresholds']),
                ', '.join(f'{100 * share:.1f}' for share in point['exit_fractions']),
            ]
            for point in report['operating_points']
        ],
    )


def _criteria_table(report: Mapping[str, Any], task: Task) -> str:
    tried = report['criteria_tried']
    if len(tried) < 2:
        return ''
    rows = [
        [found['criterion'], f'{100 * found[f"validation_{task.key}"]:.2f}', f'{found["mac_gain"]:.2f}']
        for found in tried
    ]
    table = bj.report.markdown_table(['criterion', f'{task.label} %', 'MAC gain'], rows)
    return f'\nCriteria that were tried, each at its own thresholds, on validation data:\n\n{table}\n'


def describe_device() -> str:
    """Names the device and the versions that a measurement was made with."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != 'cpu' else f'{platform.machine()} CPU, {_cores()} cores'
    return f'{kind}, jax {jax.__version__}, Python {platform.python_version()}'


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
