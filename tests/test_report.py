import json

import numpy as np
import pytest

from branchy_jax import plots, report

BASELINE = {
    'network': 'lenet', 'test_accuracy': 0.97, 'thresholds': [], 'exit_fractions': [1.0], 'latency_ms': 0.5,
    'gain': 1.0,
}  # fmt: skip
BRANCHY = {
    'network': 'b-lenet', 'test_accuracy': 0.975, 'thresholds': [0.5, float('inf')],
    'exit_fractions': [0.9, 0.06, 0.04], 'latency_ms': 0.2, 'gain': 2.5, 'gain_plain': 3.0, 'mac_gain': 4.0,
}  # fmt: skip


def test_records_round_trip_through_strict_json(tmp_path):
    record = {'rows': [BRANCHY], 'array': np.array([-np.inf, 1.5]), 'number': np.float32(2), 'none': None}
    report.write_json(tmp_path / 'new' / 'report.json', record)
    text = (tmp_path / 'new' / 'report.json').read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    found = report.read_json(tmp_path / 'new' / 'report.json')
    assert found == {'rows': [BRANCHY], 'array': [-np.inf, 1.5], 'number': 2.0, 'none': None}


def test_unknown_figures_are_not_written(tmp_path):
    path = tmp_path / 'report.json'
    report.write_json(path, {'gain': 1.0})
    with pytest.raises(ValueError, match='Out of range float'):
        report.write_json(path, {'gain': float('nan')})
    assert report.read_json(path) == {'gain': 1.0}


def test_unreadable_report_is_refused(tmp_path):
    (tmp_path / 'half.json').write_text('{"rows": [')
    for name in ('half.json', 'missing.json'):
        with pytest.raises(ValueError, match='path: cannot read a report'):
            report.read_json(tmp_path / name)


def test_table_shows_every_figure_and_dashes_for_what_is_missing():
    lines = report.table_of_networks([BASELINE, BRANCHY]).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == [
        'network', 'accuracy %', 'ms', 'gain', 'gain over plain', 'MAC gain', 'thresholds', 'exits %'
    ]  # fmt: skip
    assert cells[2] == ['lenet', '97.00', '0.500', '1.00', '–', '–', '–', '100.0']
    assert cells[3] == ['b-lenet', '97.50', '0.200', '2.50', '3.00', '4.00', '0.5, inf', '90.0, 6.0, 4.0']
    assert len({len(line) for line in lines}) == 1


def test_tradeoff_draws_what_it_is_given(tmp_path, monkeypatch):
    drawn = []
    save = plots.speed.save
    monkeypatch.setattr(plots.speed, 'save', lambda figure, path: drawn.append(figure) or save(figure, path))
    frontier = [
        {'latency_ms': ms, 'test_accuracy': accuracy} for ms, accuracy in [(0.1, 0.9), (0.2, 0.96), (0.4, 0.98)]
    ]
    plots.tradeoff(tmp_path / 'tradeoff.png', frontier, BASELINE, BRANCHY, knee=frontier[1], title='A title')
    (axes,) = drawn[0].axes
    lines = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(lines['thresholds of the frontier'], [[0.1, 90], [0.2, 96], [0.4, 98]])
    np.testing.assert_allclose(lines['knee'], [[0.2, 96]])
    np.testing.assert_allclose(lines['lenet, no exits'], [[0.5, 97]])
    np.testing.assert_allclose(lines['chosen on validation data, 2.50× faster'], [[0.2, 97.5]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('time per image, batch 1 (ms)', 'test accuracy (%)')
    assert (tmp_path / 'tradeoff.png').read_bytes().startswith(b'\x89PNG')
