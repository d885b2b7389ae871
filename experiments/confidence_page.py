"""The record of `experiments.confidence` as a page to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from branchy_jax.report import markdown_table

Record = dict[str, Any]


def page(record: Record) -> str:
    """Lays out the record in Markdown, with the pictures that lie beside it."""
    inputs = record['inputs']
    return '\n\n'.join([
        f'# Confidence of {record["network"]} on {record["dataset"]}',
        f'`{record["command"]}`, {record["device"]}. Fitted and chosen on {inputs["validation"]:,} validation images, '
        f'reported on {inputs["test"]:,} test images. Costs are multiply-accumulates unless they say ms.',
        '## Promises',
        f'{record["promises"][0]["splits"]:,} calibration sets of {inputs["calibration set"]:,} drawn from the test '
        'outputs with replacement; a promise is broken when the risk of the whole population is above ε. '
        'The share broken may be δ, and two standard errors more by chance.',
        _promises(record['promises']),
        'Without a guarantee: the cheapest setting that loses at most ε on the calibration set itself.',
        _comparison(record['comparison']),
        'In expectation only (mean risk at most ε):',
        _comparison(record['expectations']),
        '## Calibration',
        _calibration(record['calibration']),
        '![Reliability diagrams](reliability.png)',
        '## Criteria',
        'Cost on test data (thousand MACs) at the accuracy of the last exit minus what is given up, thresholds from '
        'the validation frontier; in brackets against entropy. A dash: not reached.',
        _criteria(record['criteria']),
        '## Search',
        'Under a bound on the expected time, from stages and heads measured here.',
        _search(record['search']),
        _exact_search(record['exact_search']),
        '## At run time',
        _control(record['control']),
        '![The cost held](control.png)',
        '## Anytime and budgeted batch',
        _anytime(record['protocols']['anytime']),
        _budgeted(record['protocols']['budgeted']),
        '![Accuracy against cost](protocols.png)',
        '## Who leaves where, at the knee',
        _exits(record['exits']),
        '![Images that left at each exit](exits.png)',
    ]) + '\n'  # fmt: skip


def _promises(rows: Sequence[Record]) -> str:
    columns = ['loss', 'method', 'ε', 'δ', 'broken %', 'allowed %', 'cost saved %']
    return markdown_table(columns, [
        [row['loss'], row['method'], f'{row["epsilon"]:g}', f'{row["delta"]:g}', f'{100 * row["broken"]:.1f}',
         f'{100 * row["allowed"]:.1f}', f'{100 * row["cost_saved"]:.1f}']
        for row in rows
    ])  # fmt: skip


def _comparison(rows: Sequence[Record]) -> str:
    columns = ['loss', 'method', 'ε', 'broken %', 'mean risk', 'cost saved %']
    return markdown_table(columns, [
        [row['loss'], row['method'], f'{row["epsilon"]:g}', f'{100 * row["broken"]:.1f}', f'{row["mean_risk"]:.4f}',
         f'{100 * row["cost_saved"]:.1f}']
        for row in rows
    ])  # fmt: skip


def _calibration(rows: Sequence[Record]) -> str:
    columns = ['exit', 'temperature', 'ECE %', 'after', 'one shared', 'adaptive ECE %', 'after', 'Brier', 'after']
    return markdown_table(columns, [
        [str(row['exit']), f'{row["temperature"]:.3f}', *(f'{100 * row[key]:.2f}' for key in (
            'ece_before', 'ece_after', 'ece_after_shared', 'adaptive_ece_before', 'adaptive_ece_after')),
         f'{row["brier_before"]:.4f}', f'{row["brier_after"]:.4f}']
        for row in rows
    ])  # fmt: skip


def _criteria(rows: Sequence[Record]) -> str:
    given_up = [key.removeprefix('cost_') for key in rows[0] if key.startswith('cost_')]

    def cell(row: Record, key: str) -> str:
        if row[f'cost_{key}'] is None:
            return '–'
        against = row.get(f'against_entropy_{key}')
        return f'{row[f"cost_{key}"] / 1e3:.1f}' + (f' ({against:.3f})' if against is not None else '')

    columns = ['criterion', *(f'−{100 * float(key):g} points' for key in given_up)]
    return markdown_table(columns, [[row['criterion'], *(cell(row, key) for key in given_up)] for row in rows])


def _search(rows: Sequence[Record]) -> str:
    columns = ['bound ms', 'method', 'accuracy %', 'gap to exact', 'ms', 'seconds', 'test accuracy %', 'test ms']
    return markdown_table(columns, [
        [f'{row["bound_ms"]:.4f}', row['method'], f'{100 * row["accuracy"]:.2f}', f'{100 * row["gap"]:.2f}',
         f'{row["cost"]:.4f}', f'{row["seconds"]:.3f}', f'{100 * row["test_accuracy"]:.2f}', f'{row["test_cost"]:.4f}']
        for row in rows
    ])  # fmt: skip


def _exact_search(row: Record) -> str:
    size = f'{row["exits"]} exits, {row["inputs"]:,} inputs and {row["values"]} values a threshold'
    return f'Exact search over {size} takes {row["seconds"]:.2f} seconds.'


def _control(rows: Sequence[Record]) -> str:
    columns = ['images', 'target', 'held from 2,000 images after the change on', 'thresholds left alone']
    return markdown_table(columns, [
        [row['part'], f'{row["target"]:.4f}', f'{row["after_2000"]:.4f} ({row["after_2000"] / row["target"] - 1:+.1%})',
         f'{row["left_alone"]:.4f} ({row["left_alone"] / row["target"] - 1:+.1%})']
        for row in rows
    ])  # fmt: skip


def _anytime(rows: Sequence[Record]) -> str:
    return markdown_table(
        ['exit', 'thousand MACs', 'accuracy %'],
        [[str(row['exit']), f'{row["cost"] / 1e3:.1f}', f'{100 * row["accuracy"]:.2f}'] for row in rows],
    )


def _budgeted(rows: Sequence[Record]) -> str:
    return markdown_table(
        ['budget met: thousand MACs', 'accuracy %'],
        [[f'{row["cost"] / 1e3:.1f}', f'{100 * row["accuracy"]:.2f}'] for row in rows[::3]],
    )


def _exits(rows: Sequence[Record]) -> str:
    return markdown_table(
        ['exit', 'share %', 'error %', 'most confused (answer for truth: times)'],
        [[str(row['exit']), f'{100 * row["share"]:.1f}', f'{100 * row["error"]:.2f}', ', '.join(row['confused']) or '–']
         for row in rows],
    )  # fmt: skip
