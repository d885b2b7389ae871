"""Measures every executor against the plain jitted baseline, over batch sizes and forced exit shares.

    python -m experiments.benchmark --network=b-resnet110 --workdir=runs/benchmark_resnet110
    python -m experiments.benchmark --training --workdir=runs/benchmark_training

The second, on a CPU, times a training step of B-ResNet-110 and B-AlexNet as jax starts by itself and as the commands
start it.

Random weights unless given: time does not depend on them. Writes ``benchmark.json``, ``benchmark.md``,
``gain.png`` (gain against batch size), ``cost.png`` (milliseconds a batch against batch size) and ``follows.png`` (time
against multiply-accumulates). All times are milliseconds per image; ratios are medians over interleaved passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.report import write_json, write_text
from experiments.pages import pictures
from experiments.pages.tables import table
from experiments.run import command
from experiments.run.networks import count_exits, image_specs
from experiments.run.timing import keep_to_one_core
from experiments.study import training_speed
from experiments.study.cells import Cell, images_needed, measure_cell, peak_memory_mb, prepare

_SHARES_BY_EXITS = {2: ['94/6', '70/30', '0/100', '100/0'], 3: ['100/0/0', '70/20/10', '40/30/30', '0/0/100']}
_SIZES_PER_BATCH = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the grid, writing what is known after every cell."""
    parser = command.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--network', help='A branchy network: b-lenet, b-alexnet, b-resnet110.')
    what.add_argument('--training', action='store_true', help='Times training steps instead of executors.')
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--weights', type=Path, help='Safetensors of the network; random weights without.')
    parser.add_argument('--batches', type=command.positives, help='Batch sizes, such as 1,32,256.')
    parser.add_argument('--shares', help='Exit shares in percent, such as 70/20/10,100/0/0.')
    parser.add_argument('--passes', type=command.positive, default=20, help='Interleaved pairs per cell.')
    parser.add_argument('--rounds', type=command.positive, default=3, help='Of --training: processes of each setting.')
    parser.add_argument('--one_core', action='store_true', help='Keep to one CPU core: fastest for small networks.')
    parser.add_argument('--seed', type=int, default=0, help='Of the images.')
    options = parser.parse_args(arguments)
    if options.training:
        training_speed.write(options.workdir, command.provenance('benchmark'), rounds=options.rounds)
        return
    if options.one_core:
        keep_to_one_core()
    model = bj.models.create(options.network)
    all_shares = _shares(options.shares, count_exits(model, image_specs(model.image_shape)))
    on_cpu = jax.default_backend() == 'cpu'
    batches = options.batches or ([1, 32, 256] if on_cpu else [1, 32, 256, 2048, 10000])
    count = max(images_needed(batch) for batch in batches)
    images = np.random.default_rng(options.seed).standard_normal((count, *model.image_shape), np.float32)
    weights = None if options.weights is None else bj.checkpoint.load_weights(options.weights)[0]
    subject = prepare(options.network, weights, images)
    cells: list[Cell] = []
    all_times: dict[str, Any] = {}
    for batch in batches:
        times = bj.inference.segment_times(*subject.fast, images, batch_sizes=_sizes(batch), passes=7)
        all_times[str(batch)] = dataclasses.asdict(times)
        for shares in all_shares:
            cells += measure_cell(subject, images, shares, batch, times, passes=options.passes)
            _write(options.workdir, cells, all_times, passes=options.passes)
            print(_line(cells[-1]), flush=True)


def _shares(given: str | None, num_exits: int) -> list[list[float]]:
    found = []
    for text in given.split(',') if given else _SHARES_BY_EXITS[num_exits]:
        try:
            shares = [float(share) / 100 for share in text.split('/')]
        except ValueError:
            shares = []
        if len(shares) != num_exits or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ValueError(f'shares: got {text!r}; give {num_exits} percentages that sum to 100, such as 70/20/10')
        found.append(shares)
    return found


def _sizes(batch: int) -> list[int]:
    """Returns batch sizes to measure stages at: the batch, fractions of it, and for small batches a few larger ones."""
    return sorted({max(1, batch // 4**power) for power in range(_SIZES_PER_BATCH)} | {1, 16, 64})


def _write(workdir: Path, cells: Sequence[Cell], times: dict[str, Any], *, passes: int) -> None:
    record = {
        **command.provenance('benchmark'),
        'passes': passes,
        'unit': 'ms per image',
        'peak_memory_mb': peak_memory_mb(),
        'segment_times': times,
        'cells': [dataclasses.asdict(cell) for cell in cells],
    }
    write_json(workdir / 'benchmark.json', record)
    write_text(workdir / 'benchmark.md', _page(record, cells))
    title = f'{cells[0].network}, {record["device"]}'
    pictures.gain_against_batch(workdir / 'gain.png', record['cells'], title=title)
    pictures.time_against_batch(workdir / 'cost.png', record['cells'], title=title)
    pictures.time_against_macs(workdir / 'follows.png', record['cells'], title=title)


_COLUMNS = {
    'batch': '{batch}',
    'exits %': '{exits}',
    'executor': '{executor}',
    'ms': '{ms:.4f}',
    'baseline ms': '{baseline_ms:.4f}',
    'gain': '{gain:.2f}',
    'over optimized': '{gain_over_optimized:.2f}',
    'MAC limit': '{mac_limit:.2f}',
    'time limit ms': '{time_limit_ms:.4f}',
    'realised': '{realised:.2f}',
    'within batch': '{realised_within_batch:.2f}',
    'time ÷ baseline': '[{slowdown_low:.3f}, {slowdown_high:.3f}]',
    'compile s': '{compile_s:.1f}',
}


def _page(record: dict[str, Any], cells: Sequence[Cell]) -> str:
    rows = [{**vars(cell), 'exits': _exits(cell)} for cell in cells]
    plans = '\n\n'.join(f'```\n{cell.plan}\n```' for cell in cells if cell.plan)
    return '\n\n'.join(
        [
            f'# Benchmark of {cells[0].network}',
            f'`{record["command"]}`',
            f'{record["device"]}, {record["passes"]} interleaved passes. Milliseconds per image.',
            table(_COLUMNS, rows),
            _LEGEND,
            f'# How the planner chose\n\n{plans}\n',
        ]
    )


_LEGEND = """\
- gain: plain jitted baseline ÷ this, median of paired passes; over optimized: the same over the baseline that went
  through `optimize` as well, and is served alike: by `staged` at batch 1, as planned for it in batches.
- MAC limit: baseline MACs ÷ expected MACs, heads included. Time limit: Σ share of images that reach a stage × (stage +
  head), each measured alone at its best batch size, rewritten alike, in the same passes.
- realised: time limit ÷ ms. It may exceed 1: stages measured alone pay a dispatch each, and run one chunk at a time.
  Within batch: against stages measured (before) at batch sizes up to this one, which for batch 1 is 1.
- time ÷ baseline: 95 % interval of the median.
- exits: the shares forced; a plan that skips a head serves its images later.
- compile: of the executor; of a plan, all of planning."""


def _exits(cell: Cell) -> str:
    return '/'.join(f'{100 * share:.0f}' for share in cell.exit_fractions)


def _line(cell: Cell) -> str:
    return (
        f'{cell.network} batch {cell.batch} exits {_exits(cell)}: {cell.ms:.4f} ms planned, gain {cell.gain:.2f}, '
        f'over optimized {cell.gain_over_optimized:.2f}, realised {cell.realised:.2f} '
        f'(within batch {cell.realised_within_batch:.2f}), MAC limit {cell.mac_limit:.2f}'
    )


if __name__ == '__main__':
    main()
