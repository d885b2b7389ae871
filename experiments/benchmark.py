"""Measures every executor against the plain jitted baseline, over batch sizes and forced exit shares.

    python -m experiments.benchmark --network=b-resnet110 --workdir=runs/benchmark_resnet110

Random weights unless given: time does not depend on them. Writes ``benchmark.json``, ``benchmark.md``,
``gain.png`` (gain against batch size), ``cost.png`` (milliseconds a batch against batch size) and ``follows.png`` (time
against multiply-accumulates). All times are milliseconds per image; ratios are medians over interleaved passes.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import branchy_jax as bj
from branchy_jax.inference import segment_times
from branchy_jax.report import markdown_table, write_json, write_text
from experiments.cells import Subject, images_needed, measure_cell, peak_memory_mb, prepare
from experiments.records import describe_device
from experiments.timing import keep_to_one_core

_NETWORK = flags.DEFINE_string('network', None, 'A branchy network: b-lenet, b-alexnet, b-resnet110.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the results.')
_WEIGHTS = flags.DEFINE_string('weights', None, 'Safetensors of the network; random weights without.')
_BATCHES = flags.DEFINE_list('batches', None, 'Batch sizes, such as 1,32,256.')
_SHARES = flags.DEFINE_list('shares', None, 'Exit shares in percent, such as 70/20/10,100/0/0.')
_PASSES = flags.DEFINE_integer('passes', 20, 'Interleaved pairs per cell.', lower_bound=1)
_ONE_CORE = flags.DEFINE_bool('one_core', False, 'Keep the process to one CPU core: fastest for small networks.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the images.')

_SHARES_BY_EXITS = {2: ['94/6', '70/30', '0/100', '100/0'], 3: ['100/0/0', '70/20/10', '40/30/30', '0/0/100']}
_SIZES_PER_BATCH = 4


def main(arguments: list[str]) -> None:
    """Runs the grid, writing what is known after every cell."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)  # jax would tell of every platform that is not there
    if _ONE_CORE.value:
        keep_to_one_core()
    model = bj.models.create(_NETWORK.value)
    batches, all_shares = _batches(), _shares(model.num_exits)
    count = max(images_needed(batch) for batch in batches)
    images = np.random.default_rng(_SEED.value).standard_normal((count, *model.image_shape), np.float32)
    weights = None if _WEIGHTS.value is None else bj.checkpoint.load_weights(_WEIGHTS.value)[0]
    subject = prepare(_NETWORK.value, weights, images)
    cells: list[dict[str, Any]] = []
    all_times: dict[str, Any] = {}
    for batch in batches:
        times = segment_times(*subject.fast, images, batch_sizes=_sizes(batch), passes=7)
        all_times[str(batch)] = dataclasses.asdict(times)
        for shares in all_shares:
            found = measure_cell(subject, images, shares, batch, times, passes=_PASSES.value)
            cells += found
            _write(Path(_WORKDIR.value), subject, cells, all_times)
            print(_line(found[-1]), flush=True)


def _batches() -> list[int]:
    on_cpu = jax.default_backend() == 'cpu'
    given = _BATCHES.value or ([1, 32, 256] if on_cpu else [1, 32, 256, 2048, 10000])
    if not all(str(batch).isdigit() and int(batch) > 0 for batch in given):
        raise ValueError(f'batches: got {",".join(map(str, given))}; give positive integers such as 1,32,256')
    return [int(batch) for batch in given]


def _shares(num_exits: int) -> list[list[float]]:
    given = _SHARES.value or _SHARES_BY_EXITS[num_exits]
    found = []
    for text in given:
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


def _write(workdir: Path, subject: Subject, cells: Sequence[dict[str, Any]], times: dict[str, Any]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    record = {
        'device': describe_device(),
        'passes': _PASSES.value,
        'command': shlex.join(['python', '-m', 'experiments.benchmark', *sys.argv[1:]]),
        'unit': 'ms per image',
        'peak_memory_mb': peak_memory_mb(),
        'segment_times': times,
        'cells': list(cells),
    }
    write_json(workdir / 'benchmark.json', record)
    write_text(workdir / 'benchmark.md', _markdown(record))
    title = f'{subject.name}, {record["device"]}'
    bj.plots.gain_against_batch(workdir / 'gain.png', cells, title=title)
    bj.plots.cost_against_batch(workdir / 'cost.png', cells, title=title)
    bj.plots.time_against_macs(workdir / 'follows.png', cells, title=title)


_COLUMNS = [
    'batch', 'exits %', 'executor', 'ms', 'baseline ms', 'gain', 'over optimized', 'MAC limit', 'time limit ms',
    'realised', 'within batch', 'time ÷ baseline', 'compile s',
]  # fmt: skip


def _markdown(record: dict[str, Any]) -> str:
    rows = [
        [
            str(cell['batch']),
            '/'.join(f'{100 * share:.0f}' for share in cell['exit_fractions']),
            cell['executor'],
            f'{cell["ms"]:.4f}',
            f'{cell["baseline_ms"]:.4f}',
            f'{cell["gain"]:.2f}',
            f'{cell["gain_over_optimized"]:.2f}',
            f'{cell["mac_limit"]:.2f}',
            f'{cell["time_limit_ms"]:.4f}',
            f'{cell["realised"]:.2f}',
            f'{cell["realised_within_batch"]:.2f}',
            f'[{cell["slowdown_low"]:.3f}, {cell["slowdown_high"]:.3f}]',
            f'{cell["compile_s"]:.1f}',
        ]
        for cell in record['cells']
    ]
    plans = '\n\n'.join(f'```\n{cell["plan"]}\n```' for cell in record['cells'] if 'plan' in cell)
    return '\n\n'.join([
        f'# Benchmark of {record["cells"][0]["network"]}',
        f'`{record["command"]}`',
        f'{record["device"]}, {record["passes"]} interleaved passes. Milliseconds per image.',
        markdown_table(_COLUMNS, rows),
        _LEGEND,
        f'# How the planner chose\n\n{plans}\n',
    ])  # fmt: skip


_LEGEND = """\
- gain: plain jitted baseline ÷ this, median of paired passes; over optimized: the same over the baseline that went
  through `optimize` as well.
- MAC limit: baseline MACs ÷ expected MACs, heads included. Time limit: Σ share of images that reach a stage × (stage +
  head), each measured alone at its best batch size, rewritten alike, in the same passes.
- realised: time limit ÷ ms. It may exceed 1: stages measured alone pay a dispatch each, and run one chunk at a time.
  Within batch: against stages measured (before) at batch sizes up to this one, which for batch 1 is 1.
- time ÷ baseline: 95 % interval of the median.
- exits: the shares forced; a plan that skips a head serves its images later.
- compile: of the executor; of a plan, all of planning."""


def _line(cell: dict[str, Any]) -> str:
    exits = '/'.join(f'{100 * share:.0f}' for share in cell['exit_fractions'])
    return (
        f'{cell["network"]} batch {cell["batch"]} exits {exits}: {cell["ms"]:.4f} ms planned, gain {cell["gain"]:.2f}, '
        f'over optimized {cell["gain_over_optimized"]:.2f}, realised {cell["realised"]:.2f} '
        f'(within batch {cell["realised_within_batch"]:.2f}), MAC limit {cell["mac_limit"]:.2f}'
    )


if __name__ == '__main__':
    flags.mark_flags_as_required(['network', 'workdir'])
    app.run(main)
