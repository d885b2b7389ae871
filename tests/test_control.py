"""The controller holds its target when the data shift, without overshoot; the monitor detects drift, not chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import branchy_jax as bj
from branchy_jax.costs import StageCosts
from branchy_jax.thresholds import Controller, ExitTable, Monitor

COSTS = np.array([1.0, 5.0, 10.0])

create = functools.partial(Controller.create, criterion=bj.criteria.entropy)


def images(generator, count, hardness):
    """Uncertainties of side exits; harder data are unsure more often."""
    return generator.random((2, count)) ** (1 / hardness)


def table_of(uncertainty):
    exits, inputs = uncertainty.shape
    statistics, costs = np.ones((exits, inputs, 1)), StageCosts(stages=np.ones(exits), exits=np.zeros(exits))
    options = {'criterion': bj.criteria.margin, 'split': 'validation'}
    return ExitTable(uncertainty=uncertainty, statistics=statistics, costs=costs, **options)


def run(controller, hardness_of, steps, batch=20, seeds=12):
    """Runs the loop in one program, many times over; returns mean cost and mean position per batch."""
    hardness = np.array([hardness_of(number * batch) for number in range(steps)])[:, None, None]
    drawn = np.random.default_rng(0).random((seeds, steps, 2, batch)) ** (1 / hardness)
    costs = jnp.asarray(COSTS)

    def step(controller, uncertainty):
        confident = uncertainty < controller.policy.thresholds[:, None]
        spent = costs[jnp.where(confident[0], 0, jnp.where(confident[1], 1, 2))]
        controller = controller.update(spent)
        return controller, (spent.mean(), controller.position)

    result = jax.jit(jax.vmap(lambda uncertainty: jax.lax.scan(step, controller, uncertainty)[1]))(jnp.asarray(drawn))
    return tuple(np.asarray(values).mean(axis=0) for values in result)


@pytest.fixture(scope='module')
def path():
    reference = images(np.random.default_rng(5), 5000, 1.0)
    return table_of(np.concatenate([reference, np.zeros((1, 5000))])).path_by_shares()


@pytest.mark.parametrize('hardness', [0.4, 2.5])
@pytest.mark.parametrize('target', [3.0, 5.0, 7.0])
def test_back_at_its_target_within_two_thousand_images_of_a_shift(path, hardness, target):
    """An abrupt shift after 10,000 images. Averages of 12 runs, since single images scatter by half the range."""
    controller = create(path, target=target, scale=9.0)
    costs, positions = run(controller, lambda image: 1.0 if image < 10_000 else hardness, 750)
    assert costs[600:].mean() == pytest.approx(target, rel=0.05)  # 2,000 images after the shift and later
    assert costs[400:500].mean() == pytest.approx(target, rel=0.05)
    # Without oscillation: the mean position moves in one direction after the shift, to within its scatter.
    after = positions[500:]
    final = after[-100:].mean()
    assert ((after - final) * np.sign(final - after[0])).max() < 0.05


def test_a_label_free_proxy_of_accuracy_is_held(path):
    """One minus the uncertainty of the exit that answered, which rises along the path as cost does."""
    generator = np.random.default_rng(0)
    controller, step, result = create(path, target=0.8, scale=0.5), jax.jit(Controller.update), []
    for number in range(500):
        side = images(generator, 20, 1.0 if number < 250 else 0.5)
        uncertainty = np.concatenate([side, np.full((1, 20), 0.1)])
        confident = side < np.asarray(controller.policy.thresholds)[:, None]
        exits = np.concatenate([confident, np.ones((1, 20), bool)]).argmax(axis=0)
        proxy = 1 - uncertainty[exits, np.arange(20)]
        controller = step(controller, jnp.asarray(proxy))
        result.append(proxy.mean())
    assert np.mean(result[150:250]) == pytest.approx(0.8, abs=0.02)
    assert np.mean(result[350:]) == pytest.approx(0.8, abs=0.02)


LARGEST = float(np.finfo(np.float32).max)
OPPOSITE = [LARGEST] * 1000 + [-LARGEST] * 1000
ABSURD = [[np.inf], [-np.inf, np.inf], [np.nan], [LARGEST, -LARGEST], OPPOSITE, [1e30, -3e38, 0.0]]


@pytest.mark.parametrize('observed', ABSURD)
@pytest.mark.parametrize('scale', [1e-37, 1e-3, 9.0, 1e38])
@pytest.mark.parametrize('horizon', [1e-37, 300.0, 1e38])
def test_positions_are_finite_after_absurd_observations(observed, scale, horizon):
    """Sums of errors that overflow in both directions must not become NaN."""
    controller = create([[1.0], [0.0]], target=5.0, scale=scale, horizon=horizon)
    after = jax.jit(Controller.update)(controller, jnp.asarray(observed, jnp.float32))
    assert 0 <= float(after.position) <= 1
    assert np.isfinite(after.policy.thresholds).all()
    assert float(after.update(jnp.full(3, 5.0)).position) == float(after.position)


def test_a_controller_goes_where_a_policy_goes(path):
    uncertainty = np.concatenate([images(np.random.default_rng(1), 100, 1.0), np.zeros((1, 100))])
    table = table_of(uncertainty)
    controller = create(path, criterion=bj.criteria.margin, target=5.0, scale=9.0)
    by_hand = table.answering_exits(np.asarray(controller.policy.thresholds))
    np.testing.assert_array_equal(table.answering_exits(controller), by_hand)
    assert len(set(by_hand.tolist())) == 3
    assert bj.criteria.as_policy(controller, 3).criterion == bj.criteria.margin
    with pytest.raises(ValueError, match="made for the criterion 'entropy'"):
        table.answering_exits(create(path, target=5.0, scale=9.0))


def test_many_controllers_run_side_by_side():
    positions = jnp.array([0.2, 0.4, 0.6])
    one = create([[4.0, 1.0], [2.0, 0.0]], target=1.0, scale=1.0)
    many = jax.vmap(lambda position: one.replace(position=position))(positions)
    observed = jnp.array([[0.0, 2.0], [5.0, 5.0], [0.0, 0.0]])
    after = jax.vmap(Controller.update)(many, observed)
    thresholds = jax.vmap(lambda controller: controller.policy.thresholds)(after)
    for n in range(3):
        alone = one.replace(position=positions[n]).update(observed[n])
        np.testing.assert_allclose(after.position[n], alone.position, rtol=1e-6)
        np.testing.assert_allclose(thresholds[n], alone.policy.thresholds, rtol=1e-6)


def test_positions_and_steps_are_bounded(path):
    controller = create(path, target=5.0, scale=9.0, largest_step=0.01)
    after = controller.update(jnp.full(100_000, 1e30))
    assert float(controller.position - after.position) == pytest.approx(0.01, rel=1e-4)
    assert float(controller.update(jnp.array([jnp.nan, jnp.inf])).position) == 0.5
    controller = create(path, target=0.0, scale=1.0, largest_step=1.0)
    for _ in range(5):
        controller = controller.update(jnp.full(1000, 100.0))
    assert float(controller.position) == 0.0
    np.testing.assert_allclose(controller.policy.thresholds, path[0])
    largest = images(np.random.default_rng(5), 5000, 1.0).max(axis=1).astype(np.float32)
    assert (largest < path[0]).all()
    np.testing.assert_allclose(controller.replace(position=jnp.float32(1.0)).policy.thresholds, path[-1], rtol=1e-5)


def test_thresholds_are_interpolated_between_finite_settings():
    controller = create([[4.0, 1.0], [2.0, 0.0], [0.0, 0.0]], target=1.0, scale=1.0, position=0.25)
    assert controller.policy.thresholds.tolist() == [3.0, 0.5]
    controller = create([[np.inf], [2.0], [1.0], [-np.inf]], target=1.0, scale=1.0)
    assert controller.path[:, 0].tolist() == [2, 2, 1, 1]


BAD = {
    'target, scale': {'scale': [0.0, np.inf, 1e-40], 'target': [np.nan, 1e39], 'horizon': [0.0, np.inf]},
    'position, target': {'position': [2.0], 'largest_step': [0.0]},
    'criterion: got': {'criterion': ['entropy']},
    'path: expected': {'path': [[[1.0]], [[np.nan], [1.0]], [[np.inf], [-np.inf]]]},
    'path: it must lead': {'path': [[[0.0], [1.0]]]},
}


@pytest.mark.parametrize('message', BAD)
def test_impossible_controllers_are_refused(message):
    for name, values in BAD[message].items():
        for value in values:
            options = {'path': [[1.0], [0.0]], 'target': 1.0, 'scale': 1.0, name: value}
            with pytest.raises(ValueError, match=message):
                create(options.pop('path'), **options)


def test_monitor_averages_exit_shares():
    monitor = Monitor.create([0.5, 0.5], memory=100).observe(jnp.zeros(50, jnp.int32))
    assert monitor.shares.tolist() == [1.0, 0.0]
    monitor = monitor.observe(jnp.ones(50, jnp.int32))
    np.testing.assert_allclose(monitor.shares, [0.5, 0.5])
    np.testing.assert_allclose(monitor.observe(jnp.int32(1)).shares, [0.495, 0.505], rtol=1e-5)
    monitor = Monitor.create([0.95, 0.05])
    first = monitor.observe(jnp.array([1]))
    assert float(monitor.drift) == 0.0
    assert float(first.drift) < 1
    assert first.observe(jnp.zeros(0, jnp.int32)) == first


def drift_by_hand(expected, counts):
    """The statistic of the docstring on plain counts: Pearson's, divided by no expectation below five."""
    total = counts.sum()
    divisor = np.maximum(expected * total, 5)
    freedom = max(1.0, (expected * total * (1 - expected) / divisor).sum())
    return np.sqrt(((counts - expected * total) ** 2 / divisor).sum() / freedom)


@pytest.mark.parametrize('expected', [[0.7, 0.2, 0.1], [0.9, 0.098, 0.002], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
@pytest.mark.parametrize('seen', [1, 30, 800])
def test_drift_is_pearsons_with_at_least_five_expected(expected, seen):
    expected = np.array(expected)
    index = np.random.default_rng(seen).choice(3, size=seen, p=[0.6, 0.3, 0.1])
    monitor = Monitor.create(expected)
    for part in np.array_split(index, min(seen, 8)):
        monitor = monitor.observe(jnp.asarray(part))
    assert float(monitor.drift) == pytest.approx(drift_by_hand(expected, np.bincount(index, minlength=3)), rel=1e-3)
    if (expected * seen >= 5).all():  # where no exit is rare it is Pearson's, over N − 1 degrees of freedom
        pearson = stats.chisquare(np.bincount(index, minlength=3), expected * seen).statistic
        assert float(monitor.drift) == pytest.approx(np.sqrt(pearson / 2), rel=1e-3)


def watched(expected, shares, *, updates, batch=20, memory=1000.0, runs=300, seed=0):
    """Drift of many monitors, ``[runs, updates]``, on answers drawn with the shares given."""
    drawn = np.random.default_rng(seed).choice(len(shares), size=(runs, updates, batch), p=shares)

    def step(monitor, index):
        monitor = monitor.observe(index)
        return monitor, monitor.drift

    start = Monitor.create(expected, memory=memory)
    return np.asarray(jax.jit(jax.vmap(lambda index: jax.lax.scan(step, start, index)[1]))(jnp.asarray(drawn)))


RARE = [[0.9, 0.097, 0.003], [0.998, 0.001, 0.001], [0.5, 0.0, 0.5], [1.0, 0.0], [0.4, 0.3, 0.299, 0.001]]


@pytest.mark.parametrize('expected', [*RARE, [0.7, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.95, 0.05]])
def test_chance_is_hardly_ever_an_alarm(expected):
    """At any one look, from the first batch on; without drift its mean square is 1 at most, also for rare exits."""
    result = watched(expected, expected, updates=150)
    assert (result > 3).mean() < 0.01
    assert np.square(result).mean() < 1.15
    if expected not in RARE:
        assert np.square(result[:, 50:]).mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ('expected', 'shares'),
    [
        ([0.7, 0.2, 0.1], [0.5, 0.2, 0.3]),
        ([0.9, 0.097, 0.003], [0.9, 0.06, 0.04]),  # between neighbours, one of them rare
        ([0.998, 0.001, 0.001], [0.95, 0.001, 0.049]),
        ([0.5, 0.0, 0.5], [0.48, 0.04, 0.48]),
        ([0.5, 0.0, 0.5], [0.6, 0.0, 0.4]),  # a rare exit does not hide the drift of the others
        ([1.0, 0.0], [0.97, 0.03]),
    ],
)
def test_drift_is_detected_also_where_exits_are_rare(expected, shares):
    result = watched(expected, shares, updates=100)
    assert (result[:, -1] > 3).mean() > 0.95


def test_the_average_is_worth_what_its_weights_say():
    """Twice the memory in the end, less one batch; the scatter of the shares over many runs says the same."""
    monitor = Monitor.create([0.5, 0.5], memory=100)
    for worth in (40, 80):
        monitor = monitor.observe(jnp.zeros(40, jnp.int32))
        assert 1 / float(monitor.noise) == pytest.approx(worth)
    for _ in range(50):
        monitor = monitor.observe(jnp.zeros(40, jnp.int32))
    assert 1 / float(monitor.noise) == pytest.approx(2 * 100 - 40, rel=1e-3)


def test_overshoot_begins_where_the_docstring_says():
    """If the observed mean rises along the path by the scale, an update multiplies the error by 1 − B / horizon."""
    for batch, sign in ((100, 1), (450, -1)):
        controller = create([[1.0], [0.0]], target=0.5, scale=1.0, position=0.6, largest_step=1.0)
        after = controller.update(jnp.full(batch, controller.position))
        assert np.sign(float(after.position) - 0.5) == sign


def test_impossible_monitors_are_refused():
    for expected, memory in (([0.5, 0.6], 10), ([0.5, 0.5], 0), ([0.5, 0.5], np.inf), ([1.5, -0.5], 10), ([np.nan], 9)):
        with pytest.raises(ValueError, match='expected: got'):
            Monitor.create(expected, memory=memory)


def test_paths_by_shares_count_finite_inputs_and_need_some():
    side = np.array([[1.0, 2.0, np.inf, np.nan, 4.0]])
    result = table_of(np.concatenate([side, np.zeros((1, 5))])).path_by_shares(size=3)
    assert [(side[0] < setting).sum() for setting in result] == [3, 1, 0]
    with pytest.raises(ValueError, match='uncertainty: an exit of the table'):
        table_of(np.array([[np.nan, np.inf], [0.0, 0.0]])).path_by_shares()
    with pytest.raises(ValueError, match='size: got 1'):
        table_of(np.zeros((2, 3))).path_by_shares(size=1)


def test_no_setting_of_a_path_falls_under_the_floor():
    """Nor half-way between two; the setting before the path, or the middle between the two, does."""
    generator = np.random.default_rng(3)
    uncertainty = images(generator, 400, 1.0)
    right = generator.random((3, 400)) < np.array([[0.6], [0.75], [0.9]])
    table = table_of(np.concatenate([uncertainty, np.zeros((1, 400))])).replace(statistics=right[..., None] * 1.0)
    whole = table.path_by_shares(size=51)
    floor = float(np.median(table.evaluate(whole).accuracy))
    rest = table.path_by_shares(size=51, floor=floor)
    assert 2 <= len(rest) < 51
    np.testing.assert_array_equal(rest, whole[-len(rest) :])
    assert (table.evaluate(rest).accuracy >= floor).all()
    assert (table.evaluate((rest[1:] + rest[:-1]) / 2).accuracy >= floor).all()
    before = whole[-len(rest) - 1]
    assert table.evaluate(np.stack([before, (before + rest[0]) / 2])).accuracy.min() < floor
    with pytest.raises(ValueError, match=r'floor: got 1\.1; where inputs leave least the metric is'):
        table.path_by_shares(floor=1.1)
