"""The page of a run: its table, how it was timed and chosen, its operating points and, for masks, its classes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import branchy_jax as bj
from experiments.pages.paper import JPEG_NOTE
from experiments.pages.tables import percent, rounded, table
from experiments.run.masks import STILL_UNSURE, class_names
from experiments.run.records import RunRecord
from experiments.run.tasks import TASKS

_LIKE_WITH_LIKE = {
    True: 'both networks as `inference.optimize` rewrites them',
    False: "the planner's choice over the faster of the baselines, plain or rewritten",
}


def write(workdir: Path, record: RunRecord, config: ConfigDict) -> None:
    """Writes ``report.json``, ``report.md`` and ``tradeoff.png`` into the run's folder, and prints the table.

    Args:
        workdir: the folder.
        record: of the run.
        config: its settings.
    """
    stored, task = record.to_json(), TASKS[record.task]
    bj.report.write_json(workdir / 'report.json', stored)
    baseline, branchy = stored['rows']
    networks = _networks([baseline, branchy, *record.paper], metric=task.key, label=task.label)
    bj.report.write_text(workdir / 'report.md', page(record, config, networks))
    bj.plots.tradeoff(
        workdir / 'tradeoff.png',
        stored['frontier'],
        baseline,
        branchy,
        knee=next((point for point in stored['frontier'] if point['knee']), None),
        title=f'{record.network} on {record.dataset}: {task.label} against time as the thresholds vary',
        metric=task.key,
        label=task.label,
        batch=record.baseline.clock.batch,
    )
    print(f'\n{networks}\n\nWritten to {workdir}/report.md')


def _networks(rows: Sequence[Mapping[str, Any]], *, metric: str, label: str) -> str:
    """Lays out Table I: one network per row; a figure that a row lacks is a dash."""
    columns = ['network', f'{label} %', 'ms', 'gain', 'gain over plain', 'MAC gain', 'thresholds', 'exits %']
    cells = [
        [
            row['network'],
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
    return bj.report.markdown_table(columns, cells)


def _number(value: float | None, digits: int, *, scale: float = 1) -> str:
    return '–' if value is None else f'{value * scale:.{digits}f}'


def page(record: RunRecord, config: ConfigDict, networks: str) -> str:
    """Lays out a run in Markdown around the table of its networks."""
    clock, point = record.points[0].clock, record.points[0]
    alone = clock.batch == 1 and jax.default_backend() == 'cpu'
    cores = ', on one core, where each network is fastest' if alone else ''
    timed = (
        f'Batch {clock.batch}, mean over {clock.latency_images} test images, end to end, median of '
        f'{clock.latency_passes} passes, interleaved{cores}. `gain` compares like with like: '
        f'{_LIKE_WITH_LIKE[clock.batch == 1]} (95 % interval of the median {clock.gain_low:.2f} to '
        f'{clock.gain_high:.2f}); `gain over plain` is over the baseline as written.'
    )
    chosen = (
        f'Each exit on its own: {", ".join(f"{100 * value:.2f} %" for value in record.exit_accuracy)}. '
        f'Thresholds, of {record.criterion}, were picked on validation data ({config.choose}); test data served '
        'for the figures alone.'
    )
    if record.paper:
        chosen += (
            " The paper's times count trunk segments only, on other machines; by that protocol ours gain "
            f'{point.trunk_only_gain:.2f}.'
        )
    label = TASKS[record.task].label
    parts = [
        f'# {record.network} on {record.dataset}',
        f'`{record.command}`',
        f'{record.device}.\n{textwrap.fill(timed, 120)}',
        networks,
        textwrap.fill(chosen, 120),
        _points(record, label),
        _criteria(record, label),
        JPEG_NOTE if record.dataset == 'cifar10' else '',
        f'![{label} against time](tradeoff.png)',
        _classes(record),
        _pixels(record),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _points(record: RunRecord, label: str) -> str:
    columns = {
        'operating point': '{name}',
        f'{label} %': '{accuracy:.2%}',
        'gain': '{clock.gain:.2f}',
        'gain over plain': '{clock.gain_plain:.2f}',
        'MAC gain': '{mac_gain:.2f}',
        'thresholds': '{thresholds}',
        'exits %': '{exits}',
    }
    return table(
        columns,
        [
            {**vars(point), 'thresholds': rounded(point.thresholds), 'exits': percent(point.exit_fractions)}
            for point in record.points
        ],
    )


def _criteria(record: RunRecord, label: str) -> str:
    if len(record.tried) < 2:
        return ''
    columns = {'criterion': '{criterion}', f'{label} %': '{validation_accuracy:.2%}', 'MAC gain': '{mac_gain:.2f}'}
    return 'Criteria that were tried, each at its own thresholds, on validation data:\n\n' + table(
        columns, record.tried
    )


def _classes(record: RunRecord) -> str:
    if not record.class_iou:
        return ''
    names = class_names(record.dataset, record.num_classes)
    rows = [
        [name, *('–' if value is None else f'{100 * value:.1f}' for value in values)]
        for name, values in record.class_iou.items()
    ]
    return f'## Classes\n\n{bj.report.markdown_table(["IoU % on test", *names], rows)}'


def _pixels(record: RunRecord) -> str:
    if not record.pixelwise:
        return ''
    columns = {
        'pixel threshold': '{pixel_threshold:g}',
        'pixels per exit %': '{pixels}',
        'mIoU %, no image leaves': '{test_miou_of_mosaic:.2%}',
        'mIoU %, images leave': '{test_miou_leaving:.2%}',
        'images per exit %': '{images}',
        'MAC gain': '{mac_gain_leaving:.2f}',
    }
    rows = [
        {**vars(row), 'pixels': percent(row.pixel_fractions), 'images': percent(row.exit_fractions_leaving)}
        for row in record.pixelwise
    ]
    return f"""## Anytime dense prediction

Pixels whose entropy is below the threshold keep the earlier answer (`criteria.pixelwise`). That alone saves nothing:
convolutions compute whole images, so with no image leaving the MAC gain is below 1, the side heads being extra. Time
is saved only where an image leaves, here once less than {STILL_UNSURE:.0%} of its pixels are unsure.

{table(columns, rows)}

![masks](masks.png)"""
