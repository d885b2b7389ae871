"""How far the confidence of trained exits can be trusted, and what it buys: one report.

    python -m experiments.confidence --config=experiments/configs/lenet_mnist.py --workdir=runs/lenet_mnist

Takes the weights that the main job left in the folder, and runs the main job first if there are none. Writes
``confidence.json``, ``confidence.md`` and pictures. What is fitted or chosen comes from the validation data; test data
report, and serve as the population from which the simulation of the promises draws.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import branchy_jax as bj
from experiments import datasets, job
from experiments.comparisons import all_criteria, compare_criteria, protocols, searches, time_exact_search
from experiments.confidence_page import page
from experiments.drift import control
from experiments.outputs import Outputs, entropy_of, halves, screened
from experiments.promises import Population, simulate

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the main job.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the main job.')
_SPLITS = flags.DEFINE_integer('splits', 1000, 'Calibration sets to draw.', lower_bound=1)
_SIZE = flags.DEFINE_integer('calibration_size', 2000, 'Inputs in a calibration set.', lower_bound=1)


def main(arguments: list[str]) -> None:
    """Runs everything and writes the report."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    run(_CONFIG.value, Path(_WORKDIR.value), splits=_SPLITS.value, size=_SIZE.value)


def run(config: ConfigDict, workdir: Path, *, splits: int, size: int) -> dict[str, Any]:
    """Makes ``confidence.json``, ``confidence.md`` and the pictures; returns the record."""
    weights = workdir / f'{config.network}.safetensors'
    if not weights.exists():
        job.run(config, workdir)
    variables = jax.tree.map(jnp.asarray, bj.checkpoint.load_weights(weights)[0])
    dataset = datasets.load(config)
    shape = {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape}
    model = bj.models.create(config.network, placement=config.placement, dtype=jnp.dtype(config.dtype), **shape)

    def outputs_of(images: np.ndarray, labels: np.ndarray) -> Outputs:
        found = bj.inference.exit_outputs(model, variables, images, prepare=dataset.normalization)
        return Outputs(found.logits, np.asarray(labels))

    validation = outputs_of(dataset.validation.image, dataset.validation.label)
    test = outputs_of(dataset.test.image, dataset.test.label)
    costs = bj.costs.count_macs(model, dataset.image_shape)
    title = f'{config.network} on {config.dataset}'
    fitting, choosing = halves(validation)  # what is fitted on one half is screened on the other
    calibration, temperatures = calibrations(config.network, fitting, test, workdir / 'reliability.png', title)
    criteria = all_criteria(fitting, temperatures)
    record = {
        'network': config.network,
        'dataset': config.dataset,
        'device': f'{os.cpu_count()} cores of {platform.machine()}, {jax.devices()[0].device_kind}',
        'command': shlex.join(['python', '-m', 'experiments.confidence', *sys.argv[1:]]),
        'inputs': {'validation': len(validation.labels), 'test': len(test.labels), 'calibration set': size},
        **promises(config.network, validation, test, costs, splits=splits, size=size),
        'calibration': calibration,
        'criteria': compare_criteria(config.network, criteria, choosing, test, costs),
        'search': searches(config.network, (model, variables), dataset, validation, test),
        'exact_search': time_exact_search(),
        'control': control(outputs_of, dataset, validation, costs, workdir / 'control.png', title),
        'protocols': protocols(criteria, choosing, test, costs, workdir / 'protocols.png', title),
        'exits': who_leaves_where(dataset, validation, test, costs, workdir / 'exits.png', title),
    }
    bj.report.write_json(workdir / 'confidence.json', record)
    bj.report.write_text(workdir / 'confidence.md', page(record))
    return record


def calibrations(
    network: str, validation: Outputs, test: Outputs, picture: Path, title: str
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Fits temperatures on validation data and reports calibration on test data; returns records and temperatures."""
    temperatures = bj.calibration.fit_temperatures(validation.logits, validation.labels)
    shared = bj.calibration.fit_temperatures(validation.logits, validation.labels, shared=True)
    right = test.logits.argmax(-1) == test.labels
    records, before, after = [], [], []
    for n, logits in enumerate(test.logits):
        errors = {}
        for name, temperature in (('before', 1.0), ('after', temperatures[n]), ('after_shared', shared[n])):
            scaled = jnp.asarray(logits / temperature)
            confidence = np.asarray(jax.nn.softmax(scaled).max(-1))
            found = bj.calibration.reliability(confidence, right[n])
            adaptive = bj.calibration.reliability(confidence, right[n], equal_counts=True)
            errors[f'ece_{name}'], errors[f'adaptive_ece_{name}'] = found.error, adaptive.error
            errors[f'brier_{name}'] = bj.calibration.brier_score(scaled, test.labels)
            {'before': before, 'after': after}.get(name, []).append(found)
        records.append({'network': network, 'exit': n + 1, 'temperature': float(temperatures[n]), **errors})
    bj.plots.reliability_diagrams(picture, before, after, title=f'{title}: reliability on test data')
    return records, temperatures


def promises(
    network: str, validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, *, splits: int, size: int
) -> dict[str, list[dict[str, Any]]]:
    """Simulates the promises: the path comes from validation data, the calibration sets from the test outputs."""
    on_validation, uncertainty = entropy_of(validation), entropy_of(test)
    populations = {}
    for name, labels, test_labels in (('error gap', validation.labels, test.labels), ('disagreement', None, None)):
        kept = 1 - bj.thresholds.losses_against_full(validation.logits, labels)
        path = bj.thresholds.threshold_path(bj.thresholds.screen(on_validation, kept[..., None], costs))
        losses = bj.thresholds.losses_against_full(test.logits, test_labels)
        populations[name] = Population(path, uncertainty, losses, costs, size=size, splits=splits)
    return simulate(network, populations)


def who_leaves_where(
    dataset: bj.data.Dataset, validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, picture: Path, title: str
) -> list[dict[str, Any]]:
    """Reports, at the knee, how often each exit errs and on what, and shows images that left there."""
    point = bj.thresholds.knee(screened(bj.criteria.entropy, validation, costs))
    exits = bj.thresholds.answering_exits(entropy_of(test), point.thresholds)
    answers = test.logits.argmax(-1)[exits, np.arange(len(exits))]
    num_exits, num_classes = len(test.logits), test.logits.shape[-1]
    table = bj.thresholds.confusion(test.labels, answers, exits, num_exits=num_exits, num_classes=num_classes)
    order = np.random.default_rng(0).permutation(len(exits))
    bj.plots.contact_sheet(
        picture,
        dataset.test.image[order],
        exits[order],
        num_exits=num_exits,
        title=f'{title}: which images leave where',
    )
    records = []
    for n, counts in enumerate(table):
        wrong = counts * (1 - np.eye(num_classes, dtype=int))
        most = np.unravel_index(np.argsort(wrong, axis=None)[::-1][:3], wrong.shape)
        records.append({
            'exit': n + 1,
            'share': float(counts.sum() / len(exits)),
            'error': float(wrong.sum() / max(1, counts.sum())),
            'confused': [f'{a} for {b}: {wrong[b, a]}' for b, a in zip(*most, strict=True) if wrong[b, a]],
            'confusion': counts.tolist(),
        })  # fmt: skip
    return records


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main)
