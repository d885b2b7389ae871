"""Exported folders answer as the library does, and altered ones are refused."""

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Function, random_variables, thresholds_between
from jax.extend.mlir import ir
from jax.interpreters import mlir
from test_inference import check_same

import branchy_jax as bj
from branchy_jax.criteria.policy import as_policy, decode_policy
from branchy_jax.export import folder as folder_module
from branchy_jax.export import programs as programs_module
from branchy_jax.export import save
from experiments import run_exported

SCALE = bj.Normalization(mean=jnp.float32([0.5]), deviation=jnp.float32([0.25]))


@pytest.fixture(scope='module')
def thresholds(network):
    return thresholds_between(*network).astype(np.float32)


@pytest.fixture(scope='module')
def expected(network, thresholds):
    answer = bj.inference.dense(network[0])(*network[1:], thresholds)
    assert set(answer.exit_index.tolist()) == {0, 1, 2}
    return answer


@pytest.fixture(scope='module')
def exported(network, thresholds, tmp_path_factory):
    """A folder for all platforms with weights in the programs, and its manifest."""
    folder = tmp_path_factory.mktemp('export') / 'network'
    options = {'inputs': network[2], 'normalization': SCALE, 'batch_size': 10, 'exit_names': ['a', 'b', 'c']}
    return folder, save(folder, *network[:2], thresholds, **options)


@pytest.fixture(scope='module')
def beside(network, thresholds, tmp_path_factory):
    """A folder with weights beside the programs, and its manifest."""
    folder = tmp_path_factory.mktemp('export') / 'large'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs_module, '_MOST_EMBEDDED_BYTES', 0)
        return folder, save(folder, *network[:2], thresholds, inputs=network[2], batch_size=10, platforms=['cpu'])


@pytest.mark.parametrize('form', ['exported', 'beside'])
def test_every_program_is_dense(network, thresholds, expected, form, request):
    loaded = run_exported.load(request.getfixturevalue(form)[0])
    for run in run_exported.PROGRAMS.values():
        check_same(bj.ExitPrediction(**run(loaded, np.asarray(network[2]))), expected)
    np.testing.assert_array_equal(loaded.thresholds, thresholds)


CONVOLUTION = Function(lambda x: (nn.Dense(3)(nn.Conv(2, (3, 3))(x).reshape(x.shape[0], -1)),))
ASKS_FOR_THE_BATCH = Function(lambda x: (nn.Dense(3)(x.reshape(int(x.shape[0]), -1)),) * 3)
INVERSE = Function(lambda x: (jnp.linalg.inv(x[..., 0]).sum(1),))  # for which StableHLO has no operation


def test_one_module_holds_all_platforms_and_the_forms_that_suit_each(exported, tmp_path):
    module = jax.export.deserialize(bytearray((exported[0] / 'staged.stablehlo').read_bytes()))
    assert module.platforms == ('cpu', 'cuda', 'tpu')
    images = jnp.ones((1, 4, 4, 1))
    variables = random_variables(CONVOLUTION, images)
    save(tmp_path / 'both', CONVOLUTION, variables, [], inputs=images, platforms=['cpu', 'cuda'])
    module = jax.export.deserialize(bytearray((tmp_path / 'both' / 'staged.stablehlo').read_bytes()))
    assert 'stablehlo.convolution' in module.mlir_module()
    inputs = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((0,), jnp.float32)
    assert 'convolution' not in jax.jit(module.call).lower({}, *inputs).compile().as_text()


def test_manifest_describes_the_folder(exported, beside, thresholds):
    folder, manifest = exported
    assert manifest == json.loads((folder / 'manifest.json').read_text())
    assert manifest['thresholds'] == pytest.approx(thresholds.tolist())
    assert decode_policy(manifest['policy']) == as_policy(thresholds)
    assert (manifest['exits'], manifest['criterion'], manifest['format']) == (['a', 'b', 'c'], 'entropy', 2)
    assert (manifest['input']['shape'], manifest['input']['normalization']['mean']) == ([4, 4, 1], [0.5])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    loaded = run_exported.Network(manifest, {}, thresholds)
    np.testing.assert_allclose(loaded.normalize(pixels), SCALE(pixels), rtol=1e-6, atol=1e-6)
    # 4 × 4 pixels, then 8 hidden values, 4 bytes each.
    assert [cut['bytes_per_image'] for cut in manifest['cuts']] == [64, 32, 32]
    parts = [f'{kind} {n}' for n in range(3) for kind in ('stage', 'exit')]
    assert list(manifest['programs']) == ['staged', 'batch', *parts]
    described = [file for part in manifest['programs'].values() for file in (part, part['text'])]
    assert {path.name for path in folder.iterdir()} == {'manifest.json', *(file['file'] for file in described)}
    stage = manifest['programs']['stage 1']
    assert stage['inputs'] == [{'name': 'hidden', 'shape': ['batch', 8], 'dtype': 'float32'}]
    assert beside[1]['programs']['exit 0']['weights'] == ['head1/bias', 'head1/kernel']


def operations(block):
    for operation in block.operations:
        yield operation.operation
        for region in operation.operation.regions:
            for inner in region.blocks:
                yield from operations(inner)


@pytest.mark.parametrize('form', ['exported', 'beside'])
def test_every_text_is_plain_stablehlo_for_one_platform(form, request):
    folder, manifest = request.getfixturevalue(form)
    for name, program in manifest['programs'].items():
        text = (folder / program['text']['file']).read_text()
        assert not re.search(r'custom_call|callback|loc\(|mhlo|jax|platform|tensor<\?', text), name
        with mlir.make_ir_context():
            module = ir.Module.parse(text)
            assert module.operation.verify()
            names = [operation.name for operation in operations(module.body)]
            assert {name.split('.')[0] for name in names} <= {'builtin', 'func', 'stablehlo'}, name
            (main,) = [f for f in module.body.operations if ir.StringAttr(f.attributes['sym_name']).value == 'main']
            shapes = [[1 if size == 'batch' else size for size in array['shape']] for array in program['inputs']]
            given = [ir.RankedTensorType(t).shape for t in main.type.inputs]
            assert given[len(program['weights']) :] == shapes
            assert len(main.type.results) == len(program['outputs'])
        assert names.count('stablehlo.case') == 2 or name != 'staged'


def test_what_is_more_than_stablehlo_has_no_text(tmp_path):
    images = jax.ShapeDtypeStruct((2, 3, 3, 1), jnp.float32)
    manifest = save(tmp_path / 'new', INVERSE, {}, [], inputs=images, platforms=['cpu'])
    assert manifest['programs']['staged']['text'] is None


class Pixels(nn.Module):
    """Hands on two arrays, and answers every pixel; two inputs by name."""

    @nn.compact
    def __call__(self, image, scale, train=False):
        wide = jnp.concatenate([image, image**2], -1)
        mean = (image * scale[:, None, None]).mean((1, 2))
        return wide @ jnp.eye(2, 3), nn.Dense(3)(wide * mean[:, None, None])


def test_several_inputs_and_a_criterion_that_looks_back(tmp_path):
    rng = np.random.default_rng(0)
    inputs = {'image': rng.normal(size=(9, 4, 4, 1)).astype(np.float32), 'scale': rng.random((9, 1), np.float32)}
    model, criterion = Pixels(), bj.criteria.ensemble()
    variables = model.init(jax.random.key(0), **inputs)
    logits = jnp.stack(model.apply(variables, **inputs))
    cut = np.sort(bj.criteria.replay(criterion, logits)[1][0])[3:5].mean()
    policy = bj.ExitPolicy(criterion, jnp.array([cut]))
    manifest = save(tmp_path / 'new', model, variables, policy, inputs=inputs, batch_size=9, platforms=['cpu'])
    expected = bj.inference.dense(model)(variables, inputs, policy)
    assert set(expected.exit_index.tolist()) == {0, 1}
    loaded = run_exported.load(tmp_path / 'new', ['batch'])
    answer = loaded.programs['batch'](*inputs.values(), loaded.thresholds)
    check_same(bj.ExitPrediction(**answer), expected)
    assert [array['name'] for array in manifest['input']['arrays']] == ["['image']", "['scale']"]
    # 16 pixels of one and of two channels, one scale, and what the criterion remembers: 16 pixels of three classes.
    assert manifest['cuts'][1]['bytes_per_image'] == 4 * (16 + 16 * 2 + 1 + 16 * 3)


def change(folder, change_programs=None, **changes):
    """Alters a manifest and its own checksum."""
    path = folder / 'manifest.json'
    manifest = {**json.loads(path.read_text()), **changes}
    if change_programs is not None:
        change_programs(manifest['programs'])
    manifest['sha256'] = hashlib.sha256(folder_module.canonical(manifest)).hexdigest()
    path.write_text(json.dumps(manifest))


def alter(folder, name, new):
    (folder / name).write_bytes(new((folder / name).read_bytes()))


def call_back(folder):
    """A program that calls a function registered in the process that loads it."""
    spec = jax.ShapeDtypeStruct((), jnp.float32)
    unsafe = jax.export.DisabledSafetyCheck.custom_call('anything')
    function = jax.jit(lambda weights, x: jax.ffi.ffi_call('anything', spec)(x))
    content = jax.export.export(function, disabled_checks=[unsafe])({}, spec).serialize()
    (folder / 'staged.stablehlo').write_bytes(content)
    entry = {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    change(folder, lambda programs: programs['staged'].update(entry))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda f: alter(f, 'batch.stablehlo', lambda x: x[:-100]), 'batch.stablehlo has .* truncated or altered'),
        (lambda f: alter(f, 'stage_1.stablehlo', lambda x: bytes([x[0] ^ 1]) + x[1:]), 'stage_1.stablehlo was altered'),
        (lambda f: alter(f, 'manifest.json', lambda x: x.replace(b'"a"', b'"z"')), 'manifest.json was altered'),
        (lambda f: alter(f, 'manifest.json', lambda x: x[:9]), 'missing, truncated or no manifest'),
        (lambda f: (f / 'exit_1.stablehlo').unlink(), 'exit_1.stablehlo is missing'),
        (lambda f: change(f, format=1), 'is of format 1, this reader knows 2'),
        (lambda f: change(f, versions={'jax': '9', 'calling_convention': 999}), 'convention 999 is too new'),
        (lambda f: change(f, platforms=['tpu']), 'was lowered for tpu, not for cpu'),
        (lambda f: change(f, lambda p: p['staged'].update(file='../x')), 'no name of a file within'),
        (call_back, 'more than StableHLO: anything'),
    ],
)
def test_an_altered_folder_is_refused(exported, tmp_path, damage, message):
    folder = Path(shutil.copytree(exported[0], tmp_path / 'copy'))
    damage(folder)
    with pytest.raises(ValueError, match=f'folder: .*{message}'):
        run_exported.load(folder)


def test_altered_texts_and_weights_are_refused_before_anything_is_compiled(beside, tmp_path):
    folder = Path(shutil.copytree(beside[0], tmp_path / 'copy'))
    with pytest.raises(ValueError, match="names: .* has no 'staged 2'; choose from staged, batch, stage 0"):
        run_exported.load(folder, ['staged 2'], iree=True)
    alter(folder, 'staged.mlir', lambda x: bytes([x[0] ^ 1]) + x[1:])
    with pytest.raises(ValueError, match='staged.mlir was altered'):
        run_exported.load(folder, ['staged'], iree=True)
    alter(folder, 'weights.safetensors', lambda content: content[:-4] + b'\0\0\0\1')
    for iree in (False, True):
        with pytest.raises(ValueError, match='weights.safetensors was altered'):
            run_exported.load(folder, ['staged'], iree=iree)


def imported(nodes):
    nodes = list(nodes)
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.split('.')[0] for module in modules} - set(sys.stdlib_module_names)


def test_the_reader_needs_few_packages():
    reader = ast.parse(Path(run_exported.__file__).read_text())
    assert imported(reader.body) == {'numpy'}  # the others only where they run
    assert imported(ast.walk(reader)) == {'numpy', 'jax', 'iree', 'onnxruntime'}


def test_reader_reports_differences(exported, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / 'images.npy', np.zeros((2, 4, 4, 1), np.uint8))
    arguments = ['run_exported.py', str(exported[0]), f'--images={tmp_path}/images.npy', '--program=batch']
    answers = tmp_path / 'answers.npz'
    monkeypatch.setattr(sys, 'argv', [*arguments, f'--output={answers}'])
    run_exported.main()
    monkeypatch.setattr(sys, 'argv', [*arguments, f'--expect={answers}'])
    run_exported.main()
    with np.load(answers) as right:
        wrong = {'label': right['label'], 'exit_index': right['exit_index'] + [1, 0]}
    np.savez(answers, **wrong)
    with pytest.raises(SystemExit):
        run_exported.main()
    first, *compared = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first['images'], [result['differ'] for result in compared]) == (2, [0, 1])


def test_failed_export_leaves_nothing(network, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(folder_module, 'plain_text', fail)
    with pytest.raises(OSError, match='No space'):
        save(tmp_path / 'new', *network[:2], [0.0, 0.0], inputs=network[2], platforms=['cpu'])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'policy': [0.0]}, 'thresholds: a network with 3 exits'),
        ({'exit_names': ['a', 'b']}, 'exit_names: got'),
        ({'platforms': ['gpu']}, 'platforms: got .*cpu, cuda, tpu'),
        ({'batch_size': 0}, 'batch_size: got 0'),
        ({'chunk_size': 0}, 'chunk_size: got 0'),
        ({'folder': '.'}, 'folder: .* exists'),
        ({'model': ASKS_FOR_THE_BATCH}, 'model: runs at the batch size of the example alone'),
    ],
)
def test_impossible_settings_are_refused(network, tmp_path, options, message):
    images, model = network[2], options.get('model', network[0])
    variables = random_variables(model, images)
    given = {'model': model, 'variables': variables, 'policy': [0.0, 0.0], 'inputs': images, **options}
    with pytest.raises(ValueError, match=message):
        save(**given | {'folder': tmp_path / given.get('folder', 'new')})
    assert not list(tmp_path.iterdir())
