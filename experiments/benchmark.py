"""How fast is a network with exits? As it is served best, in turns with its baseline on this machine.

    python -m experiments.benchmark --network=b-resnet110 --workdir=runs/benchmark_resnet110

Over batch sizes and forced exit shares, with random weights: time does not depend on them. 2 minutes for B-LeNet at
batch 1, 45 for B-ResNet-110. Writes ``benchmark.json`` (a row per cell), ``benchmark.md`` and ``gain.png``; times
are milliseconds an image, ratios are medians over interleaved passes.

    python -m experiments.benchmark --run=runs/lenet_mnist --batches=1,256     # its operating points: batches.json
    python -m experiments.benchmark --run=runs/lenet_mnist --energy            # joules an image: energy.json
    python -m experiments.benchmark --run=runs/alexnet_cifar10 --cache=5       # Figure 6, by valgrind: cache.json

measure a finished run of the main job, or a stored report whose weights ship with the package, in its own folder. And

    python -m experiments.benchmark --training --workdir=runs/benchmark_training    # a step, by two settings of a CPU
    python -m experiments.benchmark --network=b-resnet110 --planning --workdir=DIR  # where the time of `plan` goes
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.report import write_json, write_text
from experiments.pages.pictures import gain_against_batch
from experiments.run.networks import count_exits
from experiments.run.report import Row, provenance, table
from experiments.study import flags, on_a_run, speed
from experiments.study.cells import force, images_needed, measure, plan_by_the_clock, random_networks
from experiments.study.finished import read_run

_SHARES_BY_EXITS = {2: ['94/6', '70/30', '0/100', '100/0'], 3: ['100/0/0', '70/20/10', '40/30/30', '0/0/100']}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the flags ask for."""
    parser = flags.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--network', help='A branchy network: b-lenet, b-alexnet, b-resnet110.')
    what.add_argument('--run', type=Path, help='Folder of a finished main job, or a stored report.')
    what.add_argument('--training', action='store_true', help='Times training steps instead of executors.')
    parser.add_argument('--workdir', type=Path, help='Folder for the results.')
    parser.add_argument('--batches', type=flags.positives, help='Batch sizes, such as 1,32,256.')
    parser.add_argument('--shares', help='Exit shares in percent, such as 70/20/10,100/0/0.')
    parser.add_argument('--passes', type=flags.positive, default=20, help='Interleaved pairs.')
    parser.add_argument('--planning', action='store_true', help='Times `plan` and the warm-up.')
    parser.add_argument('--energy', action='store_true', help='With --run: joules, where the device has a meter.')
    parser.add_argument('--cache', type=flags.positive, help='With --run: cache misses at so many settings.')
    parser.add_argument('--images', type=flags.positive, help='With --run: test images in a pass.')
    parser.add_argument('--seconds', type=float, default=10.0, help='With --energy: to run each for, at least.')
    parser.add_argument('--rounds', type=flags.positive, default=3, help='With --training: processes of each setting.')
    options = parser.parse_args(arguments)
    if options.run is not None:
        _measure_a_run(options)
    elif options.workdir is None:
        parser.error('--workdir: give the folder for the results')
    elif options.training:
        _write(options.workdir, 'training', speed.training_steps(rounds=options.rounds))
    else:
        _measure_a_network(options)


def _measure_a_run(options: argparse.Namespace) -> None:
    batches = options.batches or [1]
    if on_a_run.INSIDE in os.environ:
        on_a_run.run_under_valgrind(read_run(options.run), images=options.images, settings=options.cache)
        return
    if options.cache:
        rows = on_a_run.cache(options.run, images=options.images or 8, settings=options.cache)
    elif options.energy:
        meter = bj.measure.find_meter()
        rows = on_a_run.energy(read_run(options.run), meter, batches, seconds=options.seconds)
        print('' if meter else on_a_run.NO_METER)
    else:
        rows = on_a_run.batches(read_run(options.run), batches, images=options.images or 2048, passes=options.passes)
    if rows:
        print(table(rows, *rows[0]))


def _measure_a_network(options: argparse.Namespace) -> None:
    """Times a network at every batch size, writing what is known after each; or times planning."""
    batches = options.batches or ([1, 32, 256] if jax.default_backend() == 'cpu' else [1, 32, 256, 2048, 10000])
    shape = (max(map(images_needed, batches)), *bj.models.create(options.network).image_shape)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    networks, rows = random_networks(options.network, images), []
    shares = _shares(options.shares, count_exits(networks.model, networks.inputs))
    if options.planning:
        policies = force(networks, images, dict(list(shares.items())[:2]))
        _write(options.workdir, 'planning', plan_by_the_clock(networks, images, policies), network=options.network)
        return
    for batch in batches:
        own = images[: images_needed(batch)]
        rows += measure(networks, own, force(networks, own, shares), batch, passes=options.passes)
        record = _write(options.workdir, 'benchmark', rows, network=options.network)
        gain_against_batch(options.workdir / 'gain.png', rows, title=f'{options.network}, {record["device"]}')
        print(table(rows[-len(shares) :], *_CLOCKS), flush=True)


def _shares(given: str | None, num_exits: int) -> dict[str, list[float]]:
    every = {}
    for text in given.split(',') if given else _SHARES_BY_EXITS[num_exits]:
        try:
            shares = [float(share) / 100 for share in text.split('/')]
        except ValueError:
            shares = []
        if len(shares) != num_exits or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ValueError(f'shares: got {text!r}; give {num_exits} percentages that sum to 100, such as 70/20/10')
        every[text] = shares
    return every


def _write(workdir: Path, name: str, rows: Sequence[Row], **more: str) -> Row:
    """Writes rows as JSON and as a page."""
    record = {**more, **provenance('benchmark'), 'rows': list(rows)}
    write_json(workdir / f'{name}.json', record)
    write_text(workdir / f'{name}.md', page(record))
    return record


def page(record: Row) -> str:
    """Lays out the record of executors, of training steps or of planning in Markdown: the rows say which it is."""
    rows = record['rows']
    if 'exit_fractions' in rows[0]:
        title, parts = f'Benchmark of {record["network"]}', [table(rows, *_CLOCKS), _LEGEND]
    elif 'what' in rows[0]:
        title, parts = f'How long planning takes for {record["network"]}', [table(rows, 'what', 'seconds')]
    else:
        title, parts = 'A training step on a CPU', [table(rows, *_STEPS)]
    return '\n\n'.join([f'# {title}', f'`{record["command"]}`', f'{record["device"]}.', *parts]) + '\n'


_CLOCKS = (
    *('batch', 'operating_point', 'exit_fractions', 'executor', 'latency_ms', 'gain', 'gain_plain', 'mac_limit'),
    *('time_limit_ms', 'realised'),
)
_STEPS = ('network', 'settings', 'devices', 'batch_size', 'ms', 'times_faster', 'peak_gb')
_LEGEND = """\
- The operating point is the share that is forced to leave at each exit. Times are milliseconds an image.
- gain: like with like, over the baseline in its fastest form, at batch 1 on one core; the median of paired passes.
  gain plain: over the plain jitted baseline.
- MAC limit: baseline MACs ÷ expected MACs, heads included. Time limit: Σ share of images that reach a stage × (stage +
  head), each measured alone at its best batch size, rewritten alike.
- realised: time limit ÷ latency. It may exceed 1: stages measured alone pay a dispatch each, and run one chunk at a
  time."""


if __name__ == '__main__':
    main()
