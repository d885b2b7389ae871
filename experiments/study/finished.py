"""Reads a finished run with its networks, and writes its network as published weights."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.configs import common
from experiments.run.networks import Networks, criteria_of, load, network_options
from experiments.run.report import Row, table


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        workdir: its folder.
        config: its settings.
        report: what ``report.json`` holds.
        networks: both, trained.
    """

    workdir: Path
    config: ConfigDict
    report: dict[str, Any]
    networks: Networks

    @property
    def policies(self) -> dict[str, bj.ExitPolicy]:
        """The policy of each operating point, the table's first."""
        return {row['name']: self.policy(row['thresholds']) for row in self.report['operating_points']}

    def policy(self, thresholds: Sequence[float]) -> bj.ExitPolicy:
        """Returns a policy of the run's criterion."""
        by_name = {criterion.name: criterion for criterion in criteria_of(self.config)}
        return bj.ExitPolicy(by_name[self.report['criterion']], np.array(thresholds, np.float32))

    def dataset(self) -> bj.data.Dataset:
        """Loads the data set of the run."""
        return load(self.config)


_POINT = ('thresholds', 'test_accuracy', 'exit_fractions', 'mac_gain')
_KEYS = {'dataset', 'device', 'task', 'criterion', 'rows', 'operating_points', 'frontier', 'first_and_last', 'paper'}
_ROW_KEYS = {'network', 'exit_fractions', 'thresholds', 'batch', 'latency_ms', 'gain', 'gain_plain', 'macs', 'mac_gain'}


def read_report(workdir: Path | str) -> dict[str, Any]:
    """Reads the report of a finished run.

    Raises:
        ValueError: the folder holds no finished run, or its report lacks something.
    """
    path = Path(workdir) / 'report.json'
    report = bj.report.read_json(path)
    missing = _KEYS - set(report)
    for row in report.get('rows', ()):
        missing |= _ROW_KEYS - set(row)
    if missing:
        raise ValueError(
            f'workdir: {path} is not the report of a run, or damaged: it lacks {", ".join(sorted(missing))}'
        )
    return report


def read_run(workdir: Path | str) -> FinishedRun:
    """Reads a run, or a stored report whose weights are in the package.

    The package has no weights of baselines. Those of the branchy network replace them: time does not depend on weights,
    and no reader of a run evaluates its baseline again.

    Raises:
        ValueError: the folder holds no finished run, or neither its weights nor the package has them.
    """
    workdir, report = Path(workdir), read_report(workdir)
    if (workdir / 'config.json').exists():
        config = _settings(bj.report.read_json(workdir / 'config.json'))
        variables, normalization = _weights(workdir / f'{config.network}.safetensors')
        baseline_variables, _ = _weights(workdir / f'{config.network[2:]}.safetensors')
    else:
        name, ours = report['rows'][1]['network'], report['rows'][1]['exit_accuracy']
        published = bj.models.load_pretrained(name, dataset=report['dataset'])
        theirs = published.card['exit_accuracy']
        if list(theirs) != ours:
            raise ValueError(
                f'workdir: {workdir} holds a report without weights, and those of {name} in the package are '
                f'of another run: their exits have {theirs}, these {ours}'
            )
        config, normalization = _settings(published.card['recipe']), published.normalization
        variables = baseline_variables = published.variables
    options = network_options(config, report['num_classes'], report['image_shape'])
    networks = Networks(config.network, options, variables, baseline_variables, normalization)
    return FinishedRun(workdir, config, report, networks)


def _settings(stored: Mapping[str, Any]) -> ConfigDict:
    config = common.get_config()
    config.update({name: value for name, value in stored.items() if name in config})  # a field may be gone since
    return config


def _weights(path: Path) -> tuple[Variables, bj.Normalization]:
    variables, _ = bj.checkpoint.load_weights(path)
    normalization = bj.Normalization(**variables.pop('normalization'))
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), variables), normalization


def publish(finished: FinishedRun, into: Path, *, halves: bool = False) -> Path:
    """Writes the branchy network of a classification as published weights, and a page beside it; returns the file.

    Args:
        finished: the run.
        into: the folder, such as that of the package's weights.
        halves: whether kernels are stored as float16. Accuracies on the card are those of the run.
    """
    networks, record = finished.networks, finished.report
    frontier = record['frontier']
    knee = [row for row in frontier if row['knee']]
    best = max(frontier, key=lambda row: row['validation_accuracy'])
    cheapest = min(frontier, key=lambda row: row['macs'])
    rows = {tuple(row['thresholds']): row for row in (*record['operating_points'], *knee, best, cheapest)}
    points = [
        bj.OperatingPoint(
            policy=finished.policy(row['thresholds']),
            accuracy=row['test_accuracy'],
            split='test',
            exit_fractions=np.array(row['exit_fractions']),
            cost=row['macs'],
        )
        for row in rows.values()
    ]
    baseline, branchy = record['rows']
    card = {name: record[name] for name in ('dataset', 'stage_macs', 'exit_macs')}
    card |= {'exit_accuracy': branchy['exit_accuracy'], 'baseline_accuracy': baseline['test_accuracy']}
    card |= {'recipe': finished.config.to_dict(), 'trained_on': record['device'], 'licence': 'Apache-2.0'}
    path = into / f'{networks.name}@{record["dataset"]}.safetensors'
    kernels = np.float16 if halves else np.float32
    variables = jax.tree.map(lambda x: np.asarray(x, kernels if x.ndim > 1 else np.float32), networks.variables)
    settings = {'normalization': networks.normalization, 'operating_points': points, 'options': networks.options}
    with tempfile.TemporaryDirectory(dir=into) as folder:
        bj.models.save_pretrained(folder, networks.name, variables, **settings, card=card)
        (Path(folder) / 'model.safetensors').replace(path)
    bj.report.write_text(
        path.with_suffix('.md'), _card_page(networks.name, record['criterion'], card, list(rows.values()))
    )
    return path


def _card_page(network: str, criterion: str, card: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Lays out what the published file says of itself."""
    each = ', '.join(f'{100 * value:.2f} %' for value in card['exit_accuracy'])
    trunk = sum(card['stage_macs'])
    points = table([{**row, 'mac_gain': trunk / row['macs']} for row in rows], *_POINT)
    parts = [
        f'# {network} on {card["dataset"]}',
        f'Test accuracy of each exit alone: {each}; of the baseline, trained on its own: '
        f'{100 * card["baseline_accuracy"]:.2f} %.\nTrained on {card["trained_on"]}. Licence: {card["licence"]}.',
        f'Operating points, with thresholds of {criterion}, chosen on validation data; the first is the one in the\n'
        'table of results.',
        points,
        '## Recipe',
        '\n'.join(f'- {name}: {value}' for name, value in sorted(card['recipe'].items())),
    ]
    return '\n\n'.join(parts) + '\n'
