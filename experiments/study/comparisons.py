"""What confidence is worth: calibration, criteria, searches, protocols and control on the same cached exits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.thresholds import ExitTable, Screen
from branchy_jax.thresholds.screen import answering_exits
from experiments.pages import pictures
from experiments.run.networks import Networks
from experiments.study.cached import Cached

Record = dict[str, Any]
_GRID = 100
_GIVEN_UP = (0.0, 0.002, 0.005, 0.01)
_CONTROL_BATCH, _CONTROL_IMAGES, _SETTLED_AFTER = 20, 5000, 2000


def calibrations(fitting: Cached, test: Cached, picture: Path, title: str) -> tuple[list[Record], np.ndarray]:
    """Fits temperatures on validation data and reports calibration on test data; returns records and temperatures."""
    temperatures = bj.criteria.fit_temperatures(fitting.logits, fitting.labels)
    shared = bj.criteria.fit_temperatures(fitting.logits, fitting.labels, shared=True)
    right = test.logits.argmax(-1) == test.labels
    records, diagrams = [], {'before': [], 'after': []}
    for n, logits in enumerate(test.logits):
        record = {'exit': n + 1, 'temperature': float(temperatures[n])}
        for name, temperature in (('before', 1.0), ('after', temperatures[n]), ('after_shared', shared[n])):
            scaled = jnp.asarray(logits / temperature)
            confidence = np.asarray(jax.nn.softmax(scaled).max(-1))
            found = bj.criteria.reliability(confidence, right[n])
            if name in diagrams:
                diagrams[name].append(found)
            record[f'ece_{name}'] = found.error
            record[f'adaptive_ece_{name}'] = bj.criteria.reliability(confidence, right[n], equal_counts=True).error
            record[f'brier_{name}'] = bj.criteria.brier_score(scaled, test.labels)
        records.append(record)
    bj.plots.reliability_diagrams(picture, diagrams, title=f'{title}: reliability on test data')
    return records, temperatures


def all_criteria(fitting: Cached, temperatures: np.ndarray) -> list[Criterion]:
    """Returns every criterion, those that learn fitted on validation data."""
    return [
        bj.criteria.entropy,
        bj.criteria.max_probability,
        bj.criteria.margin,
        bj.criteria.patience,
        bj.criteria.ensemble('arithmetic'),
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures(temperatures),
        bj.criteria.fit_learned(fitting.logits, fitting.labels, jax.random.key(0)),
    ]


def compare_criteria(criteria: list[Criterion], choosing: Cached, test: Cached) -> list[Record]:
    """Compares what criteria cost, by two measures.

    ``cost``: of the cheapest setting that on validation data gives up no more than asked against the last exit, with
    its accuracy on test data. ``cost_at_equal_accuracy``: read off the test curve of the validation frontier at the
    accuracy of the last exit minus what is given up, so that costs compare at equal accuracy on test data.
    """
    full, full_test = (float((part.logits[-1].argmax(-1) == part.labels).mean()) for part in (choosing, test))
    records: list[Record] = []
    for criterion in criteria:
        frontier = choosing.table(criterion).screen().frontier()
        on_test = test.table(criterion, split='test').evaluate(frontier)
        for given_up in _GIVEN_UP:
            record: Record = {'criterion': criterion.name, 'given_up': given_up}
            reached = np.flatnonzero(frontier.accuracy >= full - given_up - 1e-9)
            if len(reached):
                record['cost'] = float(on_test.cost[reached[0]])
                record['accuracy_change'] = float(on_test.accuracy[reached[0]]) - full_test
            reaching = on_test.cost[on_test.accuracy >= full_test - given_up - 1e-9]
            if len(reaching):
                record['cost_at_equal_accuracy'] = float(reaching.min())
            records.append(record)
    return records


def searches(networks: Networks, stored: np.ndarray, validation: Cached, test: Cached) -> list[Record]:
    """Compares searches under bounds on the measured time: shares of the range from the first exit to the last.

    Args:
        networks: both.
        stored: ``[M, H, W, C]`` images to measure stages and heads on.
        validation: to choose on.
        test: to report on.
    """
    images = networks.normalization(stored[:64])
    times = bj.inference.segment_times(*networks.fast, images, batch_sizes=[16, 64]).best()
    table, on_test = validation.table().replace(costs=times), test.table(split='test').replace(costs=times)
    methods: dict[str, Callable[[float], Any]] = {
        'exact': lambda bound: table.screen(_GRID).for_cost(bound),
        'coordinate descent': lambda bound: table.coordinate_descent(bound, _GRID),
        'geometric budget': table.for_budget,
    }
    records = []
    for share in (0.1, 0.25, 0.5):
        bound = float(times.to_exit[0] + share * (times.to_exit[-1] - times.to_exit[0]))
        rows = []
        for method, search in methods.items():
            start = time.perf_counter()
            policy = search(bound)
            seconds = time.perf_counter() - start
            found, carried = table.evaluate(policy).point(0), on_test.evaluate(policy).point(0)
            rows.append(
                {
                    'method': method,
                    'bound_ms': bound,
                    'accuracy': float(found.accuracy),
                    'cost': float(found.cost),
                    'seconds': seconds,
                    'test_accuracy': float(carried.accuracy),
                    'test_cost': float(carried.cost),
                }
            )
        exact = next(row for row in rows if row['method'] == 'exact')
        records += [{**row, 'gap': exact['accuracy'] - row['accuracy']} for row in rows]
    return records


def time_exact_search() -> Record:
    """Times the exact search on outputs of a large enough table, drawn at random."""
    exits, inputs, values = 3, 10_000, 100
    generator = np.random.default_rng(0)
    table = ExitTable(
        uncertainty=generator.random((exits, inputs)),
        statistics=generator.random((exits, inputs, 1)) < 0.8,
        costs=bj.costs.StageCosts(stages=np.ones(exits), exits=np.zeros(exits)),
        criterion=bj.criteria.entropy,
        split='random',
    )
    start = time.perf_counter()
    table.screen(values).for_cost(0.6 * exits)
    return {'exits': exits, 'inputs': inputs, 'values': values, 'seconds': time.perf_counter() - start}


def control(
    cached: Callable[[np.ndarray, np.ndarray], Cached], test: bj.Batch, validation: Cached, picture: Path, title: str
) -> list[Record]:
    """Holds a cost while test images turn noisy, clean and blurred.

    Args:
        cached: runs all exits over images with their labels.
        test: images as stored.
        validation: to make the path of settings from.
        picture: to draw.
        title: above it.
    """
    images, labels = test.image[:_CONTROL_IMAGES], test.label[:_CONTROL_IMAGES]
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, 1.5, 1.5, 0)).astype(np.uint8)
    parts = {'clean': images, 'noise': noisy, 'clean again': images, 'blur': blurred}
    uncertainty = np.concatenate([cached(part, labels).table().uncertainty for part in parts.values()], axis=1)
    table, relative = validation.table(), validation.costs.to_exit / validation.costs.trunk
    path = table.path_by_shares()
    target = float(relative[0] + 0.3 * (relative[-1] - relative[0]))
    controller = bj.thresholds.Controller.create(
        path, criterion=table.criterion, target=target, scale=float(relative[-1] - relative[0])
    )
    # Beside it the setting of the same path whose cost on validation data is nearest to the target.
    fixed = path[np.abs(table.evaluate(path).cost / validation.costs.trunk - target).argmin()]
    update = jax.jit(lambda controller, observed: controller.update(observed))
    held, left_alone = [], []
    for start in range(0, uncertainty.shape[1], _CONTROL_BATCH):
        batch = uncertainty[:, start : start + _CONTROL_BATCH]
        spent = relative[answering_exits(batch, np.asarray(controller.policy.thresholds))]
        controller = update(controller, jnp.asarray(spent))
        held.extend(spent)
        left_alone.extend(relative[answering_exits(batch, fixed)])
    averages = {
        name: _moving_average(np.array(values))
        for name, values in (('controlled', held), ('thresholds left alone', left_alone))
    }
    length, settled = len(labels), min(_SETTLED_AFTER, len(labels) // 2)
    starts = [length * k for k in range(len(parts))]
    pictures.controlled_cost(picture, averages, target, starts[1:], title=f'{title}: a cost held while images change')
    after = [slice(start + settled, start + length) for start in starts]
    return [
        {
            'part': name,
            'target': target,
            'after_2000': float(np.mean(held[rows])),
            'left_alone': float(np.mean(left_alone[rows])),
        }
        for name, rows in zip(parts, after, strict=True)
    ]


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Averages every value with those before it, as many as there are up to 500."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - 500)
    return (sums[ends] - sums[starts]) / (ends - starts)


def protocols(criteria: list[Criterion], choosing: Cached, test: Cached, picture: Path, title: str) -> Record:
    """Reports anytime and budgeted-batch accuracy on test data, and the frontier of each criterion as a picture."""
    on_test = test.table(split='test')
    found = {'anytime': on_test.anytime(), 'budgeted batch': on_test.budgeted(choosing.table())}
    named: Mapping[str, Criterion] = {criterion.name: criterion for criterion in criteria}
    for name in ('entropy', 'learned', 'arithmetic ensemble'):
        frontier = choosing.table(named[name]).screen().frontier()
        found[f'frontier, {name}'] = test.table(named[name], split='test').evaluate(frontier)
    bj.plots.accuracy_against_cost(picture, found, title=f'{title}: accuracy against cost')

    def rows(screen: Screen) -> list[Record]:
        curve = zip(np.asarray(screen.cost).tolist(), np.asarray(screen.accuracy).tolist(), strict=True)
        return [{'cost': cost, 'accuracy': accuracy} for cost, accuracy in curve]

    anytime = [{'exit': n + 1, **row} for n, row in enumerate(rows(found['anytime']))]
    return {'anytime': anytime, 'budgeted': rows(found['budgeted batch'])}


def who_leaves_where(images: np.ndarray, validation: Cached, test: Cached, picture: Path, title: str) -> list[Record]:
    """Reports, at the knee, how often each exit errs and on what, and shows images that left there."""
    table = test.table(split='test')
    exits = table.answering_exits(validation.table().screen().knee())
    answers = test.logits.argmax(-1)[exits, np.arange(len(exits))]
    num_exits, num_classes = table.num_exits, test.logits.shape[-1]
    confusions = bj.thresholds.statistics.confusion(
        test.labels, answers, exits, num_exits=num_exits, num_classes=num_classes
    )
    order = np.random.default_rng(0).permutation(len(exits))
    bj.plots.images_by_exit(
        picture, images[order], exits[order], num_exits=num_exits, title=f'{title}: which images leave where'
    )
    records = []
    for n, counts in enumerate(confusions):
        wrong = counts * (1 - np.eye(num_classes, dtype=int))
        most = np.unravel_index(np.argsort(wrong, axis=None)[::-1][:3], wrong.shape)
        records.append(
            {
                'exit': n + 1,
                'share': float(counts.sum() / len(exits)),
                'error': float(wrong.sum() / max(1, counts.sum())),
                'confused': [f'{a} for {b}: {wrong[b, a]}' for b, a in zip(*most, strict=True) if wrong[b, a]],
                'confusion': counts.tolist(),
            }
        )
    return records
