import json

import numpy as np
import pytest

from branchy_jax import report

ROW = {'network': 'b-lenet', 'thresholds': [0.5, float('inf')], 'exit_fractions': [0.9, 0.06, 0.04], 'gain': 2.5}


def test_records_round_trip_through_strict_json(tmp_path):
    path = tmp_path / 'new' / 'report.json'
    record = {'rows': [ROW], 'array': np.array([-np.inf, 1.5]), 'number': np.float32(2), 'none': None}
    report.write_json(path, record)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    expected = {'rows': [ROW], 'array': [-np.inf, 1.5], 'number': 2.0, 'none': None}
    assert report.read_json(path) == expected
    with pytest.raises(ValueError, match=r'record: rows\[1\].gain is NaN'):
        report.write_json(path, {'rows': [{'gain': 1.0}, {'gain': np.float32('nan')}]})
    assert report.read_json(path) == expected


def test_unreadable_report_is_refused(tmp_path):
    (tmp_path / 'half.json').write_text('{"rows": [')
    for name in ('half.json', 'missing.json'):
        with pytest.raises(ValueError, match='path: cannot read a report'):
            report.read_json(tmp_path / name)


def test_tables_are_padded_and_rows_with_other_cells_than_columns_are_refused():
    lines = report.markdown_table(['network', 'gain'], [['b-lenet, tuned', '2.50'], ['lenet', '1']]).splitlines()
    assert lines[1:3] == ['|----------------|------|', '| b-lenet, tuned | 2.50 |']
    assert len({len(line) for line in lines}) == 1
    assert report.markdown_table(['network', 'gain'], []).splitlines() == ['| network | gain |', '|---------|------|']
    for row in (['lenet'], ['lenet', '1.00', '2.00']):
        with pytest.raises(ValueError, match=r'rows: expected 2 cells \(network, gain\), got'):
            report.markdown_table(['network', 'gain'], [row])
