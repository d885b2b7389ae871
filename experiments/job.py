"""The main job, step by step: data, two trainings, thresholds, one look at the test data, clocks, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.inference import ExitOutputs
from branchy_jax.types import Variables
from experiments import datasets
from experiments.configs import common
from experiments.records import TABLE, assemble, write
from experiments.timing import time_networks
from experiments.trainings import Data, train_both

_CHOICES = {
    'placement': ('text', 'released', 'tuned'),
    'dtype': ('float32', 'bfloat16'),
    'optimizer': ('adam', 'adamw', 'sgd'),
    'schedule': ('cosine', 'constant'),
    'regime': ('baseline', 'joint', 'frozen'),
    'choose': ('accuracy', 'knee'),
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
    dataset = datasets.load(config)
    options = {
        'num_classes': dataset.num_classes,
        'image_shape': dataset.image_shape,
        'placement': config.placement,
        'dtype': jnp.dtype(config.dtype),
    }
    model = bj.models.create(config.network, **options)
    baseline = bj.models.without_branches(model)
    _claim(workdir, config)

    baseline_variables, variables = train_both(config, options, dataset, workdir, mesh)
    costs = bj.costs.count_macs(model, dataset.image_shape)
    screened, points = _choose(config, dataset, costs, (model, variables), (baseline, baseline_variables), mesh)

    # The one look at the test data: everything above is settled.
    outputs = _outputs(model, variables, dataset, dataset.test, mesh)
    baseline_outputs = _outputs(baseline, baseline_variables, dataset, dataset.test, mesh)
    if jax.process_index() > 0:
        return None
    timed = time_networks(
        config.network, options, variables, baseline_variables,
        dataset.normalization(dataset.test.image[: config.latency_images]),
        {name: point.thresholds for name, point in points.items()}, passes=config.latency_passes,
    )  # fmt: skip
    report = assemble(config, dataset, screened, points, costs, outputs, baseline_outputs, timed)
    write(workdir, report, config, dataset, {config.network: variables, config.network[2:]: baseline_variables})
    return report


def _check(config: ConfigDict) -> None:
    for field, choices in _CHOICES.items():
        if config[field] not in choices:
            raise ValueError(f'config.{field}: got {config[field]!r}; choose from {", ".join(choices)}')
    for field in ('epochs', 'epochs_baseline', 'batch_size', 'latency_images', 'latency_passes'):
        if config[field] < 1:
            raise ValueError(f'config.{field}: got {config[field]}; expected at least 1')
    if not 0 <= config.distillation < 1:
        raise ValueError(f'config.distillation: got {config.distillation}; give a share in [0, 1)')
    if not config.network.startswith('b-'):
        raise ValueError(f'config.network: got {config.network!r}; give the branchy one, its baseline is trained too')
    exits = bj.models.create(config.network, placement=config.placement).num_exits
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


def _outputs(
    model: bj.BranchyNet, variables: Variables, dataset: Data, split: bj.Batch, mesh: Mesh | None
) -> ExitOutputs:
    return bj.inference.exit_outputs(model, variables, split.image, prepare=dataset.normalization, mesh=mesh)


def _choose(
    config: ConfigDict,
    dataset: Data,
    costs: bj.costs.StageCosts,
    branchy: tuple[bj.BranchyNet, Variables],
    baseline: tuple[bj.BranchyNet, Variables],
    mesh: Mesh | None,
) -> tuple[bj.thresholds.Screen, dict[str, bj.OperatingPoint]]:
    """Screens thresholds on validation data and picks the setting of the table, and one that gives up a point.

    With ``choose = 'accuracy'``: the cheapest that is at most one standard error (or as many as the settings say)
    below the best setting (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), and reaches the
    baseline if any does. Reaching the
    baseline alone would not do: of many settings the cheapest that just reaches a bar owes that partly to luck, and
    falls short of it on other data.
    """
    labels = dataset.validation.label
    outputs = _outputs(*branchy, dataset, dataset.validation, mesh)
    statistics = bj.thresholds.accuracy_statistics(outputs.logits, labels)
    screened = bj.thresholds.screen(outputs.uncertainty, statistics, costs)
    target = _outputs(*baseline, dataset, dataset.validation, mesh)
    baseline_accuracy = bj.thresholds.accuracy_statistics(target.logits, labels).mean()
    best = screened.accuracy.max()
    standard_error = (best * (1 - best) / len(labels)) ** 0.5
    wanted = best - config.standard_errors * standard_error
    if baseline_accuracy <= best:
        wanted = max(wanted, baseline_accuracy)
    at_table = bj.thresholds.for_accuracy(screened, wanted - config.tolerance)
    if config.choose == 'knee':
        at_table = bj.thresholds.knee(screened)
    # One standard error dearer than asked, so that on other data too it is within one point.
    within = min(best, baseline_accuracy - 0.01 + standard_error)
    return screened, {TABLE: at_table, 'within 1 point': bj.thresholds.for_accuracy(screened, within)}
