"""Data that stays on disk gives the batches of data in memory, from any step on, without holding more than a few."""

import io
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import branchy_jax as bj
from branchy_jax.streaming import open_dataset
from branchy_jax.training import create_train_state, epoch_order, fit

BATCH, SIZE = 16, 32
OPTIMIZER = optax.sgd(0.1)


def write_dataset(folder, name, images, labels):
    """Writes a TFDS data set of array_record files, as TFDS would, without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    place = folder / name / '1.0.0'
    place.mkdir(parents=True)
    shape = images[0].shape if len({image.shape for image in images}) == 1 else (None, None, 1)
    features = tfds.features.FeaturesDict(
        {'image': tfds.features.Image(shape=shape), 'label': tfds.features.ClassLabel(num_classes=3)}
    )
    serializer, splits, first = ExampleSerializer(features.get_serialized_info()), [], len(images) * 9 // 10
    for split, rows in {'train': range(first), 'test': range(first, len(images))}.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=name, split=split, filetype_suffix='array_record', data_dir=place
        )
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), 'group_size:1')
        for row in rows:
            png = io.BytesIO()
            Image.fromarray(images[row][..., 0]).save(png, 'PNG')
            writer.write(serializer.serialize_example({'image': png.getvalue(), 'label': int(labels[row])}))
        writer.close()
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[len(rows)], num_bytes=0, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=place, features=features, split_infos=splits, supervised_keys=('image', 'label'), check_data=False
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp('tfds'), np.random.default_rng(0)
    write_dataset(
        folder, 'patterns', generator.integers(0, 256, (500, SIZE, SIZE, 1)).astype(np.uint8),
        generator.integers(0, 3, 500),
    )  # fmt: skip
    sizes = [generator.integers(0, 256, (size, 9, 1)).astype(np.uint8) for size in (7, 8) * 20]
    write_dataset(folder, 'uneven', sizes, np.arange(40) % 3)
    return folder


@pytest.fixture(autouse=True)
def _places(monkeypatch, folder):
    monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
    monkeypatch.setenv('BRANCHY_JAX_CACHE', str(folder / 'cache'))


@pytest.fixture
def streamed():
    return open_dataset('patterns', validation_fraction=0.2, seed=3)


@pytest.fixture
def in_memory():
    return bj.data.load_dataset('patterns', validation_fraction=0.2, seed=3)


def check_batches(found, data, order):
    steps = 0
    for batch, rows in zip(found, order, strict=True):
        np.testing.assert_array_equal(batch.image, data.image[rows])
        np.testing.assert_array_equal(batch.label, data.label[rows])
        assert (batch.image.dtype, batch.label.dtype) == (data.image.dtype, data.label.dtype)
        steps += 1
    assert steps == len(order)


def orders(count, epochs=2):
    return [np.asarray(epoch_order(jax.random.key(5), epoch, count, BATCH)) for epoch in range(epochs)]


def test_same_splits_and_normalisation(streamed, in_memory):
    assert len(streamed.train) == len(in_memory.train) == 360
    assert (streamed.num_classes, streamed.image_shape) == (in_memory.num_classes, in_memory.image_shape)
    for split in ('validation', 'test'):
        jax.tree.map(np.testing.assert_array_equal, getattr(streamed, split), getattr(in_memory, split))
    jax.tree.map(np.testing.assert_array_equal, streamed.normalization, in_memory.normalization)


def test_same_batches_for_the_same_seed(streamed, in_memory):
    first, second = orders(len(streamed.train))
    assert (first != second).any()
    for order in (first, second):
        check_batches(streamed.train.batches(order), in_memory.train, order)


def test_same_batches_from_the_middle_of_an_epoch_and_for_one_of_several_hosts(streamed, in_memory):
    order, _ = orders(len(streamed.train))
    check_batches(streamed.train.batches(order, 9), in_memory.train, order[9:])
    share = order[:, 4:8]
    check_batches(streamed.train.batches(share), in_memory.train, share)


def test_same_batches_from_several_workers(in_memory):
    streamed = open_dataset('patterns', validation_fraction=0.2, seed=3, workers=2, prefetch=2)
    order, _ = orders(len(streamed.train))
    check_batches(streamed.train.batches(order[:5]), in_memory.train, order[:5])


def prepare(key, batch):
    return batch.replace(image=batch.image[:, :4, :4].astype(jnp.float32) / 255)


def train(fit, network, data, **options):
    model, variables, _ = network
    return fit(
        create_train_state(model, variables, OPTIMIZER), data, jnp.ones(3), jax.random.key(5), epochs=2,
        prepare=prepare, **{'batch_size': BATCH, **options},
    )  # fmt: skip


def check_same_state(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.variables,
                 expected.variables)  # fmt: skip
    assert int(found.step) == int(expected.step) == 2 * 22


class Killed(Exception):
    pass


def test_training_resumes_in_the_middle_of_an_epoch(network, streamed, in_memory, tmp_path):
    expected = train(fit, network, in_memory.train)
    check_same_state(train(fit, network, streamed.train), expected)

    def die(epoch, done, steps, metrics):
        if (epoch, done) == (1, 8):
            raise Killed

    options, seen = {'directory': tmp_path / 'run', 'save_every': 5}, []
    with pytest.raises(Killed):
        train(fit, network, streamed.train, on_step=die, **options)
    resumed = train(fit, network, streamed.train, on_step=lambda *found: seen.append(found[:3]), **options)
    assert seen[0] == (1, 9, 22)  # step 30 was saved and is the 8th of the second epoch
    check_same_state(resumed, expected)
    again = train(fit, network, streamed.train, on_step=lambda *found: pytest.fail('trained on'), **options)
    check_same_state(again, expected)


def test_images_stay_on_disk(streamed):
    order, _ = orders(len(streamed.train))
    examples = streamed.train
    for _ in examples.batches(order[:1]):  # imports
        pass
    tracemalloc.start()
    for _ in examples.batches(order):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.6 * len(examples) * SIZE * SIZE  # a few batches with what decoding needs, not the whole set


def test_images_of_different_sizes_need_a_transform():
    with pytest.raises(ValueError, match=r'transform: images of train differ in size'):
        open_dataset('uneven')
    cut = open_dataset('uneven', transform=lambda image: image[:6, :6], validation_fraction=0.5)
    assert cut.image_shape == (6, 6, 1)
    assert cut.test.image.shape == (4, 6, 6, 1)
    with pytest.raises(ValueError, match='transform: images must be uint8'):
        open_dataset('uneven', transform=lambda image: image[:6, :6] / 255)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'name': 'pattern'}, 'name: unknown data set'),
        ({'validation_fraction': 1.0}, 'validation_fraction: expected a share'),
        ({'workers': -1}, 'workers, prefetch: got -1 and 4'),
        ({'prefetch': 0}, 'workers, prefetch: got 0 and 0'),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(**{'name': 'patterns', **options})


def test_impossible_batches_are_refused(network, streamed):
    with pytest.raises(ValueError, match='batch_size: got 1000'):
        train(fit, network, streamed.train, batch_size=1000)
    with pytest.raises(ValueError, match='save_every: got 0'):
        train(fit, network, streamed.train, save_every=0)
