"""Puts the weights of a finished run into the package, with a card beside them.

    python -m experiments.publish --workdir=runs/lenet_mnist

`branchy_jax.models.load_pretrained` finds them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.models.pretrained import write_pretrained
from experiments.pages.tables import percent, rounded
from experiments.run import command
from experiments.run.networks import FinishedRun, read_run
from experiments.run.records import FrontierPoint, RunRecord


def main(arguments: Sequence[str] | None = None) -> None:
    """Publishes the run in ``--workdir``."""
    parser = command.parser_of_a_run(__doc__)
    parser.add_argument('--into', type=Path, default=Path('branchy_jax/models/weights'), help='Folder to write to.')
    options = parser.parse_args(arguments)
    print(publish(read_run(options.workdir), options.into))


def publish(finished: FinishedRun, into: Path) -> Path:
    """Writes the run's branchy network as published weights; returns the file.

    Args:
        finished: the run, of a classification.
        into: the folder of the package's weights.
    """
    networks, record = finished.networks, finished.record
    points = [
        bj.OperatingPoint(
            policy=finished.policy(found.thresholds),
            accuracy=found.accuracy,
            split='test',
            exit_fractions=np.array(found.exit_fractions),
            cost=found.macs,
        )
        for found in (*record.points, *_others(record))
    ]
    card = {
        'dataset': record.dataset,
        'exit_accuracy': record.exit_accuracy,
        'baseline_accuracy': record.baseline.accuracy,
        'stage_macs': record.stage_macs,
        'exit_macs': record.exit_macs,
        'recipe': finished.config.to_dict(),
        'trained_on': record.device,
        'licence': 'Apache-2.0',
    }
    path = into / f'{networks.name}@{record.dataset}.safetensors'
    options = {**networks.options, 'dtype': str(networks.options['dtype'])}
    variables = jax.tree.map(np.asarray, networks.variables)
    write_pretrained(path, networks.name, options, variables, networks.normalization, points, card)
    bj.report.write_text(path.with_suffix('.md'), _card(networks.name, card, record.criterion, points))
    return path


def _others(record: RunRecord) -> list[FrontierPoint]:
    """Returns the knee, the most accurate on validation data, and the cheapest, but for those already chosen."""
    knee = [point for point in record.frontier if point.knee]
    best = max(record.frontier, key=lambda point: point.validation_accuracy)
    cheapest = min(record.frontier, key=lambda point: point.macs)
    found = {point.thresholds: point for point in (*knee, best, cheapest)}
    taken = {point.thresholds for point in record.points}
    return [point for thresholds, point in found.items() if thresholds not in taken]


def _card(network: str, card: dict[str, Any], criterion: str, points: list[bj.OperatingPoint]) -> str:
    trunk = sum(card['stage_macs']) + card['exit_macs'][-1]
    rows = [
        [
            rounded(point.thresholds),
            f'{100 * point.accuracy:.2f}',
            percent(point.exit_fractions),
            f'{trunk / point.cost:.2f}',
        ]
        for point in points
    ]
    table = bj.report.markdown_table([f'thresholds ({criterion})', 'test accuracy %', 'exits %', 'MAC gain'], rows)
    recipe = '\n'.join(f'- {name}: {value}' for name, value in sorted(card['recipe'].items()))
    each = ', '.join(f'{100 * value:.2f} %' for value in card['exit_accuracy'])
    return f"""# {network} on {card['dataset']}

Test accuracy of each exit alone: {each}; of the baseline, trained on its own: {100 * card['baseline_accuracy']:.2f} %.
Trained on {card['trained_on']}. Licence: {card['licence']}.

Operating points, chosen on validation data; the first is the one in the table of results.

{table}

## Recipe

{recipe}
"""


if __name__ == '__main__':
    main()
