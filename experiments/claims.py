"""Do the paper's claims hold? Trains each variant from several seeds, and answers with an interval; it may be no.

    python -m experiments.claims --workdir=runs/claims --network=b-lenet --dataset=mnist5k

Does joint training regularise, does it help to start from the baseline, do larger weights on early exits help, how deep
should a branch be (Figure 5), and where should it leave? Half an hour for B-LeNet on 2 cores, hours for B-AlexNet.
Writes ``claims_NETWORK.json``, a row per variant and seed, and ``claims_NETWORK.md`` after every trained variant: the
same command resumes a run that was stopped. Variants of a seed share initial weights and the order of the data, so that
differences are paired; baselines are trained on their own.

    python -m experiments.claims --gradients --workdir=runs/claims --network=b-plain30 --dataset=cifar10

Do branches keep gradients from vanishing? The gradient of each layer, with and without branches, at initialisation and
after some steps, in minutes: ``gradients_NETWORK.json``, ``.md`` and ``.png``. ``b-plainD`` is a network of D
convolutions without shortcuts or normalisation, with two branches. Both networks have the same initial weights, see the
same batches, and sum the losses of all of their exits.

    python -m experiments.claims --workdir=runs/claims --random_networks=2000

Do the parts of a network compute the whole? Random networks are cut at random places, about four a second.

    python -m experiments.claims --compatibility --cpu_devices=2 --workdir=runs/compatibility

Which networks can have exits, and what works with them then? Every step of the library runs on tiny networks in the
structure of those that people use, and is compared with what it must answer; five minutes on 2 idle cores.
``compatibility.json``, a row per structure, and ``compatibility.md``; the same command resumes a run that was stopped.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.configs import common
from experiments.run.networks import count_exits, image_specs, load, network_options
from experiments.run.report import JPEG_NOTE, Row, provenance, store
from experiments.run.trainings import Trainer, start_again_on_cpu
from experiments.study import compatibility, flags, gradients, random_networks, verdicts
from experiments.study.variants import with_branch


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all variants, answers the claims and writes the record."""
    parser = flags.parser(__doc__, 'Folder for the results.')
    parser.add_argument('--network', default='b-lenet', help='A branchy one, such as b-lenet, b-alexnet, b-resnet20.')
    parser.add_argument('--dataset', default='mnist5k', help='mnist5k, a TFDS name or an .npz.')
    parser.add_argument('--seeds', type=flags.positive, default=5, help='Trainings of each variant.')
    parser.add_argument('--epochs', type=flags.positive, default=15, help='Epochs of each training.')
    parser.add_argument('--batch_size', type=flags.positive, default=64, help='Examples in a step.')
    parser.add_argument('--learning_rate', type=float, default=3e-3, help='Peak of the learning rate.')
    parser.add_argument('--weight_decay', type=float, default=0.0, help='Weight decay of AdamW.')
    parser.add_argument('--augment', action='store_true', help='Shifts images, and mirrors all but digits.')
    parser.add_argument('--cpu_devices', type=flags.positive, default=1, help='Devices of a CPU that share a step.')
    parser.add_argument('--gradients', action='store_true', help='Measures the gradient of each layer instead.')
    parser.add_argument('--steps', type=flags.positive, default=20, help='With --gradients: between measurements.')
    parser.add_argument('--compatibility', action='store_true', help='Checks networks of many structures instead.')
    parser.add_argument('--random_networks', type=flags.positive, help='Random networks to cut instead.')
    options = parser.parse_args(arguments)
    if options.random_networks:
        print(random_networks.check_many(options.random_networks))
        return
    if options.compatibility:
        start_again_on_cpu(options.cpu_devices)
        jax.config.update('jax_disable_most_optimizations', True)  # compiles three times faster
        print(compatibility.run(options.workdir))
        return
    config = settings(options)
    if options.gradients:
        sizes = {'seeds': options.seeds, 'steps': options.steps, 'batch_size': options.batch_size}
        gradients.run(options.workdir, options.network, load(config), **sizes)
        return
    start_again_on_cpu(options.cpu_devices)
    mesh = bj.sharding.data_mesh(options.cpu_devices) if options.cpu_devices > 1 else None
    dataset = load(config)
    network = network_options(config, dataset.num_classes, dataset.image_shape)
    trainer = Trainer(config, network, dataset, options.workdir / 'checkpoints' / options.network, mesh)
    print(run(trainer, options.workdir, seeds=options.seeds))


def settings(options: argparse.Namespace) -> ConfigDict:
    """Returns the recipe of all variants as settings of a run."""
    config, digits = common.get_config(), 'mnist' in options.dataset
    given = ('network', 'dataset', 'epochs', 'batch_size', 'learning_rate', 'weight_decay', 'cpu_devices')
    config.update({name: getattr(options, name) for name in given})
    config.update(optimizer='adamw', regime='joint', warmup=0.3, scan_epoch=options.cpu_devices == 1)
    config.update(crop_padding=(2 if digits else 4) * options.augment, flip=options.augment and not digits)
    return config


def run(trainer: Trainer, workdir: Path, *, seeds: int) -> str:
    """Trains every variant that the record lacks; answers and writes after each; returns the page.

    Args:
        trainer: the recipe and the data of all variants.
        workdir: where the record goes.
        seeds: trainings of each variant.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    config, dataset = trainer.config, trainer.dataset
    names = ('network', 'dataset', 'dtype', 'epochs', 'batch_size', 'learning_rate', 'weight_decay', 'crop_padding')
    ours = {name: config[name] for name in (*names, 'flip')}
    ours |= {'seeds': seeds, 'train': len(dataset.train), 'test': len(dataset.test)}
    path = workdir / f'claims_{config.network}.json'
    record = bj.report.read_json(path) if path.exists() else {'settings': ours, **provenance('claims'), 'rows': []}
    if record['settings'] != ours:
        raise ValueError(
            f'workdir: {path} holds results of other settings; choose another folder, or delete this one with its '
            'checkpoints'
        )
    for name, train in variants(trainer).items():
        if any(row['variant'] == name for row in record['rows']):
            continue
        record['rows'] += [{'variant': name, 'seed': seed, **train(name, seed)[1]} for seed in range(seeds)]
        record['answers'] = verdicts.judge_all(record['rows'], config.network)
        store(path, record, page)
    return page(record)


Variant = Callable[[str, int], tuple[Variables, Row]]
"""Trains under a name from a seed; returns the variables and the accuracies of the exits."""


def variants(trainer: Trainer) -> dict[str, Variant]:
    """Returns the functions that train the variants, by name."""
    config, options = trainer.config, {**trainer.options}
    if config.network == 'b-lenet':  # the same network in the form in which a CPU trains it fastest
        options['convolution'] = bj.models.banded_convolution
    del options['placement']
    model = bj.models.create(config.network, **options)
    exits = count_exits(model, image_specs(trainer.dataset.image_shape))

    def variant(
        model: Any, weights: Sequence[float], name: str, seed: int, *, epochs: int = config.epochs, start: bool = False
    ) -> tuple[Variables, Row]:
        variables = trainer.init(lambda: model, jax.random.key(seed))
        if start:
            variables, _ = bj.training.initialize_from_baseline(variables, baseline('baseline', seed)[0])
        key = jax.random.fold_in(jax.random.key(1), seed)
        trained = trainer.train(lambda: model, variables, key, weights, f'{name}, seed {seed}', epochs)
        return trained, _accuracy(trainer, model, trained)

    @functools.cache  # of two variants
    def baseline(name: str, seed: int) -> tuple[Variables, Row]:
        return variant(bj.models.without_branches(model), [1.0], name, seed)

    def branch(after: int, convolutions: int) -> Variant:
        trunk = config.network[2:]
        return lambda name, seed: variant(
            with_branch(trunk, after=after, convolutions=convolutions, **options), [1.0, 1.0], name, seed
        )

    joint = functools.partial(variant, model, [1.0] * exits)
    return {
        'baseline': baseline,
        'joint': joint,
        'joint, from the baseline': functools.partial(joint, start=True),
        'joint, first exit 1.0 to last 0.3': functools.partial(variant, model, np.linspace(1.0, 0.3, exits).tolist()),
        **{verdicts.depth_name(depth): branch(1, depth) for depth in verdicts.DEPTHS},
        'joint, twice as long': functools.partial(joint, epochs=2 * config.epochs),
        **{verdicts.position_name(position): branch(position, 1) for position in verdicts.positions(config.network)},
    }


def _accuracy(trainer: Trainer, model: Any, variables: Variables) -> Row:
    """Returns the accuracy of every exit on training images, without augmentation, and on test images."""
    dataset = trainer.dataset
    look = functools.partial(bj.inference.exit_table, model, variables, preprocess=dataset.normalization)
    parts = {'train_accuracy': dataset.train, 'test_accuracy': dataset.test}
    return {name: look(part).anytime().accuracy.tolist() for name, part in parts.items()}


def page(record: Mapping[str, Any]) -> str:
    """Lays out a record in Markdown: verdicts first, then their figures."""
    ours = record['settings']
    rows, cells = record['rows'], []
    for name in dict.fromkeys(row['variant'] for row in rows):
        test, train = (verdicts.accuracies(rows, name, part) for part in ('test_accuracy', 'train_accuracy'))
        cells.append([name, ', '.join(map(_with_interval, test.T)), _with_interval((train - test)[:, -1])])
    columns = ['variant', 'test accuracy of each exit, %', 'train − test of the last']
    note = f'\n\n{JPEG_NOTE}' if ours['dataset'] == 'cifar10' else ''
    return f"""# The paper's claims on {ours['network']}, {ours['dataset']}

`{record['command']}`

{record['device']}. {ours['train']:,} training and {ours['test']:,} test images, {ours['epochs']} epochs,
{ours['seeds']} seeds. Figures are means with 95 % confidence intervals (Student's t); questions are answered by
differences paired by seed.{note}

## Verdicts

{verdicts.bullets(record['answers'])}

## Figures

{bj.report.markdown_table(columns, cells)}
"""


def _with_interval(values: np.ndarray) -> str:
    mean = verdicts.interval(values)
    return f'{mean["mean"]:.2f} ± {mean["high"] - mean["mean"]:.2f}'


if __name__ == '__main__':
    main()
