"""Screens and searches against brute force, refusals, and points that carry their criterion and their data's name."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import branchy_jax as bj
from branchy_jax.costs import StageCosts
from branchy_jax.criteria import entropy, margin, with_temperatures
from branchy_jax.thresholds import ExitTable, Screen

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, np.inf, np.nan]) | st.floats(0, 2, width=32)
COSTS = StageCosts(stages=[1, 4, 5], exits=[1, 1, 0])


@st.composite
def tables(draw):
    """Uncertainties with ties, infinities and NaN; statistics with one or two columns; a grid with ties."""
    exits, inputs, width = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    uncertainty = draw(hnp.arrays(np.float32, (exits, inputs), elements=VALUES))
    statistics = draw(hnp.arrays(np.float64, (exits, inputs, draw(st.integers(1, 2))), elements=st.integers(0, 3)))
    candidates = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0, np.inf])
    grid = np.sort(draw(hnp.arrays(np.float32, (exits - 1, width), elements=candidates)), axis=-1)
    costs = draw(hnp.arrays(np.int64, (2, exits), elements=st.integers(0, 9)))

    def metric(sums, count):  # not a mean over inputs, as mIoU is not
        return sums[..., 0] / (1 + sums[..., -1] + count)

    return table_of(uncertainty, statistics, StageCosts(*costs), metric=metric), grid


def table_of(uncertainty, statistics=None, costs=COSTS, **options):
    statistics = np.ones((*np.shape(uncertainty), 1)) if statistics is None else statistics
    given = {'criterion': entropy, 'split': 'validation', **options}
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, **given)


def outputs(count, seed=0, **options):
    """A table whose uncertain exits are wrong more often, later exits less."""
    generator = np.random.default_rng(seed)
    uncertainty = generator.random((3, count))
    right = generator.random((3, count)) > uncertainty * np.array([[0.8], [0.5], [0.2]])
    return table_of(uncertainty, right[..., None].astype(float), **options)


def run_by_hand(table, setting):
    """One input after the other, exit after exit, as the paper's Figure 2 has it."""
    (exits, inputs), costs = table.uncertainty.shape, table.costs
    left, total, cost = np.zeros(exits), np.zeros(table.statistics.shape[2]), 0.0
    for b in range(inputs):
        for n in range(exits):
            cost += costs.stages[n] + costs.exits[n]
            if n == exits - 1 or np.float32(table.uncertainty[n, b]) < setting[n]:
                left[n] += 1
                total += table.statistics[n, b]
                break
    return table.metric(total, inputs), left / inputs, cost / inputs


@given(tables())
def test_screen_is_brute_force(drawn):
    table, grid = drawn
    screen = table.screen(grid)
    settings = [*itertools.product(*grid)]
    assert screen.thresholds.tolist() == [list(setting) for setting in settings]
    for result in (screen, table.evaluate(screen)):
        columns = zip(settings, result.accuracy, result.exit_fractions, result.cost, strict=True)
        for setting, accuracy, fractions, cost in columns:
            expected = run_by_hand(table, setting)
            np.testing.assert_allclose(np.hstack([accuracy, fractions, cost]), np.hstack(expected), rtol=1e-12)


def screen_of(accuracy, cost):
    settings, halves = np.arange(len(cost), dtype=np.float32)[:, None], np.full((len(cost), 2), 0.5)
    return Screen(settings, np.array(accuracy), halves, np.array(cost, float), entropy, 'validation')


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=20)


@given(POINTS)
def test_frontier_and_choices_are_brute_force(points):
    points = [(float(c), a / 6) for c, a in points]
    screen = screen_of([a for _, a in points], [c for c, _ in points])
    best = sorted({p for p in points if not any(c <= p[0] and a >= p[1] and (c, a) != p for c, a in points)})
    frontier = screen.frontier()
    assert list(zip(frontier.cost, frontier.accuracy, strict=True)) == best
    for cost, accuracy in best:  # the limit itself is allowed, and a little more changes nothing
        for point in (screen.for_cost(cost + 0.5), screen.for_cost(cost), screen.for_accuracy(accuracy)):
            assert (point.cost, point.accuracy) == (cost, accuracy)
    with pytest.raises(ValueError, match='at_least: no thresholds reach .* the best accuracy is'):
        screen.for_accuracy(best[-1][1] + 0.01)
    with pytest.raises(ValueError, match='at_most: no thresholds cost .* the cheapest cost'):
        screen.for_cost(best[0][0] - 0.01)


def test_knee_by_hand():
    """From (1, 0.5) to (10, 0.9): at cost 2 most of the accuracy is there."""
    screen = screen_of([0.9, 0.8, 0.5, 0.85], [10, 2, 1, 5])
    accelerating = screen.replace(accuracy=np.array([0.9, 0.51, 0.5, 0.6]))  # nowhere above the line: no knee
    for tried, cost in ((screen, 2), (accelerating, 10), (screen_of([0.9], [10]), 10)):
        assert tried.knee().cost == cost


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=VALUES), st.integers(2, 12))
def test_candidates_separate_values(values, size):
    table = table_of(np.stack([values, np.zeros_like(values)]), costs=StageCosts([1, 1], [1, 1]))
    candidates = table.screen(size).thresholds[:, 0]
    assert (len(candidates), candidates[0], candidates[-1]) == (size, -np.inf, np.inf)
    assert (candidates[1:] >= candidates[:-1]).all()
    distinct = np.unique(values[np.isfinite(values)])
    if 0 < len(distinct) <= size - 1:  # every cut of the values in two is among them
        assert {(distinct < candidate).sum() for candidate in candidates} == set(range(len(distinct) + 1))


def test_bad_tables_are_refused():
    """By every method; `screen` shows every reason."""
    table = table_of(np.zeros((3, 3)))
    for changes, message in (
        ({'uncertainty': np.zeros(3)}, 'uncertainty: expected'),
        ({'uncertainty': np.zeros((3, 0)), 'statistics': np.zeros((3, 0, 1))}, 'uncertainty: expected'),
        ({'statistics': np.zeros((3, 4, 1))}, r'statistics: expected \[3, 3, S\]'),
        ({'statistics': np.zeros((3, 3))}, r'statistics: expected \[3, 3, S\]'),
        ({'costs': StageCosts([1, 1, 1], [1])}, 'costs: expected 3 stages'),
        ({'criterion': 'entropy'}, "criterion: got 'entropy'; give a value"),
        ({'criterion': with_temperatures([1.0, 1.0])}, 'criterion: .* was learned for 2 exits'),
    ):
        with pytest.raises(ValueError, match=message):
            table.replace(**changes).screen()
    bad = table.replace(costs=StageCosts([1, 1], [1, 1]))
    calls = [(bad.for_shares, [1, 0, 0]), (bad.coordinate_descent, 9), (bad.for_budget, 3), (bad.rows, [0])]
    calls += [(method, [0, 0]) for method in (bad.evaluate, bad.standard_error, bad.answering_exits)]
    for method, argument in calls:
        with pytest.raises(ValueError, match='costs: expected 3 stages'):
            method(argument)


def test_bad_grids_settings_shares_and_limits_are_refused():
    table = outputs(20)
    two = r'settings?: expected thresholds \[2\]'
    for message, calls in {
        r'grid: expected \[2, V\]': [lambda: table.screen(np.zeros((3, 3)))],
        'ascending and not NaN': [
            lambda: table.screen([[1, 0]] * 2),
            lambda: table.coordinate_descent(9, [[0, np.nan]] * 2),
        ],
        'grid: got 1': [
            lambda: table.screen(1),
            lambda: table_of(np.zeros((25, 5)), costs=StageCosts(np.ones(25), np.ones(25))).screen(),
        ],
        two: [lambda: table.evaluate([[np.nan, 0]]), lambda: table.answering_exits([0.1]), lambda: table.evaluate([])],
        'setting: expected one, got 2': [lambda: table.answering_exits(np.zeros((2, 2)))],
        'statistics: a standard error needs': [lambda: table.rows([0]).standard_error([0.5, 0.5])],
        'shares: got': [lambda: table.for_shares([0.5, 0.5]), lambda: table.for_shares([0.5, 0.6, -0.1])],
        'the cheapest cost 2': [lambda: table.screen(5).for_cost(1.0), lambda: table.coordinate_descent(1.0)],
        'budget: got': [lambda: table.for_budget(1.9), lambda: table.for_budget(12.1)],
        'size: got': [lambda: table.screen(5).path(size=0), lambda: table.path_by_shares(size=1)],
    }.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


def test_a_table_from_logits_replays_its_criterion():
    generator, ensemble = np.random.default_rng(0), bj.criteria.ensemble()
    logits, labels = generator.normal(size=(3, 60, 4)).astype(np.float32), generator.integers(0, 4, 60)

    def table_from(**changes):
        given = {'logits': logits, 'labels': labels, 'costs': COSTS, 'criterion': margin, 'split': 'validation'}
        return ExitTable.from_logits(**{**given, **changes})

    table = table_from(criterion=ensemble)
    answers, uncertainty = map(np.asarray, bj.criteria.replay(ensemble, logits))
    np.testing.assert_array_equal(table.uncertainty, uncertainty)
    np.testing.assert_array_equal(table.statistics[..., 0], answers.argmax(-1) == labels)
    assert (answers.argmax(-1) != logits.argmax(-1)).any()  # the heads alone answer otherwise
    of_function = table_from(criterion=margin.uncertainty_of)
    np.testing.assert_array_equal(of_function.uncertainty, table_from().uncertainty)
    of_function.evaluate(bj.ExitPolicy(margin.uncertainty_of, np.zeros(2)))
    for rows in (np.arange(0, 60, 2), np.arange(60) % 2 == 0, slice(0, 60, 2)):
        half = table.replace(uncertainty=table.uncertainty[:, ::2], statistics=table.statistics[:, ::2])
        assert table.rows(rows) == half
    for changes, message in (
        ({'logits': np.zeros((2, 3))}, 'logits: expected'),
        ({'logits': np.zeros((3, 0, 4))}, 'logits: expected'),
        ({'labels': labels[:5]}, 'labels: answers have shape'),
        ({'labels': labels + 1}, 'labels: expected classes'),
        ({'criterion': 'margin'}, "criterion: got 'margin'"),
        ({'costs': StageCosts([1, 1], [1, 1])}, 'costs: expected 3 stages'),
    ):
        with pytest.raises(ValueError, match=message):
            table_from(**changes)


def test_every_point_carries_its_criterion_and_its_data():
    table, on_test = outputs(60, criterion=margin), outputs(60, seed=1, criterion=margin, split='test')
    screens = table.screen(9), table.anytime(), table.budgeted(on_test), table.rows(np.arange(30)).screen(9)
    for point in [*(screen.frontier().point(0) for screen in screens), table.coordinate_descent(5.0)]:
        measured = on_test.evaluate(point).point(0)
        assert (point.policy.criterion, point.split) == (margin, 'validation')
        assert (measured.policy, measured.split) == (point.policy, 'test')
        for form in (point.policy, on_test.evaluate(point), np.asarray(point.thresholds)[None]):
            assert on_test.evaluate(form).point(0) == measured
        counts = np.bincount(on_test.answering_exits(point), minlength=3)
        np.testing.assert_allclose(counts / 60, measured.exit_fractions)
    assert table.for_budget(5.0).criterion == table.for_shares([0.2, 0.3, 0.5]).criterion == margin


def test_settings_of_another_criterion_are_refused():
    ours, theirs = outputs(20, criterion=margin), outputs(20)
    screen, message = theirs.screen(9), "made for the criterion 'entropy', but this table .* of 'margin'"
    calls = [(ours.evaluate, screen), (ours.evaluate, screen.knee().policy), (ours.answering_exits, screen.knee())]
    for call, setting in [*calls, (ours.standard_error, screen.knee()), (ours.budgeted, theirs)]:
        with pytest.raises(ValueError, match=message):
            call(setting)
    ours, theirs = (outputs(20, criterion=with_temperatures([t, 1.0, 1.0])) for t in (1.0, 2.0))
    assert len(ours.evaluate(bj.ExitPolicy(with_temperatures(np.ones(3)), np.zeros(2)))) == 1
    with pytest.raises(ValueError, match='their names and their numbers must agree'):
        ours.evaluate(theirs.for_budget(5.0))


def test_standard_error_is_that_of_the_answers_given():
    table, setting = outputs(60), [0.4, 0.6]
    right = [table.statistics[n, b, 0] for b, n in enumerate(table.answering_exits(setting))]
    assert table.standard_error(setting) == pytest.approx(np.std(right) / np.sqrt(len(right) - 1))


def test_inputs_leave_in_the_shares_asked():
    generator = np.random.default_rng(0)
    for shares in generator.dirichlet(np.ones(3), 20):
        table = table_of(generator.random((3, 200)))
        fractions = table.evaluate(table.for_shares(shares)).exit_fractions[0]
        np.testing.assert_allclose(fractions, shares, atol=1 / 200 + 1e-9)
    for n, thresholds in ((2, [-np.inf, -np.inf]), (1, [-np.inf, np.inf])):
        assert table.for_shares(np.eye(3)[n]).thresholds.tolist() == thresholds
    for odd in (np.nan, np.inf):  # inputs that never leave
        table = table_of(np.array([[0.1, 0.2, odd, odd], [0.0] * 4, [0.0] * 4]))
        assert table.for_shares([0.75, 0.25, 0.0]).thresholds.tolist() == [np.inf, np.inf]


def test_neighbouring_numbers_are_separated():
    """Between two floats that follow each other there is no third: the threshold is the upper one, not the lower."""
    low = np.float32(0.5)
    for start in (low, np.nextafter(low, np.float32(1))):
        above = np.nextafter(start, np.float32(1))
        table = table_of(np.array([[start, above], [0, 0], [0, 0]], np.float32))
        assert table.answering_exits(table.for_shares([0.5, 0.5, 0])).tolist() == [0, 1]
        assert above in table.screen(3).thresholds


def test_budgets_are_met_by_geometric_shares():
    table = outputs(20_000)
    for budget in (2.0, 3.7, 6.0, 11.0, 12.0):
        result = table.evaluate(table.for_budget(budget))
        assert result.cost[0] == pytest.approx(budget, abs=0.02)
        first, second, third = result.exit_fractions[0]
        assert second**2 == pytest.approx(first * third, abs=1e-3)


def test_coordinate_descent_ends_where_no_single_threshold_improves():
    for seed, at_most in enumerate((3.0, 6.0, 9.0)):
        table = outputs(80, seed)
        screen, greedy = table.screen(12), table.coordinate_descent(at_most, 12)
        assert screen.for_cost(at_most).accuracy >= greedy.accuracy
        assert greedy.cost <= at_most * (1 + 1e-9)
        for n in range(2):
            settings = np.where(np.arange(2) == n, screen.thresholds, greedy.thresholds)
            assert table.evaluate(settings).for_cost(at_most).accuracy <= greedy.accuracy


def test_anytime_is_each_exit_alone_and_budgeted_takes_thresholds_from_other_data():
    result = outputs(500).anytime()
    assert (result.cost.tolist(), result.exit_fractions.tolist()) == ([2, 7, 12], np.eye(3).tolist())
    first, second = outputs(2000, 1), outputs(2000, 2, split='test')
    result = second.budgeted(first, [3.0, 6.0, 11.0])
    np.testing.assert_allclose(result.cost, [3, 6, 11], atol=0.5)
    np.testing.assert_array_equal(result.thresholds[1], first.for_budget(6.0).thresholds)
    assert (result.split, len(second.budgeted(first))) == ('test', 20)
    # Budgets are in the unit of the table that is reported on.
    in_other_units = first.replace(costs=StageCosts(stages=[1e6, 4e6, 5e6], exits=[1e6, 1e6, 0]))
    np.testing.assert_array_equal(second.budgeted(in_other_units, [6.0]).thresholds, result.thresholds[1:2])
