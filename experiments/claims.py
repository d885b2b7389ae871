"""Puts the paper's claims to the test, each from several seeds, with a verdict that may be no.

    python -m experiments.claims --workdir=runs/claims --network=b-lenet --dataset=mnist5k

Writes ``claims_NETWORK.json`` after every trained variant, so that a run that was stopped goes on where it was, and in
the end ``claims_NETWORK.md``; claims whose variants were not trained are left out. Baselines are trained on their own;
variants of a seed share initial weights and the order of the data, so that differences are paired.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

import branchy_jax as bj
from experiments import datasets
from experiments.claims_page import page
from experiments.configs import common
from experiments.records import describe_device
from experiments.seeds import Recipe, Trained, faster_way, train_seeds
from experiments.variants import with_branch
from experiments.verdicts import judge

DEPTHS = (0, 1, 2, 3, 4)
_POSITIONS = {'lenet': (1, 2, 3), 'alexnet': (1, 2, 3, 4)}


def main(arguments: list[str]) -> None:
    """Trains all variants, judges and writes."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    config: ConfigDict = common.get_config()
    config.update(dataset=_DATASET.value, most_examples=_MOST_EXAMPLES.value)
    dataset = datasets.load(config)
    digits = 'mnist' in _DATASET.value
    recipe = Recipe(
        epochs=_EPOCHS.value, batch_size=_BATCH_SIZE.value, learning_rate=_LEARNING_RATE.value,
        weight_decay=_WEIGHT_DECAY.value, crop_padding=(2 if digits else 4) * _AUGMENT.value,
        flip=_AUGMENT.value and not digits,
    )  # fmt: skip
    run(
        Path(_WORKDIR.value),
        _NETWORK.value,
        dataset,
        recipe,
        seeds=_SEEDS.value,
        dtype=_DTYPE.value,
        judge_only=_JUDGE_ONLY.value,
    )


def run(
    workdir: Path,
    network: str,
    dataset: bj.data.Dataset,
    recipe: Recipe,
    *,
    seeds: int,
    dtype: str = 'float32',
    judge_only: bool = False,
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
    """
    path = workdir / f'claims_{network}.json'
    settings = {
        'network': network, 'dataset': dataset.name, 'seeds': seeds, 'dtype': dtype, **vars(recipe),
        'train': len(dataset.train), 'test': len(dataset.test),
    }  # fmt: skip
    record = bj.report.read_json(path) if path.exists() else {}
    if record.get('settings', settings) != settings:
        raise ValueError(f'workdir: {path} holds results of other settings; choose another folder, or delete it')
    options = {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape, 'dtype': jnp.dtype(dtype)}
    if network == 'b-lenet':  # the same network in the form in which a CPU trains it fastest
        options['convolution'] = bj.models.banded_convolution
    record = {
        'settings': settings,
        'device': describe_device(),
        'command': shlex.join(['python', '-m', 'experiments.claims', *sys.argv[1:]]),
        'seconds': 0.0,
        'variants': {},
        **record,
    }
    if 'seeds_by' not in record:
        record['seeds_by'] = faster_way(bj.models.create(network, **options), dataset, recipe, seeds=seeds)
    train = functools.partial(train_seeds, dataset=dataset, recipe=recipe, seeds=seeds, by=record['seeds_by']['by'])
    workdir.mkdir(parents=True, exist_ok=True)
    if not judge_only:
        _train_missing(record, network, options, train, path)
    _write(path, record)
    bj.report.write_text(path.with_suffix('.md'), page(record))
    print(page(record))
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    record['claims'] = judge_all(record['variants'], record['settings']['network'])
    bj.report.write_json(path, record)


def _train_missing(
    record: dict[str, Any], network: str, options: dict[str, Any], train: Callable[..., Trained], path: Path
) -> None:
    """Trains every variant that the record lacks, and writes the record after each."""
    model = bj.models.create(network, **options)
    exits, trunk = model.num_exits, network[2:]
    equal, falling = [1.0] * exits, np.linspace(1.0, 0.3, exits).tolist()
    epochs = record['settings']['epochs']
    baselines: list[Any] = []

    def from_baseline() -> Trained:
        starts = baselines or train(bj.models.without_branches(model), [1.0]).variables
        return train(model, equal, starts=starts)

    variants: dict[str, Callable[[], Trained]] = {
        'baseline': lambda: train(bj.models.without_branches(model), [1.0]),
        'joint': lambda: train(model, equal),
        'joint, from the baseline': from_baseline,
        'joint, twice as long': lambda: train(model, equal, epochs=2 * epochs),
        'joint, first exit 1.0 to last 0.3': lambda: train(model, falling),
    }
    for depth in DEPTHS:
        variants[_depth(depth)] = lambda depth=depth: train(
            with_branch(trunk, after=1, convolutions=depth, **options), [1.0, 1.0]
        )
    for position in _positions(network):
        variants[_position(position)] = lambda position=position: train(
            with_branch(trunk, after=position, convolutions=1, **options), [1.0, 1.0]
        )
    for name, make in variants.items():
        if name in record['variants']:
            continue
        start = time.perf_counter()
        found = make()
        if name == 'baseline':
            baselines = found.variables
        seconds = time.perf_counter() - start
        record['variants'][name] = {
            'train_accuracy': found.train_accuracy.tolist(),
            'test_accuracy': found.test_accuracy.tolist(),
            'seconds': seconds,
        }
        record['seconds'] += seconds
        _write(path, record)
        exits_text = ', '.join(f'{100 * value:.2f}' for value in found.test_accuracy.mean(axis=0))
        print(f'{network} {name}: test accuracy per exit {exits_text} %, {seconds:.0f} s', flush=True)


def _depth(depth: int) -> str:
    return f'branch of {depth} convolutions'


def _position(position: int) -> str:
    return _depth(1) if position == 1 else f'branch after layer {position}'  # the same network


def _positions(network: str) -> tuple[int, ...]:
    trunk = network[2:]
    if trunk in _POSITIONS:
        return _POSITIONS[trunk]
    blocks = (int(trunk.removeprefix('resnet')) - 2) // 6  # after the first block, then at each third
    return tuple(dict.fromkeys((2, 1 + blocks, 1 + 2 * blocks)))


def judge_all(variants: dict[str, Any], network: str) -> list[dict[str, Any]]:
    """Answers every claim from the accuracies of its variants; one that lacks a variant is left out."""

    def final(name: str, part: str = 'test_accuracy') -> np.ndarray:
        return np.array(variants[name][part])[:, -1]

    def first(name: str) -> np.ndarray:
        return np.array(variants[name]['test_accuracy'])[:, 0]

    def gap(name: str) -> np.ndarray:
        return final(name, 'train_accuracy') - final(name)

    points = functools.partial(judge, unit='points', scale=100.0)
    depths, positions = [_depth(depth) for depth in DEPTHS], [_position(place) for place in _positions(network)]
    joint, falling = 'joint', 'joint, first exit 1.0 to last 0.3'
    start, longer = 'joint, from the baseline', 'joint, twice as long'
    claims: dict[str, list[tuple[list[str], str, Callable[[], np.ndarray]]]] = {
        'Joint training regularises': [
            ([joint, 'baseline'],
             'Is the last exit more accurate on test data than the baseline trained on its own?',
             lambda: final(joint) - final('baseline')),
            ([joint, 'baseline'], 'Is its gap between training and test accuracy smaller?',
             lambda: gap('baseline') - gap(joint)),
        ],
        'Starting from the trained baseline is better than from random': [
            ([start, joint], 'Is the last exit more accurate, after as many joint epochs?',
             lambda: final(start) - final(joint)),
            ([start, longer], "And after as many epochs in all, the baseline's counted?",
             lambda: final(start) - final(longer)),
        ],
        'A larger weight on early exits helps later ones': [
            ([falling, joint],
             'Do weights from 1.0 on the first to 0.3 on the last exit make the last more accurate than equal ones?',
             lambda: final(falling) - final(joint)),
            ([falling, joint], 'And the first exit?', lambda: first(falling) - first(joint)),
        ],
        'Deeper branches (Figure 5)': [
            (depths, 'Does the last exit gain by each convolution in branch 1?',
             lambda: _slopes([final(name) for name in depths])),
            (depths, "Does the branch's own exit?", lambda: _slopes([first(name) for name in depths])),
        ],
        'Later branches': [
            (positions, "Is the branch's own exit more accurate, each place later?",
             lambda: _slopes([first(name) for name in positions])),
            (positions, 'Does the last exit gain by a later branch, each place?',
             lambda: _slopes([final(name) for name in positions])),
        ],
    }  # fmt: skip
    found = []
    for claim, questions in claims.items():
        answers = [
            points(question, differences())
            for needed, question, differences in questions
            if set(needed) <= set(variants)
        ]
        if answers:
            found.append({'claim': claim, 'answers': answers})
    return found


def _slopes(accuracies: list[np.ndarray]) -> np.ndarray:
    """Returns for every seed the slope of accuracy over place, by least squares."""
    return np.polyfit(np.arange(len(accuracies)), np.array(accuracies), 1)[0]


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the results.')
    _NETWORK = flags.DEFINE_string('network', 'b-lenet', 'The branchy network, such as b-lenet, b-alexnet, b-resnet20.')
    _DATASET = flags.DEFINE_string('dataset', 'mnist5k', 'mnist5k, a TFDS name or an .npz.')
    _SEEDS = flags.DEFINE_integer('seeds', 5, 'Trainings of each variant.', lower_bound=1)
    _EPOCHS = flags.DEFINE_integer('epochs', 15, 'Of each training.', lower_bound=1)
    _BATCH_SIZE = flags.DEFINE_integer('batch_size', 64, 'Examples in a step.', lower_bound=1)
    _LEARNING_RATE = flags.DEFINE_float('learning_rate', 3e-3, 'Peak.')
    _WEIGHT_DECAY = flags.DEFINE_float('weight_decay', 0.0, 'Of AdamW.')
    _AUGMENT = flags.DEFINE_bool('augment', False, 'Random shifts and, but for digits, mirroring. The paper has none.')
    _DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of the computation.')
    _MOST_EXAMPLES = flags.DEFINE_integer('most_examples', 0, 'Of each part of the data, to try it out; 0: all.')
    _JUDGE_ONLY = flags.DEFINE_bool('judge_only', False, 'Judge by what was trained so far.')
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
