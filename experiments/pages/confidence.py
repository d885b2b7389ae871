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
        'What is learned was fitted on one half of the validation data; thresholds were chosen on the other: the '
        'cheapest that give up no more than so many points against the last exit. Then: cost on test data in thousand '
        'MACs (change of test accuracy in points; cost at *equal* test accuracy, read off the test curve, against '
        "entropy's). A dash: not reached.",
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
    given_up = sorted({row['given_up'] for row in rows})
    at = {(row['criterion'], row['given_up']): row for row in rows}

    def cell(name: str, key: float) -> str:
        row, entropy = at[name, key], at['entropy', key]
        chosen, equal = '–', '–'
        if 'cost' in row:
            chosen = f'{row["cost"] / 1e3:.1f} ({100 * row["accuracy_change"]:+.2f}; '
        if 'cost_at_equal_accuracy' in row and 'cost_at_equal_accuracy' in entropy:
            equal = f'{row["cost_at_equal_accuracy"] / entropy["cost_at_equal_accuracy"]:.3f}'
        return f'{chosen}{equal})' if 'cost' in row else f'– (–; {equal})'

    names = list(dict.fromkeys(row['criterion'] for row in rows))
    columns = ['criterion', *(f'−{100 * key:g} points' for key in given_up)]
    return markdown_table(columns, [[name, *(cell(name, key) for key in given_up)] for name in names])


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
    columns = [
        'images',
        'target',
        'held from 2,000 images after the change on',
        'thresholds from validation, left alone',
    ]
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
