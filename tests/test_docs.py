"""What the documentation shows is what the code does."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import branchy_jax as bj

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(bj.__path__, 'branchy_jax.'))


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_examples_were_found():
    finder = doctest.DocTestFinder()
    found = [test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 25


def test_everything_exported_exists_and_is_documented():
    for name in ('branchy_jax', 'branchy_jax.models', 'branchy_jax.inference', 'branchy_jax.thresholds'):
        module = importlib.import_module(name)
        assert all(getattr(module, public).__doc__ for public in module.__all__)


@pytest.mark.usefixtures('few_digits')
def test_readme_examples_run(capsys):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), namespace)
    assert capsys.readouterr().out


def test_readme_commands_and_links_exist():
    text = (ROOT / 'README.md').read_text()
    for path in re.findall(r'\]\(([^)#:]+)\)', text) + re.findall(r'--config=(\S+)', text):
        assert (ROOT / path).exists(), path
