import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES
from flax import struct
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference import dense, exit_outputs, staged


@pytest.fixture(scope='module')
def outputs(network):
    return exit_outputs(*network)


@functools.partial(struct.dataclass, eq=False, repr=False)
class RunningMean(Criterion):
    """A criterion that uses earlier exits: the mean of the entropies so far, answering with the summed logits."""

    name = 'running mean'

    def __call__(self, logits, carry, n):
        answer, total = (jnp.zeros_like(logits), jnp.zeros(logits.shape[0])) if carry is None else carry
        answer, total = answer + logits, total + entropy(logits, None, n)[1]
        return answer, total / (n + 1), (answer, total)


CRITERIA = [entropy, RunningMean()]


def first_confident(uncertainty, thresholds):
    """The rule in NumPy."""
    for n, threshold in enumerate(thresholds):
        if uncertainty[n] < threshold:
            return n
    return len(thresholds)


def check_same(answer, expected):
    assert answer.label.shape == expected.label.shape
    np.testing.assert_array_equal(answer.label, expected.label)
    np.testing.assert_array_equal(answer.exit_index, expected.exit_index)
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('criterion', CRITERIA, ids=lambda criterion: criterion.name)
@given(quantiles=st.lists(st.sampled_from([-np.inf, 0.1, 0.5, 0.9, np.inf]), min_size=2, max_size=2))
def test_dense_follows_the_rule(network, criterion, quantiles):
    model, variables, images = network
    every = exit_outputs(model, variables, images, criterion=criterion)
    thresholds = np.array(
        [q if np.isinf(q) else np.quantile(every.uncertainty[n], q) for n, q in enumerate(quantiles)], np.float32
    )
    answer = dense(model)(variables, images, bj.ExitPolicy(criterion, thresholds))
    expected = [first_confident(every.uncertainty[:, b], thresholds) for b in range(len(images))]
    assert answer.exit_index.tolist() == expected
    answers = every.logits[expected, np.arange(len(images))]
    np.testing.assert_array_equal(answer.label, answers.argmax(-1))
    np.testing.assert_allclose(answer.logits, answers, rtol=1e-5, atol=1e-6)
    assert (answer.label.dtype, answer.exit_index.dtype) == (jnp.int32, jnp.int32)


@pytest.mark.parametrize('criterion', CRITERIA, ids=lambda criterion: criterion.name)
def test_staged_is_dense_on_every_exit_pattern(network, criterion):
    model, variables, images = network
    middle = np.median(exit_outputs(model, variables, images, criterion=criterion).uncertainty, axis=1)
    oracle, execute = dense(model), staged(model)
    patterns = set()
    for kinds in itertools.product((-np.inf, None, np.inf), repeat=2):
        thresholds = np.array([m if kind is None else kind for kind, m in zip(kinds, middle, strict=False)], np.float32)
        policy = bj.ExitPolicy(criterion, jnp.asarray(thresholds))
        expected = oracle(variables, images, policy)
        for b in range(len(images)):
            answer = execute(variables, images[b], policy)
            assert answer.exit_index.shape == ()
            check_same(answer, jax.tree.map(lambda values, b=b: values[b], expected))
        patterns.add(tuple(sorted(set(expected.exit_index.tolist()))))
    assert {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)} <= patterns


def test_staged_under_vmap_is_dense(network, outputs):
    model, variables, images = network
    thresholds = jnp.asarray(np.median(outputs.uncertainty, axis=1)[:2])
    mapped = jax.vmap(staged(model), in_axes=(None, 0, None))(variables, images, thresholds)
    check_same(mapped, dense(model)(variables, images, thresholds))


def test_dense_maps_over_thresholds(network, outputs):
    model, variables, images = network
    settings = jnp.asarray(np.quantile(outputs.uncertainty[:2], [0.2, 0.5, 0.8], axis=1), jnp.float32)
    mapped = jax.vmap(dense(model), in_axes=(None, None, 0))(variables, images, settings)
    for n, thresholds in enumerate(settings):
        check_same(jax.tree.map(lambda x, n=n: x[n], mapped), dense(model)(variables, images, thresholds))


def test_exit_shares_predicted_are_those_realised(network, outputs):
    """Thresholds chosen on cached outputs do the same when they run, image by image."""
    model, variables, images = network
    labels = np.arange(len(images)) % CLASSES
    screened = bj.inference.exit_table(model, variables, bj.Batch(images, labels)).screen()
    execute = staged(model)
    for index in np.linspace(0, len(screened) - 1, 7, dtype=int):
        point = screened.point(index)
        answers = [execute(variables, image, point) for image in images]
        realised = np.bincount([int(answer.exit_index) for answer in answers], minlength=3) / len(images)
        np.testing.assert_array_equal(realised, point.exit_fractions)
        assert np.mean([int(a.label) == label for a, label in zip(answers, labels, strict=True)]) == point.accuracy


@pytest.mark.parametrize('wrong', [-1, CLASSES])
def test_labels_of_no_class_are_refused(network, wrong):
    model, variables, images = network
    data = bj.Batch(images, np.full(len(images), wrong))
    with pytest.raises(ValueError, match=rf'labels: expected classes in \[0, 3\), got {wrong}'):
        bj.inference.exit_table(model, variables, data)
    answers = bj.inference.exit_table(model, variables, data, statistics=lambda logits, labels: logits, metric=max)
    assert answers.statistics.shape == (3, len(images), CLASSES)  # statistics of one's own take any target


@pytest.mark.parametrize('build', [dense, staged])
def test_one_compilation_per_shape(network, build, compilations):
    model, variables, images = network
    execute, images = build(model), np.asarray(images)
    inputs = [images, images[:2], images] if build is dense else [images[0], images[1], images[2]]
    settings = [0.5, 0.5], np.full(2, np.inf), jnp.array([0.1, 0.2])
    for value in inputs:
        execute(variables, value, settings[0])
    before = compilations.count
    for value, thresholds in itertools.product(inputs, settings):
        execute(variables, value, thresholds)
    assert compilations.count == before


def twice(images):
    return 2 * images


def test_exit_outputs_compile_once_and_lose_nothing(network, compilations):
    model, variables, images = network[0], network[1], np.asarray(network[2])
    result = exit_outputs(model, variables, images[:7], batch_size=3, preprocess=twice)
    before = compilations.count
    exit_outputs(model, variables, images[:9], batch_size=3, preprocess=twice)
    assert compilations.count == before
    expected = jnp.stack(model.apply(variables, 2 * images[:7]))
    np.testing.assert_allclose(result.logits, expected, rtol=1e-5, atol=1e-6)
    uncertainty = entropy(expected.reshape(-1, CLASSES), None, 0)[1].reshape(3, 7)
    np.testing.assert_allclose(result.uncertainty, uncertainty, rtol=1e-5, atol=1e-6)


def parts(images, cuts):
    """Yields the rows between cuts, an empty batch where two are alike."""
    yield from np.split(np.asarray(images), cuts)


def test_outputs_of_batches_that_come_are_those_in_memory(network):
    model, variables, images = network
    images, reports = images[:11], []
    expected = exit_outputs(model, variables, images)
    for cuts in ([4, 8], [4, 4, 9], [5, 6]):  # a last one that is smaller, an empty one, smaller and larger ones
        batches = parts(images, cuts)
        result = exit_outputs(model, variables, batches, on_progress=lambda *done: reports.append(done))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), result, expected)
        assert reports.pop() == (11, None)
    exit_outputs(model, variables, images, batch_size=4, on_progress=lambda *done: reports.append(done))
    assert reports[-3:] == [(4, 11), (8, 11), (11, 11)]
    without = exit_outputs(model, variables, parts(images, [4]), keep_logits=False)
    assert without.logits is None
    np.testing.assert_allclose(without.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)


def test_table_of_batches_that_come_is_that_in_memory(network):
    model, variables, images = network
    data = bj.Batch(np.asarray(images), np.arange(24) % CLASSES)
    expected = bj.inference.exit_table(model, variables, data)
    batches = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], data) for rows in np.split(np.arange(24), [10, 20]))
    answer = bj.inference.exit_table(model, variables, batches)
    np.testing.assert_array_equal(answer.statistics, expected.statistics)
    np.testing.assert_allclose(answer.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)
    wrong = data.replace(label=np.full(24, CLASSES))
    with pytest.raises(ValueError, match=r'labels: expected classes in \[0, 3\), got 3'):
        bj.inference.exit_table(model, variables, iter([data, wrong]))
    for bad, message in (([], 'data: got no batches'), ([images], 'data: got ArrayImpl'), (5, 'data: got int')):
        with pytest.raises(ValueError, match=message):
            bj.inference.exit_table(model, variables, bad)


def test_what_a_supply_raises_is_raised(network):
    model, variables, images = network

    def failing():
        yield images[:4]
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        exit_outputs(model, variables, failing())
    for bad, message in (
        (iter([]), 'images: got none'),
        (5, 'inputs: expected arrays'),
        ([images[:4, :2]], 'inputs: their shape does not fit the variables'),
        ([images[:4], images[:4, :2]], 'are to be alike'),
    ):
        with pytest.raises(ValueError, match=message):
            exit_outputs(model, variables, bad)


@pytest.mark.parametrize('build', [dense, staged])
@pytest.mark.parametrize(
    ('thresholds', 'message'),
    [
        ([0.5], r'takes 2 thresholds; got shape \(1,\)'),
        (0.5, r'got shape \(\)'),
        (np.zeros((1, 2)), r'got shape \(1, 2\)'),
        ([0.5, np.nan], 'got NaN in'),
        (jnp.array([jnp.nan, 0.5]), 'got NaN in'),
        (['low', 'high'], 'expected a number for each side exit'),
        (jnp.array([1, 2]), 'expected floats, got int32'),
    ],
)
def test_bad_thresholds_are_refused(network, build, thresholds, message):
    model, variables, images = network
    images = images if build is dense else images[0]
    with pytest.raises(ValueError, match=rf'thresholds: .*{message}'):
        build(model)(variables, images, thresholds)


@pytest.mark.parametrize('build', [dense, staged])
def test_policies_are_checked_at_every_call(network, build):
    """The same array, list or holder may have other contents the next time."""
    model, variables, images = network
    execute, image = build(model), images if build is dense else images[0]
    changing = np.array([0.5, 0.5], np.float32)
    for thresholds in (jnp.array([0.5, 0.5]), changing):
        execute(variables, image, thresholds)
    changing[0] = np.nan
    for bad in (changing, jnp.array([jnp.nan, 0.5]), jnp.zeros(3)):
        with pytest.raises(ValueError, match='thresholds: '):
            execute(variables, image, bad)

    def exits(policy):
        return set(np.ravel(execute(variables, image, policy).exit_index).tolist())

    for policy_of in (lambda thresholds: thresholds, functools.partial(bj.ExitPolicy, entropy)):
        thresholds = [jnp.float32(-jnp.inf)] * 2
        policy = policy_of(thresholds)
        assert exits(policy) == {2}
        thresholds[0] = jnp.float32(jnp.inf)
        assert exits(policy) == {0}
    holder = types.SimpleNamespace(policy=jnp.full(2, -jnp.inf))
    assert exits(holder) == {2}
    holder.policy = jnp.full(2, jnp.inf)
    assert exits(holder) == {0}


@pytest.mark.parametrize('build', [dense, staged])
def test_thresholds_that_were_converted_under_jit_serve_outside(network, build):
    model, variables, images = network
    execute, image = build(model), images if build is dense else images[0]
    for thresholds in (jnp.full(2, 0.5), jnp.full(2, 0.5, jnp.bfloat16)):  # the first is weakly typed
        jax.make_jaxpr(lambda image, thresholds=thresholds: execute(variables, image, thresholds))(image)
        assert execute(variables, image, thresholds).exit_index.shape == image.shape[:-3]


@pytest.mark.parametrize('build', [dense, staged])
def test_images_that_do_not_fit_the_variables_are_refused(network, build):
    model, variables, images = network
    bad = np.zeros((24, 9, 9, 1), np.float32)
    with pytest.raises(ValueError, match='inputs: their shape does not fit the variables'):
        build(model)(variables, bad if build is dense else bad[0], [0.1, 0.1])
    checked = bj.models.create('b-lenet')  # the library's own networks know the shape of their images
    weights = jax.eval_shape(checked.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    for bad in (np.zeros((2, 28, 28, 2), np.float32), np.zeros((2, 28, 28, 1), np.uint8), np.zeros((2, 28, 28))):
        image = bad if build is dense else bad[0]
        with pytest.raises(ValueError, match='images: expected'):
            jax.eval_shape(lambda weights, image=image: build(checked)(weights, image, [0.1]), weights)
    with pytest.raises(ValueError, match='images: got none'):
        exit_outputs(model, variables, images[:0])
    with pytest.raises(ValueError, match='batch_size: got 0'):
        exit_outputs(model, variables, images, batch_size=0)


USES = {
    'dense': lambda model, variables, images: dense(model)(variables, images, [0.1, 0.1]),
    'staged': lambda model, variables, images: staged(model)(variables, images[0], [0.1, 0.1]),
    'compacted': lambda model, variables, images: bj.inference.compacted(model, chunk_size=8)(
        variables, images, [0.1, 0.1]
    ),
    'stream': lambda model, variables, images: list(
        bj.inference.stream(model, chunk_size=8)(variables, [images], [0.1, 0.1])
    ),
    'exit_outputs': lambda model, variables, images: exit_outputs(model, variables, images),
    'exit_table': lambda model, variables, images: bj.inference.exit_table(
        model, variables, bj.Batch(images, np.zeros(len(images), int))
    ),
    'plan': lambda model, variables, images: bj.inference.plan(model, variables, images, [0.1, 0.1]),
    'optimize': lambda model, variables, images: bj.inference.optimize(model, variables, inputs=images),
    'create_train_state': lambda model, variables, images: bj.training.create_train_state(model, variables),
}


@pytest.mark.parametrize('use', USES.values(), ids=USES)
def test_what_is_no_network_or_no_variables_is_refused(network, use):
    model, variables, images = network
    with pytest.raises(ValueError, match="model: got 'b-lenet'; give a Flax module"):
        use('b-lenet', variables, images)
    for bad in (variables['params'], {}, None):
        with pytest.raises(ValueError, match='variables: got .*[Gg]ive what model.init returned'):
            use(model, bad, images)


def test_criteria_by_name_and_odd_batch_sizes_are_refused(network):
    model, variables, images = network
    data = bj.Batch(images, np.zeros(len(images), int))
    for answer, inputs in ((exit_outputs, images), (bj.inference.exit_table, data)):
        with pytest.raises(ValueError, match="criterion: got 'entropy'"):
            answer(model, variables, inputs, criterion='entropy')
        with pytest.raises(ValueError, match='batch_size: got 2.5; expected an integer'):
            answer(model, variables, inputs, batch_size=2.5)


def test_nan_threshold_under_jit_never_exits(network):
    model, variables, images = network
    assert set(jax.jit(dense(model))(variables, images, jnp.full(2, jnp.nan)).exit_index.tolist()) == {2}
