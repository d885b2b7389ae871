"""The benchmark forces the shares it is asked for, and writes what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import branchy_jax as bj

ROOT = Path(__file__).parents[1]


def benchmark(workdir, *flags):
    command = [sys.executable, '-m', 'experiments.benchmark', '--network=b-lenet', f'--workdir={workdir}', *flags]
    environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('benchmark')
    result = benchmark(workdir, '--batches=3', '--shares=67/33', '--passes=2', '--one_core')
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def test_benchmark_writes_its_cells(done):
    workdir, printed = done
    record = bj.report.read_json(workdir / 'benchmark.json')
    assert {cell['executor'] for cell in record['cells']} == {'dense', 'compacted', 'planned'}
    for cell in record['cells']:
        assert {
            'network',
            'batch',
            'exit_fractions',
            'executor',
            'ms',
            'baseline_ms',
            'gain',
            'mac_limit',
            'time_limit_ms',
            'realised',
            'slowdown_low',
            'slowdown_high',
            'compile_s',
            'peak_memory_mb',
        } <= set(cell)
        assert (cell['network'], cell['batch']) == ('b-lenet', 3)
        np.testing.assert_allclose(cell['exit_fractions'], [2 / 3, 1 / 3])
        inputs = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
        costs = bj.costs.count_macs(bj.models.create('b-lenet'), inputs=inputs)
        assert cell['mac_limit'] == pytest.approx(costs.trunk / (costs.to_exit @ [2 / 3, 1 / 3]))
        assert cell['slowdown_low'] <= 1 / cell['gain'] <= cell['slowdown_high'] * 1.001
    assert 'b-lenet batch 3 exits 67/33' in printed


def test_benchmark_shows_what_it_found(done):
    workdir, _ = done
    page = (workdir / 'benchmark.md').read_text()
    assert '--shares=67/33' in page
    assert 'batches of 3' in page
    for picture in ('gain.png', 'cost.png', 'follows.png'):
        assert (workdir / picture).read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('flag', 'message'),
    [('--shares=70/20', 'shares: got'), ('--shares=a/b', 'shares: got'), ('--batches=0', 'batches: got')],
)
def test_benchmark_refuses_impossible_settings(tmp_path, flag, message):
    result = benchmark(tmp_path, flag)
    assert result.returncode != 0
    assert message in result.stderr
