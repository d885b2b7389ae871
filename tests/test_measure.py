"""Clocks by brute force over order statistics; energy against a simulated meter, whose figures are derived by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from branchy_jax.measure import Meter, find_meter, interleaved_passes, measure_energy, one_by_one, paired_ratio


def test_passes_interleave_in_rotating_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'abc'}
    seconds = interleaved_passes(functions, passes=4, warmup=2)
    turns = [''.join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert len(turns) == 6
    assert all(sorted(turn) == list('abc') for turn in turns)
    assert len(set(turns)) == 3
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys('abc', (4,))
    assert all((values >= 0).all() for values in seconds.values())


def test_what_settles_is_called_again_and_timed_once():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'ab'}
    seconds = interleaved_passes(functions, passes=2, warmup=0, settle=2)
    assert ''.join(calls) == 'aaabbb' + 'bbbaaa'
    assert {name: values.shape for name, values in seconds.items()} == {'a': (2,), 'b': (2,)}


def test_nothing_to_time():
    with pytest.raises(ValueError, match='functions'):
        interleaved_passes({})


def test_one_by_one_calls_each_input():
    seen = []
    one_by_one(seen.append, [1, 2, 3])()
    assert seen == [1, 2, 3]


def test_ratio_is_of_pairs_not_of_medians():
    baseline, candidate = np.array([1.0, 10.0, 100.0]), np.array([1.0, 5.0, 200.0])
    ratio = paired_ratio(baseline, candidate)
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize('pairs', [10, 20, 41])
def test_interval_covers_the_median_19_times_in_20(pairs):
    """Brute force over which order statistics bracket the median of any continuous distribution."""
    ratio = paired_ratio(np.arange(1.0, pairs + 1), np.ones(pairs))
    low, high = int(ratio.low) - 1, int(ratio.high) - 1
    coverage = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 1, high + 1))
    narrower = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 2, high))
    assert coverage >= 0.95 > narrower


def test_interval_holds_for_drifting_pairs():
    drift = np.array(list(itertools.islice(itertools.cycle([1.0, 3.0]), 20)))
    ratio = paired_ratio(2 * drift, drift)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(('baseline', 'candidate'), [([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]])])
def test_unpaired_passes_are_refused(baseline, candidate):
    with pytest.raises(ValueError, match='candidate: expected seconds'):
        paired_ratio(np.array(baseline), np.array(candidate))


class Bench:
    """A device that draws 10 W at rest and 30 W at work; its meter shows what it drew, every 50 ms."""

    def __init__(self, update=0.05):
        self.now, self.joules, self.update, self.shown, self.shown_at = 0.0, 0.0, update, 0.0, 0.0

    def _pass(self, seconds, watts):
        self.now += seconds
        self.joules += watts * seconds
        if self.now - self.shown_at >= self.update:
            self.shown, self.shown_at = self.joules, self.now

    def work(self):
        self._pass(0.5, 30.0)

    def sleep(self, seconds):
        self._pass(seconds, 10.0)

    def measure(self, **options):
        meter = Meter('simulated', lambda: self.shown)
        return measure_energy(self.work, meter, clock=lambda: self.now, sleep=self.sleep, **options)


def test_idle_power_is_subtracted_and_shown():
    found = Bench().measure(seconds=20)
    assert found.idle_watts == pytest.approx(10, rel=0.03)
    assert found.watts == pytest.approx(30, rel=0.01)
    assert found.joules_with_idle == pytest.approx(15, rel=0.01)  # 30 W for half a second
    assert found.joules == pytest.approx(10, rel=0.02)  # 20 W above idle
    assert (found.calls, found.seconds, found.meter) == (40, 20, 'simulated')


@pytest.mark.parametrize('update', [0.01, 0.5])
def test_runs_are_long_enough_for_the_meter(update):
    found = Bench(update).measure(seconds=0.1, idle_seconds=0.1)
    assert found.resolution < 0.02
    assert found.seconds >= 100 * update


def test_a_meter_that_stands_still_is_refused():
    bench = Bench(update=1e9)
    with pytest.raises(ValueError, match='simulated moved 0 times'):
        bench.measure()


def test_a_device_without_a_counter_has_no_meter(monkeypatch):
    monkeypatch.setattr('branchy_jax.measure._processor_meter', lambda: None)
    assert find_meter() is None
