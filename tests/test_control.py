"""The controller holds its target when the data shift, without overshoot; the monitor detects drift, not chance."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.costs import StageCosts
from branchy_jax.criteria.policy import as_policy
from branchy_jax.thresholds import Controller, ExitTable, Monitor

create = functools.partial(Controller.create, criterion=bj.criteria.entropy)


def table_of(side, statistics=None):
    """A table of side exits with these uncertainties, and a last exit."""
    uncertainty = np.concatenate([side, np.zeros((1, np.shape(side)[1]))])
    exits = len(uncertainty)
    statistics = np.ones((*uncertainty.shape, 1)) if statistics is None else statistics
    given = {'costs': StageCosts(np.ones(exits), np.zeros(exits)), 'criterion': bj.criteria.margin, 'split': 'test'}
    return ExitTable(uncertainty=uncertainty, statistics=statistics, **given)


@pytest.fixture(scope='module')
def path():
    return table_of(np.random.default_rng(5).random((2, 5000))).path_by_shares()


@jax.jit
def simulate(controller, drawn):
    """Runs the loop on uncertainties ``[runs, steps, 2, B]``; returns mean cost and mean position per step."""

    def step(controller, uncertainty):
        confident = uncertainty < controller.policy.thresholds[:, None]
        spent = jnp.where(confident[0], 1.0, jnp.where(confident[1], 5.0, 10.0))
        controller = controller.update(spent)
        return controller, (spent.mean(), controller.position)

    costs, positions = jax.vmap(lambda uncertainty: jax.lax.scan(step, controller, uncertainty)[1])(drawn)
    return costs.mean(axis=0), positions.mean(axis=0)


@pytest.mark.parametrize(('hardness', 'target'), [(0.4, 3.0), (2.5, 5.0)])
def test_back_at_its_target_within_two_thousand_images_of_a_shift(path, hardness, target):
    """An abrupt shift after 10,000 images. Averages of 12 runs, since single images scatter by half the range."""
    hardnesses = np.where(np.arange(750) < 500, 1.0, hardness)[:, None, None]  # harder data are unsure more often
    drawn = np.random.default_rng(0).random((12, 750, 2, 20)) ** (1 / hardnesses)
    costs, positions = map(np.asarray, simulate(create(path, target=target, scale=9.0), jnp.asarray(drawn)))
    assert costs[600:].mean() == pytest.approx(target, rel=0.05)  # 2,000 images after the shift and later
    assert costs[400:500].mean() == pytest.approx(target, rel=0.05)
    # Without oscillation: the mean position moves in one direction after the shift, to within its scatter.
    after, final = positions[500:], positions[650:].mean()
    assert ((after - final) * np.sign(final - after[0])).max() < 0.05


def test_positions_are_finite_after_absurd_observations():
    """Sums of errors that overflow in both directions must not become NaN."""
    largest = float(np.finfo(np.float32).max)
    opposite = [largest] * 1000 + [-largest] * 1000
    absurd = [[np.inf], [-np.inf, np.inf], [np.nan], [largest, -largest], opposite, [1e30, -3e38], [5.0]]
    observed = np.full((len(absurd), 2000), np.nan, np.float32)
    for row, values in zip(observed, absurd, strict=True):
        row[: len(values)] = values
    update = jax.jit(jax.vmap(Controller.update, in_axes=(None, 0)))
    for scale, horizon in itertools.product((1e-37, 9.0, 1e38), repeat=2):
        positions = update(create([[1.0], [0.0]], target=5.0, scale=scale, horizon=horizon), observed).position
        assert ((positions >= 0) & (positions <= 1)).all()
        assert positions[-1] == 0.5


def test_a_controller_goes_where_a_policy_goes(path):
    table = table_of(np.random.default_rng(1).random((2, 100)))
    controller = create(path, criterion=bj.criteria.margin, target=5.0, scale=9.0)
    by_hand = table.answering_exits(np.asarray(controller.policy.thresholds))
    np.testing.assert_array_equal(table.answering_exits(controller), by_hand)
    assert as_policy(controller, 3) == controller.policy
    with pytest.raises(ValueError, match="made for the criterion 'entropy'"):
        table.answering_exits(create(path, target=5.0, scale=9.0))


def test_steps_are_bounded_and_thresholds_interpolated_between_finite_settings(path):
    controller = create(path, target=5.0, scale=9.0, largest_step=0.01)
    after = controller.update(jnp.full(1000, 1e30))
    assert float(controller.position - after.position) == pytest.approx(0.01, rel=1e-4)
    controller = create([[4.0, 1.0], [2.0, 0.0], [0.0, 0.0]], target=1.0, scale=1.0)
    for position, expected in ((0.0, [4, 1]), (0.25, [3, 0.5]), (1.0, [0, 0])):
        assert controller.replace(position=jnp.float32(position)).policy.thresholds.tolist() == expected
    controller = create([[np.inf], [2.0], [1.0], [-np.inf]], target=1.0, scale=1.0)
    assert controller.path[:, 0].tolist() == [2, 2, 1, 1]


def test_overshoot_begins_where_the_docstring_says():
    """If the observed mean rises along the path by the scale, an update multiplies the error by 1 − B / horizon."""
    for batch, sign in ((100, 1), (450, -1)):
        controller = create([[1.0], [0.0]], target=0.5, scale=1.0, position=0.6, largest_step=1.0)
        after = controller.update(jnp.full(batch, controller.position))
        assert np.sign(float(after.position) - 0.5) == sign


def test_bad_controllers_and_monitors_are_refused():
    numbers = [{'scale': 1e-40}, {'target': np.nan}, {'target': 1e39}, {'horizon': np.inf}, {'position': 2.0}]
    for message, bad in (
        ('position, target, scale', [*numbers, {'scale': 0.0}, {'largest_step': 0.0}]),
        ('criterion: got', [{'criterion': 'entropy'}]),
        ('path: expected', [{'path': [[1.0]]}, {'path': [[np.nan], [1.0]]}, {'path': [[np.inf], [-np.inf]]}]),
        ('path: it must lead', [{'path': [[0.0], [1.0]]}]),
    ):
        for options in bad:
            with pytest.raises(ValueError, match=message):
                create(**{'path': [[1.0], [0.0]], 'target': 1.0, 'scale': 1.0, **options})
    for expected, memory in (([0.5, 0.6], 10), ([0.5, 0.5], 0), ([0.5, 0.5], np.inf), ([1.5, -0.5], 10), ([np.nan], 9)):
        with pytest.raises(ValueError, match='expected: got'):
            Monitor.create(expected, memory=memory)


def test_monitor_averages_exit_shares():
    monitor = Monitor.create([0.5, 0.5], memory=100).observe(jnp.zeros(50, jnp.int32)).observe(jnp.ones(50, jnp.int32))
    np.testing.assert_allclose(monitor.shares, [0.5, 0.5])
    np.testing.assert_allclose(monitor.observe(jnp.int32(1)).shares, [0.495, 0.505], rtol=1e-5)
    assert monitor.observe(jnp.zeros(0, jnp.int32)) == monitor
    assert float(Monitor.create([0.95, 0.05]).drift) == 0.0


def drift_by_hand(expected, counts):
    """The statistic of the docstring on plain counts: Pearson's, divided by no expectation below five."""
    total = counts.sum()
    divisor = np.maximum(expected * total, 5)
    freedom = max(1.0, (expected * total * (1 - expected) / divisor).sum())
    return np.sqrt(((counts - expected * total) ** 2 / divisor).sum() / freedom)


@pytest.mark.parametrize('expected', [[0.7, 0.2, 0.1], [0.9, 0.098, 0.002], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
def test_drift_is_pearsons_with_at_least_five_expected(expected):
    expected, index = np.array(expected), np.random.default_rng(0).choice(3, size=(4, 200), p=[0.6, 0.3, 0.1])
    monitor = Monitor.create(expected)
    for seen in range(1, 5):
        monitor, counts = monitor.observe(index[seen - 1]), np.bincount(index[:seen].ravel(), minlength=3)
        assert float(monitor.drift) == pytest.approx(drift_by_hand(expected, counts), rel=1e-3)


@jax.jit
def drifts(monitor, drawn):
    """Drift of many monitors ``[runs, updates]`` after each of their batches."""

    def step(monitor, index):
        monitor = monitor.observe(index)
        return monitor, monitor.drift

    return jax.vmap(lambda index: jax.lax.scan(step, monitor, index)[1])(drawn)


def watched(expected, shares):
    drawn = np.random.default_rng(0).choice(3, size=(300, 150, 20), p=shares)
    return np.asarray(drifts(Monitor.create(expected), jnp.asarray(drawn)))


@pytest.mark.parametrize('expected', [[0.9, 0.097, 0.003], [0.5, 0.0, 0.5], [0.7, 0.2, 0.1]])
def test_chance_is_hardly_ever_an_alarm(expected):
    """At any one look, from the first batch on; without drift its mean square is 1 at most, also for rare exits."""
    result = watched(expected, expected)
    assert (result > 3).mean() < 0.01
    assert np.square(result).mean() < 1.15
    if min(expected) >= 0.1:
        assert np.square(result[:, 50:]).mean() == pytest.approx(1, abs=0.15)


def test_drift_is_detected_also_where_exits_are_rare():
    for expected, shares in (
        ([0.9, 0.097, 0.003], [0.9, 0.06, 0.04]),  # between neighbours, one of them rare
        ([0.5, 0.0, 0.5], [0.48, 0.04, 0.48]),
        ([0.5, 0.0, 0.5], [0.6, 0.0, 0.4]),  # a rare exit does not hide the drift of the others
    ):
        assert (watched(expected, shares)[:, 99] > 3).mean() > 0.95


def test_paths_by_shares_count_finite_inputs_and_need_some():
    side = np.array([[1.0, 2.0, np.inf, np.nan, 4.0]])
    result = table_of(side).path_by_shares(size=3)
    assert [(side[0] < setting).sum() for setting in result] == [3, 1, 0]
    with pytest.raises(ValueError, match='uncertainty: an exit of the table'):
        table_of([[np.nan, np.inf]]).path_by_shares()


def test_no_setting_of_a_path_falls_under_the_floor():
    """Nor half-way between two; the setting before the path, or the middle between the two, does."""
    generator = np.random.default_rng(3)
    right = generator.random((3, 400)) < np.array([[0.6], [0.75], [0.9]])
    table = table_of(generator.random((2, 400)), right[..., None] * 1.0)
    whole = table.path_by_shares(size=51)
    floor = float(np.median(table.evaluate(whole).accuracy))
    rest = table.path_by_shares(size=51, floor=floor)
    assert 2 <= len(rest) < 51
    np.testing.assert_array_equal(rest, whole[-len(rest) :])
    between = (rest[1:] + rest[:-1]) / 2
    assert (table.evaluate(np.concatenate([rest, between])).accuracy >= floor).all()
    before = whole[-len(rest) - 1]
    assert table.evaluate(np.stack([before, (before + rest[0]) / 2])).accuracy.min() < floor
    with pytest.raises(ValueError, match=r'floor: got 1\.1; where inputs leave least the metric is'):
        table.path_by_shares(floor=1.1)
