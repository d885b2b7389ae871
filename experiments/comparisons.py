"""What criteria, searches and protocols make of the same exits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from experiments.outputs import Outputs, entropy_of, evaluated, screened

_GRID = 100


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
        frontier = bj.thresholds.pareto_frontier(screened(criterion, choosing, costs))
        on_test = evaluated(criterion, frontier, test, costs)
        cost, accuracy = on_test.cost, on_test.accuracy
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


def searches(
    network: str, trained: Any, dataset: bj.data.Dataset, validation: Outputs, test: Outputs
) -> list[dict[str, Any]]:
    """Compares searches under bounds on the measured time: part of the way from the first exit to the last."""
    images = dataset.normalization(dataset.validation.image[:64])
    times = bj.inference.segment_times(*bj.inference.optimize(*trained), images, batch_sizes=[16, 64]).best()
    uncertainty = entropy_of(validation)
    on_test = entropy_of(test)
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


def protocols(
    criteria: Mapping[str, Criterion], validation: Outputs, test: Outputs, costs: bj.costs.StageCosts, picture: Path,
    title: str,
) -> dict[str, Any]:  # fmt: skip
    """Reports anytime and budgeted-batch accuracy on test data, and the frontier of each criterion as a picture."""
    chosen_on, on_test = entropy_of(validation), entropy_of(test)
    statistics = bj.thresholds.accuracy_statistics(test.logits, test.labels)
    anytime = bj.thresholds.anytime(statistics, costs)
    budgeted = bj.thresholds.budgeted(chosen_on, on_test, statistics, costs)
    lines = {
        'anytime': (anytime.cost / 1e6, 100 * anytime.accuracy),
        'budgeted batch': (budgeted.cost / 1e6, 100 * budgeted.accuracy),
    }
    for name in ('entropy', 'learned', 'arithmetic ensemble'):
        frontier = bj.thresholds.pareto_frontier(screened(criteria[name], validation, costs))
        found = evaluated(criteria[name], frontier, test, costs)
        lines[f'frontier, {name}'] = (found.cost / 1e6, 100 * found.accuracy)
    bj.plots.curves(picture, lines, title=f'{title}: accuracy against cost')
    return {
        'anytime': [{'exit': n + 1, 'cost': c, 'accuracy': a}
                    for n, (c, a) in enumerate(zip(anytime.cost.tolist(), anytime.accuracy.tolist(), strict=True))],
        'budgeted': [{'cost': c, 'accuracy': a}
                     for c, a in zip(budgeted.cost.tolist(), budgeted.accuracy.tolist(), strict=True)],
    }  # fmt: skip
