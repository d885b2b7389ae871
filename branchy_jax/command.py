"""The console command ``branchy-jax``: train a network with exits, report on it, plan its execution, export it.

    branchy-jax train b-lenet --dataset=mnist5k --epochs=3 --to=runs/digits
    branchy-jax report runs/digits --dataset=mnist5k
    branchy-jax plan runs/digits --dataset=mnist5k --batch_size=64
    branchy-jax export runs/digits --to=digits.onnx

Every command but the first takes a folder that ``train`` wrote, ``network@dataset`` of the weights in the package, or
``owner/name`` on the Hugging Face hub.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax import __version__, costs, data, export, inference, measure, models, report, training
from branchy_jax.thresholds import ExitTable
from branchy_jax.types import Array, Batch, OperatingPoint

_PASSES = 20
"""Number of paired passes that compare two networks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ``ValueError`` becomes one line on standard error and exit status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        parser.exit(2, f'branchy-jax {options.command}: {error}\n')


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog='branchy-jax', description=__doc__, formatter_class=as_written)
    parser.add_argument('--version', action='version', version=f'branchy-jax {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='train | report | plan | export')

    def command(run: Callable[..., None], *parents: argparse.ArgumentParser) -> Callable[..., Any]:
        summary = (run.__doc__ or '').split('\n')[0]
        subparser = commands.add_parser(run.__name__.strip('_'), help=summary, description=summary, parents=parents)
        subparser.set_defaults(run=run)
        return subparser.add_argument

    add = command(_train)
    add('network', help=f'one of {", ".join(name for name in models.names() if name.startswith("b-"))}')
    add('--dataset', default='mnist5k', help='mnist5k, an image data set of TFDS, or an .npz (default: %(default)s)')
    add('--to', type=Path, required=True, help='folder to save to; a killed run resumes from it')
    add('--epochs', type=float, default=5, help='of training (default: %(default)s)')
    add('--batch_size', type=int, default=64, help='examples in a step (default: %(default)s)')
    add('--exit_weights', type=_numbers, nargs='+', default=[], help='one an exit, such as 1,0.3 (default: 1 each)')
    add('--learning_rate', type=float, default=1e-3, help='of Adam (default: %(default)s)')
    add('--seed', type=int, default=0, help='of everything random (default: %(default)s)')
    trained = argparse.ArgumentParser(add_help=False)
    trained.add_argument('network', help='a folder, network@dataset, or owner/name on the hub')
    trained.add_argument('--point', type=int, default=1, help='number of its operating point (default: %(default)s)')
    tested = argparse.ArgumentParser(add_help=False, parents=[trained])
    tested.add_argument('--dataset', help='by default the one it was trained on')
    command(_report, tested)('--images', type=int, default=100, help='number of images to time (default: %(default)s)')
    command(_plan, tested)('--batch_size', type=int, default=64, help='images in a call (default: %(default)s)')
    command(_export, trained)('--to', type=Path, required=True, help='folder to make, or file that ends in .onnx')
    return parser


def _train(options: argparse.Namespace) -> None:
    """Trains all exits of a network jointly and saves it with two operating points, chosen on validation data."""
    dataset = data.load_dataset(options.dataset, seed=options.seed)
    network: dict[str, Any] = {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape}
    model = models.create(options.network, **network)
    inputs = jnp.zeros((1, *dataset.image_shape))
    start, order = jax.random.split(jax.random.key(options.seed))
    variables = jax.jit(model.init)(start, inputs)
    macs = costs.count_macs(model, inputs=inputs)
    state = training.fit(
        training.create_train_state(model, variables, training.paper_adam(options.learning_rate)),
        dataset.train,
        jnp.array(list(itertools.chain.from_iterable(options.exit_weights)) or [1.0] * len(macs.exits)),
        order,
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=lambda key, batch: batch.replace(image=dataset.normalization(batch.image)),
        directory=options.to / 'checkpoints',
        on_metrics=functools.partial(_print_metrics, len(dataset.train) // options.batch_size),
    )
    table = inference.exit_table(model, state.variables, dataset.validation, preprocess=dataset.normalization)
    screen = table.screen()
    points = [screen.for_accuracy(float(screen.accuracy.max())), screen.knee()]
    stored: dict[str, Any] = {'normalization': dataset.normalization, 'operating_points': points}
    stored['card'] = {'dataset': options.dataset, 'seed': options.seed, 'epochs': options.epochs}
    models.save_pretrained(options.to, options.network, state.variables, options=network, **stored)
    print(_table_of(points, macs.trunk))
    print(f'Saved in {options.to}. Next: branchy-jax report {options.to}')


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(',')]


def _print_metrics(steps: int, step: int, scalars: Mapping[str, float]) -> None:
    values = ', '.join(f'{name} {value:.4f}' for name, value in scalars.items())
    print(f'step {step}, epoch {step / steps:g}: {values}', file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    """Evaluates a network on test data at its operating points, and times one of them beside the network without exits.

    Both networks are rewritten by `inference.optimize` and take one image at a time; their passes take turns.
    """
    weights, point = _load(options)
    test = _test_data(options, weights)
    outputs = inference.exit_outputs(weights.model, weights.variables, test.image, preprocess=weights.normalize)
    logits, macs = np.asarray(outputs.logits), costs.count_macs(weights.model, inputs=weights.inputs)
    points = []
    for chosen in weights.operating_points:
        table = ExitTable.from_logits(logits, test.label, macs, criterion=chosen.policy.criterion, split='test')
        points.append(table.evaluate(chosen).point(0))
    print(_table_of(points, macs.trunk))
    images = list(weights.normalize(test.image[: options.images]))
    passes = {
        'baseline': _pass(models.without_branches(weights.model), weights, [], images),
        'candidate': _pass(weights.model, weights, point.policy, images),
    }
    gain = measure.paired_ratio(**measure.interleaved_passes(passes, passes=_PASSES))
    setting = f'Point {options.point}, one image at a time, {options.images} images on {jax.default_backend()}'
    interval = f'95 % interval {gain.low:.2f} to {gain.high:.2f}'
    print(f'{setting}: {gain.median:.2f} times as fast as the network without side exits ({interval}).')


def _pass(model: Any, weights: models.Pretrained, policy: Any, images: Sequence[Array]) -> Callable[[], None]:
    fast_model, variables = inference.optimize(model, weights.variables, inputs=weights.inputs)
    run = inference.staged(fast_model)
    return measure.one_by_one(lambda image: run(variables, image, policy), images)


def _plan(options: argparse.Namespace) -> None:
    """Measures which executor is fastest for batches of a size on this device, and prints all candidates."""
    weights, point = _load(options)
    images = weights.normalize(_test_data(options, weights).image[: options.batch_size])
    print(inference.plan(weights.model, weights.variables, images, point.policy))


def _export(options: argparse.Namespace) -> None:
    """Writes StableHLO programs for CPU, GPU and TPU to a folder, or one ONNX file with a conditional for each exit."""
    weights, point = _load(options)
    write = export.save_onnx if options.to.suffix == '.onnx' else export.save
    settings: dict[str, Any] = {'inputs': weights.inputs, 'normalization': weights.normalization}
    write(options.to, weights.model, weights.variables, point.policy, **settings)
    print(f'Written to {options.to}')


def _load(options: argparse.Namespace) -> tuple[models.Pretrained, OperatingPoint]:
    name, _, dataset = options.network.partition('@')
    weights = models.load_pretrained(name, dataset=dataset or None)
    if not 1 <= options.point <= len(weights.operating_points):
        raise ValueError(f'--point: got {options.point}; there are 1 to {len(weights.operating_points)}')
    return weights, weights.operating_points[options.point - 1]


def _test_data(options: argparse.Namespace, weights: models.Pretrained) -> Batch:
    return data.load_dataset(options.dataset or weights.card['dataset'], seed=weights.card.get('seed', 0)).test


def _table_of(points: Sequence[OperatingPoint], trunk: float) -> str:
    rows = []
    for number, point in enumerate(points, 1):
        thresholds = ', '.join(f'{threshold:.4g}' for threshold in np.asarray(point.thresholds))
        shares = ', '.join(f'{100 * share:.1f}' for share in point.exit_fractions)
        accuracy, gain = f'{100 * point.accuracy:.2f}', f'{trunk / point.cost:.2f}'
        rows.append([str(number), thresholds, point.split, accuracy, shares, gain])
    return report.markdown_table(['point', 'thresholds', 'data', 'accuracy %', 'exits %', 'MAC gain'], rows)


if __name__ == '__main__':
    main()
