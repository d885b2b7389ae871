"""Import order: a module imports only from those above it in `ORDER`; heavy packages are imported on use."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    *(
        'types',
        'checkpoint',
        'measure',
        'sharding',
        'jaxprs',
        'rows',
        'modes',
        'calling',
        'program',
        'costs',
        'criteria',
    ),
    *('models', 'losses', 'training', 'thresholds', 'translate', 'inference', 'export', 'data', 'plots', 'report'),
    'command',
)
WHILE_TYPE_CHECKING = {('types', 'criteria')}  # a policy holds a criterion
AT_TOP = {'branchy_jax', 'flax', 'jax', 'numpy', 'optax', 'scipy'}
ON_USE = {
    *('flatbuffers', 'huggingface_hub', 'onnx', 'onnxruntime', 'orbax', 'safetensors'),
    *('absl', 'grain', 'mlxtend', 'PIL', 'tensorflow_datasets'),  # only `data` imports these
    *('matplotlib', 'zeus'),
}
FILES = sorted((ROOT / 'branchy_jax').rglob('*.py'))


def imports(tree):
    """Yields (module, whether it is imported at the top of the file)."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'absolute imports only'
            for alias in node.names:
                joined = node.module == 'branchy_jax'
                yield f'{node.module}.{alias.name}' if joined else node.module, id(node) in top


def subject(path):
    """The module or package of `ORDER` that a file belongs to."""
    return path.relative_to(ROOT / 'branchy_jax').parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_from_above_and_calls_nothing_dangerous(path):
    own, tree = subject(path), ast.parse(path.read_text())
    for module, at_top in imports(tree):
        package = module.split('.')[0]
        assert package in AT_TOP | sys.stdlib_module_names or (package in ON_USE and not at_top), module
        assert package != 'pickle', module
        if package == 'branchy_jax' and own != '__init__' and module != 'branchy_jax.__version__':
            other = module.split('.')[1]
            above = ORDER.index(other) <= ORDER.index(own)
            assert above or (own, other) in WHILE_TYPE_CHECKING, module
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not names & {'eval', 'exec', 'compile', '__import__'}


def test_every_module_has_its_place():
    assert {subject(path) for path in FILES} - {'__init__'} == set(ORDER)
