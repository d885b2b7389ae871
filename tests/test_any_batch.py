"""Executors and plans that compile at a few sizes, and answer batches of any size without compiling again."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_inference import CRITERIA, check_same

import branchy_jax as bj
from branchy_jax.inference import Plan, compacted, dense, exit_outputs, sequential
from branchy_jax.inference.any_batch import pieces, sizes_up_to
from branchy_jax.inference.planning.candidates import Way

EXECUTORS = {
    'dense': dense,
    'sequential': sequential,
    'sequential × 2': functools.partial(sequential, workers=2),
    'loop': functools.partial(compacted, chunk_size=(5, 4, 3), on_host=False),
    'host': functools.partial(compacted, chunk_size=(5, 4, 3), on_host=True),
    'host × 2': functools.partial(compacted, chunk_size=(5, 4, 3), on_host=True, workers=2),
}
MOST = 12


@pytest.fixture(scope='module')
def many(network):
    """Images, thresholds between them, and what `dense` says of all: NumPy, so that a slice compiles nothing."""
    model, variables, images = network
    images = np.concatenate([np.asarray(images), np.asarray(images) * np.float32(0.7)])
    uncertainty = np.sort(exit_outputs(model, variables, images).uncertainty[:2], axis=1)
    thresholds = np.array([uncertainty[0, 23:25].mean(), uncertainty[1, 23:25].mean()], np.float32)
    return images, thresholds, jax.tree.map(np.asarray, dense(model)(variables, images, thresholds))


def sizes_drawn(most):
    """25 sizes, the smallest and the largest of each kind among them."""
    return [1, 2, MOST, MOST + 1, most, *np.random.default_rng(0).integers(1, most + 1, 20)]


@given(count=st.integers(1, 300), most=st.integers(1, 70))
def test_pieces_hold_every_row_once_and_are_more_than_half_full(count, most):
    sizes = sizes_up_to(most)
    cuts = list(pieces(count, sizes))
    assert [row for start, stop, _ in cuts for row in range(start, stop)] == list(range(count))
    assert all(size in sizes and size / 2 < stop - start <= size for start, stop, size in cuts)
    assert (sizes[0], sizes[-1]) == (most, 1)


def test_pieces_of_one_size_may_be_emptier():
    assert list(pieces(9, (8,))) == [(0, 8, 8), (8, 9, 8)]


@pytest.mark.parametrize('build', EXECUTORS.values(), ids=EXECUTORS)
def test_no_size_compiles_after_warm_up(network, many, compilations, build):
    model, variables, _ = network
    images, thresholds, expected = many
    execute = build(model, max_batch=MOST)
    execute.warm_up(variables, images, thresholds)
    before, found = compilations.count, []
    sizes = sizes_drawn(len(images))
    for number, size in enumerate(sizes):
        batch = images[-size:]
        batch = [batch, jax.device_put(batch), jax.device_put(batch, jax.devices()[0])][number % 3]
        found.append(execute(variables, batch, thresholds))
    assert compilations.count == before
    for size, answer in zip(sizes, found, strict=True):
        assert isinstance(answer.label, jax.Array)
        check_same(answer, jax.tree.map(lambda x, size=size: x[-size:], expected))


@pytest.mark.parametrize('name', ['loop', 'host'])
def test_criteria_that_remember_do_so_in_pieces(network, name):
    model, variables, images = network
    policy = bj.ExitPolicy(CRITERIA[1], np.float32([0.9, 0.9]))
    execute = EXECUTORS[name](model, max_batch=MOST)
    check_same(execute(variables, images[:13], policy), dense(model)(variables, images[:13], policy))


@pytest.mark.parametrize('build', EXECUTORS.values(), ids=EXECUTORS)
def test_empty_and_bad_batches_are_answered_as_ever(network, build):
    model, variables, images = network
    execute, policy = build(model, max_batch=MOST), np.float32([0.9, 0.9])
    assert execute(variables, images[:0], policy).label.shape == (0,)
    with pytest.raises(ValueError, match='images: expected'):
        execute(variables, images[:, :2], policy)


@pytest.mark.parametrize('name', ['dense', 'sequential', 'sequential × 2', 'loop'])
def test_under_jit_and_vmap_nothing_is_padded(network, many, name):
    model, variables, images = network
    execute, settings = EXECUTORS[name](model, max_batch=MOST), np.stack([many[1]] * 2)
    expected = dense(model)(variables, images[:7], many[1])
    check_same(jax.jit(execute)(variables, images[:7], many[1]), expected)
    for count in (7, MOST + 2):  # one piece, and two
        batch = np.asarray(images[:count])
        expected = dense(model)(variables, batch, many[1])
        check_same(jax.jit(lambda given, batch=batch: execute(given, batch, many[1]))(variables), expected)
    expected = dense(model)(variables, images[:7], many[1])
    mapped = jax.vmap(execute, in_axes=(None, None, 0))(variables, images[:7], settings)
    check_same(jax.tree.map(lambda x: x[1], mapped), expected)


def test_host_driven_says_that_it_cannot_be_traced(network):
    model, variables, images = network
    with pytest.raises(ValueError, match='on_host=False'):
        jax.jit(EXECUTORS['host'](model, max_batch=MOST))(variables, images, jnp.zeros(2))


@pytest.mark.parametrize('on_host', [True, False])
def test_what_fills_up_a_batch_goes_through_no_stage(on_host):
    """Hard images fill up a piece: only the real one may come to the second stage, in one chunk of its own."""
    ran = []

    def stage(hidden):
        jax.debug.callback(lambda rows: ran.append(rows.tolist()), hidden[:, 0])
        return hidden

    model = bj.BranchyNet(stages=(lambda x: x, stage), exits=(lambda x: x, lambda x: x))
    images = np.float32([[9, 0], [9, 0], [9, 0], [9, 0], [9, 0], [0, 0], [0, 0]])  # the last two stay
    execute = compacted(model, chunk_size=(7, 1), on_host=on_host, max_batch=10)
    answer = execute({}, images, [0.1])
    jax.block_until_ready(answer)
    jax.effects_barrier()
    assert answer.exit_index.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert ran == [[0.0], [0.0]]


@pytest.mark.parametrize('build', EXECUTORS.values(), ids=EXECUTORS)
@pytest.mark.parametrize('max_batch', [0, -1, 2.5, True, 'all'])
def test_impossible_largest_batches_are_refused(network, build, max_batch):
    with pytest.raises(ValueError, match='max_batch: got'):
        build(network[0], max_batch=max_batch)


def test_workers_run_pieces_at_the_same_time():
    """Each of two pieces waits for the other; what goes wrong in a piece comes out."""
    together, warm = threading.Barrier(2, timeout=20), threading.Event()

    def meet(hidden):
        if warm.is_set():
            together.wait()
        return hidden

    def stage(hidden):
        return jax.pure_callback(meet, jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), hidden)

    execute = sequential(bj.BranchyNet(stages=(stage,), exits=(lambda x: x,)), max_batch=1, workers=2)
    execute.warm_up({}, np.ones((1, 2), np.float32), [])  # the first call of a program keeps others waiting
    warm.set()
    assert execute({}, np.float32([[3, 0], [0, 3]]), []).label.tolist() == [0, 1]
    together.abort()
    with pytest.raises(Exception, match='BrokenBarrierError'):
        execute({}, np.ones((2, 2), np.float32), [])


@pytest.mark.parametrize('options', [{'workers': 0, 'max_batch': 4}, {'workers': 2}])
def test_impossible_workers_are_refused(network, options):
    with pytest.raises(ValueError, match='workers: got'):
        sequential(network[0], **options)


WAYS = {
    'dense': Way('dense', 'dense', (0, 1, 2)),
    'last exit': Way('last exit', 'dense', (2,)),
    'sequential': Way('sequential', 'sequential', (0, 2)),
    'sequential × 2': Way('sequential × 2, 5', 'sequential', (0, 1, 2), chunk_sizes=(5,), workers=2),
    'loop': Way('loop', 'compacted', (0, 1, 2), chunk_sizes=(5, 4, 3)),
    'host': Way('host', 'compacted', (0, 1, 2), chunk_sizes=(5, 4, 3), on_host=True, workers=2),
}


def planned_as(way, network, thresholds):
    """A plan that a race would have made, were this way the fastest."""
    model, variables, images = network
    run, applied = way.build(model, MOST), np.where(np.isin([0, 1], way.exits), thresholds, -np.inf)
    networks, inputs = ((model, variables),) * 2, jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32)
    policy = bj.ExitPolicy(bj.criteria.entropy, jnp.asarray(applied, jnp.float32))
    return Plan(way, policy, MOST, (), None, run, variables, networks, inputs)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_plans_compile_nothing_after_warm_up_in_many_threads(network, many, compilations, way):
    """25 sizes, dealt out to four threads that share the plan."""
    model, variables, _ = network
    images, thresholds, _ = many
    planned = planned_as(way, network, thresholds)
    planned.warm_up()
    expected = jax.tree.map(np.asarray, dense(model)(variables, images, planned.policy))
    sizes, before = sizes_drawn(len(images)), compilations.count
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: planned(images[-size:]), sizes))
    assert compilations.count == before
    for size, answer in zip(sizes, found, strict=True):
        check_same(answer, jax.tree.map(lambda x, size=size: x[-size:], expected))


def test_single_images_of_a_plan_skip_what_they_do_not_need():
    """Where `dense` is fastest in a batch, single images still leave at the first exit."""
    ran = []

    def stage(hidden):
        jax.debug.callback(lambda rows: ran.append(len(rows)), hidden)
        return hidden

    model = bj.BranchyNet(stages=(lambda x: x, stage), exits=(lambda x: x, lambda x: x))
    images = np.float32([[9, 0]] * 17)
    run = Way('dense', 'dense', (0, 1)).build(model, 16)
    for count, rows in ((1, []), (16, [16]), (17, [16])):
        ran.clear()
        jax.block_until_ready(run({}, images[:count], [0.1]))
        jax.effects_barrier()
        assert ran == rows


def test_arrays_of_others_are_taken(network):
    """Of a size that is compiled, too, where other arrays go straight in."""

    class Lent:
        def __init__(self, values):
            self._values, self.shape, self.dtype = values, values.shape, values.dtype

        def __array__(self, dtype=None, copy=None):
            return self._values if dtype is None else self._values.astype(dtype)

    model, variables, images = network
    images, thresholds = np.asarray(images[:4]), [0.5, 0.5]
    found = dense(model, max_batch=4)(variables, Lent(images), thresholds)
    check_same(found, dense(model)(variables, images, thresholds))
