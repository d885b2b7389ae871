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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import struct
from ml_collections import ConfigDict, config_flags
from scipy import ndimage

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from experiments import datasets, job
from experiments.confidence_page import page
from experiments.promises import Population, simulate

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the main job.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the main job.')
_SPLITS = flags.DEFINE_integer('splits', 1000, 'Calibration sets to draw.', lower_bound=1)
_SIZE = flags.DEFINE_integer('calibration_size', 2000, 'Inputs in a calibration set.', lower_bound=1)

_GRID = 100
_CONTROL_BATCH = 20
_CONTROL_IMAGES = 5000


@struct.dataclass
class Outputs:
    """Cached logits of a part of the data.

    Attributes:
        logits: ``[N, B, K]``.
        labels: ``[B]``.
    """

    logits: np.ndarray
    labels: np.ndarray


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


def halves(part: Outputs) -> tuple[Outputs, Outputs]:
    """Splits cached outputs at random."""
    rows = np.random.default_rng(0).permutation(len(part.labels))
    middle = len(rows) // 2
    first, second = (Outputs(part.logits[:, chosen], part.labels[chosen]) for chosen in (rows[:middle], rows[middle:]))
    return first, second


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


def all_criteria(validation: Outputs, temperatures: np.ndarray) -> dict[str, Criterion]:
    """Returns every criterion, those that learn fitted on validation data."""
    found = [
        bj.criteria.entropy,
        bj.criteria.max_probability,
        bj.criteria.margin,
        bj.criteria.patience,
        bj.criteria.ensemble('arithmetic'),
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures(temperatures),
        bj.calibration.fit_learned(validation.logits, validation.labels, jax.random.key(0)),
    ]
    return {criterion.name: criterion for criterion in found}


def compare_criteria(
    network: str, criteria: Mapping[str, Criterion], choosing: Outputs, test: Outputs, costs: bj.costs.StageCosts
) -> list[dict[str, Any]]:
    """Compares what criteria cost, in two ways.

    ``cost``: of the cheapest setting that on validation data gives up no more than asked against the last exit, with
    its accuracy on test data. ``cost_at_equal_accuracy``: read off the test curve of the validation frontier at the
    accuracy of the last exit minus what is given up, so that costs compare at equal accuracy on test data.
    """
    full, full_test = (float((part.logits[-1].argmax(-1) == part.labels).mean()) for part in (choosing, test))
    records: list[dict[str, Any]] = []
    for name, criterion in criteria.items():
        frontier = bj.thresholds.pareto_frontier(_screened(criterion, choosing, costs)[2])
        cost, accuracy = _on_test(criterion, frontier, test, costs)
        for given_up in (0.0, 0.002, 0.005, 0.01):
            record = {'network': network, 'criterion': name, 'given_up': given_up}
            kept = np.flatnonzero(frontier.accuracy >= full - given_up - 1e-9)
            if len(kept):
                record.update(cost=float(cost[kept[0]]), accuracy_change=float(accuracy[kept[0]]) - full_test)
            reaching = cost[accuracy >= full_test - given_up - 1e-9]
            if len(reaching):
                record['cost_at_equal_accuracy'] = float(reaching.min())
            records.append(record)
    return records


def _screened(
    criterion: Criterion, part: Outputs, costs: bj.costs.StageCosts
) -> tuple[np.ndarray, np.ndarray, bj.thresholds.Screen]:
    answers, uncertainty = (np.asarray(found) for found in bj.criteria.replay(criterion, part.logits))
    statistics = bj.thresholds.accuracy_statistics(answers, part.labels)
    return uncertainty, statistics, bj.thresholds.screen(uncertainty, statistics, costs, criterion=criterion.name)


def _on_test(
    criterion: Criterion, frontier: bj.thresholds.Screen, test: Outputs, costs: bj.costs.StageCosts
) -> tuple[np.ndarray, np.ndarray]:
    """Returns cost and accuracy on test data of the settings that make the frontier on validation data."""
    answers, uncertainty = (np.asarray(found) for found in bj.criteria.replay(criterion, test.logits))
    statistics = bj.thresholds.accuracy_statistics(answers, test.labels)
    found = bj.thresholds.evaluate(uncertainty, statistics, costs, frontier.thresholds)
    return found.cost, found.accuracy


def promises(
    network: str, validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, *, splits: int, size: int
) -> dict[str, list[dict[str, Any]]]:
    """Simulates the promises: the path comes from validation data, the calibration sets from the test outputs."""
    on_validation, uncertainty = (
        np.asarray(bj.criteria.replay(bj.criteria.entropy, part.logits)[1]) for part in (validation, test)
    )
    populations = {}
    for name, labels, test_labels in (('error gap', validation.labels, test.labels), ('disagreement', None, None)):
        kept = 1 - bj.thresholds.losses_against_full(validation.logits, labels)
        path = bj.thresholds.threshold_path(bj.thresholds.screen(on_validation, kept[..., None], costs))
        losses = bj.thresholds.losses_against_full(test.logits, test_labels)
        populations[name] = Population(path, uncertainty, losses, costs, size=size, splits=splits)
    return simulate(network, populations)


def searches(
    network: str, trained: Any, dataset: bj.data.Dataset, validation: Outputs, test: Outputs
) -> list[dict[str, Any]]:
    """Compares searches under bounds on the measured time: part of the way from the first exit to the last."""
    images = dataset.normalization(dataset.validation.image[:64])
    times = bj.inference.segment_times(*bj.inference.optimize(*trained), images, batch_sizes=[16, 64]).best()
    uncertainty = np.asarray(bj.criteria.replay(bj.criteria.entropy, validation.logits)[1])
    on_test = np.asarray(bj.criteria.replay(bj.criteria.entropy, test.logits)[1])
    right, right_on_test = (bj.thresholds.accuracy_statistics(part.logits, part.labels) for part in (validation, test))
    grid = bj.thresholds.quantile_grid(uncertainty, size=_GRID)
    records = []
    for share in (0.1, 0.25, 0.5):
        bound = float(times.to_exit[0] + share * (times.to_exit[-1] - times.to_exit[0]))
        methods: dict[str, Callable[[], np.ndarray]] = {
            'exact': lambda b=bound: bj.thresholds.exact(uncertainty, right, times, b, grid=grid).thresholds,
            'coordinate descent': lambda b=bound: (
                bj.thresholds.coordinate_descent(uncertainty, right, times, b, grid=grid).thresholds
            ),
            'geometric budget': lambda b=bound: bj.thresholds.for_budget(uncertainty, times, b),
        }
        best = None
        for method, search in methods.items():
            start = time.perf_counter()
            thresholds = search()
            seconds = time.perf_counter() - start
            found = bj.thresholds.evaluate(uncertainty, right, times, thresholds[None])
            carried = bj.thresholds.evaluate(on_test, right_on_test, times, thresholds[None])
            best = float(found.accuracy[0]) if best is None else best
            records.append({
                'network': network, 'method': method, 'bound_ms': bound, 'accuracy': float(found.accuracy[0]),
                'cost': float(found.cost[0]), 'gap': best - float(found.accuracy[0]), 'seconds': seconds,
                'test_accuracy': float(carried.accuracy[0]), 'test_cost': float(carried.cost[0]),
            })  # fmt: skip
    return records


def time_exact_search(*, exits: int = 3, inputs: int = 10_000, values: int = 100) -> dict[str, Any]:
    """Times `branchy_jax.thresholds.exact` on outputs of a given size, drawn at random."""
    generator = np.random.default_rng(0)
    uncertainty, right = generator.random((exits, inputs)), generator.random((exits, inputs, 1)) < 0.8
    costs = bj.costs.StageCosts(stages=np.ones(exits), exits=np.zeros(exits))
    start = time.perf_counter()
    grid = bj.thresholds.quantile_grid(uncertainty, size=values)
    bj.thresholds.exact(uncertainty, right, costs, 0.6 * exits, grid=grid)
    return {'exits': exits, 'inputs': inputs, 'values': values, 'seconds': time.perf_counter() - start}


def control(
    outputs_of: Callable[[np.ndarray, np.ndarray], Outputs], dataset: bj.data.Dataset, validation: Outputs,
    costs: bj.costs.StageCosts, picture: Path, title: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Holds a cost while test images turn noisy, clean and blurred."""
    images, labels = dataset.test.image[:_CONTROL_IMAGES], dataset.test.label[:_CONTROL_IMAGES]
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, 1.5, 1.5, 0)).astype(np.uint8)
    parts = {'clean': images, 'noise': noisy, 'clean again': images, 'blur': blurred}
    answers = [outputs_of(part, labels) for part in parts.values()]
    uncertainty = np.concatenate(
        [np.asarray(bj.criteria.replay(bj.criteria.entropy, part.logits)[1]) for part in answers], axis=1
    )
    reference = np.asarray(bj.criteria.replay(bj.criteria.entropy, validation.logits)[1])
    relative = costs.to_exit / costs.trunk
    target = float(relative[0] + 0.3 * (relative[-1] - relative[0]))
    controller = bj.control.create_controller(
        bj.control.path_by_shares(reference), target=target, scale=float(relative[-1] - relative[0])
    )
    update, fixed = jax.jit(bj.control.update), _thresholds_for(reference, relative, target)
    held, left_alone = [], []
    for start in range(0, uncertainty.shape[1], _CONTROL_BATCH):
        batch = uncertainty[:, start : start + _CONTROL_BATCH]
        spent = relative[_exits(batch, np.asarray(bj.control.thresholds_of(controller)))]
        controller = update(controller, jnp.asarray(spent))
        held.extend(spent)
        left_alone.extend(relative[_exits(batch, fixed)])
    averages = {
        'controlled': _moving_average(np.array(held)),
        'thresholds left alone': _moving_average(np.array(left_alone)),
    }
    length, settled = len(labels), min(2000, len(labels) // 2)
    shifts = [length * k for k in range(1, len(parts))]
    bj.plots.held(picture, averages, target, shifts, title=f'{title}: a cost held while images change')
    return [
        {
            'part': name,
            'target': target,
            'after_2000': float(np.mean(held[length * k + settled : length * (k + 1)])),
            'left_alone': float(np.mean(left_alone[length * k + settled : length * (k + 1)])),
        }
        for k, name in enumerate(parts)
    ]


def _thresholds_for(uncertainty: np.ndarray, costs: np.ndarray, target: float) -> np.ndarray:
    """Returns the setting on the controller's path whose cost on validation data is nearest to the target."""
    path = bj.control.path_by_shares(uncertainty)
    spent = [costs[_exits(uncertainty, setting)].mean() for setting in path]
    return path[np.abs(np.array(spent) - target).argmin()]


def _moving_average(values: np.ndarray, *, reach: int = 500) -> np.ndarray:
    """Averages every value with those before it, as many as there are up to ``reach``."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - reach)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _exits(uncertainty: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    confident = uncertainty[:-1] < thresholds[:, None]
    return np.concatenate([confident, np.ones((1, uncertainty.shape[1]), bool)]).argmax(axis=0)


def protocols(
    criteria: Mapping[str, Criterion], validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, picture: Path,
    title: str,
) -> dict[str, Any]:  # fmt: skip
    """Reports anytime and budgeted-batch accuracy on test data, and the frontier of each criterion as a picture."""
    entropy = bj.criteria.entropy
    chosen_on = np.asarray(bj.criteria.replay(entropy, validation.logits)[1])
    on_test = np.asarray(bj.criteria.replay(entropy, test.logits)[1])
    statistics = bj.thresholds.accuracy_statistics(test.logits, test.labels)
    anytime = bj.thresholds.anytime(statistics, costs)
    budgeted = bj.thresholds.budgeted(chosen_on, on_test, statistics, costs)
    lines = {
        'anytime': (anytime.cost / 1e6, 100 * anytime.accuracy),
        'budgeted batch': (budgeted.cost / 1e6, 100 * budgeted.accuracy),
    }
    for name in ('entropy', 'learned', 'arithmetic ensemble'):
        frontier = bj.thresholds.pareto_frontier(_screened(criteria[name], validation, costs)[2])
        cost, accuracy = _on_test(criteria[name], frontier, test, costs)
        lines[f'frontier, {name}'] = (cost / 1e6, 100 * accuracy)
    bj.plots.curves(picture, lines, title=f'{title}: accuracy against cost')
    return {
        'anytime': [{'exit': n + 1, 'cost': c, 'accuracy': a}
                    for n, (c, a) in enumerate(zip(anytime.cost.tolist(), anytime.accuracy.tolist(), strict=True))],
        'budgeted': [{'cost': c, 'accuracy': a}
                     for c, a in zip(budgeted.cost.tolist(), budgeted.accuracy.tolist(), strict=True)],
    }  # fmt: skip


def who_leaves_where(
    dataset: bj.data.Dataset, validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, picture: Path, title: str
) -> list[dict[str, Any]]:
    """Reports, at the knee, how often each exit errs and on what, and shows images that left there."""
    point = bj.thresholds.knee(_screened(bj.criteria.entropy, validation, costs)[2])
    exits = _exits(np.asarray(bj.criteria.replay(bj.criteria.entropy, test.logits)[1]), point.thresholds)
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
