"""IREE and ONNX Runtime answer as `dense` does, without jax."""

import json
import sys

import numpy as np
import pytest
from conftest import thresholds_between

import branchy_jax as bj
from branchy_jax.export import programs as programs_module
from experiments import run_exported


def test_ties_count_apart():
    found = {'label': np.array([1, 2, 3, 4]), 'exit_index': np.array([0, 0, 1, 1])}
    expected = {'label': np.array([1, 9, 9, 4]), 'exit_index': np.array([0, 0, 1, 0])}
    assert run_exported.compare(found, expected) == {'differ': 3, 'differ_at_ties': 0, 'ties': 0}
    expected['tie'] = np.array([True, False, True, False])
    assert run_exported.compare(found, expected) == {'differ': 2, 'differ_at_ties': 1, 'ties': 2}


@pytest.mark.parametrize('embedded_bytes', [0, 2**24])
def test_iree_answers_as_dense_does(network, embedded_bytes, tmp_path, monkeypatch):
    """Weights lie beside the programs, or in them."""
    for package in ('compiler', 'runtime'):
        pytest.importorskip(f'iree.{package}', reason=f'pip install iree-base-{package}')
    monkeypatch.setattr(programs_module, '_MOST_EMBEDDED_BYTES', embedded_bytes)
    thresholds = thresholds_between(*network).astype(np.float32)
    bj.export.save(tmp_path / 'new', *network[:2], thresholds, inputs=network[2], batch_size=8, platforms=['cpu'])
    expected = bj.inference.dense(network[0])(*network[1:], thresholds)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    for name in ('staged', 'batch'):
        loaded = run_exported.load(tmp_path / 'new', [name], iree=True)
        found = run_exported.PROGRAMS[name](loaded, np.asarray(network[2])[:21])
        for part in ('label', 'exit_index'):
            np.testing.assert_array_equal(found[part], getattr(expected, part)[:21])
        for part in ('logits', 'uncertainty'):
            np.testing.assert_allclose(found[part], getattr(expected, part)[:21], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('batch', [False, True])
def test_onnx_files_answer_as_dense_does(network, batch, tmp_path, monkeypatch, capsys):
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package, reason="pip install '.[peers]'")
    thresholds, path = thresholds_between(*network).astype(np.float32), tmp_path / 'network.onnx'
    bj.export.save_onnx(path, *network[:2], thresholds, inputs=network[2], batch=batch)
    expected = bj.inference.dense(network[0])(*network[1:], thresholds)
    np.save(tmp_path / 'images.npy', network[2])
    np.savez(tmp_path / 'answers.npz', label=expected.label, exit_index=expected.exit_index)
    flags = [f'--images={tmp_path}/images.npy', f'--expect={tmp_path}/answers.npz']
    monkeypatch.setattr(sys, 'argv', ['run_exported.py', str(path), *flags])
    run_exported.main()
    result = json.loads(capsys.readouterr().out)
    assert (result['images'], result['differ'], result['exits_asked']) == (24, 0, [0, 1, 2])
