import functools
import itertools
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, IMAGE_SHAPE
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
from jax.extend import core as jax_core

import branchy_jax as bj
from branchy_jax.criteria import Criterion, entropy, entropy_of_logits
from branchy_jax.inference import dense, exit_outputs, staged


@pytest.fixture(scope='module')
def outputs(network):
    return exit_outputs(*network)


@functools.partial(struct.dataclass, eq=False)
class RunningMean(Criterion):
    """A criterion that remembers: the mean of the entropies so far, answering with the summed logits."""

    name = 'running mean'

    def init(self, logits):
        return jnp.zeros_like(logits), jnp.zeros(logits.shape[0])

    def update(self, logits, carry, n):
        answer, total = carry[0] + logits, carry[1] + entropy_of_logits(logits)
        return answer, total / (n + 1), (answer, total)


CRITERIA = [entropy, RunningMean()]


def first_confident(uncertainty, thresholds):
    """The rule in NumPy."""
    for n, threshold in enumerate(thresholds):
        if uncertainty[n] < threshold:
            return n
    return len(thresholds)


def check_same(found, expected):
    assert found.label.shape == expected.label.shape
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('criterion', CRITERIA, ids=lambda criterion: criterion.name)
@given(quantiles=st.lists(st.sampled_from([-np.inf, 0.1, 0.5, 0.9, np.inf]), min_size=2, max_size=2))
def test_dense_follows_the_rule(network, criterion, quantiles):
    model, variables, images = network
    every = exit_outputs(model, variables, images, criterion=criterion)
    thresholds = np.array(
        [q if np.isinf(q) else np.quantile(every.uncertainty[n], q) for n, q in enumerate(quantiles)], np.float32
    )
    found = dense(model)(variables, images, bj.ExitPolicy(criterion, thresholds))
    expected = [first_confident(every.uncertainty[:, b], thresholds) for b in range(len(images))]
    assert found.exit_index.tolist() == expected
    answers = every.logits[expected, np.arange(len(images))]
    np.testing.assert_array_equal(found.label, answers.argmax(-1))
    np.testing.assert_allclose(found.logits, answers, rtol=1e-5, atol=1e-6)
    assert (found.label.dtype, found.exit_index.dtype) == (jnp.int32, jnp.int32)


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
            found = execute(variables, images[b], policy)
            assert found.exit_index.shape == ()
            check_same(found, jax.tree.map(lambda values, b=b: values[b], expected))
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


def counting_network():
    """Notes each trace of its first stage."""
    traces = []

    def note(x):
        traces.append(x.shape)
        return x

    layers = (bj.models.layers.flatten, note, nn.Dense(3)), nn.relu
    return bj.BranchyNet(stages=layers, exits=(nn.Dense(2), nn.Dense(2))), traces


@pytest.mark.parametrize('build', [dense, staged])
def test_one_trace_per_shape(build, getkey):
    model, traces = counting_network()
    images = jnp.ones((4, *IMAGE_SHAPE))
    variables = model.init(getkey(), images)
    traces.clear()
    execute = build(model)
    inputs = [images, images[:2], images] if build is dense else [images[0], images[1], images[2]]
    for thresholds in ([0.5], np.array([np.inf]), jnp.array([-jnp.inf])):
        for value in inputs:
            execute(variables, value, thresholds)
    assert len(traces) == (2 if build is dense else 1)


def test_exit_outputs_compile_once_and_lose_nothing(network, getkey):
    model, traces = counting_network()
    images = jax.random.normal(getkey(), (7, *IMAGE_SHAPE))
    variables = model.init(getkey(), images)
    traces.clear()
    found = exit_outputs(model, variables, images, batch_size=3, prepare=lambda x: 2 * x)
    assert len(traces) == 1
    expected = jnp.stack(model.apply(variables, 2 * images))
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.uncertainty, entropy_of_logits(expected), rtol=1e-5, atol=1e-6)


def parts(images, cuts):
    """Yields the rows between cuts, an empty batch where two are alike."""
    yield from np.split(np.asarray(images), cuts)


def test_outputs_of_batches_that_come_are_those_in_memory(getkey):
    model, traces = counting_network()
    images = jax.random.normal(getkey(), (11, *IMAGE_SHAPE))
    variables = model.init(getkey(), images)
    expected, told = exit_outputs(model, variables, images), []
    for cuts in ([4, 8], [4, 4, 9], [5, 6]):  # a last one that is smaller, an empty one, smaller and larger ones
        traces.clear()
        found = exit_outputs(model, variables, parts(images, cuts), on_progress=lambda *done: told.append(done))
        assert len(traces) <= 1
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
        assert told.pop() == (11, None)
    exit_outputs(model, variables, images, batch_size=4, on_progress=lambda *done: told.append(done))
    assert told[-3:] == [(4, 11), (8, 11), (11, 11)]
    without = exit_outputs(model, variables, parts(images, [4]), keep_logits=False)
    assert without.logits is None
    np.testing.assert_allclose(without.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)


def test_table_of_batches_that_come_is_that_in_memory(network):
    model, variables, images = network
    data = bj.Batch(np.asarray(images), np.arange(24) % CLASSES)
    expected = bj.inference.exit_table(model, variables, data)
    batches = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], data) for rows in np.split(np.arange(24), [10, 20]))
    found = bj.inference.exit_table(model, variables, batches)
    np.testing.assert_array_equal(found.statistics, expected.statistics)
    np.testing.assert_allclose(found.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)
    wrong = data.replace(label=np.full(24, CLASSES))
    with pytest.raises(ValueError, match=r'labels: expected classes in \[0, 3\), got 3'):
        bj.inference.exit_table(model, variables, iter([data, wrong]))
    for bad, message in (([], 'data: got no batches'), ([images], 'data: got ArrayImpl'), (5, 'data: got int')):
        with pytest.raises(ValueError, match=message):
            bj.inference.exit_table(model, variables, bad)


def test_a_supply_that_fails_is_heard(network):
    model, variables, images = network

    def failing():
        yield images[:4]
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        exit_outputs(model, variables, failing())
    for bad, message in (
        (iter([]), 'images: got none'),
        (5, 'images: expected arrays'),
        ([images[:4, :2]], 'images: expected'),
        ([images[:4], images[:4, :2]], 'are to be alike'),
    ):
        with pytest.raises(ValueError, match=message):
            exit_outputs(model, variables, bad)


def products_by_depth(jaxpr, depth=0):
    """How many matrix products lie under how many conditionals."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield depth
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (jax_core.Jaxpr, jax_core.ClosedJaxpr)):
                    inner = inner.jaxpr if isinstance(inner, jax_core.ClosedJaxpr) else inner
                    yield from products_by_depth(inner, depth + (equation.primitive.name == 'cond'))


def test_later_stages_lie_under_conditionals(network):
    model, variables, images = network
    jaxpr = jax.make_jaxpr(staged(model))(variables, images[0], jnp.zeros(2))
    assert sorted(products_by_depth(jaxpr.jaxpr)) == [0, 0, 1, 1, 2, 2]  # a stage and a head at each depth


def test_later_stages_do_not_run(getkey):
    """By the clock: the second stage is thousands of times the first, so leaving before it must show."""

    def heavy(x):
        square = jnp.outer(jnp.full(400, x.mean()), jnp.ones(400))
        return x + jax.lax.fori_loop(0, 5, lambda _, m: jnp.tanh(m @ m), square).mean()

    model = bj.BranchyNet(stages=(lambda x: x, heavy), exits=(lambda x: x, lambda x: x))
    execute, image = staged(model), jax.random.normal(getkey(), (3,))

    def seconds(threshold):
        jax.block_until_ready(execute({}, image, threshold))
        start = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(execute({}, image, threshold))
        return time.perf_counter() - start

    early, late = jnp.array([jnp.inf]), jnp.array([-jnp.inf])
    assert [int(execute({}, image, t).exit_index) for t in (early, late)] == [0, 1]
    assert min(seconds(late) for _ in range(3)) > 3 * min(seconds(early) for _ in range(3))


@pytest.mark.parametrize('build', [dense, staged])
@pytest.mark.parametrize(
    ('thresholds', 'message'),
    [
        ([0.5], r'takes 2 thresholds, shape \(2,\); got shape \(1,\)'),
        (0.5, r'got shape \(\)'),
        (np.zeros((1, 2)), r'got shape \(1, 2\)'),
        ([0.5, np.nan], 'got NaN in'),
        (jnp.array([jnp.nan, 0.5]), 'got NaN in'),
        (['low', 'high'], 'expected 2 numbers'),
        (jnp.array([1, 2]), 'expected floats, got int32'),
    ],
)
def test_bad_thresholds_are_refused(network, build, thresholds, message):
    model, variables, images = network
    images = images if build is dense else images[0]
    with pytest.raises(ValueError, match=rf'thresholds: .*{message}'):
        build(model)(variables, images, thresholds)


@pytest.mark.parametrize('build', [dense, staged])
def test_good_thresholds_do_not_excuse_bad_ones(network, build):
    """An executor remembers the array that it checked last, by identity; arrays that can change are checked always."""
    model, variables, images = network
    execute, image = build(model), images if build is dense else images[0]
    good, changing = jnp.array([0.5, 0.5]), np.array([0.5, 0.5], np.float32)
    for thresholds in (good, changing, good):
        execute(variables, image, thresholds)
    changing[0] = np.nan
    for bad in (changing, jnp.array([jnp.nan, 0.5]), jnp.zeros(3)):
        with pytest.raises(ValueError, match='thresholds: '):
            execute(variables, image, bad)


@pytest.mark.parametrize('build', [dense, staged])
def test_what_can_change_is_not_remembered(network, build):
    """A list may hold other arrays the next time, and so may whatever holds a policy."""
    model, variables, images = network
    execute, image = build(model), images if build is dense else images[0]

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
def test_bad_images_are_refused(network, build):
    model, variables, images = network
    for bad in (images[0, 0], np.zeros((24, 9, 9, 1), np.float32), images.astype(jnp.uint8)):
        with pytest.raises(ValueError, match='images?: '):
            build(model)(variables, bad if build is dense else bad[0], [0.1, 0.1])
    with pytest.raises(ValueError, match='images: got none'):
        exit_outputs(model, variables, images[:0])
    with pytest.raises(ValueError, match='batch_size: got 0'):
        exit_outputs(model, variables, images, batch_size=0)


DOORS = {
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
    'optimize': lambda model, variables, images: bj.inference.optimize(model, variables),
    'create_train_state': lambda model, variables, images: bj.training.create_train_state(model, variables),
}


@pytest.mark.parametrize('enter', DOORS.values(), ids=DOORS)
def test_what_is_no_network_or_no_variables_is_refused(network, enter):
    model, variables, images = network
    with pytest.raises(ValueError, match="model: got 'b-lenet'; give a network"):
        enter('b-lenet', variables, images)
    for bad in (variables['params'], {}, None):
        with pytest.raises(ValueError, match='variables: got .*[Gg]ive what model.init returned'):
            enter(model, bad, images)


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
    found = jax.jit(dense(model))(variables, images, jnp.full(2, jnp.nan))
    assert set(found.exit_index.tolist()) == {2}


def test_staged_says_that_it_takes_one_image(network):
    model, variables, images = network
    with pytest.raises(ValueError, match=r'image: expected one image \[4, 4, 1\], got shape \(24, 4, 4, 1\)'):
        staged(model)(variables, images, [0.0, 0.0])
