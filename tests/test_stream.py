"""No image is lost or answered twice, whatever happens to the supply or to the caller."""

import itertools
import threading
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchy_jax.inference import dense, exit_outputs, stream


@pytest.fixture(scope='module')
def thresholds(network):
    uncertainty = exit_outputs(*network).uncertainty
    return (np.quantile(uncertainty[:2], 0.45, axis=1)).astype(np.float32)


@pytest.fixture(scope='module')
def expected(network, thresholds):
    model, variables, images = network
    return jax.tree.map(np.asarray, dense(model)(variables, images, thresholds))


@pytest.fixture(scope='module')
def answer(network):
    return stream(network[0], chunk_size=(4, 3, 2))


@pytest.fixture(scope='module')
def answer_in_threads(network):
    return stream(network[0], chunk_size=3, workers=2)


def check_answers(answered, expected, sent):
    """Every image sent is answered exactly once, as `dense` answers it. Image i of the fixture has id 100 + i."""
    ids = np.concatenate([np.zeros(0, int), *(answers.ids for answers in answered)])
    assert sorted(ids.tolist()) == sorted(100 + row for row in sent)
    for answers in answered:
        rows = answers.ids - 100
        np.testing.assert_array_equal(answers.prediction.label, expected.label[rows])
        np.testing.assert_array_equal(answers.prediction.exit_index, expected.exit_index[rows])
        np.testing.assert_allclose(answers.prediction.logits, expected.logits[rows], rtol=1e-5, atol=1e-6)


class SupplyBroke(Exception):
    pass


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    breaks_after=st.none() | st.integers(0, 6),
    threads=st.booleans(),
)
def test_every_image_is_answered_once(
    network, expected, thresholds, answer, answer_in_threads, sizes, breaks_after, threads
):
    """Batches of any size, a supply that may raise at any point."""
    _, variables, images = network
    sent = []

    def supply():
        rows = itertools.cycle(range(len(images)))
        unused = set(range(len(images)))
        for number, size in enumerate(sizes):
            if number == breaks_after:
                raise SupplyBroke
            chosen = [row for row in itertools.islice(rows, size) if row in unused]
            unused -= set(chosen)
            sent.extend(chosen)
            yield np.array(chosen, int) + 100, np.asarray(images)[chosen]

    found, broke = [], False
    try:
        for answers in (answer_in_threads if threads else answer)(variables, supply(), thresholds):
            found.append(answers)
    except SupplyBroke:
        broke = True
    assert broke == (breaks_after is not None and breaks_after < len(sizes))
    check_answers(found, expected, sent)


def test_ids_count_from_zero_where_none_are_given(network, thresholds, answer):
    _, variables, images = network
    found = list(answer(variables, [images[:5], images[5:7]], thresholds))
    assert sorted(np.concatenate([answers.ids for answers in found]).tolist()) == list(range(7))


def test_survivors_of_several_batches_share_chunks(network):
    """Six batches of four, all of which go to the end, fill chunks of 24 there exactly once."""
    model, variables, images = network
    run_counts = []
    answer = stream(model, chunk_size=(4, 24, 24))
    for answers in answer(variables, np.split(np.asarray(images), 6), [-np.inf, -np.inf]):
        run_counts.append(len(answers.ids))
    assert run_counts == [24]


def test_ids_that_do_not_fit_are_refused(network, thresholds, answer):
    _, variables, images = network
    with pytest.raises(ValueError, match='ids: got shape'):
        list(answer(variables, [(np.arange(3), images)], thresholds))


def test_a_deadline_answers_while_the_supply_is_silent(network, thresholds, expected):
    """Three images fill no chunk of 24. The supply says nothing more until they have been answered."""
    model, variables, images = network
    answered = threading.Event()

    def supply():
        yield np.arange(100, 103), images[:3]
        assert answered.wait(timeout=60)

    found = []
    for answers in stream(model, chunk_size=24, deadline=0.01)(variables, supply(), thresholds):
        found.append(answers)
        if sum(len(answers.ids) for answers in found) == 3:
            answered.set()
    assert answered.is_set()
    check_answers(found, expected, range(3))


def test_without_a_deadline_images_wait_for_a_whole_chunk(network, thresholds):
    model, variables, images = network
    late = threading.Event()

    def supply():
        yield images[:3]
        late.wait(timeout=0.3)  # three images alone are not answered meanwhile
        yield images[3:4]

    first = next(stream(model, chunk_size=(4, 1, 1), ahead=1)(variables, supply(), [np.inf, np.inf]))
    assert len(first.ids) == 4


def test_a_deadline_is_kept_while_other_images_keep_coming(network):
    """One image goes on to a stage whose chunk of 100 no other image helps to fill."""
    model, variables, images = network
    uncertainty = exit_outputs(model, variables, images).uncertainty[0]
    hardest, easier = int(uncertainty.argmax()), np.flatnonzero(uncertainty < np.sort(uncertainty)[-2])
    threshold = float(np.sort(uncertainty)[-2:].mean())
    answered = threading.Event()

    def supply():
        yield np.array([1]), images[hardest : hardest + 1]
        for number in range(2000):
            if answered.is_set():
                return
            yield np.array([2 + number]), np.asarray(images)[easier[:1]]
        raise AssertionError('the image was left waiting')

    answer = stream(model, chunk_size=(1, 100, 100), deadline=0.02)
    for answers in answer(variables, supply(), [threshold, -np.inf]):
        if 1 in answers.ids:
            answered.set()
    assert answered.is_set()


def test_an_image_that_is_due_waits_for_no_others(network, thresholds, expected):
    """Of two images in one supply only the second, which is due at once, is answered while the supply is silent."""
    model, variables, images = network
    answered = threading.Event()

    def supply():
        yield np.array([100]), images[:1], [np.inf]
        yield np.array([101]), images[1:2], [time.monotonic()]
        assert answered.wait(timeout=60)

    found = []
    for answers in stream(model, chunk_size=(1, 24, 24))(variables, supply(), [-np.inf, -np.inf]):
        found.append(answers.ids.tolist())
        answered.set()
    assert found in ([[101], [100]], [[100, 101]], [[101, 100]])  # a chunk that runs takes along the images that wait
    with pytest.raises(ValueError, match=r'due: got shape \(2,\) for 1 images'):
        list(stream(model, chunk_size=1)(variables, [(np.array([1]), images[:1], [0.0, 1.0])], thresholds))


def test_a_policy_may_be_asked_for_anew_at_every_chunk(network):
    """All images leave at the first exit until the policy says otherwise."""
    model, variables, images = network
    leave, exits = [True], []

    def supply():
        yield images[:4]
        leave[0] = False
        yield images[4:8]

    answer = stream(model, chunk_size=4, ahead=1)
    waiting = answer(variables, supply(), lambda: [np.inf, np.inf] if leave[0] else [-np.inf, -np.inf])
    exits = {int(i): int(e) for found in waiting for i, e in zip(found.ids, found.prediction.exit_index, strict=True)}
    assert [exits[i] for i in range(4, 8)] == [2] * 4
    assert set(exits) == set(range(8))
    with pytest.raises(ValueError, match='thresholds: a network with 3 exits'):
        list(answer(variables, [images[:4]], lambda: [0.0]))


def test_a_supply_may_fill_the_same_buffer_again(network, thresholds, expected, answer):
    _, variables, images = network

    def supply():
        buffer, ids = np.empty((3, *images.shape[1:]), np.float32), np.empty(3, int)
        for start in range(0, 24, 3):
            buffer[:], ids[:] = images[start : start + 3], np.arange(100 + start, 103 + start)
            yield ids, buffer

    check_answers(list(answer(variables, supply(), thresholds)), expected, range(24))


@pytest.mark.parametrize(
    'bad',
    [np.zeros((2, 5), np.float32), np.float32(1.0), None, (1, 2, 3), np.zeros((2, 4, 4, 1)), np.zeros((2, 2, 4, 1))],
)
def test_what_is_no_batch_ends_the_stream_after_the_others_are_answered(network, thresholds, expected, bad):
    model, variables, images = network
    answers = stream(model, chunk_size=24)(variables, [(np.arange(100, 106), images[:6]), bad, images], thresholds)
    found = []
    with pytest.raises((ValueError, TypeError)):
        found.extend(iter(lambda: next(answers), None))
    check_answers(found, expected, range(6))


class Sum(nn.Module):
    """Two inputs, one exit."""

    @nn.compact
    def __call__(self, a, b):
        return (nn.Dense(2)(a + b),)


def test_inputs_that_are_a_tuple_come_with_ids():
    pair = (np.ones((3, 4), np.float32),) * 2
    model = Sum()
    variables, answer = model.init(jax.random.key(0), *pair), stream(model, chunk_size=3)
    (answers,) = answer(variables, [(np.arange(3), pair)], [])
    assert answers.ids.tolist() == [0, 1, 2]
    for bare in (pair, (*pair, pair[0]), pair[:1]):
        with pytest.raises(ValueError, match=r'(supply: got a tuple|ids: got shape|due: got|images: expected)'):
            list(answer(variables, [bare], []))


def test_memory_is_bounded_while_no_answers_are_read(network, thresholds):
    """An endless supply is read a few batches ahead, no further."""
    model, variables, images = network
    read = itertools.count()

    def supply():
        for _ in read:
            yield images[:2]

    answers = stream(model, chunk_size=2, ahead=3)(variables, supply(), [np.inf, np.inf])
    for _ in range(4):
        next(answers)
    time.sleep(0.3)
    # 4 given out, 3 taken at once, 3 read ahead, one in the reader's hand.
    assert next(read) <= 4 + 3 + 3 + 1
    answers.close()


def test_a_caller_who_stops_ends_the_reading(network, thresholds, answer):
    _, variables, images = network
    closed = threading.Event()

    def supply():
        try:
            while True:
                yield images[:4]
        finally:
            closed.set()

    answers = answer(variables, supply(), [np.inf, np.inf])
    next(answers)
    answers.close()
    assert closed.wait(timeout=60)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'deadline': -1.0}, 'deadline'),
        ({'deadline': float('nan')}, 'deadline'),
        ({'workers': 0}, 'workers'),
        ({'ahead': 0}, 'ahead'),
        ({'chunk_size': 0}, 'chunk_size'),
        ({'exits': [2, 0]}, 'exits'),
    ],
)
def test_impossible_settings_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        stream(network[0], **{'chunk_size': 2, **options})


def test_bad_thresholds_are_refused_before_anything_is_read(network, answer):
    def supply():
        raise AssertionError('read')
        yield

    with pytest.raises(ValueError, match='thresholds'):
        answer(network[1], supply(), [0.0, np.nan])


class Integers(nn.Module):
    """Hands on two arrays, one of them integers."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        large = (x > 0).astype(int).cumsum(1)
        return nn.Dense(3)(x), nn.Dense(3)(x * large)


def test_stages_hand_on_arrays_of_any_dtype(network):
    model, images = Integers(), network[2]
    variables = model.init(jax.random.key(0), images)
    oracle = dense(model)(variables, images, [0.9])
    answered = list(stream(model, chunk_size=5)(variables, [images], [0.9]))
    for answers in answered:
        np.testing.assert_array_equal(answers.prediction.exit_index, np.asarray(oracle.exit_index)[answers.ids])
    assert sum(len(answers.ids) for answers in answered) == len(images)
