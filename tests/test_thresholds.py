"""Screens against brute force, refusals, and points that carry their criterion and the name of their data."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import branchy_jax as bj
from branchy_jax.costs import StageCosts
from branchy_jax.criteria import entropy, margin
from branchy_jax.thresholds import ExitTable, Screen

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, np.inf, np.nan]) | st.floats(0, 2, width=32)
TWO = StageCosts(stages=np.ones(2), exits=np.ones(2))
THREE = StageCosts(stages=[1, 2, 3], exits=[1, 1, 1])


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


def table_of(uncertainty, statistics=None, costs=TWO, **options):
    statistics = np.ones((*np.shape(uncertainty), 1)) if statistics is None else statistics
    given = {'criterion': entropy, 'split': 'validation', **options}
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, **given)


@given(cached_outputs())
def test_screen_is_brute_force(outputs):
    uncertainty, statistics, grid, costs = outputs

    def metric(sums, count):  # not a mean over inputs, as mIoU is not
        return sums[..., 0] / (1 + sums[..., -1] + count)

    table = table_of(uncertainty, statistics, costs, metric=metric)
    result = table.screen(grid)
    settings = list(itertools.product(*grid))
    assert result.thresholds.tolist() == [list(setting) for setting in settings]
    for index, setting in enumerate(settings):
        total, fractions, cost = run_by_hand(uncertainty, statistics, costs, setting)
        np.testing.assert_allclose(result.accuracy[index], metric(total, uncertainty.shape[1]), rtol=1e-12)
        np.testing.assert_allclose(result.exit_fractions[index], fractions, rtol=1e-12)
        np.testing.assert_allclose(result.cost[index], cost, rtol=1e-12)
    one_by_one = table.evaluate(result)
    for name in ('accuracy', 'exit_fractions', 'cost'):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(result, name), rtol=1e-12)


def screen_of(accuracy, cost):
    count = len(cost)
    settings, halves = np.arange(count, dtype=np.float32)[:, None], np.full((count, 2), 0.5)
    return Screen(settings, np.array(accuracy), halves, np.array(cost, float), entropy, 'validation')


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_frontier_and_choices_are_brute_force(points, cost, accuracy):
    points, accuracy = [(float(c), a / 6) for c, a in points], accuracy / 6
    screen = screen_of([a for _, a in points], [c for c, _ in points])
    best = {p for p in points if not any(c <= p[0] and a >= p[1] and (c, a) != p for c, a in points)}
    result = screen.frontier()
    assert list(zip(result.cost, result.accuracy, strict=True)) == sorted(best)
    reaching, affordable = [p for p in points if p[1] >= accuracy], [p for p in points if p[0] <= cost]
    if reaching:
        point = screen.for_accuracy(accuracy)
        assert (point.cost, point.accuracy) == min(reaching, key=lambda p: (p[0], -p[1]))
    else:
        with pytest.raises(ValueError, match='at_least: no thresholds reach .* the best accuracy is'):
            screen.for_accuracy(accuracy)
    if affordable:
        point = screen.for_cost(cost)
        assert (point.cost, point.accuracy) == min(affordable, key=lambda p: (-p[1], p[0]))
    else:
        with pytest.raises(ValueError, match='at_most: no thresholds cost .* the cheapest cost'):
            screen.for_cost(cost)


def test_knee_by_hand():
    """From (1, 0.5) to (10, 0.9): at cost 2 most of the accuracy is there."""
    screen = screen_of([0.9, 0.8, 0.5, 0.85], [10, 2, 1, 5])
    assert (screen.knee().cost, screen.knee().accuracy) == (2.0, 0.8)
    accelerating = screen.replace(accuracy=np.array([0.9, 0.51, 0.5, 0.6]))  # nowhere above the line: no knee
    assert accelerating.knee().accuracy == 0.9
    assert screen_of([0.9], [10]).knee().cost == 10.0


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=VALUES), st.integers(2, 12))
def test_candidates_separate_values(values, size):
    candidates = table_of(np.stack([values, np.zeros_like(values)])).screen(size).thresholds[:, 0]
    assert (len(candidates), candidates[0], candidates[-1]) == (size, -np.inf, np.inf)
    assert (candidates[1:] >= candidates[:-1]).all()
    distinct = np.unique(values[np.isfinite(values)])
    if 0 < len(distinct) <= size - 1:  # every cut of the values in two is among them
        assert {(distinct < candidate).sum() for candidate in candidates} == set(range(len(distinct) + 1))


@pytest.mark.parametrize(('exits', 'settings'), [(1, 1), (2, 1000), (3, 316**2), (6, 10**5), (25, None)])
def test_default_grid_is_fine_but_bounded(exits, settings):
    ones = StageCosts(stages=np.ones(exits), exits=np.ones(exits))
    table = table_of(np.random.default_rng(0).random((exits, 5), np.float32), costs=ones)
    if settings is None:
        with pytest.raises(ValueError, match='grid: got 1 candidates for each of 25 exits'):
            table.screen()
    else:
        assert len(table.screen()) == settings


METHODS_OF_A_TABLE = {
    'screen': lambda table: table.screen(),
    'evaluate': lambda table: table.evaluate(np.zeros((1, 1))),
    'coordinate_descent': lambda table: table.coordinate_descent(9.0),
    'for_shares': lambda table: table.for_shares([0.5, 0.5]),
    'for_budget': lambda table: table.for_budget(3.0),
    'standard_error': lambda table: table.standard_error([0.5]),
    'answering_exits': lambda table: table.answering_exits([0.5]),
    'path_by_shares': lambda table: table.path_by_shares(),
    'rows': lambda table: table.rows([0]),
}


@pytest.mark.parametrize('method', METHODS_OF_A_TABLE)
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'uncertainty': np.zeros(3)}, 'uncertainty: expected'),
        ({'uncertainty': np.zeros((2, 0)), 'statistics': np.zeros((2, 0, 1))}, 'uncertainty: expected'),
        ({'statistics': np.zeros((2, 4, 1))}, r'statistics: expected \[2, 3, S\]'),
        ({'statistics': np.zeros((2, 3))}, r'statistics: expected \[2, 3, S\]'),
        ({'costs': THREE}, 'costs: expected 2 stages'),
        ({'costs': StageCosts(stages=[1, 1], exits=[1])}, 'costs: expected 2 stages'),
        ({'criterion': 'entropy'}, "criterion: got 'entropy'; give a value"),
        ({'criterion': bj.criteria.with_temperatures([1.0, 1.0, 1.0])}, 'criterion: .* was learned for 3 exits'),
    ],
)
def test_bad_tables_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        METHODS_OF_A_TABLE[method](table_of(np.zeros((2, 3))).replace(**changes))


def test_bad_grids_and_settings_are_refused():
    table = table_of(np.zeros((2, 3)))
    grids = {r'grid: expected \[1, V\]': np.zeros((2, 3)), 'not NaN': [[0, np.nan]], 'ascending': [[1, 0]], 'got 1': 1}
    for message, grid in grids.items():
        for search in (table.screen, lambda grid: table.coordinate_descent(9.0, grid)):
            with pytest.raises(ValueError, match=message):
                search(grid)
    for bad in ([[np.nan]], [[0.1, 0.2]], [0.1, 0.2], [np.nan], [[[0.1]]]):
        for ask in (table.evaluate, table.answering_exits, table.standard_error):
            with pytest.raises(ValueError, match=r'settings?: expected thresholds \[1\]'):
                ask(bad)
    with pytest.raises(ValueError, match='setting: expected one, got 2'):
        table.answering_exits([[0.1], [0.2]])
    with pytest.raises(ValueError, match='statistics: a standard error needs'):
        table.rows([0]).standard_error([0.5])


def cached_logits(exits=3, inputs=60, classes=4, seed=0):
    """Later exits are right more often; labels to go with them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, inputs)
    strength = np.arange(1, exits + 1)[:, None, None]
    logits = generator.normal(size=(exits, inputs, classes)) + strength * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


def table_from(split='validation', criterion=margin, seed=0, **options):
    return ExitTable.from_logits(*cached_logits(seed=seed), THREE, criterion=criterion, split=split, **options)


def test_a_table_from_logits_replays_its_criterion():
    logits, labels = cached_logits()
    table = table_from(criterion=bj.criteria.ensemble())
    answers, uncertainty = bj.criteria.replay(bj.criteria.ensemble(), jnp.asarray(logits))
    np.testing.assert_array_equal(table.uncertainty, uncertainty)
    np.testing.assert_array_equal(table.statistics[..., 0], np.asarray(answers).argmax(-1) == labels)
    assert (np.asarray(answers).argmax(-1) != logits.argmax(-1)).any()  # the heads alone answer otherwise
    assert (len(table), table.num_exits) == (60, 3)
    of_function = table_from(criterion=margin.uncertainty_of)
    np.testing.assert_array_equal(of_function.uncertainty, table_from().uncertainty)
    of_function.evaluate(bj.ExitPolicy(margin.uncertainty_of, np.zeros(2)))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'logits': np.zeros((2, 3))}, 'logits: expected'),
        ({'logits': np.zeros((3, 0, 4))}, 'logits: expected'),
        ({'labels': np.zeros(5, int)}, 'labels: answers have shape'),
        ({'labels': np.full(60, 4)}, 'labels: expected classes'),
        ({'costs': TWO}, 'costs: expected 3 stages'),
        ({'criterion': bj.criteria.with_temperatures([1.0, 2.0])}, 'criterion: .* was learned for 2 exits'),
        ({'criterion': 'margin'}, "criterion: got 'margin'"),
        ({'statistics': lambda answers, labels: np.zeros(3)}, 'statistics: expected'),
    ],
)
def test_bad_logits_are_refused_when_the_table_is_made(changes, message):
    logits, labels = cached_logits()
    options = {'logits': logits, 'labels': labels, 'costs': THREE, 'split': 'validation', **changes}
    with pytest.raises(ValueError, match=message):
        ExitTable.from_logits(**options)


def test_every_point_carries_its_criterion_and_its_data():
    table, on_test = table_from(), table_from('test', seed=1)
    points = [
        table.screen(9).for_cost(5.0),
        table.coordinate_descent(5.0),
        table.screen().knee(),
        table.screen().frontier().point(0),
        table.evaluate(np.zeros((1, 2))).for_cost(9.0),
        table.anytime().for_accuracy(0.1),
        table.budgeted(on_test).point(3),
        table.rows(np.arange(30)).screen(9).for_cost(5.0),
    ]
    for point in points:
        measured = on_test.evaluate(point).point(0)
        assert (point.policy.criterion, point.split) == (margin, 'validation')
        assert (measured.policy, measured.split) == (point.policy, 'test')
    assert on_test.evaluate(points[0]).accuracy[0] != points[0].accuracy
    assert table.for_budget(5.0).criterion == table.for_shares([0.2, 0.3, 0.5]).criterion == margin


def test_settings_of_another_criterion_are_refused():
    ours, theirs = table_from(), table_from(criterion=entropy)
    point, message = theirs.screen(9).knee(), "made for the criterion 'entropy', but this table .* of 'margin'"
    for settings in (theirs.screen(9), point, point.policy):
        with pytest.raises(ValueError, match=message):
            ours.evaluate(settings)
    for ask in (ours.answering_exits, ours.standard_error):
        with pytest.raises(ValueError, match=message):
            ask(point)
    with pytest.raises(ValueError, match='chosen_on: ' + message):
        ours.budgeted(theirs)
    ours, theirs = (table_from(criterion=bj.criteria.with_temperatures([t, 1.0, 1.0])) for t in (1.0, 2.0))
    assert len(ours.evaluate(bj.ExitPolicy(bj.criteria.with_temperatures(np.ones(3)), np.zeros(2)))) == 1
    with pytest.raises(ValueError, match='with other numbers in it'):
        ours.evaluate(theirs.for_budget(5.0))


@given(cached_outputs(), st.data())
def test_every_form_of_a_setting_is_evaluated_alike(outputs, data):
    uncertainty, statistics, grid, costs = outputs
    table = table_of(uncertainty, statistics, costs, split='test')
    column = data.draw(st.integers(0, grid.shape[1] - 1)) if grid.size else 0
    setting = grid[:, column] if grid.size else np.empty(0, np.float32)
    expected = table.evaluate(setting[None])
    policy = bj.ExitPolicy(entropy, setting)
    for form in (policy, expected, expected.point(0)):
        assert table.evaluate(form) == expected
    _, fractions, _ = run_by_hand(uncertainty, statistics, costs, setting)
    for form in (policy, expected.point(0), setting, setting.tolist()):
        counts = np.bincount(table.answering_exits(form), minlength=table.num_exits)
        np.testing.assert_allclose(counts / len(table), fractions)


def test_standard_error_is_that_of_the_answers_given():
    table, setting = table_from(), [0.4, 0.6]
    right = [table.statistics[n, b, 0] for b, n in enumerate(table.answering_exits(setting))]
    assert table.standard_error(setting) == pytest.approx(np.std(right) / np.sqrt(len(right) - 1))


@pytest.mark.parametrize('rows', [np.arange(0, 60, 2), np.arange(60) % 2 == 0, slice(0, 60, 2)])
def test_rows_are_a_table_of_some_inputs(rows):
    table, (logits, labels) = table_from(), cached_logits()
    expected = ExitTable.from_logits(logits[:, ::2], labels[::2], THREE, criterion=margin, split='validation')
    half = table.rows(rows)
    np.testing.assert_allclose(half.uncertainty, expected.uncertainty, rtol=1e-6)
    np.testing.assert_array_equal(half.statistics, expected.statistics)
    assert len(half) == 30


def test_tables_and_screens_are_frozen_pytrees_compared_by_value():
    table = table_from()
    assert jax.tree.map(lambda leaf: leaf, table) == table
    assert table != table.replace(split='test')
    assert table.screen([[0.1, 0.2]] * 2) == table_from().screen([[0.1, 0.2]] * 2)
    with pytest.raises(AttributeError):
        table.split = 'test'


def test_dense_predictions_choose_by_their_own_metric():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, (20, 4, 4))
    logits = generator.normal(size=(2, 20, 4, 4, 3)) + np.array([1, 3])[:, None, None, None, None] * np.eye(3)[labels]
    options = {'statistics': bj.thresholds.iou_statistics, 'metric': bj.thresholds.mean_iou, 'split': 'validation'}
    table = ExitTable.from_logits(logits.astype(np.float32), labels, TWO, **options)
    answers = logits[1].argmax(-1)
    ious = [((answers == k) & (labels == k)).sum() / ((answers == k) | (labels == k)).sum() for k in range(3)]
    assert table.evaluate([[-np.inf]]).accuracy[0] == pytest.approx(np.mean(ious))
