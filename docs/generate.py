"""Writes the parts of the documentation that follow from the code and from stored results.

    python docs/generate.py

- ``README.md``: the table of networks, from the records under ``experiments/results``.
- ``docs/results.md``: the stored reports that the page includes.
- ``docs/api.md``: the tree of files, with the first sentence of each file's docstring.
- ``docs/api/``: a page for each package, with every public name. Git ignores these pages.

`bash docs/build.sh` runs this command first.
"""

from __future__ import annotations

import ast
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import branchy_jax as bj
from branchy_jax.report import markdown_table, read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'experiments' / 'results'
NETWORKS = ('lenet_mnist_tuned', 'alexnet_cifar10', 'resnet110_cifar10_tuned')
"""Runs whose weights are in the package."""

COLUMNS = (
    'network',
    'test accuracy %',
    'ms per image',
    'gain',
    'MAC limit',
    'realised',
    'leave first',
    'gain in batches',
    'paper: accuracy %, gain',
)


def table_of_networks() -> str:
    """Returns a row for each published network and for its baseline."""
    cells = []
    for run in NETWORKS:
        report = read_json(RESULTS / run / 'report.json')
        clocks = read_json(RESULTS / run / 'batches.json')['rows']
        single, *batches = [
            clock for clock in clocks if clock['operating_point'] == 'table'
        ]
        assert single['batch'] == 1, run
        fastest = max(batches, key=lambda clock: clock['gain'])
        costs = bj.costs.StageCosts(stages=report['stage_macs'], exits=report['exit_macs'])
        limit = bj.costs.mac_limit(costs, single['exit_fractions'])
        of_baseline = [f'{single["baseline_ms"]:.3f}', '1.00', '–', '–', '–', '1.00']
        of_branchy = [
            f'{single["latency_ms"]:.3f}',
            f'{single["gain"]:.2f} [{single["gain_low"]:.2f}, {single["gain_high"]:.2f}]',
            f'{limit:.2f}',
            f'{single["gain"] / limit:.2f}',
            f'{100 * report["rows"][1]["exit_fractions"][0]:.1f} %',
            f'{fastest["gain"]:.2f} of {fastest["batch"]}',
        ]
        for row, times, paper in zip(
            report['rows'], [of_baseline, of_branchy], report['paper'], strict=True
        ):
            name = f'{row["network"]}, {report["dataset"]}'
            published = f'{100 * paper["test_accuracy"]:.2f}, {paper["gain"]:.2f}'
            cells.append([name, f'{100 * row["test_accuracy"]:.2f}', *times, published])
    return markdown_table(list(COLUMNS), cells)


def included_reports() -> str:
    """Returns an include for each report without a page of its own, figures first."""
    first = ['figures', *NETWORKS]
    paths = [path for path in RESULTS.glob('*/*.md') if path.parent.name != 'compatibility']

    def place(path: Path) -> tuple[int, Path]:
        folder = path.parent.name
        return (first.index(folder) if folder in first else len(first)), path

    return '\n\n'.join(
        f'```{{include}} {os.path.relpath(path, ROOT / "docs")}\n'
        ':heading-offset: 1\n:relative-images:\n```'
        for path in sorted(paths, key=place)
    )


def tree_of_files() -> str:
    """Returns a line for each Python file of the library and of the experiments."""
    lines = [*_lines(ROOT / 'branchy_jax', ''), '', *_lines(ROOT / 'experiments', '')]
    return '\n'.join(['```text', *lines, '```'])


def _lines(folder: Path, indent: str) -> Iterator[str]:
    yield _line(f'{indent}{folder.name}/', folder / '__init__.py')
    for path in sorted(folder.glob('*.py')):
        if path.name != '__init__.py':
            yield _line(f'{indent}    {path.name}', path)
    for path in sorted(folder.glob('*/__init__.py')):
        yield from _lines(path.parent, f'{indent}    ')


def _line(start: str, path: Path) -> str:
    """Returns a file's line: its name, and the first sentence of its docstring."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or '').split('\n\n')[0]
    text = ' '.join(paragraph.split()).replace('`', '')
    sentence = re.split(r'(?<=[.?])\s', text)[0]
    return f'{start:<35} {sentence}'.rstrip()


def public(module: types.ModuleType) -> dict[str, Any]:
    """Returns the public values of a module, by name."""
    names = getattr(module, '__all__', None)
    if names is None:
        own = f'{module.__name__}.'
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith('_')
            and f'{getattr(value, "__module__", "")}.'.startswith(own)
        ]
    values = {name: getattr(module, name) for name in names}
    return {
        n: value for n, value in values.items() if not isinstance(value, types.ModuleType)
    }


def api_pages() -> dict[str, str]:
    """Returns the text of a page for each package, by name of its file."""
    values = [getattr(bj, name) for name in bj.__all__]
    modules = [bj, *(value for value in values if isinstance(value, types.ModuleType))]
    return {f'{module.__name__.split(".")[-1]}.rst': _page(module) for module in modules}


def _page(module: types.ModuleType) -> str:
    title = module.__name__.replace('branchy_jax', 'bj')
    lines = [title, '=' * len(title), '', f'.. automodule:: {module.__name__}']
    lines += ['   :no-members:', '']
    for name, value in public(module).items():
        if isinstance(value, bj.criteria.Criterion | dict):
            lines += [f'.. autodata:: {module.__name__}.{name}', '   :no-value:']
        else:
            kind = 'class' if isinstance(value, type) else 'function'
            lines.append(f'.. auto{kind}:: {module.__name__}.{name}')
    return '\n'.join(lines) + '\n'


PARTS: dict[str, Callable[[], str]] = {
    'README.md': table_of_networks,
    'docs/results.md': included_reports,
    'docs/api.md': tree_of_files,
}
"""The part of each page that this command writes, between two comments."""


def filled(page: str) -> str:
    """Returns the text of a page with its part written again."""
    text = (ROOT / page).read_text()
    before, comment, rest = text.rpartition('<!-- python docs/generate.py -->\n')
    _, end, after = rest.partition('\n<!-- end -->')
    assert end, page
    return f'{before}{comment}\n{PARTS[page]()}\n{end}{after}'


def main() -> None:
    """Writes every part, and the pages of the API."""
    for page in PARTS:
        (ROOT / page).write_text(filled(page))
    folder = ROOT / 'docs' / 'api'
    folder.mkdir(exist_ok=True)
    for path in folder.glob('*.rst'):
        path.unlink()
    for name, text in api_pages().items():
        (folder / name).write_text(text)


if __name__ == '__main__':
    main()
