"""The record of `experiments.confidence` as a page to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import branchy_jax as bj
from experiments.pages.tables import table

Record = dict[str, Any]
_PROMISES = {
    'loss': '{loss}',
    'method': '{method}',
    'ε': '{epsilon:g}',
    'δ': '{delta:g}',
    'broken %': '{broken:.1%}',
    'allowed %': '{allowed:.1%}',
    'cost saved %': '{cost_saved:.1%}',
}
_COMPARISON = {
    'loss': '{loss}',
    'method': '{method}',
    'ε': '{epsilon:g}',
    'broken %': '{broken:.1%}',
    'mean risk': '{mean_risk:.4f}',
    'cost saved %': '{cost_saved:.1%}',
}
_CALIBRATION = {
    'exit': '{exit}',
    'temperature': '{temperature:.3f}',
    'ECE %': '{ece_before:.2%}',
    'ECE % after': '{ece_after:.2%}',
    'one shared': '{ece_after_shared:.2%}',
    'adaptive ECE %': '{adaptive_ece_before:.2%}',
    'adaptive ECE % after': '{adaptive_ece_after:.2%}',
    'Brier': '{brier_before:.4f}',
    'Brier after': '{brier_after:.4f}',
}
_SEARCH = {
    'bound ms': '{bound_ms:.4f}',
    'method': '{method}',
    'accuracy %': '{accuracy:.2%}',
    'gap to exact': '{gap:.2%}',
    'ms': '{cost:.4f}',
    'seconds': '{seconds:.3f}',
    'test accuracy %': '{test_accuracy:.2%}',
    'test ms': '{test_cost:.4f}',
}
_EXACT_SEARCH = (
    'Exact search over {exits} exits, {inputs:,} inputs and {values} values a threshold takes {seconds:.2f} seconds.'
)


def page(record: Record) -> str:
    """Lays out the record in Markdown, with the pictures that lie beside it."""
    inputs = record['inputs']
    parts = [
        f'# Confidence of {record["network"]} on {record["dataset"]}',
        f'`{record["command"]}`, {record["device"]}. Fitted and chosen on {inputs["validation"]:,} validation images, '
        f'reported on {inputs["test"]:,} test images. Costs are multiply-accumulates unless they say ms.',
        '## Promises',
        f'{record["promises"][0]["splits"]:,} calibration sets of {inputs["calibration set"]:,} drawn from the test '
        'outputs with replacement; a promise is broken when the risk of the whole population is above ε. '
        'The share broken may be δ, and two standard errors more by chance.',
        table(_PROMISES, record['promises']),
        'Without a guarantee: the cheapest setting that loses at most ε on the calibration set itself.',
        table(_COMPARISON, record['comparison']),
        'In expectation only (mean risk at most ε):',
        table(_COMPARISON, record['expectations']),
        '## Calibration',
        table(_CALIBRATION, record['calibration']),
        '![Reliability diagrams](reliability.png)',
        '## Criteria',
        'What is learned was fitted on one half of the validation data; thresholds were chosen on the other: the '
        'cheapest that give up no more than so many points against the last exit. Then: cost on test data in thousand '
        'MACs (change of test accuracy in points; cost at *equal* test accuracy, read off the test curve, against '
        "entropy's). A dash: not reached.",
        _criteria(record['criteria']),
        '## Search',
        'Under a bound on the expected time, from stages and heads measured here.',
        table(_SEARCH, record['search']),
        _EXACT_SEARCH.format_map(record['exact_search']),
        '## At run time',
        _control(record['control']),
        '![The cost held](control.png)',
        '## Anytime and budgeted batch',
        _protocol({'exit': '{exit}', 'thousand MACs': '{thousands:.1f}'}, record['protocols']['anytime']),
        _protocol({'budget met: thousand MACs': '{thousands:.1f}'}, record['protocols']['budgeted'][::3]),
        '![Accuracy against cost](protocols.png)',
        '## Who leaves where, at the knee',
        _exits(record['exits']),
        '![Images that left at each exit](exits.png)',
    ]
    return '\n\n'.join(parts) + '\n'


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
    return bj.report.markdown_table(columns, [[name, *(cell(name, key) for key in given_up)] for name in names])


def _control(rows: Sequence[Record]) -> str:
    columns = {
        'images': '{part}',
        'target': '{target:.4f}',
        'held from 2,000 images after the change on': '{after_2000:.4f} ({over:+.1%})',
        'thresholds from validation, left alone': '{left_alone:.4f} ({over_alone:+.1%})',
    }
    return table(
        columns,
        [
            {**row, 'over': row['after_2000'] / row['target'] - 1, 'over_alone': row['left_alone'] / row['target'] - 1}
            for row in rows
        ],
    )


def _protocol(columns: dict[str, str], rows: Sequence[Record]) -> str:
    columns = {**columns, 'accuracy %': '{accuracy:.2%}'}
    return table(columns, [{**row, 'thousands': row['cost'] / 1e3} for row in rows])


def _exits(rows: Sequence[Record]) -> str:
    columns = {
        'exit': '{exit}',
        'share %': '{share:.1%}',
        'error %': '{error:.2%}',
        'most confused (answer for truth: times)': '{confused}',
    }
    return table(columns, [{**row, 'confused': ', '.join(row['confused']) or '–'} for row in rows])
