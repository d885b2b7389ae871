"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import branchy_jax as bj

MODULES = [
    module.name
    for module in pkgutil.walk_packages(bj.__path__, 'branchy_jax.')
    if re.search(r'>>> (?!.*SKIP)', Path(module.module_finder.find_spec(module.name).origin).read_text())
]


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.usefixtures('xla_defaults')
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted
