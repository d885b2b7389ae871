"""Data on disk gives the batches of data in memory, from any step on, and only a few of them are in memory."""

import io
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import branchy_jax as bj
from branchy_jax.data import OnDisk, load_dataset
from branchy_jax.training import create_train_state, fit

BATCH, SIZE = 16, 32


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(file, 'PNG')
    return file.getvalue()


def write_dataset(folder, name, images, labels, splits=('train', 'test'), supervised_keys=('image', 'label')):
    """Writes a TFDS data set of array_record files, as TFDS would, without TensorFlow; labels may be masks."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    place = folder / name / '1.0.0'
    place.mkdir(parents=True)
    shape = images[0].shape if len({image.shape for image in images}) == 1 else (None, None, 1)
    dense = np.ndim(labels[0]) > 0
    label_key = 'segmentation_mask' if dense else 'label'
    label = tfds.features.Image(shape=(None, None, 1)) if dense else tfds.features.Scalar(np.int64)
    features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=shape), label_key: label})
    serializer, infos, first = ExampleSerializer(features.get_serialized_info()), [], len(images) * 9 // 10
    for split, rows in zip(splits, (range(first), range(first, len(images))), strict=True):
        names = {'dataset_name': name, 'split': split, 'filetype_suffix': 'array_record', 'data_dir': place}
        template = tfds.core.ShardedFileTemplate(**names)
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), 'group_size:1')
        for row in rows:
            label = png(labels[row]) if dense else int(labels[row])
            writer.write(serializer.serialize_example({'image': png(images[row]), label_key: label}))
        writer.close()
        infos.append(tfds.core.SplitInfo(split, [len(rows)], num_bytes=0, filename_template=template))
    options = {'supervised_keys': supervised_keys, 'check_data': False}
    tfds.folder_dataset.write_metadata(data_dir=place, features=features, split_infos=infos, **options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp('tfds'), np.random.default_rng(0)
    patterns = generator.integers(0, 256, (500, SIZE, SIZE, 1)).astype(np.uint8)
    write_dataset(folder, 'patterns', patterns, generator.integers(0, 3, 500))
    sizes = [generator.integers(0, 256, (size, 9, 1)).astype(np.uint8) for size in (7, 8) * 20]
    write_dataset(folder, 'uneven', sizes, np.arange(40) % 3)
    rows = [np.repeat([1, 3, 2], [2, 2, len(image) - 4]).astype(np.uint8) for image in sizes]
    masks = [column[:, None, None].repeat(9, 1) for column in rows]
    write_dataset(folder, 'pets', sizes, masks, supervised_keys=None)
    write_dataset(folder, 'secret', sizes, np.where(np.arange(40) < 36, np.arange(40) % 3, -1))
    write_dataset(folder, 'untested', sizes, np.arange(40) % 3, splits=('train', 'validation'))
    write_dataset(folder, 'unlabelled', sizes, np.arange(40) % 3, supervised_keys=('label', 'label'))
    small = [np.zeros((6, 5, 1), np.uint8)] * 36
    write_dataset(folder, 'unlike', small + [image[:, :4] for image in small[:4]], np.arange(40) % 3)
    return folder


@pytest.fixture(autouse=True)
def _places(monkeypatch, folder):
    monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
    monkeypatch.setenv('BRANCHY_JAX_CACHE', str(folder / 'cache'))


@pytest.fixture
def on_disk():
    return load_dataset('patterns', in_memory=False, validation_fraction=0.2, seed=3)


@pytest.fixture
def in_memory():
    return load_dataset('patterns', validation_fraction=0.2, seed=3)


@pytest.fixture
def order():
    """The batches of an epoch."""
    return np.random.default_rng(5).permutation(360)[: 22 * BATCH].reshape(-1, BATCH)


def check_batches(batches, data, order):
    for batch, rows in zip(batches, order, strict=True):
        chex.assert_trees_all_equal(batch, bj.Batch(data.image[rows], data.label[rows]), strict=True)


def test_batches_from_disk_are_those_in_memory(on_disk, in_memory, order):
    """Whole epochs, from the middle of one, and the part of one of several hosts; splits and normalisation, too."""
    assert isinstance(on_disk.train, OnDisk)
    assert len(on_disk.train) == len(in_memory.train) == 360
    chex.assert_trees_all_equal(on_disk.replace(train=in_memory.train), in_memory)
    check_batches(on_disk.train.batches(order), in_memory.train, order)
    check_batches(on_disk.train.batches(order, 9), in_memory.train, order[9:])
    check_batches(on_disk.train.batches(order[:, 4:8]), in_memory.train, order[:, 4:8])


def test_same_batches_from_several_workers(in_memory, order):
    on_disk = load_dataset('patterns', in_memory=False, validation_fraction=0.2, seed=3, workers=2, prefetch=2)
    check_batches(on_disk.train.batches(order[:5]), in_memory.train, order[:5])


def test_training_resumes_in_the_middle_of_an_epoch(network, on_disk, in_memory, tmp_path):
    model, variables, _ = network

    def augment(key, batch):
        return batch.replace(image=batch.image[:, :4, :4].astype(jnp.float32) / 255)

    def train(data, **options):
        state = create_train_state(model, variables, optax.sgd(0.1))
        options = {'epochs': 2, 'batch_size': BATCH, 'augment': augment, **options}
        return fit(state, data, jnp.ones(3), jax.random.key(5), **options)

    def die(epoch, done, steps, metrics):
        if (epoch, done) == (1, 8):
            raise KeyboardInterrupt

    options, steps = {'directory': tmp_path, 'save_every': 5}, []
    with pytest.raises(KeyboardInterrupt):
        train(on_disk.train, on_step=die, **options)
    resumed = train(on_disk.train, on_step=lambda *step: steps.append(step[:3]), **options)
    assert (steps[0], steps[-1]) == ((1, 9, 22), (1, 22, 22))  # step 30 was saved and is the 8th of the second epoch
    chex.assert_trees_all_close(resumed.variables, train(in_memory.train).variables, rtol=1e-5, atol=1e-6)


def test_images_stay_on_disk(on_disk, order):
    examples = on_disk.train
    list(examples.batches(order[:1]))  # imports
    tracemalloc.start()
    for _ in examples.batches(order):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.6 * len(examples) * SIZE * SIZE  # a few batches with what decoding needs, not the whole set


def check_same(name, **options):
    """Loads a data set from disk and into memory, twice so that the second time reads the cache, and compares all."""
    for _ in range(2):
        on_disk, in_memory = (load_dataset(name, in_memory=memory, **options) for memory in (False, True))
        everything = on_disk.replace(train=on_disk.train.read(np.arange(len(on_disk.train))))
        chex.assert_trees_all_equal(everything, in_memory)  # compares name and number of classes, too
        chex.assert_trees_all_equal_dtypes(everything, in_memory)
    return on_disk, in_memory


def test_images_of_different_sizes_are_refused_or_resized():
    for memory in (True, False):
        with pytest.raises(ValueError, match=r'image_size: images of uneven/1.0.0, train differ in size'):
            load_dataset('uneven', in_memory=memory)
    on_disk, _ = check_same('uneven', image_size=(12, 5), validation_fraction=0.5)
    assert on_disk.image_shape == (12, 5, 1)


def test_masks_are_resized_with_their_images_and_count_from_0():
    on_disk, in_memory = check_same('pets', task='segmentation', image_size=(12, 16), validation_fraction=0.25)
    assert (on_disk.num_classes, len(on_disk.train), on_disk.image_shape) == (3, 27, (12, 16, 1))
    assert in_memory.train.label.shape == (27, 12, 16)
    assert in_memory.train.label.dtype == np.uint8
    masks = np.concatenate([in_memory.train.label, in_memory.validation.label, in_memory.test.label])
    assert np.unique(masks).tolist() == [0, 1, 2]  # resizing invented no class
    seven, eight = ([0] * 3 + [2] * 4 + [1] * 5, [0] * 3 + [2] * 3 + [1] * 6)  # rows of 7 and of 8 become 12
    assert {tuple(mask) for mask in masks[:, :, 0].tolist()} == {tuple(seven), tuple(eight)}
    assert (masks == masks[:, :, :1]).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'name': 'secret', 'image_size': (6, 5)}, 'name: secret/1.0.0 holds labels from -1 to 2'),
        ({'name': 'unlike'}, r'name: each image of unlike has shape \(6, 5, 1\) in train and \(6, 4, 1\)'),
        (
            {'name': 'untested'},
            'name: .untested. is not .* nonempty train and test splits',
        ),
        ({'name': 'unlabelled'}, 'name: .unlabelled. is not an image classification data set'),
        ({'name': 'pets'}, 'name: .pets. is not an image classification data set'),
        ({'task': 'segmentation'}, 'name: .patterns. is not an image segmentation data set'),
        ({'validation_fraction': 0.001}, 'validation_fraction: 0.001 of 450 leaves a split empty'),
    ],
)
def test_data_sets_of_another_kind_are_refused(options, message, folder):
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=message):
            load_dataset(**{'name': 'patterns', 'in_memory': in_memory, **options})


def test_canvases_are_made_of_digits_in_memory(on_disk):
    with pytest.raises(ValueError, match='digits: their training images are on disk'):
        bj.data.digit_canvases(on_disk)
