"""Records of a run as JSON and Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically

__all__ = ['markdown_table', 'read_json', 'write_json', 'write_text']

Record = Mapping[str, Any]
"""One row of a report: numbers, strings and lists."""


def write_json(path: Path | str, record: Record) -> None:
    """Writes a record as strict JSON, atomically.

    JSON has no infinite numbers, so they become the strings ``"inf"`` and ``"-inf"``; `read_json` converts them back.

    Raises:
        ValueError: if the record holds NaN. Leave out values that are not known.
    """
    write_text(path, json.dumps(_encoded(record), indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        ValueError: if the file is missing or not JSON.
    """
    try:
        return _decoded(json.loads(Path(path).read_text(encoding='utf-8')))
    except (OSError, ValueError) as error:
        raise ValueError(f'path: cannot read a report from {path}: {error}') from error


def write_text(path: Path | str, text: str) -> None:
    """Writes text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table with padded columns.

    Args:
        columns: names of the columns.
        rows: cells; every row has one cell for each column.

    Raises:
        ValueError: if a row has another number of cells.

    Example:
        >>> print(markdown_table(['network', 'gain'], [['lenet', '1.00']]))
        | network | gain |
        |---------|------|
        | lenet   | 1.00 |
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f'rows: expected {len(columns)} cells ({", ".join(columns)}), got {list(row)}')
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [' | '.join(map(str.ljust, row, widths)) for row in (columns, *rows)]
    rule = '|'.join('-' * (width + 2) for width in widths)
    return '\n'.join([f'| {lines[0]} |', f'|{rule}|', *(f'| {line} |' for line in lines[1:])])


def _encoded(value: Any, place: str = '') -> Any:
    """Returns a value that strict JSON can hold; ``place`` is its path in the record."""
    if hasattr(value, 'tolist'):  # arrays and NumPy's numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _encoded(inner, f'{place}.{key}' if place else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(inner, f'{place}[{n}]') for n, inner in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f'record: {place} is NaN; leave out values that are not known')
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    return float(value) if value in ('inf', '-inf') else value
