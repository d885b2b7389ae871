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
from conftest import check_equal

import branchy_jax as bj

MNIST = os.path.join(os.environ.get('TFDS_DATA_DIR', '../shared/tfds'), 'mnist')


NORMALIZATION = bj.Normalization(mean=jnp.array([0.5]), deviation=jnp.array([0.25]))
OPTIONS = {'num_classes': 4, 'image_shape': (12, 12, 1), 'dtype': jnp.bfloat16}
CRITERIA = (bj.criteria.entropy, bj.criteria.ensemble(), bj.criteria.with_temperatures([0.3, 2]))
POINTS = [
    bj.OperatingPoint(bj.ExitPolicy(criterion, np.float32([limit])), 0.9, 'test', np.array([0.7, 0.3]), 1e5)
    for criterion, limit in zip(CRITERIA, (0.25, np.inf, -np.inf), strict=True)
]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp('weights') / 'mine', bj.models.create('b-lenet', **OPTIONS)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 1)))
    described = {'options': OPTIONS, 'card': {'licence': 'MIT', 'dataset': 'squares'}}
    settings = {'normalization': NORMALIZATION, 'operating_points': POINTS}
    bj.models.save_pretrained(folder, 'b-lenet', variables, **settings, **described)
    return folder, model, variables


def test_what_is_saved_is_loaded(written):
    folder, model, variables = written
    for weights in (bj.models.load_pretrained(folder), bj.models.load_pretrained(str(folder))):
        assert (weights.model, weights.operating_points) == (model, tuple(POINTS))
        check_equal(weights.variables, variables)
    assert repr(weights) == 'Pretrained(b-lenet on squares, 3 operating points)'
    assert (weights.card['licence'], weights.inputs.shape) == ('MIT', (1, 12, 12, 1))
    np.testing.assert_allclose(weights.normalize(np.full((1, 12, 12, 1), 255, np.uint8)), 2.0)
    assert 'license: mit' in (folder / 'README.md').read_text()
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'model.safetensors']


def test_broken_files_and_those_of_a_newer_format_are_refused(written, tmp_path):
    path = tmp_path / 'model.safetensors'
    bj.checkpoint.save_weights(path, {'a': np.ones(1)}, metadata={'format': '9'})
    with pytest.raises(ValueError, match="format '9'"):
        bj.models.load_pretrained(tmp_path)
    whole = (written[0] / 'model.safetensors').read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='path: cannot read'):
        bj.models.load_pretrained(tmp_path)


def test_unknown_weights_are_refused_with_the_known(monkeypatch):
    with pytest.raises(ValueError, match=r"no weights of 'b-lenet' on 'cats'; there are .*'b-lenet' on 'mnist'"):
        bj.models.load_pretrained('b-lenet', dataset='cats')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # a hub needs its package
    with pytest.raises(ValueError, match=r"no folder 'someone/squares'; .* pip install '.\[hub\]'"):
        bj.models.load_pretrained('someone/squares')


def test_weights_of_another_network_are_not_saved(written, tmp_path):
    save = functools.partial(bj.models.save_pretrained, tmp_path / 'new', 'b-lenet', written[2])
    with pytest.raises(ValueError, match="variables: are not those of 'b-lenet' with"):
        save(normalization=NORMALIZATION, operating_points=POINTS)
    with pytest.raises(ValueError, match='operating_points: got none'):
        save(normalization=NORMALIZATION, operating_points=[])
    with pytest.raises(ValueError, match='network: got LeNet; .* use checkpoint.save_weights and criteria.save_policy'):
        bj.models.save_pretrained(tmp_path / 'new', *written[1:], normalization=NORMALIZATION, operating_points=POINTS)
    with pytest.raises(ValueError, match="options: 'b-lenet' needs an 'image_shape'"):
        save(normalization=NORMALIZATION, operating_points=POINTS, options={'image_shape': None})
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('checksum', ['right', 'wrong', 'nothing'])
def test_what_comes_from_a_hub_is_checked(written, monkeypatch, checksum):
    """The hub is a stand-in that serves the folder and gives a right checksum, a wrong one, or none."""
    folder, asked = written[0], []
    right = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    digest = right if checksum == 'right' else 64 * '0'
    lfs = None if checksum == 'nothing' else types.SimpleNamespace(sha256=digest)

    class HfApi:
        def model_info(self, repository, *, revision, files_metadata):
            asked.append((repository, revision, files_metadata))
            siblings = [types.SimpleNamespace(rfilename='model.safetensors', lfs=lfs)]
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
    assert bj.models.load_pretrained('someone/squares', revision='v1').operating_points == tuple(POINTS)
    # The commit that the checksum belongs to is the one that is fetched.
    assert asked == [('someone/squares', 'v1', True), ('someone/squares', 'model.safetensors', 'c0ffee')]


@pytest.mark.parametrize(('network', 'dataset'), bj.models.pretrained.pretrained_names())
def test_shipped_weights_are_whole(network, dataset):
    weights = bj.models.load_pretrained(network, dataset=dataset)
    compared = weights.card['recipe'].get('criteria') or ('entropy',)
    assert weights.operating_points[0].policy.criterion in [getattr(bj.criteria, name) for name in compared]
    assert weights.operating_points[0].split == 'test'
    assert {'exit_accuracy', 'baseline_accuracy', 'recipe', 'licence', 'dataset'} <= set(weights.card)
    shapes = jax.eval_shape(weights.model.init, jax.random.key(0), weights.inputs)
    assert jax.tree.map(jnp.shape, weights.variables) == jax.tree.map(jnp.shape, shapes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights.variables))


@pytest.mark.skipif(not os.path.isdir(MNIST), reason=f'MNIST is not at {MNIST}; set TFDS_DATA_DIR')
def test_shipped_lenet_has_the_accuracy_of_its_card(monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', os.path.dirname(MNIST))
    dataset = bj.data.load_dataset('mnist')
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (60000, 10000)
    assert abs(len(dataset.validation) - 6000) < 5  # rounded per class
    np.testing.assert_allclose(dataset.normalization.mean, [0.1307], atol=5e-4)  # the published numbers
    np.testing.assert_allclose(dataset.normalization.deviation, [0.3081], atol=5e-4)
    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    table = bj.inference.exit_table(
        weights.model, weights.variables, dataset.test, preprocess=weights.normalize, batch_size=1000, split='test'
    )
    evaluated = table.evaluate(np.array([point.thresholds for point in weights.operating_points]))
    for point, accuracy, cost in zip(weights.operating_points, evaluated.accuracy, evaluated.cost, strict=True):
        assert accuracy == pytest.approx(point.accuracy, abs=5e-4)
        assert cost == pytest.approx(point.cost, rel=1e-3)
