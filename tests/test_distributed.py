"""Two processes on the loopback are one run; when one dies the other reports it, and a single process can resume."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import loopback
import numpy as np
import pytest

from branchy_jax import training

STEPS = 60 // loopback.BATCH
KILLED_AFTER = STEPS + 2


def start(folder):
    """Starts two processes, each with its output in a file."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = []
    for n in range(2):
        command = [sys.executable, '-u', Path(loopback.__file__), *map(str, (n, 2, port, folder))]
        with (folder / f'{n}.log').open('w') as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    return processes


@pytest.fixture(scope='module')
def alone():
    """The same training in this one process, on data in memory."""
    return loopback.train(training.fit, loopback.fresh(), loopback.data())


@pytest.fixture
def order_alone():
    """The rows of each step of the same training in one process."""
    stream = loopback.Recorded()
    loopback.train(training.fit, loopback.fresh(), stream)
    return np.array(stream.rows)


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    """Starts two processes, kills the second in the middle of an epoch, and waits for the first to end."""
    folder = tmp_path_factory.mktemp('together')
    processes = start(folder)
    logs = [folder / f'{n}.log' for n in range(2)]
    try:
        limit = time.monotonic() + 180
        while f'step {KILLED_AFTER}:' not in logs[1].read_text():
            assert time.monotonic() < limit, [log.read_text()[-2000:] for log in logs]
            assert processes[0].poll() is processes[1].poll() is None, [log.read_text()[-2000:] for log in logs]
            time.sleep(0.05)
        processes[1].kill()
        code = processes[0].wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = []
    for n in range(2):
        with np.load(folder / f'{n}.npz') as stored:
            results.append(dict(stored))
    return folder, results, (code, logs[0].read_text())


@pytest.fixture
def results(together):
    return together[1]


def params_of(result):
    return [result[f'arr_{n}'] for n in range(sum(name.startswith('arr_') for name in result))]


def check_same(result, expected):
    for a, b in zip(result, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_two_processes_train_what_one_trains(alone, results):
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(alone.params)]
    for result in results:
        assert result['devices'] == 2
        check_same(params_of(result), expected)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(loopback.fresh().params)]
    assert max(np.abs(a - b).max() for a, b in zip(before, expected, strict=True)) > 0.01  # it did train


def test_two_processes_evaluate_what_one_evaluates(alone, results):
    expected = loopback.evaluate(alone)
    for result in results:
        np.testing.assert_allclose(result['logits'], expected.logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result['uncertainty'], expected.uncertainty, rtol=1e-3, atol=1e-5)


def test_each_process_reads_its_share_of_every_batch(results, order_alone):
    first, second = (result['rows'] for result in results)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), order_alone)
    assert first.shape == second.shape == (15, 6)


def test_a_dead_process_ends_the_others_with_a_clear_error(together):
    _, _, (code, log) = together
    assert code != 0
    assert 'another task died' in log
    assert f'step {3 * STEPS}:' not in log


def test_one_process_resumes_the_run_from_its_checkpoint(alone, together):
    done = []
    state = loopback.train(
        training.fit,
        loopback.fresh(),
        loopback.Recorded(),
        directory=together[0] / 'checkpoints',
        on_step=lambda epoch, step, steps, metrics: done.append(epoch * steps + step),
    )
    assert done[0] > KILLED_AFTER - loopback.SAVE_EVERY  # in the middle of an epoch, not at the start
    assert done == list(range(done[0], 3 * STEPS + 1))
    check_same(jax.tree.leaves(state.params), jax.tree.leaves(alone.params))
