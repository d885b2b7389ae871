"""The sections of the reproduction: Table I, Figures 3 to 6, energy and claims, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import branchy_jax as bj
from experiments.pages import paper, pictures
from experiments.pages.claims import bullets, verdicts
from experiments.pages.tables import percent, table
from experiments.run.records import Clock, Numbers
from experiments.study.folders import Folder
from experiments.study.verdicts import DEPTHS, depth_name, interval

# The run that stands for a network comes first; the others have rows of their own.
PLACES = {
    'b-lenet': ('lenet_mnist_tuned', 'lenet_mnist'),
    'b-alexnet': ('alexnet_cifar10', 'alexnet_cifar10_tuned'),
    'b-resnet110': ('resnet110_cifar10_tuned', 'resnet110_cifar10'),
}
NOT_RUN = 'not run'
Folders = Mapping[str, Folder]
"""Runs by the name of their folder; those that were not run are left out."""
_DASH = '–'
_COLUMNS = [
    'network',
    'run',
    'device',
    'batch',
    'test accuracy %',
    'ms an image',
    'gain, end to end',
    'gain over plain',
    'gain, trunk only',
    'exits %',
]


def table_1(found: Folders) -> str:
    """Lays out Table I: per network the paper's rows, ours at batch 1 and in batches, and the static controls."""
    rows = []
    for network, names in PLACES.items():
        rows += [_paper_row(row, paper.TABLE_1[network][0]) for row in paper.TABLE_1[network]]
        run_here = [name for name in names if name in found]
        if not run_here:
            rows.append([network, NOT_RUN, *[_DASH] * (len(_COLUMNS) - 2)])
        for name in run_here:
            rows += _rows_of(name, found[name])
    legend = (
        'Gain, end to end: over the same trunk without branches, trained on its own, both rewritten by '
        '`inference.optimize` and, in batches, both planned. Gain over plain: over that baseline merely jitted. Trunk '
        "only: the paper's protocol, in which side heads, softmax and copies are not timed; the paper's own gains are "
        'of that kind. Where a branch leaves before the trunk begins (b-lenet, tuned) it counts next to nothing.'
    )
    if any(folder.static for folder in found.values()):
        legend += ' Static: the first stages and their exit alone, trained from scratch as long as the baseline.'
    return f'{bj.report.markdown_table(_COLUMNS, rows)}\n\n{legend}'


def _rows_of(name: str, folder: Folder) -> list[list[str]]:
    record = folder.record
    device, names = record.device.split(',')[0], [point.name for point in record.points]
    networks = [record.network, *(f'{record.network}, {point}' for point in names[1:])]

    def row(
        network: str, accuracy: float, clock: Clock, exit_fractions: Numbers = (), trunk_only: str = _DASH
    ) -> list[str]:
        return [
            network,
            name,
            device,
            f'{clock.batch:,}',
            f'{100 * accuracy:.2f}',
            f'{clock.latency_ms:.4f}',
            f'{clock.gain:.2f} [{clock.gain_low:.2f}, {clock.gain_high:.2f}]',
            f'{clock.gain_plain:.2f}',
            trunk_only,
            percent(exit_fractions) or _DASH,
        ]

    rows = [row(record.network[2:], record.baseline.accuracy, record.baseline.clock, (1.0,))]
    for network, point in zip(networks, record.points, strict=True):
        rows.append(row(network, point.accuracy, point.clock, point.exit_fractions, f'{point.trunk_only_gain:.2f}'))
    for batched in folder.batches:
        n = names.index(batched.operating_point)
        rows.append(row(networks[n], record.points[n].accuracy, batched.clock, batched.exit_fractions))
    return [*rows, *(row(f'static: {static.network}', static.accuracy, static.clock) for static in folder.static)]


def _paper_row(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    cpu, gpu = (baseline[key] / row[key] for key in ('latency_ms', 'gpu_latency_ms'))
    return [
        row['network'],
        _DASH,
        'CPU / GPU',
        '1',
        f'{100 * row["test_accuracy"]:.2f}',
        f'{row["latency_ms"]:.2f} / {row["gpu_latency_ms"]:.2f}',
        _DASH,
        _DASH,
        f'{cpu:.1f} / {gpu:.1f}',
        percent(row['exit_fractions']),
    ]


def energy_table(found: Folders) -> str:
    """Lays out joules per image; where nothing was measured, it says why."""
    lines = [f'- {name}, {folder.energy_note}' for name, folder in found.items() if folder.energy_note]
    columns = {
        'network': '{network} {operating_point}',
        'run': '{run}',
        'batch': '{batch}',
        'mJ an image': '{mj:.3f}',
        'with idle': '{mj_with_idle:.3f}',
        'idle W': '{idle_watts:.1f}',
        'W': '{watts:.1f}',
        'resolution %': '{resolution:.2%}',
    }
    rows = [
        {**vars(row), 'run': name, 'mj': 1e3 * row.joules, 'mj_with_idle': 1e3 * row.joules_with_idle}
        for name, folder in found.items()
        for row in folder.energy
    ]
    return '\n\n'.join(['\n'.join(lines) or NOT_RUN, *([table(columns, rows)] if rows else [])])


def _stands_for(network: str, found: Folders) -> tuple[str, Folder] | None:
    """Returns the run that stands for a network, if any was run."""
    return next(((name, found[name]) for name in PLACES[network] if name in found), None)


def _note(folder: Folder) -> str:
    return folder.record.device + ('; CIFAR-10 as JPEG' if folder.record.dataset == 'cifar10' else '')


def figure_3(network: str, found: Folders, workdir: Path) -> str:
    """Accuracy against time as T varies; times in units of the baseline's, since the machines differ."""
    points, knee = paper.FIGURE_3[network]
    own_ms = paper.TABLE_1[network][0]['gpu_latency_ms']
    theirs = {network: [(ms / own_ms, accuracy) for ms, accuracy in points]}
    marked = {'knee (paper)': theirs[network][knee]}
    ours, source, note, chosen = {}, NOT_RUN, '', _stands_for(network, found)
    if chosen is not None:
        name, folder = chosen
        record = folder.record

        def at(latency_ms: float, accuracy: float) -> tuple[float, float]:
            return latency_ms / record.baseline.clock.latency_ms, 100 * accuracy

        frontier = [at(point.latency_ms, point.accuracy) for point in record.frontier]
        own = [at(part.clock.latency_ms, part.accuracy) for part in (record.baseline, record.points[0])]
        ours = {f'{network}, {name}': frontier, network[2:]: own[:1]}
        marked['knee (ours)'] = frontier[[point.knee for point in record.frontier].index(True)]
        marked['operating point (ours)'] = own[1]
        note = _note(folder)
        source = f'{name}, {note}'
    pictures.against_paper(
        workdir / f'figure3_{network}.png',
        ours,
        theirs,
        x="time per image, batch 1 ÷ baseline's",
        y='test accuracy (%)',
        title=f'Figure 3: {network}',
        note=note,
        marked=marked,
    )
    return f'## Figure 3, {network}\n\nOurs: {source}. Paper: GPU, trunk only.\n\n![](figure3_{network}.png)'


def figure_4(found: Folders, workdir: Path) -> str:
    """Accuracy against the share that leaves first, first and last exit only."""
    ours, source, note, leaving, chosen = {}, NOT_RUN, '', '', _stands_for('b-alexnet', found)
    if chosen is not None:
        name, folder = chosen
        points, note = folder.record.first_and_last, _note(folder)
        ours, source = {name: [(100 * point.share, 100 * point.accuracy) for point in points]}, f'{name}, {note}'
        columns = {
            'leave first %': '{share:.0%}',
            'test accuracy %': '{accuracy:.2%}',
            'largest entropy let through': '{threshold:.4g}',
        }
        leaving = '\n\n' + table(columns, points[::4])
    pictures.against_paper(
        workdir / 'figure4.png',
        ours,
        {'b-alexnet': paper.FIGURE_4_ACCURACY},
        x='leave at the first exit (%)',
        y='test accuracy (%)',
        title='Figure 4: B-AlexNet, first and last exit only',
        note=note,
    )
    return f'## Figure 4\n\nOurs: {source}.{leaving}\n\n![](figure4.png)'


def figure_5(claims: Mapping[str, Any], workdir: Path) -> str:
    """Accuracy of the last exit against the number of convolutions in the first branch."""
    ours, notes, devices, by_depth = {}, [], {}, {}
    for name in ('claims_b-alexnet', 'claims_b-lenet'):
        variants = claims.get(name, {}).get('variants', {})
        depths = {
            depth: interval(100 * np.array(variants[depth_name(depth)]['test_accuracy'])[:, -1])
            for depth in DEPTHS
            if depth_name(depth) in variants
        }
        if 0 in depths:
            settings = claims[name]['settings']
            ours[f'{settings["network"]}, {settings["dataset"]}, last exit − depth 0'] = [
                (depth, accuracy['mean'] - depths[0]['mean']) for depth, accuracy in depths.items()
            ]
            notes.append(f'{settings["network"]}: {settings["epochs"]} epochs, {settings["seeds"]} seeds')
            devices[claims[name]['device']] = None
            by_depth[name] = depths
    theirs = {'b-alexnet': [(n, value - paper.FIGURE_5[0]) for n, value in enumerate(paper.FIGURE_5)]}
    pictures.against_paper(
        workdir / 'figure5.png',
        ours,
        theirs,
        x='convolutions in branch 1',
        y='last exit: points above depth 0',
        title='Figure 5: how deep the first branch should be',
        note='; '.join(notes),
    )
    rows = [
        [
            str(depth),
            *(
                '{mean:.2f} [{low:.2f}, {high:.2f}]'.format(**depths[depth]) if depth in depths else NOT_RUN
                for depths in by_depth.values()
            ),
            f'{paper.FIGURE_5[depth]:.1f}',
        ]
        for depth in DEPTHS
    ]
    told = f' {"; ".join([*notes, *devices])}.' if notes else ''
    missing = '' if 'claims_b-alexnet' in by_depth else ' B-AlexNet: not run.'
    found = bj.report.markdown_table(['convolutions', *by_depth, 'B-AlexNet (paper)'], rows)
    return f'## Figure 5\n\nLast exit, test accuracy %.{told}{missing}\n\n{found}\n\n![](figure5.png)'


def figure_6(found: Folders, workdir: Path) -> str:
    """Cache misses against run time on the CPU."""
    theirs = {'b-alexnet': paper.FIGURE_6, 'alexnet': [paper.FIGURE_6_BASELINE]}
    ours: dict[str, list[tuple[float, float]]] = {}
    for name, folder in found.items():
        for row in folder.cache:
            ours.setdefault(f'{row.network}, {name}', []).append((row.latency_ms, 100 * row.last_level))
    pictures.against_paper(
        workdir / 'figure6.png',
        ours,
        theirs,
        x='time per image, batch 1 (ms)',
        y='last-level cache misses (%)',
        title='Figure 6: cache misses as the thresholds vary, CPU',
        log_x=True,
    )
    source = '; '.join(dict.fromkeys(folder.cache_note for folder in found.values() if folder.cache_note)) or NOT_RUN
    return f'## Figure 6\n\nOurs: {source}, of all data accesses.\n\n![](figure6.png)'


def claims(records: Mapping[str, Any]) -> str:
    """Lays out the verdicts on the paper's claims, and on vanishing gradients."""
    lines = ['## Claims']
    for name, record in records.items():
        if name.startswith('claims_') and 'claims' in record:
            settings = record['settings']
            lines.append(f'### {settings["network"]} on {settings["dataset"]}, {settings["seeds"]} seeds')
            lines.append(verdicts(record))
        elif name.startswith('gradients_'):
            lines.append(f'### Vanishing gradients: {record["network"]} on {record["dataset"]}')
            lines.append(bullets(record['answers']))
    return '\n\n'.join(lines if len(lines) > 1 else [*lines, NOT_RUN])
