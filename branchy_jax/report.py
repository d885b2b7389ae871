"""Records of a run as JSON and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically

Record = Mapping[str, Any]
"""One row of a report: plain numbers, strings and lists."""


def write_json(path: Path | str, record: Record) -> None:
    """Writes a record as JSON that any reader parses, atomically.

    Infinite thresholds become the strings ``"inf"`` and ``"-inf"``, which JSON has no numbers for; `read_json` turns
    them back.

    Raises:
        ValueError: the record holds NaN: a figure that is not known is to be left out, not written.
    """
    write_text(path, json.dumps(_encoded(record), indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    try:
        return _decoded(json.loads(Path(path).read_text(encoding='utf-8')))
    except (OSError, ValueError) as error:
        raise ValueError(f'path: cannot read a report from {path}: {error}') from error


def write_text(path: Path | str, text: str) -> None:
    """Writes text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table in Markdown, columns padded so that the source reads well too.

    Args:
        columns: their names.
        rows: cells, as many in each as there are columns.

    Raises:
        ValueError: a row with another number of cells.

    Example:
        >>> print(markdown_table(['network', 'gain'], [['lenet', '1.00']]))
        | network | gain |
        |---------|------|
        | lenet   | 1.00 |
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f'rows: expected {len(columns)} cells ({", ".join(columns)}), got {list(row)}')
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |' for row in cells
    ]
    rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
    return '\n'.join([lines[0], rule, *lines[1:]])


def table_of_networks(rows: Sequence[Record], *, metric: str = 'accuracy', label: str | None = None) -> str:
    """Lays out Table I: one network per row, its accuracy, speed and exits.

    Args:
        rows: with the keys ``network``, ``test_<metric>``, ``latency_ms``, ``gain``, ``gain_plain``, ``mac_gain``,
            ``thresholds`` and ``exit_fractions``; one that is missing shows as a dash.
        metric: what ``test_<metric>`` is called.
        label: what the column is called, if otherwise.
    """
    columns = ['network', f'{label or metric} %', 'ms', 'gain', 'gain over plain', 'MAC gain', 'thresholds', 'exits %']
    cells = [
        [
            str(row['network']),
            _number(row.get(f'test_{metric}'), 2, scale=100),
            _number(row.get('latency_ms'), 3),
            _number(row.get('gain'), 2),
            _number(row.get('gain_plain'), 2),
            _number(row.get('mac_gain'), 2),
            ', '.join(f'{threshold:.4g}' for threshold in row.get('thresholds', [])) or '–',
            ', '.join(_number(share, 1, scale=100) for share in row.get('exit_fractions', [])) or '–',
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def _number(value: float | None, digits: int, *, scale: float = 1) -> str:
    return '–' if value is None else f'{value * scale:.{digits}f}'


def _encoded(value: Any, place: str = '') -> Any:
    """Returns what JSON has words for; ``place`` tells where in the record the value stands."""
    if hasattr(value, 'tolist'):  # arrays, and NumPy's own numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _encoded(inner, f'{place}.{key}' if place else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(inner, f'{place}[{n}]') for n, inner in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f'record: {place} is NaN; leave out a figure that is not known')
    if isinstance(value, float) and math.isinf(value):
        return 'inf' if value > 0 else '-inf'
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    return float(value) if value in ('inf', '-inf') else value
