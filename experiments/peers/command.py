"""Runs each network as planned here beside PyTorch and ONNX Runtime: the same weights, images and exits, in turns.

    python -m experiments.peers --workdir=runs/peers
    python -m experiments.peers --workdir=runs/peers --one_core --batches=1

Needs ``pip install 'branchy_jax[peers]'``: torch, onnx, onnxruntime, and a C++ compiler for `torch.compile`; what is
missing is named on the page. On Linux the package index offers PyTorch for CUDA alone, which wants CUDA's libraries
to be imported at all, some 3 GB of them; they are not used. Weights are random and images leave at forced shares, the
same images in every runtime, which is checked. From images in NumPy's memory to labels in NumPy's memory; each
contender in a process of its own, in its best settings as a short trial finds them, in tight loops, taking turns.

Writes ``peers.json``, ``peers.md`` and ``peers.png``; networks, batch sizes and numbers of cores that are not asked for
stay in them as they were.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchy_jax.report import read_json, write_json, write_text
from experiments.pages import peers as pages
from experiments.peers import cells
from experiments.peers.contenders import CONTENDERS
from experiments.peers.forcing import force, random_network
from experiments.run import command
from experiments.run.networks import count_exits, image_specs
from experiments.study.cells import USUAL_SHARES

_NETWORKS = 'b-lenet,b-alexnet,b-resnet110'


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures cell by cell, writing what is known after each."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--networks', type=_names, default=_NETWORKS, help=f'With exits, such as {_NETWORKS}.')
    parser.add_argument('--batches', type=command.positives, default=[1, 32, 256], help='Batch sizes: 1,32,256.')
    parser.add_argument('--rounds', type=command.positive, default=20, help='Turns of every contender.')
    parser.add_argument('--one_core', action='store_true', help='Keep everyone to one core: fastest for batch 1.')
    options = parser.parse_args(arguments)
    cores = 1 if options.one_core else os.cpu_count() or 1
    for name in options.networks:
        if not name.startswith('b-'):
            raise ValueError(f'networks: got {name!r}; give those with exits, such as {_NETWORKS}')
    for name in options.networks:
        model, variables = random_network(name)
        shares = USUAL_SHARES[count_exits(model, image_specs(model.image_shape))]
        for batch in options.batches:
            print(f'{name}, batches of {batch}', flush=True)
            forced = force(name, model, variables, shares, batch, cores=cores)
            cell = cells.measure(forced, CONTENDERS, rounds=options.rounds)
            _write(options.workdir, cell)
            print(f'  {pages.sentence(dataclasses.asdict(cell))}', flush=True)


def _names(text: str) -> list[str]:
    return text.split(',')


def _write(workdir: Path, cell: cells.Cell) -> None:
    """Adds a cell to what was found before, in place of an older one of its kind."""
    path = workdir / 'peers.json'
    rows: list[dict[str, Any]] = read_json(path)['cells'] if path.exists() else []
    row = {**dataclasses.asdict(cell), **command.provenance('peers'), 'packages': _packages()}
    rows = [*(other for other in rows if _key(other) != _key(row)), row]
    record = {'unit': 'ms per image', 'cells': sorted(rows, key=_key)}
    write_json(path, record)
    write_text(workdir / 'peers.md', pages.page(record))
    pages.picture(workdir / 'peers.png', record)


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row['network'], row['cores'], row['batch']


def _packages() -> dict[str, str]:
    found = {}
    for name in ('torch', 'onnx', 'onnxruntime'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = 'none'
    return found
