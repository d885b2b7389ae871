"""No image is lost or answered twice, whatever happens to the supply or to the caller."""

import contextlib
import itertools
import threading
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchy_jax.inference import dense, stream

NEVER, ALWAYS = np.full(2, -np.inf, np.float32), np.full(2, np.inf, np.float32)


@pytest.fixture(scope='module')
def images(network):
    return np.asarray(network[2])


@pytest.fixture(scope='module')
def uncertainty(network, images):
    """Of the first exit, from highest to lowest, and the images in this order."""
    values = np.asarray(dense(network[0])(network[1], images, ALWAYS).uncertainty)
    order = np.argsort(-values)
    return values[order], order


@pytest.fixture(scope='module')
def policy(uncertainty):
    return np.float32([uncertainty[0][11:13].mean(), 0.9])


@pytest.fixture(scope='module')
def expected(network, images, policy):
    return jax.tree.map(np.asarray, dense(network[0])(network[1], images, policy))


@pytest.fixture(scope='module')
def answer(network):
    """Runs a stream to its end, in chunks of 4, 3 and 2."""
    return lambda supply, policy, **options: stream(network[0], **{'chunk_size': (4, 3, 2), **options})(
        network[1], supply, policy
    )


def check_answers(answered, expected, sent):
    """Every image sent is answered exactly once, as `dense` answers it. Image i of the fixture has id 100 + i."""
    ids = np.concatenate([[], *(answers.ids for answers in answered)])
    assert sorted(ids.tolist()) == sorted(100 + row for row in sent)
    for answers in answered:
        rows = answers.ids - 100
        np.testing.assert_array_equal(answers.prediction.label, expected.label[rows])
        np.testing.assert_array_equal(answers.prediction.exit_index, expected.exit_index[rows])
        np.testing.assert_allclose(answers.prediction.logits, expected.logits[rows], rtol=1e-5, atol=1e-6)


@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    breaks_after=st.integers(0, 9),
    workers=st.sampled_from([1, 2]),
)
def test_every_image_is_answered_once(answer, images, expected, policy, sizes, breaks_after, workers):
    """Batches of any size, from one buffer that the supply fills again; the supply may raise at any point."""
    sent, buffer, answered = [], np.empty((9, *images.shape[1:]), np.float32), []

    def supply():
        for number, size in enumerate(sizes):
            if number == breaks_after:
                raise ConnectionError
            rows = np.arange(len(sent), min(len(sent) + size, len(images)))
            sent.extend(rows.tolist())
            buffer[: len(rows)] = images[rows]
            yield rows + 100, buffer[: len(rows)]

    with pytest.raises(ConnectionError) if breaks_after < len(sizes) else contextlib.nullcontext():
        answered.extend(iter(answer(supply(), policy, workers=workers).__next__, None))
    check_answers(answered, expected, sent)


def test_survivors_of_several_batches_share_chunks(answer, images):
    """Six batches of four, all of which go to the end, fill chunks of 24 there exactly once; their ids count from 0."""
    (answers,) = answer(np.split(images, 6), NEVER, chunk_size=(4, 24, 24))
    assert sorted(answers.ids.tolist()) == list(range(24))


def test_without_a_deadline_images_wait_for_a_whole_chunk(answer, images):
    late = threading.Event()

    def supply():
        yield images[:3]
        late.wait(timeout=0.3)  # three images alone are not answered meanwhile
        yield images[3:4]

    assert len(next(answer(supply(), ALWAYS, ahead=1)).ids) == 4


def test_a_deadline_is_kept_while_other_images_keep_coming(answer, images, uncertainty):
    """One image goes on to a stage whose chunk of 100 no other image helps to fill."""
    values, order = uncertainty
    answered = threading.Event()

    def supply():
        yield np.array([1]), images[order[:1]]
        for number in range(2000):
            if answered.is_set():
                return
            yield np.array([2 + number]), images[order[-1:]]
        raise AssertionError('the image was left waiting')

    policy = np.float32([values[:2].mean(), -np.inf])
    for answers in answer(supply(), policy, chunk_size=(1, 24, 24), deadline=0.02):
        if 1 in answers.ids:
            answered.set()
    assert answered.is_set()


def test_an_image_that_is_due_is_answered_while_the_supply_is_silent(answer, images):
    """Two images fill no chunk; one of them waits for others for ever, the other one until soon."""
    answered, results = threading.Event(), []

    def supply():
        yield np.arange(2), images[:2], [np.inf, time.monotonic() + 0.05]
        assert answered.wait(timeout=60)

    for answers in answer(supply(), NEVER, chunk_size=(1, 24, 24)):
        results.append(sorted(answers.ids.tolist()))
        answered.set()
    assert results in ([[1], [0]], [[0, 1]])  # a chunk that runs takes along the images that wait


def test_a_policy_may_be_asked_for_anew_at_every_chunk(answer, images):
    """All images leave at the first exit until the policy says otherwise."""
    leave = [True]

    def supply():
        yield images[:4]
        leave[0] = False
        yield images[4:8]

    answered = answer(supply(), lambda: ALWAYS if leave[0] else NEVER, ahead=1)
    exits = {int(i): int(e) for part in answered for i, e in zip(part.ids, part.prediction.exit_index, strict=True)}
    assert set(exits) == set(range(8))
    assert [exits[i] for i in range(4, 8)] == [2] * 4
    with pytest.raises(ValueError, match='thresholds: a network with 3 exits'):
        list(answer([images[:4]], lambda: [0.0]))


BAD = {
    'are to be alike': np.zeros((2, 5), np.float32),
    'are to be .*float64': np.zeros((2, 4, 4, 1)),
    'images: expected arrays': (1, 2, 3),
    'images: expected': None,
    'supply: got a tuple of 4': (1, 2, 3, 4),
    'ids: got shape': (np.arange(3), np.zeros((2, 4, 4, 1), np.float32)),
    r'due: got shape \(2,\) for 1 images': (np.arange(1), np.zeros((1, 4, 4, 1), np.float32), [0.0, 1.0]),
}


@pytest.mark.parametrize('message', BAD)
def test_what_is_no_batch_ends_the_stream_after_the_others_are_answered(answer, images, policy, expected, message):
    answered, supply = [], [(np.arange(100, 106), images[:6]), BAD[message], images]
    with pytest.raises(ValueError, match=message):
        answered.extend(iter(answer(supply, policy).__next__, None))
    check_answers(answered, expected, range(6))


class Handing(nn.Module):
    """Two inputs; hands on two arrays, one of them integers."""

    @nn.compact
    def __call__(self, a, b):
        large = ((a + b) > 0).astype(int).cumsum(1)
        return nn.Dense(3)(a + b), nn.Dense(3)(a * large)


def test_inputs_that_are_a_tuple_come_with_ids_and_stages_hand_on_any_dtype(getkey):
    model, pair = Handing(), tuple(np.asarray(jax.random.normal(getkey(), (7, 4))) for _ in range(2))
    variables, answer, exits = model.init(getkey(), *pair), stream(model, chunk_size=3), {}
    for part in answer(variables, [(np.arange(7), pair)], [0.9]):
        exits.update(zip(part.ids.tolist(), part.prediction.exit_index.tolist(), strict=True))
    assert [exits[i] for i in range(7)] == dense(model)(variables, pair, [0.9]).exit_index.tolist()
    with pytest.raises(ValueError, match='ids: got shape'):
        list(answer(variables, [pair], [0.9]))


def test_memory_is_bounded_and_a_caller_who_stops_ends_the_reading(answer, images):
    """An endless supply is read a few batches ahead, no further."""
    read, closed = itertools.count(), threading.Event()

    def supply():
        try:
            for _ in read:
                yield images[:4]
        finally:
            closed.set()

    answers = answer(supply(), ALWAYS, ahead=3)
    for _ in range(4):
        next(answers)
    time.sleep(0.3)
    # 4 given out, 3 taken at once, 3 read ahead, one in the reader's hand.
    assert next(read) <= 4 + 3 + 3 + 1
    assert not closed.is_set()
    answers.close()
    assert closed.wait(timeout=60)


def test_impossible_settings_are_refused_before_anything_is_read(network, answer):
    for name, value in (('deadline', -1.0), ('deadline', np.nan), ('workers', 0), ('ahead', 0), ('exits', [2, 0])):
        with pytest.raises(ValueError, match=name):
            stream(network[0], **{'chunk_size': 2, name: value})
    with pytest.raises(ValueError, match='thresholds'):
        answer(map(pytest.fail, ['read']), [0.0, np.nan])
