"""What the documentation shows is what the code does."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import branchy_jax as bj

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(bj.__path__, 'branchy_jax.'))


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_docstrings_have_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in tests) > 25


def test_everything_exported_exists_and_is_documented():
    for package in ('branchy_jax', 'branchy_jax.models', 'branchy_jax.inference', 'branchy_jax.thresholds'):
        module = importlib.import_module(package)
        public = getattr(module, '__all__', [name for name in vars(module) if not name.startswith('_')])
        assert all(getattr(module, name).__doc__ for name in public)


@pytest.mark.slow
@pytest.mark.usefixtures('few_digits')
def test_readme_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the example writes a file
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), namespace)
    assert capsys.readouterr().out
    assert (tmp_path / 'digits.onnx').stat().st_size


@pytest.mark.parametrize('run', ['lenet_mnist_tuned', 'alexnet_cifar10', 'resnet110_cifar10_tuned'])
def test_readme_table_is_what_the_records_say(run):
    stored = ROOT / 'experiments' / 'results' / run
    report, clock = (bj.report.read_json(stored / f'{name}.json') for name in ('report', 'batches'))
    clock, row = clock['rows'][0], report['rows'][1]
    reaches = 1 - np.cumsum([0, *clock['exit_fractions'][:-1]])  # the share of images that run each stage and head
    macs = reaches @ (np.array(report['stage_macs']) + report['exit_macs'])
    limit = (sum(report['stage_macs']) + report['exit_macs'][-1]) / macs
    expected = [
        f'{100 * row["test_accuracy"]:.2f}',
        f'{clock["gain"]:.2f} [{clock["gain_low"]:.2f}, {clock["gain_high"]:.2f}]',
        f'{limit:.2f}',
        f'{clock["gain"] / limit:.2f}',
        f'{100 * row["exit_fractions"][0]:.1f} %',
    ]
    lines = (ROOT / 'README.md').read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f'| {row["network"]},'))
    cells = [cell.strip() for cell in line.split('|')]
    assert [cells[n] for n in (2, 4, 5, 6, 7)] == expected


def test_readme_links_exist():
    text = (ROOT / 'README.md').read_text()
    for path in re.findall(r'\]\(([^)#:]+)\)', text):
        assert (ROOT / path).exists(), path
