import json

import numpy as np
import pytest

from branchy_jax import report

BASELINE = {
    'network': 'lenet',
    'test_accuracy': 0.97,
    'thresholds': [],
    'exit_fractions': [1.0],
    'latency_ms': 0.5,
    'gain': 1.0,
}
BRANCHY = {
    'network': 'b-lenet',
    'test_accuracy': 0.975,
    'thresholds': [0.5, float('inf')],
    'exit_fractions': [0.9, 0.06, 0.04],
    'latency_ms': 0.2,
    'gain': 2.5,
    'gain_plain': 3.0,
    'mac_gain': 4.0,
}


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
    with pytest.raises(ValueError, match=r'record: rows\[1\].gain is NaN'):
        report.write_json(path, {'rows': [{'gain': 1.0}, {'gain': np.float32('nan')}]})
    assert report.read_json(path) == {'gain': 1.0}


def test_unreadable_report_is_refused(tmp_path):
    (tmp_path / 'half.json').write_text('{"rows": [')
    for name in ('half.json', 'missing.json'):
        with pytest.raises(ValueError, match='path: cannot read a report'):
            report.read_json(tmp_path / name)


def test_table_shows_every_figure_and_dashes_for_what_is_missing():
    lines = report.table_of_networks([BASELINE, BRANCHY]).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['network', 'accuracy %', 'ms', 'gain', 'gain over plain', 'MAC gain', 'thresholds', 'exits %']
    assert cells[2] == ['lenet', '97.00', '0.500', '1.00', '–', '–', '–', '100.0']
    assert cells[3] == ['b-lenet', '97.50', '0.200', '2.50', '3.00', '4.00', '0.5, inf', '90.0, 6.0, 4.0']
    assert len({len(line) for line in lines}) == 1


def test_rows_with_other_cells_than_columns_are_refused():
    for row in (['lenet'], ['lenet', '1.00', '2.00']):
        with pytest.raises(ValueError, match=r'rows: expected 2 cells \(network, gain\), got'):
            report.markdown_table(['network', 'gain'], [row])
    assert report.markdown_table(['network', 'gain'], []).splitlines() == ['| network | gain |', '|---------|------|']
