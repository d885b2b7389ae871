"""The benchmark forces the shares it is asked for, and writes the rows that it documents."""

import numpy as np
import pytest

import branchy_jax as bj
from experiments import benchmark
from experiments.study import cells, speed


@pytest.fixture(scope='module')
def lenet():
    images = np.random.default_rng(0).standard_normal((6, 28, 28, 1), np.float32)
    return cells.random_networks('b-lenet', images), images


def fake_clocks(networks, planned_on, images, policies, *, batch, passes):
    clock = {'batch': batch, 'latency_ms': 0.5, 'gain': 2.0, 'gain_plain': 4.0, 'executor': 'it'}
    return {'baseline': {**clock, 'latency_ms': 1.0}, 'points': dict.fromkeys(policies, clock)}


def test_images_leave_in_the_shares_asked_for(lenet, tmp_path, monkeypatch, capsys):
    networks, _ = lenet
    monkeypatch.setattr(cells, 'time_run', fake_clocks)
    monkeypatch.setattr(benchmark, 'random_networks', lambda name, images: networks)
    benchmark.main([f'--workdir={tmp_path}', '--network=b-lenet', '--batches=3', '--shares=67/33,0/100'])
    first, second = bj.report.read_json(tmp_path / 'benchmark.json')['rows']
    costs = bj.costs.count_macs(networks.model, inputs=networks.inputs)
    np.testing.assert_allclose(first['exit_fractions'], [2 / 3, 1 / 3])
    assert (first['batch'], second['exit_fractions'], second['thresholds']) == (3, [0, 1], [-np.inf])
    assert first['mac_limit'] == pytest.approx(costs.trunk / (costs.to_exit @ [2 / 3, 1 / 3]))
    assert first['realised'] == pytest.approx(first['time_limit_ms'] / 0.5)
    assert first['time_limit_ms'] < second['time_limit_ms']
    assert (tmp_path / 'gain.png').read_bytes().startswith(b'\x89PNG')
    assert '66.67, 33.33' in capsys.readouterr().out


@pytest.mark.slow
def test_planning_is_timed_step_by_step(lenet):
    networks, images = lenet
    policies = cells.force(networks, images, {'a': [0.5, 0.5], 'b': [0.0, 1.0]})
    rows = cells.plan_by_the_clock(networks, images, policies)
    assert [row['what'] for row in rows] == ['the first plan', 'a plan at other thresholds', 'its warm-up']
    assert all(row['seconds'] >= 0 for row in rows)


@pytest.mark.slow
def test_training_steps_are_timed_in_a_process_of_their_own():
    training = {'settings': 'one', 'devices': 1, 'network': 'b-lenet', 'batch_size': 4, 'steps': 2}
    (row,) = speed.training_steps(rounds=1, trainings=[training])
    assert row['times_faster'] == 1
    assert row['low'] <= row['ms'] <= row['high']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--network=b-lenet --workdir=x --shares=70/20', 'shares: got'),
        ('--network=b-lenet --workdir=x --shares=a/b', 'shares: got'),
        ('--network=b-lenet --workdir=x --batches=0', 'batches: got'),
        ('--network=b-lenet', '--workdir: give the folder'),
    ],
)
def test_benchmark_refuses_impossible_settings(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as refused:
        benchmark.main(flags.split())
    assert message in str(refused.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())
