"""The controller holds its target when the data shift, without overshoot, under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from branchy_jax.control import (
    create_controller,
    create_monitor,
    drift,
    observe,
    path_by_shares,
    thresholds_of,
    update,
)

COSTS = np.array([1.0, 5.0, 10.0])


def images(generator, count, hardness):
    """Uncertainties of side exits; harder data are unsure more often."""
    return generator.random((2, count)) ** (1 / hardness)


def run(controller, hardness_of, steps, batch=20, seeds=12):
    """Runs the loop in one program, many times over; returns mean cost and mean position per batch."""
    hardness = np.array([hardness_of(number * batch) for number in range(steps)])[:, None, None]
    drawn = np.random.default_rng(0).random((seeds, steps, 2, batch)) ** (1 / hardness)
    costs = jnp.asarray(COSTS)

    def step(controller, uncertainty):
        confident = uncertainty < thresholds_of(controller)[:, None]
        spent = costs[jnp.where(confident[0], 0, jnp.where(confident[1], 1, 2))]
        controller = update(controller, spent)
        return controller, (spent.mean(), controller.position)

    found = jax.jit(jax.vmap(lambda uncertainty: jax.lax.scan(step, controller, uncertainty)[1]))(jnp.asarray(drawn))
    return tuple(np.asarray(values).mean(axis=0) for values in found)


@pytest.fixture(scope='module')
def path():
    reference = images(np.random.default_rng(5), 5000, 1.0)
    return path_by_shares(np.concatenate([reference, np.zeros((1, 5000))]))


@pytest.mark.parametrize('hardness', [0.4, 2.5])
@pytest.mark.parametrize('target', [3.0, 5.0, 7.0])
def test_back_at_its_target_within_two_thousand_images_of_a_shift(path, hardness, target):
    """An abrupt shift after 10,000 images. Averages of 12 runs, since single images scatter by half the range."""
    controller = create_controller(path, target=target, scale=9.0)
    costs, positions = run(controller, lambda image: 1.0 if image < 10_000 else hardness, 750)
    settled = costs[600:].mean()  # 2,000 images after the shift and later
    assert settled == pytest.approx(target, rel=0.05)
    assert costs[400:500].mean() == pytest.approx(target, rel=0.05)
    # Without oscillation: the mean position goes one way after the shift, to within its scatter.
    after = positions[500:]
    final = after[-100:].mean()
    overshoot = (after - final) * np.sign(final - after[0])
    assert overshoot.max() < 0.05


def test_a_label_free_proxy_of_accuracy_is_held(path):
    """One minus the uncertainty of the exit that answered, which rises along the path as cost does."""
    generator = np.random.default_rng(0)
    controller, step, found = create_controller(path, target=0.8, scale=0.5), jax.jit(update), []
    for number in range(500):
        side = images(generator, 20, 1.0 if number < 250 else 0.5)
        uncertainty = np.concatenate([side, np.full((1, 20), 0.1)])
        confident = side < np.asarray(thresholds_of(controller))[:, None]
        exits = np.concatenate([confident, np.ones((1, 20), bool)]).argmax(axis=0)
        proxy = 1 - uncertainty[exits, np.arange(20)]
        controller = step(controller, jnp.asarray(proxy))
        found.append(proxy.mean())
    assert np.mean(found[150:250]) == pytest.approx(0.8, abs=0.02)
    assert np.mean(found[350:]) == pytest.approx(0.8, abs=0.02)


def test_steps_are_bounded(path):
    controller = create_controller(path, target=5.0, scale=9.0, largest_step=0.01)
    after = update(controller, jnp.full(100_000, 1e30))
    assert float(controller.position - after.position) == pytest.approx(0.01, rel=1e-4)
    assert float(update(controller, jnp.array([jnp.nan, jnp.inf])).position) == 0.5


def test_positions_stay_on_the_path(path):
    controller = create_controller(path, target=0.0, scale=1.0, largest_step=1.0)
    for _ in range(5):
        controller = update(controller, jnp.full(1000, 100.0))
    assert float(controller.position) == 0.0
    np.testing.assert_allclose(thresholds_of(controller), path[0])
    everyone = images(np.random.default_rng(5), 5000, 1.0).max(axis=1).astype(np.float32)
    assert (everyone < path[0]).all()
    np.testing.assert_allclose(thresholds_of(controller.replace(position=jnp.float32(1.0))), path[-1], rtol=1e-5)


def test_thresholds_are_interpolated():
    controller = create_controller([[4.0, 1.0], [2.0, 0.0], [0.0, 0.0]], target=1.0, scale=1.0, position=0.25)
    assert thresholds_of(controller).tolist() == [3.0, 0.5]


def test_infinite_settings_become_the_nearest_finite_ones():
    controller = create_controller([[np.inf], [2.0], [1.0], [-np.inf]], target=1.0, scale=1.0)
    assert controller.path[:, 0].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    'changes',
    [{'scale': 0.0}, {'target': np.nan}, {'horizon': 0.0}, {'largest_step': 0.0}, {'position': 2.0},
     {'path': [[1.0]]}, {'path': [[0.0], [1.0]]}, {'path': [[np.nan], [1.0]]}, {'path': [[np.inf], [-np.inf]]}],
)  # fmt: skip
def test_impossible_controllers_are_refused(changes):
    options = {'path': [[1.0], [0.0]], 'target': 1.0, 'scale': 1.0, **changes}
    with pytest.raises(ValueError, match=r'path: expected|path: it must lead|target, scale'):
        create_controller(options.pop('path'), **options)


def test_monitor_averages_exit_shares():
    monitor = create_monitor([0.5, 0.5], memory=100)
    monitor = observe(monitor, jnp.zeros(50, jnp.int32))
    assert monitor.shares.tolist() == [1.0, 0.0]
    monitor = observe(monitor, jnp.ones(50, jnp.int32))
    np.testing.assert_allclose(monitor.shares, [0.5, 0.5])
    monitor = observe(monitor, jnp.int32(1))
    np.testing.assert_allclose(monitor.shares, [0.495, 0.505], rtol=1e-5)


def test_drift_is_noticed_and_chance_is_not():
    generator = np.random.default_rng(0)
    monitor, step, found = create_monitor([0.7, 0.2, 0.1], memory=1000), jax.jit(observe), []
    for shares in ([0.7, 0.2, 0.1], [0.5, 0.2, 0.3]):
        for _ in range(100):
            monitor = step(monitor, jnp.asarray(generator.choice(3, size=20, p=shares)))
            found.append(float(drift(monitor)))
    assert max(found[:100]) < 3
    assert min(found[140:]) > 3


def test_monitor_says_nothing_too_early_and_survives_empty_batches():
    monitor = create_monitor([0.95, 0.05])
    first = observe(monitor, jnp.array([1]))
    assert float(drift(first)) == 0.0
    assert observe(first, jnp.zeros(0, jnp.int32)).shares.tolist() == first.shares.tolist()


def test_overshoot_begins_where_the_docstring_says():
    """Observed rises along the path by the scale: the error shrinks by 1 − B / horizon an update."""
    for batch, sign in ((100, 1), (450, -1)):
        controller = create_controller([[1.0], [0.0]], target=0.5, scale=1.0, position=0.6, largest_step=1.0)
        after = update(controller, jnp.full(batch, controller.position))
        assert np.sign(float(after.position) - 0.5) == sign


def test_impossible_monitors_are_refused():
    with pytest.raises(ValueError, match='expected: got'):
        create_monitor([0.5, 0.6])
