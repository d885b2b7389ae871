import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from branchy_jax.costs import StageCosts
from branchy_jax.thresholds import (
    Screen,
    accuracy_statistics,
    evaluate,
    for_accuracy,
    for_cost,
    knee,
    pareto_frontier,
    quantile_grid,
    screen,
)

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, np.inf, np.nan]) | st.floats(0, 2, width=32)


@st.composite
def cached_outputs(draw):
    """Uncertainties with ties, infinities and NaN; statistics with one or two columns; a grid with ties."""
    exits, inputs, width = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    uncertainty = draw(hnp.arrays(np.float32, (exits, inputs), elements=VALUES))
    statistics = draw(hnp.arrays(np.float64, (exits, inputs, draw(st.integers(1, 2))), elements=st.integers(0, 3)))
    candidates = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0, np.inf])
    grid = np.sort(draw(hnp.arrays(np.float32, (exits - 1, width), elements=candidates)), axis=-1)
    costs = draw(hnp.arrays(np.int64, (2, exits), elements=st.integers(0, 9)))
    return uncertainty, statistics, grid, StageCosts(stages=costs[0], exits=costs[1])


def run_by_hand(uncertainty, statistics, costs, setting):
    """One input after the other, exit after exit, as the paper's Figure 2 has it."""
    exits, inputs = uncertainty.shape
    left, total, cost = np.zeros(exits), np.zeros(statistics.shape[2]), 0.0
    for b in range(inputs):
        for n in range(exits):
            cost += costs.stages[n] + costs.exits[n]
            if n == exits - 1 or uncertainty[n, b] < setting[n]:
                left[n] += 1
                total += statistics[n, b]
                break
    return total, left / inputs, cost / inputs


@given(cached_outputs())
def test_screen_is_brute_force(outputs):
    uncertainty, statistics, grid, costs = outputs

    def metric(sums, count):  # not a mean over inputs, as mIoU is not
        return sums[..., 0] / (1 + sums[..., -1] + count)

    found = screen(uncertainty, statistics, costs, grid=grid, metric=metric)
    settings = list(itertools.product(*grid))
    assert found.thresholds.tolist() == [list(setting) for setting in settings]
    for index, setting in enumerate(settings):
        total, fractions, cost = run_by_hand(uncertainty, statistics, costs, setting)
        np.testing.assert_allclose(found.accuracy[index], metric(total, uncertainty.shape[1]), rtol=1e-12)
        np.testing.assert_allclose(found.exit_fractions[index], fractions, rtol=1e-12)
        np.testing.assert_allclose(found.cost[index], cost, rtol=1e-12)
    one_by_one = evaluate(uncertainty, statistics, costs, found.thresholds, metric=metric)
    for name in ('accuracy', 'exit_fractions', 'cost'):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(found, name), rtol=1e-12)


SCREENS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=20).map(
    lambda points: Screen(
        thresholds=np.arange(len(points), dtype=np.float32)[:, None],
        accuracy=np.array([a / 6 for a, _ in points]),
        exit_fractions=np.full((len(points), 2), 0.5),
        cost=np.array([float(c) for _, c in points]),
        criterion='entropy',
        split='validation',
    )
)


@given(SCREENS)
def test_frontier_is_brute_force(screened):
    found = pareto_frontier(screened)
    points = list(zip(screened.cost, screened.accuracy, strict=True))
    best = {
        point for point in points
        if not any(c <= point[0] and a >= point[1] and (c, a) != point for c, a in points)
    }  # fmt: skip
    assert list(zip(found.cost, found.accuracy, strict=True)) == sorted(best)


@given(SCREENS, st.integers(0, 6), st.integers(1, 6))
def test_choices_are_brute_force(screened, accuracy, cost):
    reaching = screened.cost[screened.accuracy >= accuracy / 6]
    if len(reaching):
        point = for_accuracy(screened, accuracy / 6)
        assert point.cost == reaching.min()
        assert point.accuracy == screened.accuracy[screened.cost == point.cost].max()
    else:
        with pytest.raises(ValueError, match='at_least: no thresholds reach .* the best accuracy is'):
            for_accuracy(screened, accuracy / 6)
    affordable = screened.accuracy[screened.cost <= cost]
    if len(affordable):
        assert for_cost(screened, cost).accuracy == affordable.max()
        assert for_cost(screened, cost).cost <= cost
    else:
        with pytest.raises(ValueError, match='at_most: no thresholds cost .* the cheapest cost'):
            for_cost(screened, cost)


def test_knee_by_hand():
    """From (1, 0.5) to (10, 0.9): at cost 2 most of the accuracy is there."""
    cost, accuracy = np.array([10.0, 2.0, 1.0, 5.0]), np.array([0.9, 0.8, 0.5, 0.85])
    screened = Screen(np.zeros((4, 1)), accuracy, np.full((4, 2), 0.5), cost, 'entropy', 'validation')
    assert (knee(screened).cost, knee(screened).accuracy) == (2.0, 0.8)
    accelerating = screened.replace(accuracy=np.array([0.9, 0.51, 0.5, 0.6]))  # nowhere above the line: no knee
    assert knee(accelerating).accuracy == 0.9
    alone = Screen(np.zeros((1, 1)), accuracy[:1], np.full((1, 2), 0.5), cost[:1], 'entropy', 'validation')
    assert knee(alone).cost == 10.0


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 3), st.integers(1, 30)), elements=VALUES), st.integers(2, 12))
def test_quantile_grid_separates(uncertainty, size):
    grid = quantile_grid(uncertainty, size=size)
    assert grid.shape == (len(uncertainty) - 1, size)
    assert (grid[:, 0] == -np.inf).all()
    assert (grid[:, -1] == np.inf).all()
    assert (grid[:, 1:] >= grid[:, :-1]).all()
    for row, values in zip(grid, uncertainty, strict=False):
        distinct = np.unique(values[np.isfinite(values)])
        if 0 < len(distinct) <= size - 1:  # every way to cut the values in two is on the grid
            shares = {(distinct < candidate).sum() for candidate in row}
            assert shares == set(range(len(distinct) + 1))


@pytest.mark.parametrize(('exits', 'settings'), [(1, 1), (2, 1000), (3, 316**2), (6, 10**5), (25, None)])
def test_default_grid_is_fine_but_bounded(exits, settings):
    uncertainty = np.random.default_rng(0).random((exits, 5), np.float32)
    costs = StageCosts(stages=np.ones(exits), exits=np.ones(exits))
    if settings is None:
        with pytest.raises(ValueError, match='grid: 25 exits .* give a grid'):
            screen(uncertainty, np.ones((exits, 5, 1)), costs)
    else:
        assert len(screen(uncertainty, np.ones((exits, 5, 1)), costs)) == settings


def test_accuracy_statistics_by_hand():
    logits = np.array([[[0.0, 1.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert accuracy_statistics(logits, np.array([1, 1]))[..., 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


COSTS = StageCosts(stages=np.ones(2), exits=np.ones(2))


@pytest.mark.parametrize(
    ('uncertainty', 'statistics', 'options', 'message'),
    [
        (np.zeros(3), np.zeros((2, 3, 1)), {}, 'uncertainty: expected'),
        (np.zeros((2, 0)), np.zeros((2, 0, 1)), {}, 'uncertainty: expected'),
        (np.zeros((2, 3)), np.zeros((2, 4, 1)), {}, r'statistics: expected \[2, 3, S\]'),
        (np.zeros((3, 3)), np.zeros((3, 3, 1)), {}, 'costs: expected 3 stages'),
        (np.zeros((2, 3)), np.zeros((2, 3, 1)), {'grid': np.zeros((2, 3))}, r'grid: expected \[1, V\]'),
        (np.zeros((2, 3)), np.zeros((2, 3, 1)), {'grid': [[1.0, 0.0]]}, 'grid: .* ascending'),
        (np.zeros((2, 3)), np.zeros((2, 3, 1)), {'grid': [[0.0, np.nan]]}, 'grid: .* not NaN'),
    ],
)
def test_bad_arrays_are_refused(uncertainty, statistics, options, message):
    with pytest.raises(ValueError, match=message):
        screen(uncertainty, statistics, COSTS, **options)


def test_bad_settings_are_refused():
    outputs = np.zeros((2, 3)), np.zeros((2, 3, 1))
    for bad in ([[np.nan]], [[0.1, 0.2]], [0.1]):
        with pytest.raises(ValueError, match=r'thresholds: expected \[G, 1\]'):
            evaluate(*outputs, COSTS, bad)
    with pytest.raises(ValueError, match='size: got 1'):
        quantile_grid(outputs[0], size=1)
