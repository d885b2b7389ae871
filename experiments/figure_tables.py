"""Table I and the energy table, from stored runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import branchy_jax as bj
from experiments import paper

_DASH = '–'
_COLUMNS = [
    'network', 'run', 'device', 'batch', 'test accuracy %', 'ms an image', 'gain, end to end', 'gain over plain',
    'gain, trunk only', 'exits %',
]  # fmt: skip


def table_1(found: Mapping[str, Mapping[str, Any]], places: Mapping[str, Sequence[str]]) -> str:
    """Lays out Table I: per network the paper's rows, ours at batch 1 and in batches, and the static controls.

    Args:
        found: records of the runs by folder.
        places: folders of each network.
    """
    rows = []
    for network, names in places.items():
        rows += [_paper_row(row, paper.TABLE_1[network][0]) for row in paper.TABLE_1[network]]
        run_here = [name for name in names if name in found]
        if not run_here:
            rows.append([network, 'not run', *[_DASH] * (len(_COLUMNS) - 2)])
        for name in run_here:
            rows += _rows_of(name, found[name])
    legend = (
        'Gain, end to end: over the same trunk without branches, trained on its own, both rewritten by '
        "`inference.optimize`. Gain over plain: over that baseline merely jitted. Trunk only: the paper's protocol, "
        "in which side heads, softmax and copies are not timed; the paper's own gains are of that kind. Where a branch "
        'leaves before the trunk begins (b-lenet, tuned) it counts next to nothing. Static: the '
        'first stages and their exit alone, trained from scratch as long as the baseline. '
        '"brief" runs are four epochs long: not a reproduction.'
    )
    return f'{bj.report.markdown_table(_COLUMNS, rows)}\n\n{legend}'


def _paper_row(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    cpu, gpu = (baseline[key] / row[key] for key in ('latency_ms', 'gpu_latency_ms'))
    return [
        row['network'], _DASH, 'CPU / GPU', '1', f'{100 * row["test_accuracy"]:.2f}',
        f'{row["latency_ms"]:.2f} / {row["gpu_latency_ms"]:.2f}', _DASH, _DASH, f'{cpu:.1f} / {gpu:.1f}',
        _shares(row),
    ]  # fmt: skip


def _rows_of(name: str, run: Mapping[str, Any]) -> list[list[str]]:
    report = run['report']
    device = report['device'].split(',')[0]
    baseline, branchy = report['rows']
    rows = [_row(baseline['network'], name, device, baseline)]
    for point in report['operating_points']:
        label = branchy['network'] + ('' if point['name'] == 'table' else f', {point["name"]}')
        rows.append(_row(label, name, device, point))
    accuracy = {point['name']: point['test_accuracy'] for point in report['operating_points']}
    for cell in run.get('batches', {}).get('batches', []):
        label = branchy['network'] + ('' if cell['operating_point'] == 'table' else f', {cell["operating_point"]}')
        rows.append(_row(label, name, device, {**cell, 'test_accuracy': accuracy[cell['operating_point']]}))
    for row in run.get('smaller', {}).get('rows', []):
        rows.append(_row(f'static: {row["network"]}', name, device, row))
    return rows


def _row(network: str, name: str, device: str, row: Mapping[str, Any]) -> list[str]:
    interval = f' [{row["gain_low"]:.2f}, {row["gain_high"]:.2f}]' if 'gain_low' in row else ''
    return [
        network, name, device, f'{row.get("batch", 1):,}', f'{100 * row["test_accuracy"]:.2f}',
        f'{row["latency_ms"]:.4f}', f'{row["gain"]:.2f}{interval}', _number(row.get('gain_plain')),
        _number(row.get('trunk_only_gain')), _shares(row),
    ]  # fmt: skip


def _shares(row: Mapping[str, Any]) -> str:
    return ', '.join(f'{100 * share:.1f}' for share in row.get('exit_fractions', [])) or _DASH


def _number(value: float | None) -> str:
    return _DASH if value is None else f'{value:.2f}'


def energy_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Lays out joules per image; where nothing was measured, it says why."""
    lines, rows = [], []
    for name, run in found.items():
        if 'energy' in run:
            record = run['energy']
            lines.append(f'- {name}, {record["device"]}: {record["note"]}')
            rows += [
                [
                    f'{row["network"]} {row["operating_point"]}', name, str(row['batch']),
                    f'{1e3 * row["joules"]:.3f}', f'{1e3 * row["joules_with_idle"]:.3f}', f'{row["idle_watts"]:.1f}',
                    f'{row["watts"]:.1f}', f'{100 * row["resolution"]:.2f}',
                ]
                for row in record['rows']
            ]  # fmt: skip
    columns = ['network', 'run', 'batch', 'mJ an image', 'with idle', 'idle W', 'W', 'resolution %']
    table = bj.report.markdown_table(columns, rows) if rows else ''
    return '\n\n'.join(part for part in ('\n'.join(lines) or 'not run', table) if part)
