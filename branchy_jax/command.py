"""The console command ``branchy-jax``: train a network with exits, report on it, plan its execution, export it.

    branchy-jax train b-lenet --dataset=mnist5k --epochs=3 --to=runs/digits
    branchy-jax report runs/digits --dataset=mnist5k
    branchy-jax plan runs/digits --dataset=mnist5k --batch_size=64
    branchy-jax export runs/digits --to=digits.onnx

Every command but the first takes a folder that ``train`` wrote, ``network@dataset`` of the weights in the package, or
``owner/name`` on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax import costs, data, export, inference, measure, models, report, training
from branchy_jax.data import Dataset
from branchy_jax.models import Pretrained
from branchy_jax.types import Array, OperatingPoint, Variables

_ON_ONNX = '.onnx'
_PASSES = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ``ValueError`` becomes one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f'branchy-jax {options.command}: {error}', file=sys.stderr)
        raise SystemExit(2) from error


def _parser() -> argparse.ArgumentParser:
    describe = functools.partial(argparse.ArgumentParser, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = describe(prog='branchy-jax', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='train | report | plan | export')

    def command(name: str, run: Any, told: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=told, description=(run.__doc__ or '').split('\n\n')[0])
        found.set_defaults(run=run)
        return found

    train = command('train', _train, 'train all exits jointly, choose thresholds, save both')
    train.add_argument('network', help=f'one of {", ".join(name for name in models.names() if name.startswith("b-"))}')
    train.add_argument('--dataset', default='mnist5k', help='mnist5k, any TFDS image classification, or an .npz file')
    train.add_argument('--to', type=Path, required=True, help='folder to save to; a killed run goes on from it')
    train.add_argument('--epochs', type=float, default=5, help='of training (default: %(default)s)')
    train.add_argument('--batch_size', type=int, default=64, help='examples in a step (default: %(default)s)')
    train.add_argument('--exit_weights', type=float, nargs='+', help='one for each exit (default: 1 each)')
    train.add_argument('--learning_rate', type=float, default=1e-3, help='of Adam (default: %(default)s)')
    train.add_argument('--seed', type=int, default=0, help='of everything random (default: %(default)s)')
    for name, run, told in (
        ('report', _report, 'accuracy, exits and speed on test data, beside the network without exits'),
        ('plan', _plan, 'measure which executor is fastest for batches of a size on this device'),
        ('export', _export, 'write StableHLO programs for CPU, GPU and TPU, or one ONNX file'),
    ):
        other = command(name, run, told)
        other.add_argument('network', help='a folder, network@dataset, or owner/name on the hub')
        other.add_argument('--point', type=int, default=1, help='number of its operating point (default: %(default)s)')
        if run is not _export:
            other.add_argument('--dataset', help='by default what it was trained on')
    commands.choices['report'].add_argument('--images', type=int, default=100, help='to time (default: %(default)s)')
    commands.choices['plan'].add_argument('--batch_size', type=int, default=64, help='(default: %(default)s)')
    commands.choices['export'].add_argument(
        '--to', type=Path, required=True, help=f'a folder to make, or a file that ends in {_ON_ONNX}'
    )
    return parser


def _train(options: argparse.Namespace) -> None:
    """Trains all exits of a network jointly and saves it with two operating points, chosen on validation data."""
    dataset = data.load_dataset(options.dataset, seed=options.seed)
    settings: dict[str, Any] = {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape}
    model = models.create(options.network, **settings)
    start, order = jax.random.split(jax.random.key(options.seed))
    variables = jax.jit(model.init)(start, jnp.zeros((1, *dataset.image_shape)))
    optimizer = training.paper_adam(options.learning_rate)
    state = training.fit(
        training.create_train_state(model, variables, optimizer),
        dataset.train,
        jnp.ones(model.num_exits) if options.exit_weights is None else jnp.array(options.exit_weights),
        order,
        epochs=options.epochs,
        batch_size=options.batch_size,
        prepare=lambda key, batch: batch.replace(image=dataset.normalization(batch.image)),
        directory=options.to / 'checkpoints',
        on_metrics=_tell,
    )
    table = inference.exit_table(model, state.variables, dataset.validation, prepare=dataset.normalization)
    screen = table.screen()
    points = [screen.for_accuracy(float(screen.accuracy.max())), screen.knee()]
    models.save_pretrained(
        options.to,
        options.network,
        state.variables,
        options=settings,
        normalization=dataset.normalization,
        operating_points=points,
        card={'dataset': options.dataset, 'seed': options.seed, 'epochs': options.epochs},
    )
    print(_table_of(points, costs.count_macs(model, model.image_shape).trunk))
    print(f'Saved in {options.to}. Next: branchy-jax report {options.to}')


def _tell(step: int, scalars: Mapping[str, float]) -> None:
    told = ', '.join(f'{name} {value:.4f}' for name, value in scalars.items())
    print(f'step {step}: {told}', file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    """Evaluates a network on test data at its operating points and times one of them, one image at a time.

    Both networks, with exits and without, are rewritten by `inference.optimize`; passes take turns.
    """
    found, point = _found(options)
    dataset = _dataset(options, found)
    outcome = []
    for chosen in found.operating_points:
        table = inference.exit_table(
            found.model,
            found.variables,
            dataset.test,
            prepare=found.normalize,
            criterion=chosen.policy.criterion,
            split='test',
        )
        outcome.append(table.evaluate(chosen).point(0))
    print(_table_of(outcome, costs.count_macs(found.model, found.model.image_shape).trunk))
    gain = _gain(found, point, found.normalize(dataset.test.image[: options.images]))
    print(
        f'Point {options.point}, one image at a time, {options.images} images on {jax.default_backend()}: '
        f'{gain.median:.2f} times as fast as the network without side exits (95 % interval {gain.low:.2f} to '
        f'{gain.high:.2f}).'
    )


def _gain(found: Pretrained, point: OperatingPoint, images: Array) -> measure.Ratio:
    model, variables = inference.optimize(found.model, found.variables)
    plain_model, plain_variables = inference.optimize(models.without_branches(found.model), found.variables)
    runs = {
        'plain': (inference.staged(plain_model), plain_variables, []),
        'branchy': (inference.staged(model), variables, point.policy),
    }
    passes = {
        name: measure.one_by_one(functools.partial(_answer, run, weights, policy), list(images))
        for name, (run, weights, policy) in runs.items()
    }
    seconds = measure.interleaved_passes(passes, passes=_PASSES)
    return measure.paired_ratio(seconds['plain'], seconds['branchy'])


def _answer(run: Any, variables: Variables, policy: Any, image: Array) -> Any:
    return run(variables, image, policy)


def _plan(options: argparse.Namespace) -> None:
    """Measures which executor answers batches fastest here, and prints all that were tried."""
    found, point = _found(options)
    images = found.normalize(_dataset(options, found).test.image[: options.batch_size])
    print(inference.plan(found.model, found.variables, images, point.policy))


def _export(options: argparse.Namespace) -> None:
    """Writes a network as a folder of StableHLO programs, or as one ONNX file with a conditional for every exit."""
    found, point = _found(options)
    write = export.save_onnx if options.to.suffix == _ON_ONNX else export.save
    write(options.to, found.model, found.variables, thresholds=point.policy, normalization=found.normalization)
    print(f'Written to {options.to}')


def _found(options: argparse.Namespace) -> tuple[Pretrained, OperatingPoint]:
    name, _, dataset = options.network.partition('@')
    found = models.load_pretrained(name, dataset=dataset or None)
    if not 1 <= options.point <= len(found.operating_points):
        raise ValueError(f'--point: got {options.point}; there are 1 to {len(found.operating_points)}')
    return found, found.operating_points[options.point - 1]


def _dataset(options: argparse.Namespace, found: Pretrained) -> Dataset:
    return data.load_dataset(options.dataset or found.card['dataset'], seed=found.card.get('seed', 0))


def _table_of(points: Sequence[OperatingPoint], trunk: float) -> str:
    columns = ['point', 'thresholds', 'data', 'accuracy %', 'exits %', 'MAC gain']
    rows = [
        [
            str(number),
            ', '.join(f'{threshold:.4g}' for threshold in np.asarray(point.thresholds)),
            point.split,
            f'{100 * point.accuracy:.2f}',
            ', '.join(f'{100 * share:.1f}' for share in point.exit_fractions),
            f'{trunk / point.cost:.2f}',
        ]
        for number, point in enumerate(points, 1)
    ]
    return report.markdown_table(columns, rows)


if __name__ == '__main__':
    main()
