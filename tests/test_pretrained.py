"""Published weights: what is written is what is read, and what ships does what its card says."""

import functools
import hashlib
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.models.pretrained import read_pretrained, write_pretrained

MNIST = os.path.join(os.environ.get('TFDS_DATA_DIR', '../shared/tfds'), 'mnist')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'b-lenet@squares.safetensors'
    options = {'num_classes': 4, 'image_shape': [12, 12, 1]}
    model = bj.models.create('b-lenet', num_classes=4, image_shape=(12, 12, 1))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 12, 12, 1)))
    points = [
        bj.OperatingPoint(
            bj.ExitPolicy(bj.criteria.entropy, np.float32([0.25])), 0.9, 'test', np.array([0.7, 0.3]), 1e5
        ),
        bj.OperatingPoint(
            bj.ExitPolicy(bj.criteria.ensemble(), np.float32([np.inf])), 0.8, 'test', np.array([1.0, 0.0]), 9e4
        ),
        bj.OperatingPoint(
            bj.ExitPolicy(bj.criteria.with_temperatures([0.3, 2]), np.float32([-np.inf])),
            0.95,
            'test',
            np.array([0.0, 1.0]),
            9e5,
        ),
    ]
    normalization = bj.Normalization(mean=jnp.array([0.5]), deviation=jnp.array([0.25]))
    write_pretrained(path, 'b-lenet', options, variables, normalization, points, {'licence': 'Apache-2.0'})
    return path, model, variables, points


def test_what_is_written_is_read(written):
    path, model, variables, points = written
    weights = read_pretrained(path)
    assert weights.model == model
    jax.tree.map(np.testing.assert_array_equal, weights.variables, variables)
    assert weights.card['licence'] == 'Apache-2.0'
    for point, expected in zip(weights.operating_points, points, strict=True):
        assert point == expected
    np.testing.assert_allclose(weights.normalize(np.full((1, 12, 12, 1), 255, np.uint8)), 2.0)


def test_files_of_a_newer_format_are_refused(tmp_path):
    bj.checkpoint.save_weights(tmp_path / 'new.safetensors', {'a': np.ones(1)}, metadata={'format': '9'})
    with pytest.raises(ValueError, match="format '9'"):
        read_pretrained(tmp_path / 'new.safetensors')


def test_truncated_files_are_refused(written, tmp_path):
    whole = written[0].read_bytes()
    (tmp_path / 'half.safetensors').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='path: cannot read'):
        read_pretrained(tmp_path / 'half.safetensors')


def test_unknown_weights_are_refused_with_the_known():
    with pytest.raises(ValueError, match=r"no weights of 'b-lenet' on 'cats'; there are .*'b-lenet' on 'mnist'"):
        bj.models.load_pretrained('b-lenet', dataset='cats')


@pytest.fixture
def folder(written, tmp_path):
    _, _, variables, points = written
    normalization = bj.Normalization(mean=jnp.array([0.5]), deviation=jnp.array([0.25]))
    bj.models.save_pretrained(
        tmp_path / 'mine',
        'b-lenet',
        variables,
        normalization=normalization,
        operating_points=points,
        options={'num_classes': 4, 'image_shape': (12, 12, 1)},
        card={'licence': 'MIT', 'dataset': 'squares'},
    )
    return tmp_path / 'mine'


def test_a_folder_is_saved_and_loaded(written, folder):
    _, model, variables, points = written
    for weights in (bj.models.load_pretrained(folder), bj.models.load_pretrained(str(folder))):
        assert (weights.model, weights.operating_points) == (model, tuple(points))
        jax.tree.map(np.testing.assert_array_equal, weights.variables, variables)
    assert 'license: mit' in (folder / 'README.md').read_text()
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'model.safetensors']


def test_weights_of_another_network_are_not_saved(written, tmp_path):
    _, _, variables, points = written
    normalization = bj.Normalization(mean=jnp.array([0.5]), deviation=jnp.array([0.25]))
    save = functools.partial(
        bj.models.save_pretrained, tmp_path / 'new', 'b-lenet', variables, normalization=normalization
    )
    with pytest.raises(ValueError, match="variables: are not those of 'b-lenet' with"):
        save(operating_points=points)
    with pytest.raises(ValueError, match='operating_points: got none'):
        save(operating_points=[])
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('checksum', ['right', 'wrong', 'nothing'])
def test_what_comes_from_a_hub_is_checked(written, folder, monkeypatch, checksum):
    """The hub is a stand-in that serves the folder and gives a right checksum, a wrong one, or none."""
    right = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    lfs = {
        'right': types.SimpleNamespace(sha256=right),
        'wrong': types.SimpleNamespace(sha256=64 * '0'),
        'nothing': None,
    }
    asked = []

    class HfApi:
        def model_info(self, repository, *, revision, files_metadata):
            asked.append((repository, revision, files_metadata))
            siblings = [types.SimpleNamespace(rfilename='model.safetensors', lfs=lfs[checksum])]
            return types.SimpleNamespace(sha='c0ffee', siblings=siblings)

    def hf_hub_download(repository, name, *, revision):
        asked.append((repository, name, revision))
        return str(folder / name)

    hub = types.SimpleNamespace(HfApi=HfApi, hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    if checksum != 'right':
        with pytest.raises(ValueError, match='SHA-256' if checksum == 'wrong' else 'with a checksum'):
            bj.models.load_pretrained('someone/squares', revision='v1')
        return
    assert bj.models.load_pretrained('someone/squares', revision='v1').operating_points == tuple(written[3])
    # The commit that the checksum belongs to is the one that is fetched.
    assert asked == [('someone/squares', 'v1', True), ('someone/squares', 'model.safetensors', 'c0ffee')]


def test_a_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r"pip install 'branchy_jax\[hub\]'"):
        bj.models.load_pretrained('someone/squares')


@pytest.mark.parametrize(('network', 'dataset'), bj.models.pretrained_names())
def test_shipped_weights_are_whole(network, dataset):
    weights = bj.models.load_pretrained(network, dataset=dataset)
    assert weights.operating_points[0].policy.criterion == bj.criteria.entropy
    assert weights.operating_points[0].split == 'test'
    assert {'exit_accuracy', 'baseline_accuracy', 'recipe', 'licence', 'dataset'} <= set(weights.card)
    images = np.zeros((2, *weights.inputs.shape[1:]), np.uint8)
    answer = bj.inference.dense(weights.model)(
        weights.variables, weights.normalize(images), weights.operating_points[0]
    )
    assert np.isfinite(answer.logits).all()


@pytest.mark.skipif(not os.path.isdir(MNIST), reason=f'MNIST is not at {MNIST}; set TFDS_DATA_DIR')
def test_shipped_lenet_has_the_accuracy_of_its_card(monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', os.path.dirname(MNIST))
    test = bj.data.load_dataset('mnist').test
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    table = bj.inference.exit_table(
        weights.model, weights.variables, test, preprocess=weights.normalize, batch_size=1000, split='test'
    )
    evaluated = table.evaluate(np.array([point.thresholds for point in weights.operating_points]))
    for point, accuracy, cost in zip(weights.operating_points, evaluated.accuracy, evaluated.cost, strict=True):
        assert accuracy == pytest.approx(point.accuracy, abs=5e-4)
        assert cost == pytest.approx(point.cost, rel=1e-3)
