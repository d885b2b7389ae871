"""The benchmark forces the shares it is asked for, and writes the rows that it documents."""

import types

import numpy as np
import pytest

import branchy_jax as bj
from experiments import benchmark
from experiments.study import cells, executors, speed


@pytest.fixture(scope='module')
def lenet():
    images = np.random.default_rng(0).standard_normal((6, 28, 28, 1), np.float32)
    return cells.random_networks('b-lenet', images), images


def fake_clocks(networks, planned_on, images, policies, *, batch, passes):
    clock = {'batch': batch, 'latency_ms': 0.5, 'gain': 2.0, 'gain_plain': 4.0, 'executor': 'it'}
    points = {name: {**clock, 'executor': 'ONNX Runtime × 1'} if name == '40/60' else clock for name in policies}
    return {'baseline': {**clock, 'latency_ms': 1.0}, 'points': points, 'exit_latency_ms': [0.1, 0.4]}


def test_images_leave_in_the_shares_asked_for(lenet, tmp_path, monkeypatch, capsys):
    networks, _ = lenet
    monkeypatch.setattr(cells, 'time_run', fake_clocks)
    monkeypatch.setattr(benchmark, 'random_networks', lambda name, images: networks)
    benchmark.main([f'--workdir={tmp_path}', '--network=b-lenet', '--batches=3', '--shares=67/33,0/100,40/60'])
    first, second, third = bj.report.read_json(tmp_path / 'benchmark.json')['rows']
    costs = bj.costs.count_macs(networks.model, inputs=networks.inputs)
    np.testing.assert_allclose(first['exit_fractions'], [2 / 3, 1 / 3])
    assert (first['batch'], second['exit_fractions'], second['thresholds']) == (3, [0, 1], [-np.inf])
    assert first['mac_limit'] == pytest.approx(costs.trunk / (costs.to_exit @ [2 / 3, 1 / 3]))
    assert first['realised'] == pytest.approx(first['time_limit_ms'] / 0.5)
    assert first['time_limit_ms'] < second['time_limit_ms']
    assert third['time_limit_ms'] == pytest.approx(np.dot(third['exit_fractions'], [0.1, 0.4]))
    assert third['realised'] == pytest.approx(third['time_limit_ms'] / 0.5)
    assert (tmp_path / 'gain.png').read_bytes().startswith(b'\x89PNG')
    assert '66.67, 33.33' in capsys.readouterr().out


def test_forced_shares_hold_for_another_program_and_batch_size():
    """Heads whose logits hardly differ between images left it to rounding: another batch size moved a tenth of them."""
    images = np.random.default_rng(0).standard_normal((20, 32, 32, 3), np.float32)
    networks = cells.random_networks('b-resnet8', images)
    (policy,) = cells.force(networks, images, {'half': [0.5, 0.3, 0.2]}).values()
    run = bj.inference.dense(networks.model)
    exits = [run(networks.variables, part, policy).exit_index for part in np.split(images, 5)]
    np.testing.assert_array_equal(np.bincount(np.ravel(exits)), [10, 6, 4])


def test_training_steps_are_timed_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    training = {'settings': 'one', 'devices': 1, 'network': 'b-lenet', 'batch_size': 4, 'steps': 2}
    (row,) = speed.training_steps(rounds=1, trainings=[training])
    assert row['times_faster'] == 1
    assert row['low'] <= row['ms'] <= row['high']


def test_forms_are_timed_beside_the_form_that_lacks_them(monkeypatch):
    monkeypatch.setattr(bj.data, 'load_dataset', lambda name, load=bj.data.load_dataset: load('mnist5k'))
    rows = speed.forms('b-lenet', 4, passes=3)
    assert [(row['executor'], row['form']) for row in rows] == [
        ('sequential', form) for form in ('banded', 'ALL_CORES', 'ONE_CORE')
    ]
    assert all(0 < row['gain_low'] <= row['gain'] <= row['gain_high'] for row in rows)
    assert '| b-lenet |' in ' '.join(benchmark.page({'command': '', 'device': '', 'rows': rows}).split())


def test_executors_are_written_one_by_one(tmp_path, capsys):
    """An interruption leaves the rows so far; a form that fails is named with its reason, and others go on."""
    cell, forms = executors.Cell('b-lenet', 8, 'float32'), ('plain baseline', 'other', 'compacted, loops', 'time limit')

    def interrupted(rows, **more):
        benchmark._write(tmp_path, 'executors', rows, **more)
        if 'realised' in rows[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executors.measure_within(60, [(cell, form) for form in (*forms, 'dense', 'stream')], interrupted, passes=6)
    record = bj.report.read_json(tmp_path / 'executors.json')
    plain, loops = record['rows']
    assert (plain['executor'], loops['executor'], loops['host_waits']) == ('plain baseline', 'compacted, loops', 1)
    assert loops['exit_fractions'] == [30 / 32, 2 / 32]
    assert loops['gain_low'] <= loops['gain'] <= loops['gain_high']
    failed, *others = record['not_reached']
    assert failed.startswith("other: b-lenet at 8 in float32: KeyError: 'other'")
    assert others == ['dense: b-lenet at 8 in float32', 'stream: b-lenet at 8 in float32']
    assert '- stream: b-lenet at 8' in (tmp_path / 'executors.md').read_text()


def test_executors_keep_to_their_budget(monkeypatch):
    """A form is left out if one of the same network took longer than what is left; forms of other networks go on."""
    now, done = [0.0], []

    class Fake:
        def __init__(self, cell, networks):
            self.cell, self.rows, self.networks = cell, [], networks or cell.network

        def add(self, form, passes):
            assert self.networks == self.cell.network
            now[0] += {'first': 40.0, 'second': 30.0}.get(self.cell.network, 5.0)
            self.rows.append({'executor': form})

    monkeypatch.setattr(executors, 'Bench', Fake)
    monkeypatch.setattr(executors, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
    cells = [executors.Cell(name, batch, 'float32') for batch in (2, 1) for name in ('first', 'second', 'third')]
    units = [(cell, 'form') for cell in cells]
    executors.measure_within(100, units, lambda rows, **more: done.append((rows, more['not_reached'])), passes=6)
    rows, missing = done[-1]
    assert (len(rows), now[0]) == (4, 80.0)
    assert missing == ['form: first at 1 in float32', 'form: second at 1 in float32']
    assert executors.work(['a', 'b', 'c'], [4, 1])[0] == (executors.Cell('a', 4, 'float32'), 'plain baseline')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--network=b-lenet --workdir=x --shares=70/20', 'shares: got'),
        ('--network=b-lenet --workdir=x --shares=a/b', 'shares: invalid'),
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
