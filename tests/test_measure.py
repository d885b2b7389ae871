"""Timing against brute force over order statistics; energy against a simulated meter with hand-derived values."""

import itertools
import sys
import types

import numpy as np
import pytest
from scipy import stats

from branchy_jax.measure import Meter, find_meter, interleaved_passes, measure_energy, one_by_one, paired_ratio


def test_passes_interleave_in_rotating_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'abc'}
    seconds = interleaved_passes(functions, passes=4, warmup=2)
    assert ''.join(calls) == 'bcacababcbcacababc'
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys('abc', (4,))
    assert all((values >= 0).all() for values in seconds.values())
    calls.clear()
    interleaved_passes(functions, passes=2, warmup=0, settle=2)
    one_by_one(calls.append, 'xyz')()
    assert ''.join(calls) == 'aaabbbccc' + 'bbbcccaaa' + 'xyz'
    with pytest.raises(ValueError, match='functions: got 0'):
        interleaved_passes({})


def test_ratio_is_of_pairs_not_of_medians():
    ratio = paired_ratio(np.array([1.0, 10.0, 100.0]), np.array([1.0, 5.0, 200.0]))
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.5, 2.0)
    drift = np.array(list(itertools.islice(itertools.cycle([1.0, 3.0]), 20)))
    ratio = paired_ratio(2 * drift, drift)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    for bad in (([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match='candidate: expected seconds'):
            paired_ratio(*map(np.array, bad))


@pytest.mark.parametrize('pairs', [10, 20, 41])
def test_interval_covers_the_median_19_times_in_20(pairs):
    """Brute force over which order statistics bracket the median of any continuous distribution."""
    ratio = paired_ratio(np.arange(1.0, pairs + 1), np.ones(pairs))
    low, high = int(ratio.low) - 1, int(ratio.high) - 1
    coverage = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 1, high + 1))
    narrower = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 2, high))
    assert coverage >= 0.95 > narrower


class Bench:
    """A device that draws 10 W at rest and 30 W at work; its meter updates every 50 ms."""

    def __init__(self, update=0.05):
        self.now, self.joules, self.update, self.shown, self.shown_at = 0.0, 0.0, update, 0.0, 0.0

    def draw(self, seconds, watts):
        self.now += seconds
        self.joules += watts * seconds
        if self.now - self.shown_at >= self.update:
            self.shown, self.shown_at = self.joules, self.now

    def measure(self, **options):
        options |= {'clock': lambda: self.now, 'sleep': lambda seconds: self.draw(seconds, 10.0)}
        return measure_energy(lambda: self.draw(0.5, 30.0), Meter('simulated', lambda: self.shown), **options)


@pytest.mark.parametrize('options', [{}, {'idle_watts': 10.0}])
@pytest.mark.parametrize('update', [0.05, 0.5])
def test_idle_power_is_subtracted_and_runs_are_long_enough_for_the_meter(update, options):
    energy = Bench(update).measure(seconds=20, **options)
    assert energy.idle_watts == pytest.approx(10, rel=0.01)
    assert energy.watts == pytest.approx(30, rel=0.01)
    assert energy.joules_with_idle == pytest.approx(15, rel=0.01)  # 30 W for half a second
    assert energy.joules == pytest.approx(10, rel=0.02)  # 20 W above idle
    assert energy.calls == pytest.approx(2 * energy.seconds)
    assert energy.seconds >= max(20, 100 * update)
    assert (energy.resolution < 0.02, energy.meter) == (True, 'simulated')


class Processors(list):
    """Counters in millijoules, as zeus reads them."""

    def get_total_energy_consumption(self, number):
        return types.SimpleNamespace(cpu_mj=self[number])


def test_meters_that_do_not_change_are_refused_and_may_be_absent(monkeypatch):
    with pytest.raises(ValueError, match='simulated changed 0 times'):
        Bench(update=1e9).measure()
    monkeypatch.setitem(sys.modules, 'zeus', None)  # the library is not installed
    monkeypatch.delitem(sys.modules, 'zeus.device', raising=False)
    assert find_meter() is None
    zeus = types.SimpleNamespace(get_gpus=None)
    monkeypatch.setitem(sys.modules, 'zeus', zeus)
    monkeypatch.setitem(sys.modules, 'zeus.device', zeus)
    for counters, joules in (([1000.0, 500.0], 1.5), ([], None)):
        zeus.get_cpus = lambda counters=counters: Processors(counters)
        meter = find_meter()
        assert (meter and meter.read()) == joules
    zeus.get_gpus = lambda: types.SimpleNamespace(get_total_energy_consumption=lambda number: 2500)
    monkeypatch.setattr('jax.default_backend', lambda: 'gpu')
    assert find_meter().read() == 2.5
