"""How fast is a network with exits? Times plans of it and of its baseline, in turns, on this machine.

    python -m experiments.benchmark --network=b-resnet110 --workdir=runs/benchmark_resnet110

Measures several batch sizes and forced exit shares, with random weights, since time does not depend on weights. Takes 2
minutes for B-LeNet at batch 1, 45 for B-ResNet-110. Writes ``benchmark.json`` (a row per cell), ``benchmark.md`` and
``gain.png``; times are milliseconds an image, ratios are medians over interleaved passes.

    python -m experiments.benchmark --run=runs/lenet_mnist --batches=1,256     # its operating points: batches.json
    python -m experiments.benchmark --run=runs/lenet_mnist --energy            # joules an image: energy.json
    python -m experiments.benchmark --run=runs/alexnet_cifar10 --cache=5       # Figure 6, by valgrind: cache.json

measure a finished run of the main job, or a stored report whose weights are in the package, and write into its folder.
Further options time training steps and measure forms:

    python -m experiments.benchmark --training --workdir=runs/benchmark_training    # a step, by two settings of a CPU
    python -m experiments.benchmark --forms --workdir=DIR           # gains of banded products and of compiler options

The last uses published weights and test images. On a machine that is at hand for minutes,

    python -m experiments.benchmark --executors --seconds=330 --workdir=DIR         # executors.json, a row each

measures executors of three networks at forced shares until the time is over, the most valuable rows first, and writes
them after each.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from experiments.pages.pictures import gain_against_batch
from experiments.run.networks import count_exits
from experiments.run.report import Row, provenance, store, table
from experiments.study import executors, flags, on_a_run, speed
from experiments.study.cells import SHARES, force, images_needed, measure, random_networks
from experiments.study.finished import read_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the measurement that the flags choose."""
    parser = flags.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--network', help='A branchy network: b-lenet, b-alexnet, b-resnet110.')
    what.add_argument('--run', type=Path, help='Folder of a finished main job, or a stored report.')
    what.add_argument('--training', action='store_true', help='Times training steps instead of executors.')
    what.add_argument('--forms', action='store_true', help='Times published networks in each form for a CPU.')
    what.add_argument('--executors', action='store_true', help='Times executors beside the plain jitted baseline.')
    parser.add_argument('--networks', default=executors.NETWORKS, help='With --executors: branchy networks.')
    parser.add_argument('--workdir', type=Path, help='Folder for the results.')
    parser.add_argument('--batches', type=flags.positives, help='Batch sizes, such as 1,32,256.')
    parser.add_argument('--shares', type=flags.shares, help='Exit shares in percent, such as 70/20/10,100/0/0.')
    parser.add_argument('--passes', type=flags.positive, default=20, help='Interleaved passes.')
    parser.add_argument('--energy', action='store_true', help='With --run: measures joules, if there is a meter.')
    parser.add_argument('--cache', type=flags.positive, help='With --run: settings to count cache misses at.')
    parser.add_argument('--images', type=flags.positive, help='With --run: test images in a pass.')
    parser.add_argument('--seconds', type=float, help='Of --energy: each at least (10); of --executors: all (330).')
    parser.add_argument('--rounds', type=flags.positive, default=3, help='With --training: processes of each setting.')
    options = parser.parse_args(arguments)
    if options.run is not None:
        _measure_a_run(options)
    elif options.workdir is None:
        parser.error('--workdir: give the folder for the results')
    elif options.network is not None:
        _measure_a_network(options)
    elif options.executors:
        write = functools.partial(_write, options.workdir, 'executors')
        units = executors.work(options.networks.split(','), options.batches or executors.BATCHES)
        executors.measure_within(options.seconds or 330.0, units, write, passes=options.passes)
    elif options.training:
        print(page(_write(options.workdir, 'training', speed.training_steps(rounds=options.rounds))))
    else:
        cells = itertools.product(speed.DATASETS, options.batches or [1, 256])
        rows = [row for cell in cells for row in speed.forms(*cell, passes=options.passes)]
        print(page(_write(options.workdir, 'forms', rows)))


def _measure_a_run(options: argparse.Namespace) -> None:
    batches = options.batches or [1]
    if options.cache:
        rows = on_a_run.cache(options.run, images=options.images or 8, settings=options.cache)
    elif options.energy:
        meter = bj.measure.find_meter()
        rows = on_a_run.energy(read_run(options.run), meter, batches, seconds=options.seconds or 10.0)
        print('' if meter else on_a_run.NO_METER)
    else:
        rows = on_a_run.batches(read_run(options.run), batches, images=options.images or 2048, passes=options.passes)
    if rows:
        print(table(rows, *rows[0]))


def _measure_a_network(options: argparse.Namespace) -> None:
    """Times a network at every batch size, and writes the rows after each."""
    batches = options.batches or ([1, 32, 256] if jax.default_backend() == 'cpu' else [1, 32, 256, 2048, 10000])
    shape = (max(map(images_needed, batches)), *bj.models.create(options.network).image_shape)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    networks, rows = random_networks(options.network, images), []
    shares = options.shares or flags.shares(SHARES[count_exits(networks.model, networks.inputs)])
    for batch in batches:
        own = images[: images_needed(batch)]
        rows += measure(networks, own, force(networks, own, shares), batch, passes=options.passes)
        record = _write(options.workdir, 'benchmark', rows, network=options.network)
        gain_against_batch(options.workdir / 'gain.png', rows, title=f'{options.network}, {record["device"]}')
        print(table(rows[-len(shares) :], *_CLOCKS), flush=True)


def _write(workdir: Path, name: str, rows: Sequence[Row], **more: Any) -> Row:
    """Writes rows as JSON and as a page."""
    return store(workdir / f'{name}.json', {**more, **provenance('benchmark'), 'rows': list(rows)}, page)


def page(record: Row) -> str:
    """Lays out the record in Markdown; its rows say what was measured."""
    rows = record['rows']
    if 'not_reached' in record:
        missing = '\n'.join(f'- {name}' for name in record['not_reached'])
        parts = [
            table(rows, *_EXECUTORS, 'host_waits', 'start_s', 'choice'),
            _OF_EXECUTORS,
            *(['Not reached:', missing] if missing else []),
        ]
        title = 'Executors beside the plain jitted baseline'
    elif 'exit_fractions' in rows[0]:
        title, parts = f'Benchmark of {record["network"]}', [table(rows, *_CLOCKS), _LEGEND]
    elif 'form' in rows[0]:
        title, parts = 'Forms of networks for a CPU', [table(rows, *_FORMS), 'Gain: time without ÷ time with the form.']
    else:
        title, parts = 'A training step on a CPU', [table(rows, *_STEPS)]
    return '\n\n'.join([f'# {title}', f'`{record["command"]}`', f'{record["device"]}.', *parts]) + '\n'


_CLOCKS = (
    *('batch', 'operating_point', 'exit_fractions', 'executor', 'latency_ms', 'gain', 'gain_plain', 'mac_limit'),
    *('time_limit_ms', 'realised'),
)
_FORMS = ('network', 'batch', 'cores', 'executor', 'form', 'ms', 'gain')
_STEPS = ('network', 'settings', 'devices', 'batch_size', 'ms', 'times_faster', 'peak_gb')
_EXECUTORS = ('network', 'batch', 'dtype', 'executor', 'exit_fractions', 'ms', 'gain', *_CLOCKS[7:])
_OF_EXECUTORS = """\
- ms: of an image on the device. Gain: over the plain jitted baseline, in turns. Chunks hold 5 % more images than leave
  later. Realised: time limit, of stages and heads alone at the same batch size, ÷ ms.
- host waits: conditionals and loops whose condition a GPU hands to the host, unless command buffers record them.
  start: seconds until the first pass is done; of a plan, to plan."""
_LEGEND = """\
- The operating point is the share that is forced to leave at each exit. Times are milliseconds an image.
- gain: like with like, over the baseline in its fastest form, at batch 1 on one core; the median of paired passes.
  gain plain: over the plain jitted baseline.
- MAC limit: baseline MACs ÷ expected MACs, heads included. Time limit: Σ share of images that reach a stage × (stage +
  head), each measured alone at its best batch size, rewritten alike. In ONNX Runtime: Σ share of an exit × time of an
  image where all leave there.
- realised: time limit ÷ latency. It may exceed 1: stages measured alone pay a dispatch each, and run one chunk at a
  time."""


if __name__ == '__main__':
    main()
