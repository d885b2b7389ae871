"""Puts the weights of a finished run into the package, with a card beside them.

    python -m experiments.publish --workdir=runs/lenet_mnist

`branchy_jax.models.load_pretrained` finds them there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

import branchy_jax as bj
from branchy_jax.models.pretrained import write_pretrained

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished main job.')
_INTO = flags.DEFINE_string('into', 'branchy_jax/models/weights', 'Folder to write to.')


def main(arguments: list[str]) -> None:
    """Publishes the run in ``--workdir``."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    print(publish(Path(_WORKDIR.value), Path(_INTO.value)))


def publish(workdir: Path, into: Path) -> Path:
    """Writes the run's branchy network as published weights; returns the file.

    Args:
        workdir: of a finished main job.
        into: the folder of the package's weights.

    Raises:
        ValueError: the run is not finished.
    """
    report, config = bj.report.read_json(workdir / 'report.json'), bj.report.read_json(workdir / 'config.json')
    network, dataset, row = config['network'], report['dataset'], report['rows'][1]
    variables, _ = bj.checkpoint.load_weights(workdir / f'{network}.safetensors')
    normalization = bj.Normalization(**variables.pop('normalization'))
    chosen = report['operating_points']
    others = _others(report['frontier'], chosen)
    points = [_point(found, found['macs'], report['criterion']) for found in (*chosen, *others)]
    card = {
        'dataset': dataset,
        'exit_accuracy': row['exit_accuracy'],
        'baseline_accuracy': report['rows'][0]['test_accuracy'],
        'stage_macs': report['stage_macs'],
        'exit_macs': report['exit_macs'],
        'recipe': config,
        'trained_on': report['device'],
        'licence': 'Apache-2.0',
    }
    options = {
        'placement': config['placement'],
        'dtype': config['dtype'], 'num_classes': report['num_classes'], 'image_shape': report['image_shape'],
    }  # fmt: skip
    path = into / f'{network}@{dataset}.safetensors'
    write_pretrained(path, network, options, jax.tree.map(np.asarray, variables), normalization, points, card)
    bj.report.write_text(path.with_suffix('.md'), _card(network, card, points))
    return path


def _point(found: dict[str, Any], macs: float, criterion: str) -> bj.OperatingPoint:
    return bj.OperatingPoint(
        thresholds=np.array(found['thresholds'], np.float32),
        criterion=criterion,
        accuracy=found['test_accuracy'],
        split='test',
        exit_fractions=np.array(found['exit_fractions']),
        cost=macs,
    )


def _others(frontier: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the knee, the most accurate on validation data, and the cheapest, but for those already chosen."""
    knee = [point for point in frontier if point['knee']]
    best = max(frontier, key=lambda point: point['validation_accuracy'])
    cheapest = min(frontier, key=lambda point: point['macs'])
    found = {tuple(point['thresholds']): point for point in (*knee, best, cheapest)}
    taken = {tuple(point['thresholds']) for point in chosen}
    return [point for thresholds, point in found.items() if thresholds not in taken]


def _card(network: str, card: dict[str, Any], points: list[bj.OperatingPoint]) -> str:
    trunk = sum(card['stage_macs']) + card['exit_macs'][-1]
    rows = [
        [
            ', '.join(f'{value:.4g}' for value in point.thresholds),
            f'{100 * point.accuracy:.2f}',
            ', '.join(f'{100 * share:.1f}' for share in point.exit_fractions),
            f'{trunk / point.cost:.2f}',
        ]
        for point in points
    ]
    table = bj.report.markdown_table(['thresholds (entropy)', 'test accuracy %', 'exits %', 'MAC gain'], rows)
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
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
