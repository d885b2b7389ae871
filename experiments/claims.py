"""Puts the paper's claims to the test, each from several seeds, with a verdict that may be no.

    python -m experiments.claims --workdir=runs/claims --network=b-lenet --dataset=mnist5k

Writes ``claims_NETWORK.json`` after every trained variant, and checkpoints: a run that was stopped goes on where it
was. In the end writes ``claims_NETWORK.md``; claims whose variants were not trained are left out. Baselines are
trained on their own; variants of a seed share initial weights and the order of the data, so that differences are
paired.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.checkpoint import locked
from experiments.configs import common
from experiments.pages.claims import page
from experiments.run import command
from experiments.run.networks import count_exits, image_specs
from experiments.run.processes import start_again_on_cpu
from experiments.run.tasks import load
from experiments.study.seeds import Recipe, Seeds, Trained
from experiments.study.variants import with_branch
from experiments.study.verdicts import DEPTHS, depth_name, judge_all, position_name, positions


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all variants, judges and writes."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--network', default='b-lenet', help='A branchy one, such as b-lenet, b-alexnet, b-resnet20.')
    parser.add_argument('--dataset', default='mnist5k', help='mnist5k, a TFDS name or an .npz.')
    parser.add_argument('--seeds', type=command.positive, default=5, help='Trainings of each variant.')
    parser.add_argument('--epochs', type=command.positive, default=15, help='Of each training.')
    parser.add_argument('--batch_size', type=command.positive, default=64, help='Examples in a step.')
    parser.add_argument('--learning_rate', type=float, default=3e-3, help='Peak.')
    parser.add_argument('--weight_decay', type=float, default=0.0, help='Of AdamW.')
    parser.add_argument('--augment', action='store_true', help='Shifts and, but for digits, mirroring; not the paper.')
    parser.add_argument('--dtype', default='float32', help='Of the computation.')
    parser.add_argument('--most_examples', type=int, default=0, help='Of each part of the data, to try it; 0: all.')
    parser.add_argument('--cpu_devices', type=command.positive, default=1, help='That a CPU makes to share each step.')
    parser.add_argument('--judge_only', action='store_true', help='Judge by what was trained so far.')
    options = parser.parse_args(arguments)
    start_again_on_cpu(options.cpu_devices)
    mesh = bj.sharding.data_mesh(options.cpu_devices) if options.cpu_devices > 1 else None
    config: ConfigDict = common.get_config()
    config.update(dataset=options.dataset, most_examples=options.most_examples)
    digits = 'mnist' in options.dataset
    recipe = Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        crop_padding=(2 if digits else 4) * options.augment,
        flip=options.augment and not digits,
    )
    run(
        options.workdir,
        options.network,
        load(config),
        recipe,
        seeds=options.seeds,
        dtype=options.dtype,
        judge_only=options.judge_only,
        mesh=mesh,
    )


def run(
    workdir: Path,
    network: str,
    dataset: bj.data.Dataset,
    recipe: Recipe,
    *,
    seeds: int,
    dtype: str,
    judge_only: bool,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Trains what the claims need, resuming, and returns the record.

    Args:
        workdir: ``claims_NETWORK.json`` and ``.md`` go there.
        network: the branchy one.
        dataset: to train and evaluate on.
        recipe: of every training.
        seeds: trainings of each variant.
        dtype: of the computation.
        judge_only: trains nothing more.
        mesh: devices that share every step.
    """
    checkpoints = workdir / 'checkpoints' / network
    with contextlib.nullcontext() if judge_only else locked(checkpoints):
        settings = {
            'network': network,
            'dataset': dataset.name,
            'seeds': seeds,
            'dtype': dtype,
            **vars(recipe),
            'train': len(dataset.train),
            'test': len(dataset.test),
        }
        path = workdir / f'claims_{network}.json'
        record = _started(path, settings)
        if not judge_only:
            options = {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape}
            options['dtype'] = jnp.dtype(dtype)
            if network == 'b-lenet':  # the same network in the form in which a CPU trains it fastest
                options['convolution'] = bj.models.banded_convolution
            trainings = Seeds(dataset, recipe, count=seeds, directory=checkpoints, mesh=mesh)
            _train_missing(record, _variants(network, options, trainings), path)
        _write(path, record)
        bj.report.write_text(path.with_suffix('.md'), page(record))
    print(page(record))
    return record


def _started(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the record so far, refusing one of other settings."""
    record = bj.report.read_json(path) if path.exists() else {}
    if record.get('settings', settings) != settings:
        raise ValueError(
            f'workdir: {path} holds results of other settings; choose another folder, or delete this one with its '
            'checkpoints'
        )
    return {'settings': settings, **command.provenance('claims'), 'seconds': 0.0, 'variants': {}, **record}


def _write(path: Path, record: dict[str, Any]) -> None:
    record['claims'] = judge_all(record['variants'], record['settings']['network'])
    bj.report.write_json(path, record)


def _variants(network: str, options: dict[str, Any], seeds: Seeds) -> dict[str, Callable[[str], Trained]]:
    """Returns by name what trains each variant under that name."""
    model = bj.models.create(network, **options)
    exits = count_exits(model, image_specs(options['image_shape']))
    twice = 2 * seeds.recipe.epochs
    equal, falling = [1.0] * exits, np.linspace(1.0, 0.3, exits).tolist()

    @functools.cache  # of two variants
    def baseline(name: str) -> Trained:
        return seeds.train(name, bj.models.without_branches(model), [1.0])

    def joint(name: str, weights: list[float] = equal, **changed: Any) -> Trained:
        return seeds.train(name, model, weights, **changed)

    def branch(name: str, after: int, convolutions: int) -> Trained:
        return seeds.train(
            name, with_branch(network[2:], after=after, convolutions=convolutions, **options), [1.0, 1.0]
        )

    return {
        'baseline': baseline,
        'joint': joint,
        'joint, from the baseline': lambda name: joint(name, starts=baseline('baseline').variables),
        'joint, first exit 1.0 to last 0.3': lambda name: joint(name, falling),
        **{depth_name(depth): functools.partial(branch, after=1, convolutions=depth) for depth in DEPTHS},
        'joint, twice as long': lambda name: joint(name, epochs=twice),
        **{
            position_name(position): functools.partial(branch, after=position, convolutions=1)
            for position in positions(network)
        },
    }


def _train_missing(record: dict[str, Any], variants: dict[str, Callable[[str], Trained]], path: Path) -> None:
    """Trains every variant that the record lacks, and writes the record after each."""
    for name in [name for name in variants if name not in record['variants']]:
        start = time.perf_counter()
        found = variants[name](name)
        seconds = time.perf_counter() - start
        record['variants'][name] = {
            'train_accuracy': found.train_accuracy.tolist(),
            'test_accuracy': found.test_accuracy.tolist(),
            'seconds': seconds,
        }
        record['seconds'] += seconds
        _write(path, record)
        exits_text = ', '.join(f'{100 * value:.2f}' for value in found.test_accuracy.mean(axis=0))
        print(
            f'{record["settings"]["network"]} {name}: test accuracy per exit {exits_text} %, {seconds:.0f} s',
            flush=True,
        )


if __name__ == '__main__':
    main()
