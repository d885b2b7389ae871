"""The benchmark forces the shares it is asked for, and writes the rows that it documents."""

import numpy as np
import pytest

import branchy_jax as bj
from experiments import benchmark
from experiments.study import cells, checkouts, speed


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
def test_training_steps_are_timed_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    training = {'settings': 'one', 'devices': 1, 'network': 'b-lenet', 'batch_size': 4, 'steps': 2}
    (row,) = speed.training_steps(rounds=1, trainings=[training])
    assert row['times_faster'] == 1
    assert row['low'] <= row['ms'] <= row['high']


@pytest.mark.slow
def test_forms_are_timed_beside_the_form_that_lacks_them(monkeypatch):
    monkeypatch.setattr(bj.data, 'load_dataset', lambda name, load=bj.data.load_dataset: load('mnist5k'))
    rows = speed.forms('b-lenet', 4, passes=3)
    assert [(row['executor'], row['form']) for row in rows] == [
        ('sequential', form) for form in ('banded', 'ALL_CORES', 'ONE_CORE')
    ]
    assert all(0 < row['gain_low'] <= row['gain'] <= row['gain_high'] for row in rows)
    assert '| b-lenet |' in ' '.join(benchmark.page({'command': '', 'device': '', 'rows': rows}).split())


WORKER = """
import os, sys
print('a plan', flush=True)
for _ in sys.stdin:
    print(2.0 if os.getcwd() == os.environ['PYTHONPATH'] == {other!r} else 1.0, flush=True)
"""


def test_checkouts_take_turns(tmp_path, monkeypatch):
    (tmp_path / 'branchy_jax').mkdir()
    (tmp_path / 'worker.py').write_text(WORKER.format(other=str(tmp_path)))
    monkeypatch.setattr(checkouts, '__file__', str(tmp_path / 'worker.py'))
    row = checkouts.compare(tmp_path, 'b-lenet', 2, images=4, passes=7)
    assert (row['ratio'], row['ratio_low'], row['ratio_high']) == (0.5, 0.5, 0.5)
    assert (row['ms'], row['executors']) == ([250.0, 500.0], ['a plan', 'a plan'])
    (tmp_path / 'worker.py').write_text('raise SystemExit("no weights")')
    with pytest.raises(ValueError, match='other: .* could not plan b-lenet'):
        checkouts.compare(tmp_path, 'b-lenet', 2, images=4, passes=1)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--network=b-lenet --workdir=x --shares=70/20', 'shares: got'),
        ('--network=b-lenet --workdir=x --shares=a/b', 'shares: invalid'),
        ('--network=b-lenet --workdir=x --batches=0', 'batches: got'),
        ('--network=b-lenet', '--workdir: give the folder'),
        ('--network=b-lenet --workdir=x --other=nowhere', 'other: got nowhere'),
    ],
)
def test_benchmark_refuses_impossible_settings(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as refused:
        benchmark.main(flags.split())
    assert message in str(refused.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())
