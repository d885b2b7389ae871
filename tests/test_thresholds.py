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
from branchy_jax.thresholds import ExitTable, Screen, accuracy_statistics, answering_exits, confusion, quantile_grid

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


def table_of(uncertainty, statistics, costs, **options):
    given = {'criterion': entropy, 'split': 'validation', **options}
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, **given)


@given(cached_outputs())
def test_screen_is_brute_force(outputs):
    uncertainty, statistics, grid, costs = outputs

    def metric(sums, count):  # not a mean over inputs, as mIoU is not
        return sums[..., 0] / (1 + sums[..., -1] + count)

    table = table_of(uncertainty, statistics, costs, metric=metric)
    found = table.screen(grid)
    settings = list(itertools.product(*grid))
    assert found.thresholds.tolist() == [list(setting) for setting in settings]
    for index, setting in enumerate(settings):
        total, fractions, cost = run_by_hand(uncertainty, statistics, costs, setting)
        np.testing.assert_allclose(found.accuracy[index], metric(total, uncertainty.shape[1]), rtol=1e-12)
        np.testing.assert_allclose(found.exit_fractions[index], fractions, rtol=1e-12)
        np.testing.assert_allclose(found.cost[index], cost, rtol=1e-12)
    one_by_one = table.evaluate(found)
    for name in ('accuracy', 'exit_fractions', 'cost'):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(found, name), rtol=1e-12)


SCREENS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=20).map(
    lambda points: Screen(
        thresholds=np.arange(len(points), dtype=np.float32)[:, None],
        accuracy=np.array([a / 6 for a, _ in points]),
        exit_fractions=np.full((len(points), 2), 0.5),
        cost=np.array([float(c) for _, c in points]),
        criterion=entropy,
        split='validation',
    )
)


@given(SCREENS)
def test_frontier_is_brute_force(screened):
    found = screened.frontier()
    points = list(zip(screened.cost, screened.accuracy, strict=True))
    best = {
        point for point in points if not any(c <= point[0] and a >= point[1] and (c, a) != point for c, a in points)
    }
    assert list(zip(found.cost, found.accuracy, strict=True)) == sorted(best)


@given(SCREENS, st.integers(0, 6), st.integers(1, 6))
def test_choices_are_brute_force(screened, accuracy, cost):
    reaching = screened.cost[screened.accuracy >= accuracy / 6]
    if len(reaching):
        point = screened.for_accuracy(accuracy / 6)
        assert point.cost == reaching.min()
        assert point.accuracy == screened.accuracy[screened.cost == point.cost].max()
    else:
        with pytest.raises(ValueError, match='at_least: no thresholds reach .* the best accuracy is'):
            screened.for_accuracy(accuracy / 6)
    affordable = screened.accuracy[screened.cost <= cost]
    if len(affordable):
        assert screened.for_cost(cost).accuracy == affordable.max()
        assert screened.for_cost(cost).cost <= cost
    else:
        with pytest.raises(ValueError, match='at_most: no thresholds cost .* the cheapest cost'):
            screened.for_cost(cost)


def test_knee_by_hand():
    """From (1, 0.5) to (10, 0.9): at cost 2 most of the accuracy is there."""
    cost, accuracy = np.array([10.0, 2.0, 1.0, 5.0]), np.array([0.9, 0.8, 0.5, 0.85])
    screened = Screen(np.zeros((4, 1)), accuracy, np.full((4, 2), 0.5), cost, entropy, 'validation')
    assert (screened.knee().cost, screened.knee().accuracy) == (2.0, 0.8)
    accelerating = screened.replace(accuracy=np.array([0.9, 0.51, 0.5, 0.6]))  # nowhere above the line: no knee
    assert accelerating.knee().accuracy == 0.9
    alone = Screen(np.zeros((1, 1)), accuracy[:1], np.full((1, 2), 0.5), cost[:1], entropy, 'validation')
    assert alone.knee().cost == 10.0


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
            table_of(uncertainty, np.ones((exits, 5, 1)), costs).screen()
    else:
        assert len(table_of(uncertainty, np.ones((exits, 5, 1)), costs).screen()) == settings


def test_accuracy_statistics_by_hand():
    logits = np.array([[[0.0, 1.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert accuracy_statistics(logits, np.array([1, 1]))[..., 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


COSTS = StageCosts(stages=np.ones(2), exits=np.ones(2))
METHODS_OF_A_TABLE = {
    'screen': lambda table: table.screen(),
    'evaluate': lambda table: table.evaluate(np.zeros((1, 1))),
    'exact': lambda table: table.exact(9.0),
    'coordinate_descent': lambda table: table.coordinate_descent(9.0),
    'for_shares': lambda table: table.for_shares([0.5, 0.5]),
    'for_budget': lambda table: table.for_budget(3.0),
    'standard_error': lambda table: table.standard_error([0.5]),
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
        ({'costs': StageCosts(stages=[1, 1, 1], exits=[1, 1, 1])}, 'costs: expected 2 stages'),
        ({'costs': StageCosts(stages=[1, 1], exits=[1])}, 'costs: expected 2 stages'),
        ({'criterion': 'entropy'}, "criterion: got 'entropy'; give a value"),
        ({'criterion': bj.criteria.with_temperatures([1.0, 1.0, 1.0])}, 'criterion: .* was learned for 3 exits'),
    ],
)
def test_bad_tables_are_refused(method, changes, message):
    table = table_of(np.zeros((2, 3)), np.zeros((2, 3, 1)), COSTS).replace(**changes)
    with pytest.raises(ValueError, match=message):
        METHODS_OF_A_TABLE[method](table)


@pytest.mark.parametrize(
    ('grid', 'message'),
    [
        (np.zeros((2, 3)), r'grid: expected \[1, V\]'),
        ([[1.0, 0.0]], 'grid: .* ascending'),
        ([[0.0, np.nan]], 'grid: .* not NaN'),
    ],
)
@pytest.mark.parametrize('search', ['screen', 'exact', 'coordinate_descent'])
def test_bad_grids_are_refused(search, grid, message):
    table = table_of(np.zeros((2, 3)), np.zeros((2, 3, 1)), COSTS)
    with pytest.raises(ValueError, match=message):
        table.screen(grid) if search == 'screen' else getattr(table, search)(9.0, grid)


def test_bad_settings_are_refused():
    table = table_of(np.zeros((2, 3)), np.zeros((2, 3, 1)), COSTS)
    for bad in ([[np.nan]], [[0.1, 0.2]], [0.1]):
        with pytest.raises(ValueError, match=r'settings: expected \[G, 1\]'):
            table.evaluate(bad)
    for bad in ([np.nan], [0.1, 0.2], [[0.1]]):
        with pytest.raises(ValueError, match='thresholds: '):
            table.answering_exits(bad)
    with pytest.raises(ValueError, match='thresholds: expected 1'):
        answering_exits(table.uncertainty, [0.1, 0.2])
    with pytest.raises(ValueError, match='size: got 1'):
        quantile_grid(table.uncertainty, size=1)


def cached_logits(exits=3, inputs=60, classes=4, seed=0):
    """Later exits are righter; labels to go with them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, inputs)
    strength = np.arange(1, exits + 1)[:, None, None]
    logits = generator.normal(size=(exits, inputs, classes)) + strength * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


THREE = StageCosts(stages=[1, 2, 3], exits=[1, 1, 1])


def table_from(split='validation', criterion=margin, seed=0, **options):
    return ExitTable.from_logits(*cached_logits(seed=seed), THREE, criterion=criterion, split=split, **options)


def test_a_table_from_logits_replays_its_criterion():
    logits, labels = cached_logits()
    table = table_from(criterion=bj.criteria.ensemble())
    answers, uncertainty = bj.criteria.replay(bj.criteria.ensemble(), jnp.asarray(logits))
    np.testing.assert_array_equal(table.uncertainty, uncertainty)
    np.testing.assert_array_equal(table.statistics[..., 0], np.asarray(answers).argmax(-1) == labels)
    assert (np.asarray(answers).argmax(-1) != logits.argmax(-1)).any()  # it is not the heads that answer
    assert (len(table), table.num_exits) == (60, 3)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'logits': np.zeros((2, 3))}, 'logits: expected'),
        ({'logits': np.zeros((3, 0, 4))}, 'logits: expected'),
        ({'labels': np.zeros(5, int)}, 'labels: answers have shape'),
        ({'labels': np.full(60, 4)}, 'labels: expected classes'),
        ({'costs': COSTS}, 'costs: expected 3 stages'),
        ({'criterion': bj.criteria.with_temperatures([1.0, 2.0])}, 'criterion: .* was learned for 2 exits'),
        ({'criterion': 'margin'}, "criterion: got 'margin'"),
        ({'statistics': lambda answers, labels: np.zeros(3)}, 'statistics: expected'),
    ],
)
def test_bad_logits_are_refused_when_the_table_is_made(changes, message):
    logits, labels = cached_logits()
    options = {'logits': logits, 'labels': labels, 'costs': THREE, 'split': 'validation', **changes}
    with pytest.raises(ValueError, match=message):
        ExitTable.from_logits(options.pop('logits'), options.pop('labels'), options.pop('costs'), **options)


def test_a_table_needs_its_criterion_and_split():
    arrays = {'uncertainty': np.zeros((2, 3)), 'statistics': np.zeros((2, 3, 1)), 'costs': COSTS}
    for known in ({'criterion': entropy}, {'split': 'test'}):
        with pytest.raises(TypeError, match='missing'):
            ExitTable(**arrays, **known)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_every_point_and_policy_knows_where_it_comes_from(split):
    """A search once labelled points found on validation data as measured on test data, and all of them entropy."""
    table = table_from(split)
    points = [
        table.exact(5.0),
        table.coordinate_descent(5.0),
        table.screen().knee(),
        table.screen().frontier().point(0),
        table.evaluate(np.zeros((1, 2))).for_cost(9.0),
        table.anytime().for_accuracy(0.1),
        table.budgeted(table_from('elsewhere', seed=1)).point(3),
        table.rows(np.arange(30)).exact(5.0),
    ]
    for point in points:
        assert (point.policy.criterion, point.split) == (margin, split)
        found = table.evaluate(point)
        assert (found.criterion, found.split) == (margin, split)
    assert table.for_budget(5.0).criterion == table.for_shares([0.2, 0.3, 0.5]).criterion == margin


def test_a_point_measured_elsewhere_is_of_the_other_split():
    point = table_from('validation').exact(5.0)
    on_test = table_from('test', seed=1).evaluate(point).point(0)
    assert on_test.policy == point.policy
    assert (point.split, on_test.split) == ('validation', 'test')
    assert on_test.accuracy != point.accuracy


def test_settings_of_another_criterion_are_refused():
    ours, theirs = table_from(), table_from(criterion=entropy)
    message = "made for the criterion 'entropy', but the uncertainties of this table are of 'margin'"
    for settings in (theirs.screen(), theirs.exact(5.0), theirs.exact(5.0).policy, theirs.for_budget(5.0)):
        with pytest.raises(ValueError, match=message):
            ours.evaluate(settings)
    for ask in (ours.answering_exits, ours.standard_error):
        with pytest.raises(ValueError, match=message):
            ask(theirs.exact(5.0))
    with pytest.raises(ValueError, match='found_on: ' + message):
        ours.budgeted(theirs)


def test_learned_numbers_are_part_of_a_criterion():
    ours, theirs = (table_from(criterion=bj.criteria.with_temperatures([t, 1.0, 1.0])) for t in (1.0, 2.0))
    same = bj.criteria.with_temperatures(np.ones(3))
    assert len(ours.evaluate(bj.ExitPolicy(same, np.zeros(2)))) == 1
    with pytest.raises(ValueError, match='with other numbers in it'):
        ours.evaluate(theirs.exact(5.0))


@given(cached_outputs(), st.data())
def test_evaluate_takes_every_form_of_a_setting(outputs, data):
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
    table = table_from()
    setting = [0.4, 0.6]
    right = [table.statistics[n, b, 0] for b, n in enumerate(table.answering_exits(setting))]
    assert table.standard_error(setting) == pytest.approx(np.std(right) / np.sqrt(len(right) - 1))
    with pytest.raises(ValueError, match='statistics: a standard error needs'):
        table.rows([0]).standard_error(setting)


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
    table = ExitTable.from_logits(logits.astype(np.float32), labels, COSTS, **options)
    found = table.evaluate([[-np.inf]])
    answers = logits[1].argmax(-1)
    ious = [((answers == k) & (labels == k)).sum() / ((answers == k) | (labels == k)).sum() for k in range(3)]
    assert found.accuracy[0] == pytest.approx(np.mean(ious))


def test_confusion_refuses_what_no_class_or_exit_has():
    with pytest.raises(ValueError, match=r'labels: expected numbers in \[0, 2\)'):
        confusion([0, -1], [0, 0], [0, 0], num_exits=1, num_classes=2)
    with pytest.raises(ValueError, match='exits: expected one per input'):
        confusion([0, 1], [0, 0], [0], num_exits=1, num_classes=2)
