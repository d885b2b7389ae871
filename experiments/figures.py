"""Remakes every figure and table of the paper from stored runs, ours beside the paper's.

    python -m experiments.figures --workdir=runs/figures --runs=runs

Reads the folders that the other commands left below ``--runs`` (``report.json``, ``batches.json``, ``energy.json``,
``cache.json``, ``static.json``, ``claims_*.json``, ``gradients_*.json``), writes pictures and ``figures.md``. What was
not run says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import branchy_jax as bj
from experiments.pages import figures as sections
from experiments.pages.paper import JPEG_NOTE
from experiments.run import command
from experiments.study.folders import read_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Remakes everything."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the pictures and figures.md.')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='Folder with the folders of runs.')
    options = parser.parse_args(arguments)
    print(remake(options.runs, options.workdir))


def remake(runs: Path, workdir: Path) -> str:
    """Writes all pictures and ``figures.md``; returns the page.

    Args:
        runs: folder with the folders of runs.
        workdir: where pictures and page go.
    """
    folders = {name: read_folder(runs / name) for names in sections.PLACES.values() for name in names}
    found = {name: folder for name, folder in folders.items() if folder is not None}
    claims = {path.stem: bj.report.read_json(path) for path in sorted((runs / 'claims').glob('*.json'))}
    workdir.mkdir(parents=True, exist_ok=True)
    parts = [
        '# The paper, reproduced\n\nEvery picture and table here was made by `python -m experiments.figures` from '
        f"stored runs; grey points and rows marked (paper) are the paper's. {JPEG_NOTE}",
        '## Table I\n\n' + sections.table_1(found),
        *(sections.figure_3(network, found, workdir) for network in sections.PLACES),
        sections.figure_4(found, workdir),
        sections.figure_5(claims, workdir),
        sections.figure_6(found, workdir),
        '## Energy\n\n' + sections.energy_table(found),
        sections.claims(claims),
    ]
    page = '\n\n'.join(parts) + '\n'
    bj.report.write_text(workdir / 'figures.md', page)
    return page


if __name__ == '__main__':
    main()
