"""Energy against a simulated meter, whose figures are derived by hand."""

import pytest

import branchy_jax as bj
from branchy_jax.energy import Meter, measure_energy


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


def test_no_meter_means_no_figure(monkeypatch):
    monkeypatch.setattr('branchy_jax.energy._processor_meter', lambda: None)
    assert bj.energy.find_meter() is None
    from experiments import energy

    record = energy.measure(None, None, batches=[1], seconds=1)
    assert (record['meter'], record['rows'], record['note']) == (None, [], energy.NO_METER)
