"""Exported networks answer as the library does, and a folder that is not what was written is refused."""

import ast
import functools
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
from flax import struct
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
    return np.quantile(bj.inference.exit_outputs(*network).uncertainty[:2], 0.4, axis=1).astype(np.float32) + 1e-4


@pytest.fixture(scope='module')
def exported(network, thresholds, tmp_path_factory):
    place = tmp_path_factory.mktemp('export') / 'network'
    manifest = save(
        place, *network[:2], thresholds=thresholds, normalization=SCALE, batch_size=10, exit_names=['a', 'b', 'c']
    )
    return place, manifest


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / 'copy')
    return tmp_path / 'copy'


def answers(network, images):
    """Every way to run a folder."""
    found = {name: run(network, np.asarray(images)) for name, run in run_exported.PROGRAMS.items()}
    return {name: bj.ExitPrediction(**answer) for name, answer in found.items()}


def test_every_program_is_dense(network, exported, thresholds):
    model, variables, images = network
    loaded = run_exported.load(exported[0])
    np.testing.assert_array_equal(loaded.thresholds, thresholds)
    expected = bj.inference.dense(model)(variables, images, thresholds)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    for answer in answers(loaded, images).values():
        check_same(answer, expected)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    np.testing.assert_allclose(loaded.normalize(pixels), SCALE(pixels), rtol=1e-6, atol=1e-6)


def test_all_platforms_are_in_one_module_and_one_conditional_per_side_exit_is_left(network, exported, tmp_path):
    module = jax.export.deserialize(bytearray((exported[0] / 'staged.stablehlo').read_bytes()))
    assert module.platforms == ('cpu', 'cuda', 'tpu')
    inputs = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    compiled = jax.jit(module.call).lower({}, *inputs).compile({'xla_backend_optimization_level': 1}).as_text()
    assert len(re.findall(r' conditional\(', compiled)) == 2
    save(tmp_path / 'cpu', *network[:2], thresholds=[0.0, 0.0], platforms=['cpu'])
    alone = jax.export.deserialize(bytearray((tmp_path / 'cpu' / 'staged.stablehlo').read_bytes()))
    assert len(re.findall(r'stablehlo\.(?:case|if)\b', alone.mlir_module())) == 2


def test_cpus_run_the_forms_that_suit_them(tmp_path):
    model = bj.BranchyNet(
        stages=((nn.Conv(2, (3, 3)), bj.models.layers.flatten),), exits=(nn.Dense(3),), image_shape=(4, 4, 1)
    )
    variables = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
    save(tmp_path / 'both', model, variables, thresholds=[], platforms=['cpu', 'cuda'])
    module = jax.export.deserialize(bytearray((tmp_path / 'both' / 'staged.stablehlo').read_bytes()))
    assert 'stablehlo.convolution' in module.mlir_module()
    inputs = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((0,), jnp.float32)
    assert 'convolution' not in jax.jit(module.call).lower({}, *inputs).compile().as_text()


def test_manifest_tells_what_is_there(network, exported, thresholds):
    place, manifest = exported
    assert manifest == json.loads((place / 'manifest.json').read_text())
    assert manifest['thresholds'] == pytest.approx(thresholds.tolist())
    assert (manifest['exits'], manifest['criterion'], manifest['format']) == (['a', 'b', 'c'], 'entropy', 1)
    assert manifest['input']['shape'] == [4, 4, 1]
    assert manifest['input']['normalization']['mean'] == [0.5]
    assert manifest['versions']['jax'] == jax.__version__
    # 4 × 4 pixels, then 8 hidden values, 4 bytes each.
    assert [cut['bytes_per_image'] for cut in manifest['cuts']] == [64, 32, 32]
    parts = [f'{kind} {n}' for n in (1, 2, 3) for kind in ('stage', 'exit')]
    assert list(manifest['programs']) == ['staged', 'batch', *parts]
    described = [file for part in manifest['programs'].values() for file in (part, part['text'])]
    for file in described:
        assert hashlib.sha256((place / file['file']).read_bytes()).hexdigest() == file['sha256']
    assert {path.name for path in place.iterdir()} == {'manifest.json', *(file['file'] for file in described)}
    stage = manifest['programs']['stage 2']
    assert stage['inputs'] == [{'name': 'hidden', 'shape': ['batch', 8], 'dtype': 'float32'}]


@functools.partial(struct.dataclass, eq=False)
class SumOfExits(bj.criteria.Criterion):
    name = 'sum'

    def init(self, logits):
        return jnp.zeros_like(logits)

    def update(self, logits, carry, n):
        return carry + logits, -(carry + logits).max(-1).mean((1, 2)), carry + logits


def test_hidden_trees_dense_answers_and_criteria_that_remember(tmp_path):
    """A trunk that carries two arrays, logits for every pixel, an ensemble of the exits so far."""
    model = bj.BranchyNet(
        stages=(
            lambda image: {'wide': jnp.concatenate([image, image**2], -1), 'mean': image.mean((1, 2))},
            lambda hidden: hidden['wide'] * hidden['mean'][:, None, None],
        ),
        exits=(lambda hidden: hidden['wide'] @ jnp.eye(2, 3), (nn.Dense(3),)),
        image_shape=(4, 4, 1),
    )
    images = np.random.default_rng(0).normal(size=(9, 4, 4, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    outputs = bj.inference.exit_outputs(model, variables, images, criterion=SumOfExits())
    policy = bj.ExitPolicy(SumOfExits(), jnp.array([np.median(outputs.uncertainty[0]) + 1e-4]))
    manifest = save(tmp_path / 'tree', model, variables, thresholds=policy, batch_size=4)
    expected = bj.inference.dense(model)(variables, images, policy)
    assert set(expected.exit_index.tolist()) == {0, 1}
    assert expected.label.shape == (9, 4, 4)
    for answer in answers(run_exported.load(tmp_path / 'tree'), images).values():
        check_same(answer, expected)
    # 16 pixels of two channels, one mean, and what the criterion remembers: 16 pixels of three classes.
    assert manifest['cuts'][1]['bytes_per_image'] == 4 * (16 * 2 + 1 + 16 * 3)


def test_large_weights_lie_beside(network, thresholds, tmp_path, monkeypatch):
    model, variables, images = network
    monkeypatch.setattr(programs_module, '_MOST_EMBEDDED_BYTES', 0)
    manifest = save(tmp_path / 'large', model, variables, thresholds=thresholds, batch_size=10)
    assert manifest['programs']['exit 1']['weights'] == ['exit1/constant0', 'exit1/constant1']
    expected = bj.inference.dense(model)(variables, images, thresholds)
    for answer in answers(run_exported.load(tmp_path / 'large'), images).values():
        check_same(answer, expected)
    weights = tmp_path / 'large' / 'weights.safetensors'
    weights.write_bytes(weights.read_bytes()[:-4] + b'\0\0\0\1')
    with pytest.raises(ValueError, match='weights.safetensors was altered'):
        run_exported.load(tmp_path / 'large')


def change(manifest_path, **changes):
    """Alters a manifest as one would who knows how it vouches for itself."""
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
def test_what_was_not_written_so_is_refused(copy, damage, message):
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


def test_reader_tells_what_differs(exported, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / 'images.npy', np.zeros((2, 4, 4, 1), np.uint8))
    arguments = ['run_exported.py', str(exported[0]), f'--images={tmp_path}/images.npy', '--program=batch']
    monkeypatch.setattr(sys, 'argv', [*arguments, f'--output={tmp_path}/answers.npz'])
    run_exported.main()
    with np.load(tmp_path / 'answers.npz') as found:
        wrong = {'label': found['label'], 'exit_index': found['exit_index'] + [1, 0]}
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
        save(tmp_path / 'new', *network[:2], thresholds=[0.0, 0.0], platforms=['cpu'])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'thresholds': [0.0]}, 'thresholds: a network with 3 exits'),
        ({'exit_names': ['a', 'b']}, 'exit_names: got'),
        ({'platforms': ['gpu']}, 'platforms: got .*cpu, cuda, tpu'),
        ({'batch_size': 0}, 'batch_size: got 0'),
        ({'chunk_size': 0}, 'chunk_size: got 0'),
    ],
)
def test_impossible_settings_are_refused(network, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / 'new', *network[:2], **{'thresholds': [0.0, 0.0], **options})
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(network, tmp_path):
    with pytest.raises(ValueError, match='folder: .* exists'):
        save(tmp_path, *network[:2], thresholds=[0.0, 0.0])
    with pytest.raises(ValueError, match='model: has no image_shape'):
        save(tmp_path / 'new', network[0].clone(image_shape=None), network[1], thresholds=[0.0, 0.0])
