"""Is the paper reproduced? Makes each of its tables and figures from stored rows, ours beside the paper's.

    python -m experiments.figures --workdir=runs/figures --runs=runs

Reads the folders that the other commands left below ``--runs`` (``report.json``, ``batches.json``, ``energy.json``,
``cache.json``, ``claims_*.json``, ``gradients_*.json``), and writes pictures and ``figures.md``, in seconds. Both say
what was not run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import branchy_jax as bj
from experiments.pages.pictures import against_paper
from experiments.run.report import JPEG_NOTE, Row, paper, table
from experiments.study import flags
from experiments.study.finished import read_report
from experiments.study.verdicts import DEPTHS, accuracies, bullets, depth_name, interval

# The run that stands for a network comes first; the others have rows of their own.
PLACES = {
    'b-lenet': ('lenet_mnist_tuned', 'lenet_mnist'),
    'b-alexnet': ('alexnet_cifar10', 'alexnet_cifar10_tuned'),
    'b-resnet110': ('resnet110_cifar10_tuned', 'resnet110_cifar10'),
}
PRETRAINED = 'efficientnet_lite0_cifar10'
NOT_RUN = 'not run'
_SHARES = (0.75, 0.55)
"""Of the baseline's multiply-accumulates, at most: the points in the table of networks from ImageNet weights."""
Folders = Mapping[str, Row]
"""By the name of a folder: its report, and its ``batches``, ``energy`` and ``cache`` where they are."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes all tables and pictures."""
    parser = flags.parser(__doc__, 'Folder for the pictures and figures.md.')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='Folder with the folders of runs.')
    options = parser.parse_args(arguments)
    print(remake(options.runs, options.workdir))


def remake(runs: Path, workdir: Path) -> str:
    """Writes all pictures and ``figures.md``; returns the page.

    Args:
        runs: folder with the folders of runs.
        workdir: where pictures and page go.
    """
    names = [name for names in PLACES.values() for name in names]
    folders = {name: _read(runs / name) for name in names if (runs / name / 'report.json').exists()}
    claims = {path.stem: bj.report.read_json(path) for path in sorted((runs / 'claims').glob('*.json'))}
    workdir.mkdir(parents=True, exist_ok=True)
    parts = [
        '# The paper, reproduced\n\nEvery picture and table here was made by `python -m experiments.figures` from '
        f"stored runs; grey points and rows marked (paper) are the paper's. {JPEG_NOTE}",
        '## Table I\n\n' + table_1(folders),
        *(figure_3(network, folders, workdir) for network in PLACES),
        figure_4(folders, workdir),
        figure_5(claims, workdir),
        figure_6(folders, workdir),
        from_imagenet(runs / PRETRAINED, workdir),
        '## Energy\n\n' + energy(folders),
        '## Claims',
        *(
            f'### {record.get("network") or record["settings"]["network"]}\n\n{bullets(record["answers"])}'
            for record in claims.values()
        ),
    ]
    page = '\n\n'.join(parts) + '\n'
    bj.report.write_text(workdir / 'figures.md', page)
    return page


def _read(folder: Path) -> Row:
    more = {name: folder / f'{name}.json' for name in ('batches', 'energy', 'cache')}
    return read_report(folder) | {name: bj.report.read_json(path) for name, path in more.items() if path.exists()}


def table_1(folders: Folders) -> str:
    """Lays out Table I: per network the paper's rows, ours at batch 1 and in batches."""
    clock = ('batch', 'test_accuracy', 'latency_ms', 'gain', 'gain_plain', 'trunk_only_gain', 'exit_fractions')
    rows: list[Row] = []
    for network, names in PLACES.items():
        theirs, keys = paper('Table I', branchy=network), ('latency_ms', 'gpu_latency_ms')
        for row in theirs:
            gains = ' / '.join(f'{theirs[0][key] / row[key]:.1f}' for key in keys)
            ms = ' / '.join(f'{row[key]:.2f}' for key in keys)
            rows.append({**row, 'device': 'CPU / GPU', 'batch': 1, 'latency_ms': ms})
            rows[-1] |= {'gain': None, 'trunk_only_gain': gains}
        rows += [row for name in names if name in folders for row in _rows_of(name, folders[name])]
        if not set(names) & set(folders):
            rows.append({'network': network, 'run': NOT_RUN})
    legend = (
        'Gain, end to end: over the same trunk without branches, trained on its own, both rewritten by '
        '`inference.optimize` and, in batches, both planned. Gain over plain: over that baseline merely jitted. Trunk '
        "only: the paper's protocol, in which side heads, softmax and copies are not timed; the paper's own gains are "
        'of that kind. Where a branch leaves before the trunk begins (b-lenet, tuned) it counts next to nothing.'
    )
    return f'{table(rows, "network", "run", "device", *clock)}\n\n{legend}'


def _rows_of(name: str, report: Row) -> list[Row]:
    baseline, branchy = report['rows']
    points = {row['name']: row for row in report['operating_points']}
    rows = [baseline]
    for point, row in points.items():
        network = branchy['network'] if row is report['operating_points'][0] else f'{branchy["network"]}, {point}'
        points[point] = {**row, 'network': network}
        rows.append(points[point])
    for row in report.get('batches', {}).get('rows', ()):
        point = points[row['operating_point']]
        rows.append({**row, 'network': point['network'], 'test_accuracy': point['test_accuracy']})
    shared = {'run': name, 'device': report['device'].split(',')[0]}
    return [{**row, **shared} for row in rows]


def energy(folders: Folders) -> str:
    """Lays out joules per image, or says why none were measured."""
    columns = ('network', 'operating_point', 'run', 'batch', 'joules', 'joules_with_idle', 'idle_watts', 'watts')
    measured = {name: report['energy'] for name, report in folders.items() if 'energy' in report}
    notes = [f'- {name}, {record["device"]}: {record["note"]}' for name, record in measured.items()]
    rows = [{**row, 'run': name} for name, record in measured.items() for row in record['rows']]
    return '\n'.join(notes or [NOT_RUN]) + (f'\n\n{table(rows, *columns)}' if rows else '')


def _stands_for(network: str, folders: Folders) -> tuple[str, Row, str]:
    """Returns the run that represents a network, its report, and a note on device and data; or that there was none."""
    for name in PLACES[network]:
        if name in folders:
            report = folders[name]
            return name, report, report['device'] + ('; CIFAR-10 as JPEG' if report['dataset'] == 'cifar10' else '')
    return NOT_RUN, {}, ''


def figure_3(network: str, folders: Folders, workdir: Path) -> str:
    """Accuracy against time as T varies; times in units of the baseline's, since the machines differ."""
    baseline_ms = paper('Table I', branchy=network)[0]['gpu_latency_ms']
    theirs = paper('Figure 3', branchy=network)
    points = [(row['gpu_latency_ms'] / baseline_ms, row['accuracy_percent']) for row in theirs]
    marked = {'knee (paper)': points[[row['knee'] for row in theirs].index(True)]}
    name, report, note = _stands_for(network, folders)
    ours = {}
    if report:
        baseline, branchy = report['rows']

        def at(row: Row) -> tuple[float, float]:
            return row['latency_ms'] / baseline['latency_ms'], 100 * row['test_accuracy']

        ours = {f'{network}, {name}': [at(row) for row in report['frontier']], network[2:]: [at(baseline)]}
        marked['knee (ours)'] = at(next(row for row in report['frontier'] if row['knee']))
        marked['operating point (ours)'] = at(branchy)
    against_paper(
        workdir / f'figure3_{network}.png',
        ours,
        {f'{network} (paper)': points},
        x="time per image, batch 1 ÷ baseline's",
        y='test accuracy (%)',
        title=f'Figure 3: {network}',
        note=note,
        marked=marked,
    )
    return f'## Figure 3, {network}\n\nOurs: {name}, {note}. Paper: GPU, trunk only.\n\n![](figure3_{network}.png)'


def figure_4(folders: Folders, workdir: Path) -> str:
    """Accuracy against the share that leaves first, first and last exit only."""
    name, report, note = _stands_for('b-alexnet', folders)
    rows = report.get('first_and_last', [])
    against_paper(
        workdir / 'figure4.png',
        {name: [(100 * row['share'], 100 * row['test_accuracy']) for row in rows]} if rows else {},
        {'b-alexnet (paper)': [(row['share_percent'], row['accuracy_percent']) for row in paper('Figure 4')]},
        x='leave at the first exit (%)',
        y='test accuracy (%)',
        title='Figure 4: B-AlexNet, first and last exit only',
        note=note,
    )
    leaving = table(rows[::4], 'share', 'test_accuracy', 'threshold')
    return f'## Figure 4\n\nOurs: {name}, {note}.\n\n{leaving}\n\n![](figure4.png)'


def figure_5(claims: Mapping[str, Any], workdir: Path) -> str:
    """Accuracy of the last exit against the number of convolutions in the first branch."""
    theirs = [row['accuracy_percent'] for row in paper('Figure 5')]
    rows: list[Row] = [{'convolutions': depth, 'B-AlexNet (paper)': theirs[depth]} for depth in DEPTHS]
    ours, notes, names = {}, [], ('claims_b-alexnet', 'claims_b-lenet')
    for name in names:
        record = claims.get(name, {'rows': ()})
        depths = [accuracies(record['rows'], depth_name(depth)) for depth in DEPTHS]
        if not all(len(values) for values in depths):
            notes.append(f'{name}: {NOT_RUN}')
            continue
        own, settings = [interval(values[:, -1]) for values in depths], record['settings']
        for row, values in zip(rows, own, strict=True):
            row[name] = '{mean:.2f} [{low:.2f}, {high:.2f}]'.format_map(values)
        series = f'{settings["network"]}, {settings["dataset"]}, last exit − depth 0'
        ours[series] = [(depth, values['mean'] - own[0]['mean']) for depth, values in enumerate(own)]
        notes.append(
            f'{settings["network"]}: {settings["epochs"]} epochs, {settings["seeds"]} seeds, {record["device"]}'
        )
    against_paper(
        workdir / 'figure5.png',
        ours,
        {'b-alexnet (paper)': [(n, value - theirs[0]) for n, value in enumerate(theirs)]},
        x='convolutions in branch 1',
        y='last exit: points above depth 0',
        title='Figure 5: how deep the first branch should be',
        note='; '.join(notes),
    )
    accuracy = table(rows, 'convolutions', *names, 'B-AlexNet (paper)')
    return f'## Figure 5\n\nLast exit, test accuracy %. {"; ".join(notes)}.\n\n{accuracy}\n\n![](figure5.png)'


def figure_6(folders: Folders, workdir: Path) -> str:
    """Cache misses against run time on the CPU."""
    ours: dict[str, list[tuple[float, float]]] = {}
    theirs: dict[str, list[tuple[float, float]]] = {}
    for row in paper('Figure 6'):
        theirs.setdefault(f'{row["network"]} (paper)', []).append((row['latency_ms'], row['misses_percent']))
    sources = {}
    for name, report in folders.items():
        if 'cache' in report:
            sources[report['cache']['simulated_by']] = None
            for row in report['cache']['rows']:
                series = ours.setdefault(f'{row["network"]}, {name}', [])
                series.append((row['latency_ms'], 100 * row['last_level']))
    against_paper(
        workdir / 'figure6.png',
        dict(reversed(ours.items())),  # the color of the network with exits is that of the other pictures
        theirs,
        x='time per image, batch 1 (ms)',
        y='last-level cache misses (%)',
        title='Figure 6: cache misses as the thresholds vary, CPU',
        log_x=True,
    )
    return f'## Figure 6\n\nOurs: {"; ".join(sources) or NOT_RUN}, of all data accesses.\n\n![](figure6.png)'


def from_imagenet(folder: Path, workdir: Path) -> str:
    """Accuracy against the share of multiply-accumulates, of networks that start from ImageNet weights."""
    theirs = [{**row, 'network': f'{row["network"]} (earlyon)'} for row in paper('earlyon')]
    ours, note = [], NOT_RUN
    if (folder / 'report.json').exists():
        report = read_report(folder)
        baseline, branchy = report['rows']
        ours = [
            {
                'network': branchy['network'],
                'macs_share': row['macs'] / baseline['macs'],
                'accuracy': row['test_accuracy'],
                'validation_accuracy': row['validation_accuracy'],
                'baseline_accuracy': baseline['test_accuracy'],
            }
            for row in report['frontier']
        ]
        note = report['device']
    against_paper(
        workdir / 'from_imagenet.png',
        {ours[0]['network']: [_place(row) for row in ours]} if ours else {},
        {row['network']: [_place(row)] for row in theirs},
        x="multiply-accumulates (% of the baseline's)",
        y='test accuracy: points above the baseline',
        title='CIFAR-10 from ImageNet weights',
        note=note,
    )
    within = [[row for row in ours if row['macs_share'] <= share] for share in _SHARES]
    chosen = [max(rows, key=lambda row: row['validation_accuracy']) for rows in within if rows]
    rows = [{**row, 'change': row['accuracy'] - row['baseline_accuracy']} for row in (*chosen, *theirs)]
    columns = ('network', 'macs_share', 'accuracy', 'baseline_accuracy', 'change')
    shares = ' and '.join(f'{100 * share:g}' for share in _SHARES)
    return (
        f'## From ImageNet weights\n\nOurs: {PRETRAINED}, {note}; the thresholds of highest validation accuracy at no '
        f"more than {shares} % of the baseline's multiply-accumulates. Our baseline was fine-tuned alike. "
        'The rows of earlyon are as published; its networks are other ones.\n\n'
        f'{table(rows, *columns)}\n\n![](from_imagenet.png)'
    )


def _place(row: Row) -> tuple[float, float]:
    return 100 * row['macs_share'], 100 * (row['accuracy'] - row['baseline_accuracy'])


if __name__ == '__main__':
    main()
