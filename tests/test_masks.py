"""Dense prediction: pools, pixelwise answers, statistics of masks, and canvases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax import criteria, thresholds


def pooled(values, **options):
    """Pools ``[B, H, W]`` as a criterion does whose uncertainty these values are."""
    criterion = criteria.as_criterion(lambda logits: logits[..., 0], **options)
    return criterion(jnp.asarray(values)[..., None], None, 0)[1]


def test_pools_are_their_numpy_references(getkey):
    values = jax.random.uniform(getkey(), (3, 5, 7))
    flat = np.asarray(values, np.float64).reshape(3, -1)
    np.testing.assert_allclose(pooled(values), flat.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(pooled(values, quantile=0.9), np.quantile(flat, 0.9, axis=-1), rtol=1e-5)
    patches = [[np.asarray(image)[r : r + 3, c : c + 3].mean() for r in (0, 3) for c in (0, 3, 6)] for image in values]
    found = pooled(values, quantile=0.75, patch=3)
    np.testing.assert_allclose(found, np.quantile(patches, 0.75, axis=-1), rtol=1e-5)


def test_a_lone_uncertain_pixel_does_not_make_an_uncertain_patch():
    edge, blob = np.zeros((2, 1, 8, 8))
    edge[0, 0, ::3], blob[0, :4, :4] = 1, 1
    assert pooled(blob, quantile=1.0, patch=4)[0] == 1
    assert pooled(edge, quantile=1.0, patch=4)[0] == 0.125
    assert pooled(edge, quantile=1.0)[0] == 1


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: pooled(jnp.ones((1, 2, 2)), quantile=1.5), 'quantile: got 1.5'),
        (lambda: pooled(jnp.ones((1, 2, 2)), patch=0), 'stride and patch: got 1 and 0'),
        (lambda: pooled(jnp.ones(3), patch=2), r'logits: got shape .* need \[B, H, W, K\]'),
        (lambda: criteria.as_criterion(criteria.entropy, stride=0), 'stride and patch: got 0'),
        (lambda: criteria.pixelwise([[0.1]]), 'pixel_thresholds: expected one number'),
        (lambda: criteria.pixelwise([np.nan]), 'pixel_thresholds'),
        (
            lambda: criteria.replay(criteria.pixelwise([]), jnp.ones((2, 1, 2, 2))),
            'criterion: .* for 1 exits, not for 2',
        ),
        (lambda: criteria.pixelwise([0.1]).pixel_exits(jnp.ones((3, 1, 2, 2))), 'pixel_thresholds: got 1 for 3 exits'),
    ],
)
def test_impossible_pools_and_pixels_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@given(st.integers(0, 10_000), st.lists(st.floats(0, 1.2), min_size=2, max_size=2))
def test_mosaic_is_built_pixel_by_pixel(seed, limits):
    """Brute force over pixels: the first exit whose entropy is below its threshold answers, else the last."""
    logits = np.random.default_rng(seed).normal(0, 2, (3, 2, 3, 4, 3)).astype(np.float32)
    criterion = criteria.pixelwise(limits)
    answers, uncertainty = criteria.replay(criterion, logits)
    entropy = np.asarray(criteria.entropy.uncertainty_of(jnp.asarray(logits)))
    exits = np.full((2, 3, 4), 2)
    for n in (1, 0):
        exits[entropy[n] < np.float32(limits[n])] = n
    np.testing.assert_array_equal(criterion.pixel_exits(jnp.asarray(logits)), exits)
    expected = np.take_along_axis(logits, exits[None, ..., None], axis=0)[0]
    np.testing.assert_array_equal(answers[2], expected)
    for n in range(2):
        np.testing.assert_allclose(uncertainty[n], (exits > n).reshape(2, -1).mean(-1), rtol=1e-6)


def brute_force_iou(predictions, labels, classes):
    values = []
    for k in range(classes):
        ours, theirs = predictions == k, labels == k
        union = (ours | theirs).sum()
        values.append((ours & theirs).sum() / union if union else np.nan)
    return values


def test_mean_iou_is_that_of_all_pixels_together():
    """Not the mean of the images' own IoU; and a class that is nowhere does not count."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(2, 6, 5, 4, 4)), generator.integers(0, 3, (6, 5, 4))
    logits[..., 3] = -9
    statistics = thresholds.iou_statistics(logits, labels)
    assert statistics.shape == (2, 6, 8)
    for n in range(2):
        expected = brute_force_iou(logits[n].argmax(-1), labels, 4)
        np.testing.assert_allclose(thresholds.statistics.iou_per_class(statistics[n].sum(0)), expected)
        assert thresholds.mean_iou(statistics[n].sum(0), 6) == pytest.approx(np.nanmean(expected))
    traced = jax.jit(thresholds.iou_statistics)(logits.astype(np.float32), labels)
    np.testing.assert_array_equal(traced, statistics)


def test_screen_of_masks_is_brute_force():
    """The same tuner, with a metric that is no mean over images."""
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(3, 20, 4, 4, 3)), generator.integers(0, 3, (20, 4, 4))
    uncertainty = generator.uniform(size=(3, 20))
    grid = np.array([[-np.inf, 0.3, 0.6, np.inf]] * 2)
    table = thresholds.ExitTable(
        uncertainty=uncertainty,
        statistics=thresholds.iou_statistics(logits, labels),
        costs=bj.costs.StageCosts([1, 1, 1], [0, 0, 0]),
        criterion=criteria.entropy,
        metric=thresholds.mean_iou,
        split='validation',
    )
    screened = table.screen(grid)
    for setting, found in zip(screened.thresholds, screened.accuracy, strict=True):
        exits = table.answering_exits(setting)
        predictions = logits.argmax(-1)[exits, np.arange(20)]
        assert found == pytest.approx(np.nanmean(brute_force_iou(predictions, labels, 3)))


def test_standard_error_of_an_accuracy_is_the_binomial_one():
    right = (np.random.default_rng(0).uniform(size=(1, 400, 1)) < 0.9).astype(float)
    table = thresholds.ExitTable(
        uncertainty=np.zeros((1, 400)),
        statistics=right,
        costs=bj.costs.StageCosts([1], [0]),
        criterion=criteria.entropy,
        split='validation',
    )
    p = right.mean()
    assert table.standard_error([]) == pytest.approx((p * (1 - p) / 399) ** 0.5)
    with pytest.raises(ValueError, match='at least 2 inputs'):
        table.rows(slice(1)).standard_error([])


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.zeros((2, 3, 5), int), r'labels: answers have shape \(2, 3, 4\).*got \(2, 3, 5\)'),
        (np.full((2, 3, 4), 3), r'labels: expected classes in \[0, 3\), got 3 to 3'),
        (np.full((2, 3, 4), -1), 'labels: expected classes'),
    ],
)
def test_masks_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        thresholds.iou_statistics(np.zeros((1, 2, 3, 4, 3)), labels)
    with pytest.raises(ValueError, match='labels'):
        bj.losses.cross_entropy_per_exit((jnp.zeros((2, 3, 4, 3)),), jnp.asarray(labels))


def test_statistics_in_batches_are_those_of_the_logits(network, getkey):
    model, variables, images = network
    labels = jax.random.randint(getkey(), (24,), 0, 3)
    outputs = bj.inference.exit_outputs(model, variables, images)
    found = bj.inference.exit_table(model, variables, bj.Batch(images, labels), batch_size=7)
    np.testing.assert_array_equal(found.statistics, thresholds.accuracy_statistics(outputs.logits, labels))
    np.testing.assert_allclose(found.uncertainty, outputs.uncertainty, rtol=1e-5)


@pytest.fixture(scope='module')
def digits():
    """Digits of one brightness each, so that a pixel tells which digit it came from."""

    def split(first, count):
        images = np.zeros((count, 6, 6, 1), np.uint8)
        images[:, 1:5, 2:4] = (100 + first + np.arange(count))[:, None, None, None]
        return bj.Batch(images, np.arange(count, dtype=np.int32) % 3)

    parts = {'train': split(0, 40), 'validation': split(40, 20), 'test': split(60, 20)}
    return bj.data.Dataset(
        name='bars', **parts, num_classes=3, normalization=bj.data.fit_normalization(parts['train'].image)
    )


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


def test_canvases_depend_on_the_seed_alone(digits):
    first, again, other = (bj.data.digit_canvases(digits, side=12, most_clutter=2, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.train.image, again.train.image)
    np.testing.assert_array_equal(first.test.label, again.test.label)
    assert (first.train.image != other.train.image).any()


@pytest.mark.parametrize('options', [{'side': 5}, {'most_digits': 0}, {'most_clutter': -1}])
def test_impossible_canvases_are_refused(digits, options):
    with pytest.raises(ValueError, match='side: got 5|most_digits: got'):
        bj.data.digit_canvases(digits, **options)


def test_npz_may_hold_masks_of_the_images_size(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 6, 5)).astype(np.uint8)
    masks = generator.integers(0, 3, (20, 6, 5))
    path = tmp_path / 'own.npz'
    np.savez(path, x_train=images[:15], y_train=masks[:15], x_test=images[15:], y_test=masks[15:])
    loaded = bj.data.load_dataset(str(path), validation_fraction=0.2)
    assert loaded.num_classes == 3
    assert (len(loaded.train), len(loaded.validation)) == (12, 3)
    pairs = {image.tobytes(): mask for image, mask in zip(images, masks, strict=True)}
    for image, mask in zip(loaded.train.image, loaded.train.label, strict=True):
        np.testing.assert_array_equal(pairs[image.tobytes()], mask)
    np.savez(path, x_train=images[:15], y_train=masks[:15, :5], x_test=images[15:], y_test=masks[15:])
    with pytest.raises(ValueError, match=r'train.* masks \(15, 6, 5\)'):
        bj.data.load_dataset(str(path))


def test_masks_move_with_their_images(getkey):
    pixels, key = jax.random.randint(getkey(), (8, 6, 6, 1), 1, 9), getkey()
    moved = bj.data.augment(key, bj.Batch(pixels, pixels[..., 0]), crop_padding=2)
    np.testing.assert_array_equal(moved.image[..., 0], moved.label)
    assert (moved.label != pixels[..., 0]).any()
