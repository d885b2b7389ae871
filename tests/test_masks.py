"""Dense prediction: answers and metrics of pixels against brute force, canvases, and masks in a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax import criteria, thresholds


def test_a_mosaic_is_built_pixel_by_pixel():
    """The first exit whose entropy is below its threshold answers a pixel, else the last."""
    logits = np.random.default_rng(0).normal(0, 2, (3, 2, 3, 4, 3)).astype(np.float32)
    entropy = np.asarray(criteria.entropy.uncertainty_of(jnp.asarray(logits)))
    for limits in ([0.7, 0.6], [0.0, 0.9], [1.2, 0.3]):
        criterion = criteria.pixelwise(limits)
        answers, uncertainty = criteria.replay(criterion, logits)
        exits = np.full((2, 3, 4), 2)
        for n in (1, 0):
            exits[entropy[n] < np.float32(limits[n])] = n
        np.testing.assert_array_equal(criterion.pixel_exits(jnp.asarray(logits)), exits)
        np.testing.assert_array_equal(answers[2], np.take_along_axis(logits, exits[None, ..., None], axis=0)[0])
        for n in range(2):
            np.testing.assert_allclose(uncertainty[n], (exits > n).reshape(2, -1).mean(-1), rtol=1e-6)
    with pytest.raises(ValueError, match='criterion: .* for 3 exits, not for 2'):
        criterion.pixel_exits(jnp.asarray(logits[:2]))


def test_mean_iou_is_that_of_all_pixels_together():
    """Not the mean of the images' own IoU. Class 3, which is nowhere, does not count. Screens use the same metric."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 6, 5, 4, 4)).astype(np.float32), generator.integers(0, 3, (6, 5, 4))
    logits[..., 3] = -9
    statistics = jax.jit(thresholds.iou_statistics)(logits, labels)
    costs = bj.costs.StageCosts(np.ones(3), np.zeros(3))
    columns = {'uncertainty': generator.uniform(size=(3, 6)), 'statistics': statistics, 'costs': costs}
    table = thresholds.ExitTable(**columns, criterion=criteria.entropy, metric=thresholds.mean_iou, split='validation')
    screened = table.screen(np.array([[-np.inf, 0.3, 0.6, np.inf]] * 2))
    for setting, accuracy in zip(screened.thresholds, screened.accuracy, strict=True):
        answers = logits.argmax(-1)[table.answering_exits(setting), np.arange(6)]
        pairs = [(answers == k, labels == k) for k in range(3)]
        assert accuracy == pytest.approx(
            np.mean([(ours & truth).sum() / (ours | truth).sum() for ours, truth in pairs])
        )
    for bad, message in ((labels[:, :4], 'labels: answers have shape'), (labels + 2, 'labels: expected classes')):
        with pytest.raises(ValueError, match=message):
            thresholds.iou_statistics(logits, bad)


@pytest.fixture(scope='module')
def digits():
    """Digits of one brightness each, so that a pixel tells which digit it came from."""

    def split(first, count):
        images = np.zeros((count, 6, 6, 1), np.uint8)
        images[:, 1:5, 2:4] = (100 + first + np.arange(count))[:, None, None, None]
        return bj.Batch(images, np.arange(count, dtype=np.int32) % 3)

    parts = {'train': split(0, 40), 'validation': split(40, 20), 'test': split(60, 20)}
    normalization = bj.data.fit_normalization(parts['train'].image)
    return bj.data.Dataset(name='bars', **parts, num_classes=3, normalization=normalization)


def test_canvases_keep_their_splits_apart_and_label_every_bright_pixel(digits):
    canvases = bj.data.digit_canvases(digits, side=12, most_clutter=0, seed=4)
    assert canvases.num_classes == 4
    for split, low, high in (('train', 100, 140), ('validation', 140, 160), ('test', 160, 180)):
        image, mask = getattr(canvases, split).image[..., 0], getattr(canvases, split).label
        assert image.shape == mask.shape == (len(getattr(digits, split).label), 12, 12)
        assert ((image > 0) == (mask > 0)).all()
        assert set(np.unique(image)) - {0} <= set(range(low, high))
        alone = (mask > 0).sum(axis=(1, 2)) == 8  # one digit: its class is its own
        np.testing.assert_array_equal(mask.max((1, 2))[alone], (image.max((1, 2))[alone].astype(int) - low) % 3 + 1)
        assert 0 < alone.mean() < 1
    again, other = (bj.data.digit_canvases(digits, side=12, most_clutter=0, seed=s).train.image for s in (4, 2))
    np.testing.assert_array_equal(canvases.train.image, again)
    assert (again != other).any()
    for options in ({'side': 5}, {'most_digits': 0}, {'most_clutter': -1}):
        with pytest.raises(ValueError, match='side: got 5|most_digits: got'):
            bj.data.digit_canvases(digits, **options)


def test_npz_may_hold_masks_of_the_images_size(tmp_path):
    images, masks = np.random.default_rng(0).integers(0, 3, (2, 20, 6, 5)).astype(np.uint8)
    arrays = {'x_train': images[:15], 'y_train': masks[:15], 'x_test': images[15:], 'y_test': masks[15:]}
    np.savez(tmp_path / 'own.npz', **arrays)
    loaded = bj.data.load_dataset(str(tmp_path / 'own.npz'), validation_fraction=0.2)
    assert (loaded.num_classes, len(loaded.train), len(loaded.validation)) == (3, 12, 3)
    pairs = {image.tobytes(): mask for image, mask in zip(images, masks, strict=True)}
    for image, mask in zip(loaded.train.image, loaded.train.label, strict=True):
        np.testing.assert_array_equal(pairs[image.tobytes()], mask)
    np.savez(tmp_path / 'bad.npz', **{**arrays, 'y_train': masks[:15, :5]})
    with pytest.raises(ValueError, match=r'train.* masks \(15, 6, 5\)'):
        bj.data.load_dataset(str(tmp_path / 'bad.npz'))
