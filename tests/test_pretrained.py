"""Published weights: what is written is what is read, and what ships does what its card says."""

import os

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
    found = read_pretrained(path)
    assert found.model == model
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.card['licence'] == 'Apache-2.0'
    for point, expected in zip(found.operating_points, points, strict=True):
        assert point == expected
    np.testing.assert_allclose(found.normalize(np.full((1, 12, 12, 1), 255, np.uint8)), 2.0)


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


@pytest.mark.parametrize(('network', 'dataset'), bj.models.pretrained_names())
def test_shipped_weights_are_whole(network, dataset):
    weights = bj.models.load_pretrained(network, dataset=dataset)
    assert weights.operating_points[0].policy.criterion == bj.criteria.entropy
    assert weights.operating_points[0].split == 'test'
    assert {'exit_accuracy', 'baseline_accuracy', 'recipe', 'licence', 'dataset'} <= set(weights.card)
    images = np.zeros((2, *weights.model.image_shape), np.uint8)
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
        weights.model, weights.variables, test, prepare=weights.normalization, batch_size=1000, split='test'
    )
    found = table.evaluate(np.array([point.thresholds for point in weights.operating_points]))
    for point, accuracy, cost in zip(weights.operating_points, found.accuracy, found.cost, strict=True):
        assert accuracy == pytest.approx(point.accuracy, abs=5e-4)
        assert cost == pytest.approx(point.cost, rel=1e-3)
