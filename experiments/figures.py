"""Remakes every figure and table of the paper from stored runs, ours beside the paper's.

    python -m experiments.figures --workdir=runs/figures --runs=runs

Reads the folders that the other commands left below ``--runs`` (``report.json``, ``batches.json``, ``energy.json``,
``cache.json``, ``smaller.json``, ``claims_*.json``, ``gradients_*.json``), writes pictures and ``figures.md``. What was
not run says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import branchy_jax as bj
from experiments import paper
from experiments.figure_tables import energy_table, table_1
from experiments.verdicts import interval, sentence

# The run that stands for a network comes first; the others have rows of their own.
PLACES = {
    'b-lenet': ('lenet_mnist_tuned', 'lenet_mnist'),
    'b-alexnet': ('alexnet_cifar10_tuned', 'alexnet_cifar10', 'alexnet_cifar10_brief'),
    'b-resnet110': ('resnet110_cifar10_tuned', 'resnet110_cifar10'),
}
NOT_RUN = 'not run'
Run = Mapping[str, Any]
"""Records of one folder by file name without its ending."""


def main(arguments: list[str]) -> None:
    """Remakes everything."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    print(remake(Path(_RUNS.value), Path(_WORKDIR.value)))


def remake(runs: Path, workdir: Path) -> str:
    """Writes all pictures and ``figures.md``; returns the page.

    Args:
        runs: folder with the folders of runs.
        workdir: where pictures and page go.
    """
    found = {name: _read(runs / name) for names in PLACES.values() for name in names if (runs / name).is_dir()}
    found = {name: run for name, run in found.items() if 'report' in run}
    claims = _read(runs / 'claims')
    workdir.mkdir(parents=True, exist_ok=True)
    sections = [
        '# The paper, reproduced\n\nEvery picture and table here was made by `python -m experiments.figures` from '
        f"stored runs; grey points and rows marked (paper) are the paper's. {paper.JPEG_NOTE}",
        '## Table I\n\n' + table_1(found, PLACES),
        *(_figure_3(network, found, workdir) for network in PLACES),
        _figure_4(found, workdir),
        _figure_5(claims, workdir),
        _figure_6(found, workdir),
        '## Energy\n\n' + energy_table(found),
        _claims(claims),
    ]
    page = '\n\n'.join(sections) + '\n'
    bj.report.write_text(workdir / 'figures.md', page)
    return page


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        return {}
    return {path.stem: bj.report.read_json(path) for path in sorted(folder.glob('*.json'))}


def first_run(network: str, found: Mapping[str, Run]) -> tuple[str, Run] | None:
    """Returns the name and records of the run that stands for a network, if any was run."""
    return next(((name, found[name]) for name in PLACES[network] if name in found), None)


def _note(run: Run) -> str:
    report = run['report']
    return f'{report["device"]}' + ('; CIFAR-10 as JPEG' if report['dataset'] == 'cifar10' else '')


def _figure_3(network: str, found: Mapping[str, Run], workdir: Path) -> str:
    """Accuracy against time as T varies; times in units of the baseline's, since the machines differ."""
    points, knee = paper.FIGURE_3[network]
    own_ms = paper.TABLE_1[network][0]['gpu_latency_ms']
    theirs = {f'{network}': [(ms / own_ms, accuracy) for ms, accuracy in points]}
    marked = {'knee (paper)': theirs[network][knee]}
    ours, note, chosen = {}, '', first_run(network, found)
    if chosen is not None:
        name, run = chosen
        baseline = run['report']['rows'][0]

        def at(record: Mapping[str, Any]) -> tuple[float, float]:
            return record['latency_ms'] / baseline['latency_ms'], 100 * record['test_accuracy']

        ours = {
            f'{network}, {name}': [at(point) for point in run['report']['frontier']],
            network[2:]: [at(baseline)],
        }
        marked |= {'knee (ours)': at(next(point for point in run['report']['frontier'] if point['knee']))}
        marked |= {'operating point (ours)': at(run['report']['rows'][1])}
        note = _note(run)
    bj.plots.beside(
        workdir / f'figure3_{network}.png', ours, theirs, x="time per image, batch 1 ÷ baseline's",
        y='test accuracy (%)', title=f'Figure 3: {network}', note=note, marked=marked,
    )  # fmt: skip
    source = NOT_RUN if chosen is None else f'{chosen[0]}, {note}'
    return f'## Figure 3, {network}\n\nOurs: {source}. Paper: GPU, trunk only.\n\n![](figure3_{network}.png)'


def _figure_4(found: Mapping[str, Run], workdir: Path) -> str:
    """Accuracy against the share that leaves first, first and last exit only: points of the stored frontier."""
    ours, note, chosen = {}, '', first_run('b-alexnet', found)
    if chosen is not None:
        name, run = chosen
        if 'first_and_last' in run['report']:
            ours = {name: [(100 * p['share'], 100 * p['test_accuracy']) for p in run['report']['first_and_last']]}
            note = _note(run)
    bj.plots.beside(
        workdir / 'figure4.png', ours, {'b-alexnet': paper.FIGURE_4_ACCURACY}, x='leave at the first exit (%)',
        y='test accuracy (%)', title='Figure 4: B-AlexNet, first and last exit only', note=note,
    )  # fmt: skip
    source = f'{chosen[0]}, {note}' if ours and chosen else NOT_RUN
    thresholds = ''
    if ours and chosen:
        rows = [
            [f'{100 * p["share"]:.0f}', f'{100 * p["test_accuracy"]:.2f}', f'{p["threshold"]:.4g}']
            for p in chosen[1]['report']['first_and_last'][::4]
        ]
        columns = ['leave first %', 'test accuracy %', 'largest entropy let through']
        thresholds = '\n\n' + bj.report.markdown_table(columns, rows)
    return f'## Figure 4\n\nOurs: {source}.{thresholds}\n\n![](figure4.png)'


def _figure_5(claims: Mapping[str, Any], workdir: Path) -> str:
    """Accuracy of the last exit against the number of convolutions in the first branch."""
    ours, notes, first = {}, [], {}
    for name in ('claims_b-alexnet', 'claims_b-lenet'):
        depths = [
            (depth, interval(100 * np.array(claims[name]['variants'][key]['test_accuracy'])[:, -1]))
            for depth in range(5)
            if (key := f'branch of {depth} convolutions') in claims.get(name, {}).get('variants', {})
        ]
        if depths:
            settings = claims[name]['settings']
            ours[f'{settings["network"]}, {settings["dataset"]}, last exit − depth 0'] = [
                (depth, found['mean'] - depths[0][1]['mean']) for depth, found in depths
            ]
            notes.append(f'{settings["network"]}: {claims[name]["device"]}, {settings["seeds"]} seeds')
            first[name] = depths
    theirs = {'b-alexnet': [(n, value - paper.FIGURE_5[0]) for n, value in enumerate(paper.FIGURE_5)]}
    bj.plots.beside(
        workdir / 'figure5.png', ours, theirs, x='convolutions in branch 1', y='last exit: points above depth 0',
        title='Figure 5: how deep the first branch should be', note='; '.join(notes),
    )  # fmt: skip
    columns = ['convolutions', *first, 'B-AlexNet (paper)']
    rows = [
        [
            str(depth),
            *(
                f'{found[depth][1]["mean"]:.2f} [{found[depth][1]["low"]:.2f}, {found[depth][1]["high"]:.2f}]'
                if depth < len(found) else NOT_RUN
                for found in first.values()
            ),
            f'{paper.FIGURE_5[depth]:.1f}',
        ]
        for depth in range(5)
    ]  # fmt: skip
    missing = '' if 'claims_b-alexnet' in first else ' B-AlexNet: not run.'
    table = bj.report.markdown_table(columns, rows)
    return f'## Figure 5\n\nLast exit, test accuracy %.{missing}\n\n{table}\n\n![](figure5.png)'


def _figure_6(found: Mapping[str, Run], workdir: Path) -> str:
    """Cache misses against run time on the CPU."""
    theirs = {'b-alexnet': paper.FIGURE_6, 'alexnet': [paper.FIGURE_6_BASELINE]}
    ours, notes = {}, []
    for name, run in found.items():
        if 'cache' in run:
            for network in dict.fromkeys(point['network'] for point in run['cache']['points']):
                ours[f'{network}, {name}'] = [
                    (point['latency_ms'], 100 * point['last_level'])
                    for point in run['cache']['points']
                    if point['network'] == network
                ]
            notes.append(run['cache']['simulated_by'])
    bj.plots.beside(
        workdir / 'figure6.png', ours, theirs, x='time per image, batch 1 (ms)', y='last-level cache misses (%)',
        title='Figure 6: cache misses as the thresholds vary, CPU', log_x=True,
    )  # fmt: skip
    source = '; '.join(dict.fromkeys(notes)) or NOT_RUN
    return f'## Figure 6\n\nOurs: {source}, of all data accesses.\n\n![](figure6.png)'


def _claims(claims: Mapping[str, Any]) -> str:
    lines = ['## Claims']
    for name, record in claims.items():
        if name.startswith('claims_') and 'claims' in record:
            settings = record['settings']
            lines.append(f'### {settings["network"]} on {settings["dataset"]}, {settings["seeds"]} seeds')
            for claim in record['claims']:
                lines.append(
                    f'**{claim["claim"]}.**\n' + '\n'.join(f'- {sentence(answer)}' for answer in claim['answers'])
                )
        elif name.startswith('gradients_'):
            lines.append(f'### Vanishing gradients: {record["network"]} on {record["dataset"]}')
            lines.append('\n'.join(f'- {sentence(answer)}' for answer in record['answers']))
    return '\n\n'.join(lines if len(lines) > 1 else [*lines, NOT_RUN])


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the pictures and figures.md.')
    _RUNS = flags.DEFINE_string('runs', 'runs', 'Folder with the folders of runs.')
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
