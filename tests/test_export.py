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
from branchy_jax.export import save, save_stages
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


@pytest.mark.parametrize('form', ['exported', 'beside'])
def test_iree_answers_as_dense_does(network, expected, form, request):
    for package in ('compiler', 'runtime'):
        pytest.importorskip(f'iree.{package}', reason=f'pip install iree-base-{package}')
    for name in ('staged', 'batch'):
        loaded = run_exported.load(request.getfixturevalue(form)[0], [name], iree=True)
        answer = run_exported.PROGRAMS[name](loaded, np.asarray(network[2])[:21])
        check_same(bj.ExitPrediction(**answer), jax.tree.map(lambda x: x[:21], expected), rtol=1e-4, atol=1e-5)


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
    assert stage['inputs'] == [{'name': 'hidden_0', 'shape': ['batch', 8], 'dtype': 'float32'}]
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


@pytest.fixture(scope='module', params=['onnx', 'stablehlo'])
def stage_files(request, network, thresholds, tmp_path_factory):
    """A folder of stage files, its manifest, and its policy; the criterion uses earlier exits."""
    for package in ('onnx', 'onnxruntime') if request.param == 'onnx' else ():
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    model, variables, images = network
    criterion = bj.criteria.ensemble()
    cut = np.sort(bj.criteria.replay(criterion, jnp.stack(model.apply(variables, images)))[1], axis=1)
    policy = bj.ExitPolicy(criterion, (cut[:-1, 8] + cut[:-1, 9]) / 2)
    folder = tmp_path_factory.mktemp('stages') / 'network'
    options = {'inputs': images, 'format': request.param, 'normalization': SCALE, 'platforms': ['cpu']}
    return folder, save_stages(folder, model, variables, policy, **options), policy


def test_stage_files_are_dense_at_any_batch_size(stage_files, network):
    folder, _, policy = stage_files
    expected = bj.inference.dense(network[0])(*network[1:], policy)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    loaded = run_exported.load(folder)
    for size in (1, 7, 24):
        answers = run_exported.run_parts(loaded, np.asarray(network[2])[:size])
        check_same(bj.ExitPrediction(**answers), jax.tree.map(lambda leaf, size=size: leaf[:size], expected))


def test_the_manifest_of_stage_files_says_what_each_cut_hands_on(stage_files):
    folder, manifest, _ = stage_files
    assert manifest == json.loads((folder / 'manifest.json').read_text())
    assert manifest['order'] == [f'{kind} {n}' for n in range(3) for kind in ('stage', 'exit')]
    assert list(manifest['programs']) == manifest['order']
    # 8 hidden values, and what the criterion remembers: 3 classes; 4 bytes each.
    hands_on = [(cut['arrays'], cut['bytes_per_image']) for cut in manifest['cuts']]
    assert hands_on == [(['image'], 64), (['hidden_0', 'carry_0'], 44), (['hidden_1', 'carry_1'], 44)]
    head = manifest['programs']['exit 1']
    assert [array['name'] for array in head['inputs']] == ['hidden_1', 'carry_0']
    assert [(array['name'], array['shape']) for array in head['outputs']] == [
        ('carry_1', ['batch', 3]),
        ('label', ['batch']),
        ('logits', ['batch', 3]),
        ('uncertainty', ['batch']),
    ]
    assert manifest['input']['normalization']['mean'] == [0.5]


def swap(folder):
    """Exchanges the files of two stages."""
    first, second = sorted(folder.glob('stage_[12].*[!r]'))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (swap, r'stage_1\..* (was altered|truncated or altered)'),
        (lambda f: alter(f, 'manifest.json', lambda x: x.replace(b'"stage 1"', b'"stage 2"', 1)), 'was altered'),
        (lambda f: alter(f, 'manifest.json', lambda x: re.sub(rb'"thresholds": \[\s*', b'\\g<0>1', x)), 'was altered'),
        (lambda f: next(f.glob('exit_1.[os]*')).unlink(), 'exit_1.* is missing'),
    ],
)
def test_altered_stage_files_are_refused(stage_files, tmp_path, damage, message):
    folder = Path(shutil.copytree(stage_files[0], tmp_path / 'copy'))
    damage(folder)
    with pytest.raises(ValueError, match=f'folder: .*{message}'):
        run_exported.load(folder)


def test_parts_in_another_order_are_refused_by_name(stage_files, network):
    loaded, images = run_exported.load(stage_files[0]), np.asarray(network[2])
    _, _, values = run_exported.run_exits(loaded, {'image': images}, until=1)
    with pytest.raises(
        ValueError, match="values: stage 2 takes 'hidden_1', got hidden_0, .*; run the parts as stage 0"
    ):
        run_exported.run_exits(loaded, values, first=2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'format': 'tflite'}, "format: got 'tflite'; choose 'onnx' or 'stablehlo'"),
        ({'model': INVERSE}, "model: stage 0 computes 'lu', which has no ONNX form here"),
        ({'model': ASKS_FOR_THE_BATCH, 'policy': [0.0, 0.0]}, 'model: runs at the batch size of the example alone'),
        ({'folder': '.'}, 'folder: .* exists'),
    ],
)
def test_impossible_stage_files_are_refused(tmp_path, options, message):
    images = jnp.ones((2, 3, 3, 1))
    given = {'folder': 'new', 'model': CONVOLUTION, 'policy': [], 'inputs': images, **options}
    given |= {'variables': random_variables(given['model'], images), 'folder': tmp_path / given['folder']}
    with pytest.raises(ValueError, match=message):
        save_stages(**given)
    assert not list(tmp_path.iterdir())


class Pixels(nn.Module):
    """Hands on two arrays, and answers every pixel; two inputs by name."""

    @nn.compact
    def __call__(self, image, scale, train=False):
        wide = jnp.concatenate([image, image**2], -1)
        mean = (image * scale[:, None, None]).mean((1, 2))
        return wide @ jnp.eye(2, 3), nn.Dense(3)(wide * mean[:, None, None])


def test_several_inputs_and_a_criterion_that_looks_back(tmp_path):
    rng = np.random.default_rng(0)
    inputs = {'image': rng.normal(size=(9, 4, 4, 1)).astype(np.float32), 'scale': np.int32(rng.integers(1, 4, (9, 1)))}
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
    named = {array['name']: array['dtype'] for array in manifest['input']['arrays']}
    assert named == {"['image']": 'float32', "['scale']": 'int32'}
    parts = run_exported.load(tmp_path / 'new', manifest['order'])
    images = dict(zip(manifest['cuts'][0]['arrays'], inputs.values(), strict=True))
    check_same(bj.ExitPrediction(**run_exported.run_exits(parts, images)[0]), expected)
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


@pytest.fixture
def read(tmp_path, monkeypatch, capsys):
    """Runs the reader on the images of the network; returns what it prints."""

    def run(subject, images, *flags):
        np.save(tmp_path / 'images.npy', images)
        arguments = ['run_exported.py', str(subject), f'--images={tmp_path}/images.npy', *flags]
        monkeypatch.setattr(sys, 'argv', arguments)
        run_exported.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_reader_reports_differences_and_ties_apart(exported, read, tmp_path):
    images, answers = np.zeros((2, 4, 4, 1), np.uint8), tmp_path / 'answers.npz'
    assert read(exported[0], images, '--program=batch', f'--output={answers}')['images'] == 2
    arguments = exported[0], images, '--program=batch', f'--expect={answers}'
    assert read(*arguments)['differ'] == 0
    with np.load(answers) as right:
        wrong = {'label': right['label'], 'exit_index': right['exit_index'] + [1, 0]}
    np.savez(answers, **wrong, tie=[True, False])
    result = read(*arguments)
    assert (result['differ'], result['differ_at_ties'], result['ties']) == (0, 1, 1)
    np.savez(answers, **wrong)
    with pytest.raises(SystemExit):
        read(*arguments)


@pytest.mark.parametrize('batch', [False, True])
def test_reader_runs_onnx_files(network, thresholds, expected, read, batch, tmp_path):
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    path, answers = tmp_path / 'network.onnx', tmp_path / 'answers.npz'
    bj.export.save_onnx(path, *network[:2], thresholds, inputs=network[2], batch=batch)
    np.savez(answers, label=expected.label, exit_index=expected.exit_index)
    result = read(path, network[2], f'--expect={answers}')
    assert (result['images'], result['differ'], result['exits_asked']) == (24, 0, [0, 1, 2])


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
