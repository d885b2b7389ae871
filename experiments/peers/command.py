"""How fast is a network as planned here beside PyTorch and ONNX Runtime? The same weights, images and exits, in turns.

    python -m experiments.peers --workdir=runs/peers
    python -m experiments.peers --workdir=runs/peers --one_core --batches=1

Needs ``pip install 'branchy_jax[peers]'``: torch, onnx, onnxruntime, and a C++ compiler for `torch.compile`; what is
missing is named on the page. On Linux the package index offers PyTorch for CUDA alone, which wants CUDA's libraries
to be imported at all, some 3 GB of them; they are not used. Half an hour on 2 cores. Weights are random and images
leave at forced shares, the same images in every runtime, which is checked. From images in NumPy's memory to labels in
NumPy's memory; each contender in a process of its own, in its best settings as a short trial finds them, in tight
loops, taking turns.

Writes ``peers.json``, a row per contender, and ``peers.md``; networks, batch sizes and numbers of cores that are not
asked for stay in them as they were.
"""

import importlib.metadata
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from branchy_jax.report import read_json, write_json, write_text
from experiments.peers import turns
from experiments.peers.contenders import CONTENDERS
from experiments.peers.forcing import force, random_network
from experiments.run.networks import count_exits, image_specs
from experiments.run.report import Row, provenance, table
from experiments.study import flags
from experiments.study.cells import USUAL_SHARES

_NETWORKS = 'b-lenet,b-alexnet,b-resnet110'
_OURS = 'planned here'


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures cell by cell, writing what is known after each."""
    parser = flags.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--networks', default=_NETWORKS, help=f'With exits, such as {_NETWORKS}.')
    parser.add_argument('--batches', type=flags.positives, default=[1, 32, 256], help='Batch sizes: 1,32,256.')
    parser.add_argument('--rounds', type=flags.positive, default=20, help='Turns of every contender.')
    parser.add_argument('--one_core', action='store_true', help='Keep everyone to one core: fastest for batch 1.')
    options = parser.parse_args(arguments)
    cores, names = 1 if options.one_core else os.cpu_count() or 1, options.networks.split(',')
    for name in names:
        if not name.startswith('b-'):
            raise ValueError(f'networks: got {name!r}; give those with exits, such as {_NETWORKS}')
    path = options.workdir / 'peers.json'
    for name in names:
        model, variables = random_network(name)
        shares = USUAL_SHARES[count_exits(model, image_specs(model.image_shape))]
        for batch in options.batches:
            print(f'{name}, batches of {batch}', flush=True)
            forced = force(name, model, variables, shares, batch, cores=cores)
            made_by = {**provenance('peers'), 'packages': _packages()}
            measured = [{**row, **made_by} for row in turns.measure(forced, CONTENDERS, rounds=options.rounds)]
            rows = read_json(path)['rows'] if path.exists() else []
            rows = sorted([*(row for row in rows if _cell(row) != _cell(measured[0])), *measured], key=_cell)
            write_json(path, {'unit': 'ms an image', 'rows': rows})
            write_text(options.workdir / 'peers.md', page(rows))
            print(table(measured, *_EVERYONE), flush=True)


def _cell(row: Row) -> tuple[str, int, int]:
    return row['network'], row['cores'], row['batch']


def _packages() -> str:
    versions = []
    for name in ('torch', 'onnx', 'onnxruntime'):
        try:
            versions.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            versions.append(f'{name} none')
    return ', '.join(versions)


_CELLS = ('network', 'batch', 'cores', 'forced', 'planned_ms', 'best_peer', 'ms', 'ratio')
_EVERYONE = ('network', 'batch', 'cores', 'contender', 'settings', 'shares', 'ms', 'ratio', 'absent')


def page(rows: Sequence[Row]) -> str:
    """Lays out rows in Markdown: the best peer of each cell, then everyone."""
    best = []
    for _, cell in itertools.groupby(sorted(rows, key=_cell), _cell):
        there = [row for row in cell if 'absent' not in row]
        peers = [row for row in there if not row['contender'].startswith(_OURS)]
        fastest = min(peers, key=lambda row: row['ms'], default={})
        row = {name: there[0][name] for name in ('network', 'batch', 'cores', 'forced')}
        clock = {name: fastest[name] for name in ('ms', 'ratio', 'ratio_low', 'ratio_high') if fastest}
        best.append({**row, 'planned_ms': there[0]['ms'], 'best_peer': fastest.get('contender'), **clock})
    commands = {f'- `{row["command"]}`, {row["device"]}, {row["packages"]}, {row["rounds"]} rounds' for row in rows}
    made_by = '\n'.join(sorted(commands))
    return f"""# Beside PyTorch and ONNX Runtime

{made_by}

Random weights, forced exits, the same in every runtime, from images in host memory to labels there. Each contender has
a process of its own and its best settings; tight loops, in turns. Times are milliseconds
an image; the ratio is to the time of what is planned here, the median over rounds with its 95 % interval: above 1 what
is planned here is faster.

{table(best, *_CELLS)}

## Everyone

- planned here: what `bj.inference.plan` chose for the batch size, called with arrays of NumPy's or of jax's. Bare: what
  it chose for the network without exits.
- PyTorch: operation by operation, BatchNorm folded, in the faster layout; without exits, and with exits by masks: each
  stage runs on the rows that are left.
- torch.compile: the same, weights frozen; with exits each stage and each head is compiled.
- ONNX Runtime: the file that PyTorch exports of the network without exits. If: the file of `bj.export.save_onnx`, whose
  conditionals skip later stages; it takes one image.

Shares are those achieved: without exits all leave at the last, and a plan that skips a head serves its images later.

{table(rows, *_EVERYONE)}
"""
