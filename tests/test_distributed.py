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

STEPS = loopback.ROWS // loopback.BATCH
KILLED_AFTER = STEPS + 2


@pytest.fixture(scope='module')
def alone():
    """The same training in this one process, and the rows of each step."""
    stream = loopback.Recorded()
    return loopback.train(loopback.fresh(), stream), np.array(stream.rows)


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    """Starts two processes, kills the second in the middle of an epoch, and waits for the first to end."""
    folder = tmp_path_factory.mktemp('together')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes, logs = [], [folder / f'{n}.log' for n in range(2)]
    for n, path in enumerate(logs):
        command = [sys.executable, '-u', Path(loopback.__file__), *map(str, (n, port, folder))]
        with path.open('w') as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
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
    return folder, [dict(np.load(folder / f'{n}.npz')) for n in range(2)], (code, logs[0].read_text())


def check_same(result, expected):
    for a, b in zip(result, jax.tree.leaves(expected.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_two_processes_train_and_evaluate_what_one_does(alone, together):
    state, order = alone
    outputs, results = loopback.evaluate(state), together[1]
    for result in results:
        assert result['devices'] == 2
        check_same([values for name, values in result.items() if name.startswith('arr_')], state)
        np.testing.assert_allclose(result['logits'], outputs.logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result['uncertainty'], outputs.uncertainty, rtol=1e-3, atol=1e-5)
    # Each process reads its share of every batch.
    first, second = (result['rows'] for result in results)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), order)
    assert first.shape == second.shape == (15, 6)
    before = jax.tree.leaves(loopback.fresh().params)
    assert max(np.abs(a - b).max() for a, b in zip(before, jax.tree.leaves(state.params), strict=True)) > 0.01


def test_a_dead_process_ends_the_others_with_a_clear_error(together):
    code, log = together[2]
    assert code != 0
    assert 'another task died' in log
    assert f'step {3 * STEPS}:' not in log


def test_one_process_resumes_the_run_from_its_checkpoint(alone, together):
    done = []
    state = loopback.train(
        loopback.fresh(),
        loopback.Recorded(),
        directory=together[0] / 'checkpoints',
        on_step=lambda epoch, step, steps, metrics: done.append(epoch * steps + step),
    )
    assert done[0] > KILLED_AFTER - loopback.SAVE_EVERY  # in the middle of an epoch, not at the start
    assert done == list(range(done[0], 3 * STEPS + 1))
    check_same(jax.tree.leaves(state.params), alone[0])
