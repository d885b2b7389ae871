"""The page and the picture of a run; and what the pages of all commands share: tables, provenance, the paper's rows."""

import functools
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.measure import Ratio
from experiments.run.networks import TASKS

Row = dict[str, Any]
_CLOCKS = ('latency_ms', 'gain', 'gain_plain', 'mac_gain', 'thresholds', 'exit_fractions')
JPEG_NOTE = 'This CIFAR-10 is a copy re-encoded as JPEG (quality 75).'


def provenance(name: str) -> dict[str, str]:
    """Returns the fields of a record that state its command and its device.

    Args:
        name: of the command, below ``experiments``.
    """
    return {'device': describe_device(), 'command': shlex.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])}


def describe_device() -> str:
    """Names the device and the versions that a measurement was made with."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    kind = device.device_kind if device.platform != 'cpu' else f'{platform.machine()} CPU, {cores} cores'
    return f'{kind}, jax {jax.__version__}, Python {platform.python_version()}'


def paper(figure: str, **where: Any) -> list[Row]:
    """Returns the paper's rows of a figure or table that have the given values."""
    rows = bj.report.read_json(Path(__file__).with_name('paper.json'))['rows']
    return [row for row in rows if row['figure'] == figure and where.items() <= row.items()]


def store(path: Path, record: Row, lay_out: Callable[[Row], str]) -> Row:
    """Writes a record as JSON and beside it as a page; returns the record."""
    bj.report.write_json(path, record)
    bj.report.write_text(path.with_suffix('.md'), lay_out(record))
    return record


def of_ratio(name: str, ratio: Ratio) -> Row:
    """Returns a ratio and its interval as the fields that `table` shows together."""
    return {name: ratio.median, f'{name}_low': ratio.low, f'{name}_high': ratio.high}


def table(rows: Iterable[Mapping[str, Any]], *names: str) -> str:
    """Lays out fields of rows in Markdown, a column per name.

    Shares and accuracies are shown in per cent, a field ``x`` that has ``x_low`` and ``x_high`` with that interval. A
    dash stands where a row lacks a field.
    """
    columns = [name.replace('_', ' ') + (' %' if _is_share(name) else '') for name in names]
    return bj.report.markdown_table(columns, [[_cell(row, name) for name in names] for row in rows])


_SHARES = ['accuracy', 'miou', 'fraction', 'share', 'forced', 'error', 'broken', 'allowed', 'saved', 'change']


def _is_share(name: str) -> bool:
    return name.startswith('ece_') or name.split('_')[-1].removesuffix('s') in _SHARES


def _cell(row: Mapping[str, Any], name: str) -> str:
    text = _shown(row.get(name), _is_share(name))
    return f'{text} [{row[f"{name}_low"]:.3g}, {row[f"{name}_high"]:.3g}]' if f'{name}_low' in row else text


def _shown(value: Any, is_share: bool) -> str:
    if isinstance(value, list):
        return ', '.join(_shown(entry, is_share) for entry in value) or '–'
    if is_share and value is not None:
        return f'{100 * value:.4g}'
    if isinstance(value, float):
        return f'{value:.4g}' if abs(value) < 1e4 or np.isinf(value) else f'{value:,.0f}'
    return '–' if value is None else str(value)


def write(workdir: Path, record: Row, config: ConfigDict) -> None:
    """Writes ``report.json``, ``report.md`` and ``tradeoff.png`` into the run's folder, and prints the table.

    Args:
        workdir: the folder.
        record: of the run.
        config: its settings.
    """
    task, (baseline, branchy) = TASKS[record['task']], record['rows']
    store(workdir / 'report.json', record, functools.partial(page, choose=config.choose))
    bj.plots.tradeoff(
        workdir / 'tradeoff.png',
        record['frontier'],
        baseline,
        branchy,
        knee=next((row for row in record['frontier'] if row['knee']), None),
        title=f'{branchy["network"]} on {record["dataset"]}: {task.label} against time as the thresholds vary',
        metric=task.metric,
        label=task.label,
        batch=baseline['batch'],
    )
    print(f'\n{networks(record)}\n\nThe page: {workdir}/report.md; the picture: {workdir}/tradeoff.png')


def networks(record: Row) -> str:
    """Lays out Table I: both networks and the paper's."""
    metric = f'test_{TASKS[record["task"]].metric}'
    rows = [*record['rows'], *record['paper']]
    return table(rows, 'network', metric, *_CLOCKS)


def page(record: Row, choose: str) -> str:
    """Lays out a run in Markdown around the table of its networks."""
    (_, branchy), task, tried = record['rows'], TASKS[record['task']], record['criteria_tried']
    alone = branchy['batch'] == 1 and 'CPU' in record['device']
    timed = (
        f'Batch {branchy["batch"]}, mean over {branchy["latency_images"]} test images, end to end, median of '
        f'{branchy["latency_passes"]} passes, interleaved'
        f'{", on one core, where each network is fastest" if alone else ""}. `gain` compares like with like: both '
        f'networks in their fastest form (95 % interval of the median {branchy["gain_low"]:.2f} to '
        f'{branchy["gain_high"]:.2f}); `gain over plain` is over the baseline as written.'
    )
    each = ', '.join(f'{100 * value:.2f} %' for value in branchy[f'exit_{task.metric}'])
    chosen = (
        f'Each exit on its own: {each}. Thresholds, of {record["criterion"]}, were picked on validation data '
        f'({choose}); test data served for the figures alone.'
    )
    if record['paper']:
        chosen += (
            " The paper's times count trunk segments only, on other machines; by that protocol ours gain "
            f'{branchy["trunk_only_gain"]:.2f}.'
        )
    parts = [
        f'# {branchy["network"]} on {record["dataset"]}',
        f'`{record["command"]}`',
        f'{record["device"]}.\n{textwrap.fill(timed, 120)}',
        networks(record),
        textwrap.fill(chosen, 120),
        table(record['operating_points'], 'name', f'test_{task.metric}', *_CLOCKS),
        table(tried, 'criterion', f'validation_{task.metric}', 'mac_gain') if len(tried) > 1 else '',
        JPEG_NOTE if record['dataset'] == 'cifar10' else '',
        f'![{task.label} against time](tradeoff.png)',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'
