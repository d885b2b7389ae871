"""Tables whose columns are format strings, and how shares and thresholds are shown in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from branchy_jax.report import markdown_table


def table(columns: Mapping[str, str], rows: Iterable[Any]) -> str:
    """Lays out a table in Markdown, every column by a format string of the fields of a row.

    A per cent sign at the end of a cell is left out: the name of the column says it.

    Args:
        columns: format strings, by name of the column.
        rows: mappings, or values of data classes.

    Example:
        >>> print(table({'exit': '{exit}', 'share %': '{share:.1%}'}, [{'exit': 1, 'share': 0.5}]))
        | exit | share % |
        |------|---------|
        | 1    | 50.0    |
    """
    fields = [row if isinstance(row, Mapping) else vars(row) for row in rows]
    cells = [[form.format_map(row).removesuffix('%') for form in columns.values()] for row in fields]
    return markdown_table(list(columns), cells)


def percent(shares: Iterable[float]) -> str:
    """Returns shares as a table shows them.

    Example:
        >>> percent((0.9, 0.1))
        '90.0, 10.0'
    """
    return ', '.join(f'{100 * share:.1f}' for share in shares)


def rounded(thresholds: Iterable[float]) -> str:
    """Returns thresholds as a table shows them.

    Example:
        >>> rounded((0.25, 1.5))
        '0.25, 1.5'
    """
    return ', '.join(f'{threshold:.4g}' for threshold in thresholds)
