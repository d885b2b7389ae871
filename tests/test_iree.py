"""Beside each exported program lies its text: plain StableHLO, which IREE runs without jax."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import thresholds_between
from jax.extend.mlir import ir
from jax.interpreters import mlir

import branchy_jax as bj
from branchy_jax.export import programs as programs_module
from experiments import run_exported, run_iree

READER = Path(run_iree.__file__)
PLAIN = {'builtin', 'func', 'stablehlo'}


@pytest.fixture(scope='module')
def exported(network, tmp_path_factory):
    """Thresholds, a folder with weights in the programs, one with weights beside them."""
    thresholds = thresholds_between(*network).astype(np.float32)
    place = tmp_path_factory.mktemp('iree')
    inputs, options = network[2], {'batch_size': 8, 'chunk_size': 4, 'platforms': ['cpu']}
    bj.export.save(place / 'embedded', *network[:2], thresholds, inputs=inputs, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs_module, '_MOST_EMBEDDED_BYTES', 0)
        bj.export.save(place / 'beside', *network[:2], thresholds, inputs=inputs, **options)
    return thresholds, place


def manifest_of(folder):
    return json.loads((folder / 'manifest.json').read_text())


def operations(block):
    for operation in block.operations:
        yield operation.operation
        for region in operation.operation.regions:
            for inner in region.blocks:
                yield from operations(inner)


@pytest.mark.parametrize('weights', ['embedded', 'beside'])
def test_every_text_is_plain_stablehlo_for_one_platform(exported, weights):
    folder = exported[1] / weights
    for name, program in manifest_of(folder)['programs'].items():
        text = (folder / program['text']['file']).read_text()
        assert not re.search(r'custom_call|callback|loc\(|mhlo|jax|platform|tensor<\?', text), name
        with mlir.make_ir_context():
            module = ir.Module.parse(text)
            assert module.operation.verify()
            found = [operation.name for operation in operations(module.body)]
            assert {name.split('.')[0] for name in found} <= PLAIN, name
            (main,) = [f for f in module.body.operations if ir.StringAttr(f.attributes['sym_name']).value == 'main']
            given, made = main.type.inputs, main.type.results
            shapes = [[1 if size == 'batch' else size for size in array['shape']] for array in program['inputs']]
            assert [ir.RankedTensorType(t).shape for t in given][len(program['weights']) :] == shapes
            assert len(given) == len(program['weights']) + len(program['inputs'])
            assert len(made) == len(program['outputs'])
        if name == 'staged':
            assert found.count('stablehlo.case') == 2


def test_what_is_more_than_stablehlo_has_no_text():
    spec = jax.ShapeDtypeStruct((2, 2), jnp.float32)

    def program(function, *names):
        return programs_module.Program('staged', function, function, {}, dict.fromkeys(names, spec), ('x',))

    assert programs_module.plain_text(program(lambda weights, x: (jnp.linalg.inv(x),), 'image')) is None
    unused = program(lambda weights, x, y: (x,), 'x', 'y')
    assert '%arg1' in programs_module.plain_text(unused)


def imported(nodes):
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.split('.')[0] for module in modules} - set(sys.stdlib_module_names)


def test_reader_needs_numpy_and_iree_only():
    """With the other reader beside it, which imports jax where that is used."""
    found = imported(list(ast.walk(ast.parse(READER.read_text()))))
    assert found == {'numpy', 'iree', 'experiments', 'run_exported'}
    assert imported(ast.parse(Path(run_exported.__file__).read_text()).body) == {'numpy'}


def test_what_was_not_written_so_is_refused(exported, tmp_path, monkeypatch):
    def unreachable(text):
        raise AssertionError('compiled what it should refuse')

    monkeypatch.setattr(run_iree, '_compile', unreachable)
    folder = shutil.copytree(exported[1] / 'embedded', tmp_path / 'copy')
    with pytest.raises(ValueError, match="names: .* has no 'staged 2'; choose from staged, batch, stage 1"):
        run_iree.load(folder, ['staged 2'])
    text = (folder / 'staged.mlir').read_text()
    (folder / 'staged.mlir').write_text(text.replace('dense<1', 'dense<2', 1))
    with pytest.raises(ValueError, match='staged.mlir was altered'):
        run_iree.load(folder, ['staged'])
    (folder / 'batch.mlir').unlink()
    with pytest.raises(ValueError, match='batch.mlir is missing'):
        run_iree.load(folder, ['batch'])
    path = folder / 'manifest.json'
    path.write_text(path.read_text().replace('"entropy"', '"margin"'))
    with pytest.raises(ValueError, match='manifest.json was altered'):
        run_iree.load(folder, ['staged'])


def test_ties_count_apart():
    found = {'label': np.array([1, 2, 3, 4]), 'exit_index': np.array([0, 0, 1, 1])}
    expected = {'label': np.array([1, 9, 9, 4]), 'exit_index': np.array([0, 0, 1, 0])}
    assert run_iree.compare(found, expected) == {'differ': 3, 'differ at ties': 0, 'ties': 0}
    expected['tie'] = np.array([True, False, True, False])
    assert run_iree.compare(found, expected) == {'differ': 2, 'differ at ties': 1, 'ties': 2}


@pytest.mark.parametrize('weights', ['embedded', 'beside'])
@pytest.mark.parametrize('program', sorted(run_iree.PROGRAMS))
def test_iree_answers_as_dense_does(network, exported, weights, program):
    for package in ('compiler', 'runtime'):
        pytest.importorskip(f'iree.{package}', reason=f'pip install iree-base-{package}')
    model, variables, images = network
    expected = bj.inference.dense(model)(variables, images, exported[0])
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    loaded = run_iree.load(exported[1] / weights, [program])
    found = run_iree.PROGRAMS[program](loaded, np.asarray(images)[:21])
    for name in ('label', 'exit_index'):
        np.testing.assert_array_equal(found[name], getattr(expected, name)[:21])
    for name in ('logits', 'uncertainty'):
        np.testing.assert_allclose(found[name], getattr(expected, name)[:21], rtol=1e-4, atol=1e-5)


def test_stages_and_heads_run_by_iree_one_image_at_a_time(network, exported):
    for package in ('compiler', 'runtime'):
        pytest.importorskip(f'iree.{package}', reason=f'pip install iree-base-{package}')
    model, variables, images = network
    hidden, folder = {'hidden': np.asarray(images)[:1]}, exported[1] / 'embedded'
    for n, logits in enumerate(model.apply(variables, images[:1])):
        hidden = run_iree.load(folder, [f'stage {n + 1}']).programs[f'stage {n + 1}'](*hidden.values())
        answer = run_iree.load(folder, [f'exit {n + 1}']).programs[f'exit {n + 1}'](*hidden.values())
        np.testing.assert_allclose(answer['logits'], logits, rtol=1e-4, atol=1e-5)
