"""Exported folders answer as the library does, and altered ones are refused."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import thresholds_between
from test_inference import check_same

import branchy_jax as bj
from branchy_jax.export import folder as folder_module
from branchy_jax.export import programs as programs_module
from branchy_jax.export import save
from experiments import run_exported

READER = Path(run_exported.__file__)
SCALE = bj.Normalization(mean=jnp.float32([0.5]), deviation=jnp.float32([0.25]))


@pytest.fixture(scope='module')
def thresholds(network):
    return thresholds_between(*network).astype(np.float32)


@pytest.fixture(scope='module')
def exported(network, thresholds, tmp_path_factory):
    model, variables, images = network
    folder = tmp_path_factory.mktemp('export') / 'network'
    options = {'inputs': images, 'normalization': SCALE, 'batch_size': 10, 'exit_names': ['a', 'b', 'c']}
    return folder, save(folder, model, variables, thresholds, **options)


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported[0], tmp_path / 'copy'))


def check_programs(folder, images, expected):
    """Runs the staged program, the batch program and the parts; returns the loaded folder."""
    loaded = run_exported.load(folder)
    for run in run_exported.PROGRAMS.values():
        check_same(bj.ExitPrediction(**run(loaded, np.asarray(images))), expected)
    return loaded


def test_every_program_is_dense(network, exported, thresholds):
    model, variables, images = network
    expected = bj.inference.dense(model)(variables, images, thresholds)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    loaded = check_programs(exported[0], images, expected)
    np.testing.assert_array_equal(loaded.thresholds, thresholds)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    np.testing.assert_allclose(loaded.normalize(pixels), SCALE(pixels), rtol=1e-6, atol=1e-6)


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (nn.Dense(3)(nn.Conv(2, (3, 3))(x).reshape(x.shape[0], -1)),)


def test_one_module_holds_all_platforms_and_the_forms_that_suit_each(network, exported, tmp_path):
    module = jax.export.deserialize(bytearray((exported[0] / 'staged.stablehlo').read_bytes()))
    assert module.platforms == ('cpu', 'cuda', 'tpu')
    inputs = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    compiled = jax.jit(module.call).lower({}, *inputs).compile({'xla_backend_optimization_level': 1}).as_text()
    assert len(re.findall(r' conditional\(', compiled)) == 2
    model, images = Convolution(), jnp.ones((1, 4, 4, 1))
    variables = model.init(jax.random.key(0), images)
    save(tmp_path / 'both', model, variables, [], inputs=images, platforms=['cpu', 'cuda'])
    module = jax.export.deserialize(bytearray((tmp_path / 'both' / 'staged.stablehlo').read_bytes()))
    assert 'stablehlo.convolution' in module.mlir_module()
    inputs = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((0,), jnp.float32)
    assert 'convolution' not in jax.jit(module.call).lower({}, *inputs).compile().as_text()


def test_manifest_describes_the_folder(exported, thresholds):
    folder, manifest = exported
    assert manifest == json.loads((folder / 'manifest.json').read_text())
    assert manifest['thresholds'] == pytest.approx(thresholds.tolist())
    assert bj.criteria.decode_policy(manifest['policy']) == bj.criteria.as_policy(thresholds)
    assert (manifest['exits'], manifest['criterion'], manifest['format']) == (['a', 'b', 'c'], 'entropy', 1)
    assert (manifest['input']['shape'], manifest['input']['normalization']['mean']) == ([4, 4, 1], [0.5])
    # 4 × 4 pixels, then 8 hidden values, 4 bytes each.
    assert [cut['bytes_per_image'] for cut in manifest['cuts']] == [64, 32, 32]
    parts = [f'{kind} {n}' for n in (1, 2, 3) for kind in ('stage', 'exit')]
    assert list(manifest['programs']) == ['staged', 'batch', *parts]
    described = [file for part in manifest['programs'].values() for file in (part, part['text'])]
    for file in described:
        assert hashlib.sha256((folder / file['file']).read_bytes()).hexdigest() == file['sha256']
    assert {path.name for path in folder.iterdir()} == {'manifest.json', *(file['file'] for file in described)}
    stage = manifest['programs']['stage 2']
    assert stage['inputs'] == [{'name': 'hidden', 'shape': ['batch', 8], 'dtype': 'float32'}]


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
    manifest = save(tmp_path / 'pixels', model, variables, policy, inputs=inputs, batch_size=9)
    expected = bj.inference.dense(model)(variables, inputs, policy)
    assert set(expected.exit_index.tolist()) == {0, 1}
    loaded = run_exported.load(tmp_path / 'pixels', ['batch'])
    answer = loaded.programs['batch'](*inputs.values(), loaded.thresholds)
    check_same(bj.ExitPrediction(**answer), expected)
    assert [array['name'] for array in manifest['input']['arrays']] == ["['image']", "['scale']"]
    # 16 pixels of one and of two channels, one scale, and what the criterion remembers: 16 pixels of three classes.
    assert manifest['cuts'][1]['bytes_per_image'] == 4 * (16 + 16 * 2 + 1 + 16 * 3)


def test_large_weights_lie_beside(network, thresholds, tmp_path, monkeypatch):
    model, variables, images = network
    monkeypatch.setattr(programs_module, '_MOST_EMBEDDED_BYTES', 0)
    manifest = save(tmp_path / 'large', model, variables, thresholds, inputs=images, batch_size=10)
    assert manifest['programs']['exit 1']['weights'] == ['head1/bias', 'head1/kernel']
    check_programs(tmp_path / 'large', images, bj.inference.dense(model)(variables, images, thresholds))
    weights = tmp_path / 'large' / 'weights.safetensors'
    weights.write_bytes(weights.read_bytes()[:-4] + b'\0\0\0\1')
    with pytest.raises(ValueError, match='weights.safetensors was altered'):
        run_exported.load(tmp_path / 'large')


def change(manifest_path, **changes):
    """Alters a manifest and its own checksum."""
    manifest = json.loads(manifest_path.read_text())
    manifest.update(changes)
    manifest['sha256'] = hashlib.sha256(folder_module.canonical(manifest)).hexdigest()
    manifest_path.write_text(json.dumps(manifest))


def truncate(copy):
    path = copy / 'batch.stablehlo'
    path.write_bytes(path.read_bytes()[:-100])


def alter(copy):
    path = copy / 'stage_2.stablehlo'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def alter_manifest(copy):
    path = copy / 'manifest.json'
    path.write_text(path.read_text().replace('"entropy"', '"margin"'))


def newer_jax(copy):
    versions = {**json.loads((copy / 'manifest.json').read_text())['versions'], 'calling_convention': 999}
    change(copy / 'manifest.json', versions=versions)


def reach_out(copy):
    programs = json.loads((copy / 'manifest.json').read_text())['programs']
    programs['staged']['file'] = '../staged.stablehlo'
    change(copy / 'manifest.json', programs=programs)


def call_back(copy):
    """A program that calls a function registered in the process that loads it."""
    spec = jax.ShapeDtypeStruct((), jnp.float32)
    unsafe = jax.export.DisabledSafetyCheck.custom_call('anything')
    function = jax.jit(lambda weights, x: jax.ffi.ffi_call('anything', spec)(x))
    content = jax.export.export(function, disabled_checks=[unsafe])({}, spec).serialize()
    (copy / 'staged.stablehlo').write_bytes(content)
    programs = json.loads((copy / 'manifest.json').read_text())['programs']
    programs['staged'].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    change(copy / 'manifest.json', programs=programs)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (truncate, 'batch.stablehlo has .* truncated or altered'),
        (alter, 'stage_2.stablehlo was altered'),
        (alter_manifest, 'manifest.json was altered'),
        (lambda copy: (copy / 'manifest.json').write_text('{"format": 1'), 'missing, truncated or no manifest'),
        (lambda copy: (copy / 'exit_1.stablehlo').unlink(), 'exit_1.stablehlo is missing'),
        (lambda copy: change(copy / 'manifest.json', format=2), 'is of format 2, this reader knows 1'),
        (newer_jax, 'calling convention 999 is too new'),
        (lambda copy: change(copy / 'manifest.json', platforms=['tpu']), 'was lowered for tpu, not for cpu'),
        (reach_out, 'no name of a file within'),
        (call_back, 'more than StableHLO: anything'),
    ],
)
def test_an_altered_folder_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=f'folder: .*{message}'):
        run_exported.load(copy)


def test_reader_needs_jax_and_numpy_only(exported, network, thresholds, tmp_path):
    tree = ast.parse(READER.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split('.')[0] for module in modules} - set(sys.stdlib_module_names) == {'jax', 'numpy'}
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)).astype(np.uint8)
    expected = bj.inference.dense(network[0])(network[1], SCALE(pixels), thresholds)
    np.save(tmp_path / 'images.npy', pixels)
    np.savez(tmp_path / 'answers.npz', label=expected.label, exit_index=expected.exit_index)
    # The packages that a machine without this library would not have cannot be imported here.
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(['branchy_jax', 'flax', 'optax', 'experiments']))"
    code = f'{blocked}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    command = [
        sys.executable,
        '-c',
        code,
        READER,
        exported[0],
        f'--images={tmp_path}/images.npy',
        f'--expect={tmp_path}/answers.npz',
        '--program=parts',
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert 'exit_index: 0 of 6 differ' in result.stdout


def test_reader_reports_differences(exported, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / 'images.npy', np.zeros((2, 4, 4, 1), np.uint8))
    arguments = ['run_exported.py', str(exported[0]), f'--images={tmp_path}/images.npy', '--program=batch']
    monkeypatch.setattr(sys, 'argv', [*arguments, f'--output={tmp_path}/answers.npz'])
    run_exported.main()
    with np.load(tmp_path / 'answers.npz') as answers:
        wrong = {'label': answers['label'], 'exit_index': answers['exit_index'] + [1, 0]}
    np.savez(tmp_path / 'wrong.npz', **wrong)
    monkeypatch.setattr(sys, 'argv', [*arguments, f'--expect={tmp_path}/wrong.npz'])
    with pytest.raises(SystemExit):
        run_exported.main()
    assert 'exit_index: 1 of 2 differ' in capsys.readouterr().out


def test_failed_export_leaves_nothing(network, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(folder_module, '_described', fail)
    with pytest.raises(OSError, match='No space'):
        save(tmp_path / 'new', *network[:2], [0.0, 0.0], inputs=network[2], platforms=['cpu'])
    assert not list(tmp_path.iterdir())


class AsksForTheBatch(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (nn.Dense(3)(x.reshape(int(x.shape[0]), -1)),) * 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'policy': [0.0]}, 'thresholds: a network with 3 exits'),
        ({'exit_names': ['a', 'b']}, 'exit_names: got'),
        ({'platforms': ['gpu']}, 'platforms: got .*cpu, cuda, tpu'),
        ({'batch_size': 0}, 'batch_size: got 0'),
        ({'chunk_size': 0}, 'chunk_size: got 0'),
        ({'folder': '.'}, 'folder: .* exists'),
        ({'model': AsksForTheBatch()}, 'model: runs at the batch size of the example alone'),
    ],
)
def test_impossible_settings_are_refused(network, tmp_path, options, message):
    images, model = network[2], options.get('model', network[0])
    variables = model.init(jax.random.key(0), images)
    folder, policy = tmp_path / options.pop('folder', 'new'), options.pop('policy', [0.0, 0.0])
    with pytest.raises(ValueError, match=message):
        save(folder, **{'model': model, 'variables': variables, 'policy': policy, 'inputs': images, **options})
    assert not list(tmp_path.iterdir())
