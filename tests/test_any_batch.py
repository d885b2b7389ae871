"""Plans compile at a few sizes, and answer batches of any size without compiling again."""

import threading
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_inference import check_same

import branchy_jax as bj
from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference import dense
from branchy_jax.inference.planning.candidates import Candidate
from branchy_jax.inference.planning.programs import Programs, pieces, sizes_up_to

MOST = 12
CHUNKED = {'exits': (0, 1, 2), 'chunk_sizes': (5, 4, 3)}
CANDIDATES = [
    Candidate('dense', 'dense', (0, 2)),
    Candidate('sequential × 2', 'sequential', (0, 1, 2), chunk_sizes=(5,), workers=2),
    Candidate('loop', 'compacted', **CHUNKED),
    Candidate('host × 2', 'compacted', **CHUNKED, on_host=True, workers=2),
]


def runner(candidate, model, variables, inputs, policy, batch_size=MOST):
    programs = Programs(model, variables, bj.calling.with_batch(inputs, 1), None)
    policy = jax.tree.map(jnp.asarray, as_policy(policy))
    return programs.runner(candidate, policy, batch_size)


@given(count=st.integers(1, 300), most=st.integers(1, 70))
def test_pieces_hold_every_row_once_and_are_more_than_half_full(count, most):
    sizes = sizes_up_to(most)
    cuts = list(pieces(count, sizes))
    assert [row for start, stop, _ in cuts for row in range(start, stop)] == list(range(count))
    assert all(size in sizes and size / 2 < stop - start <= size for start, stop, size in cuts)
    assert (sizes[0], sizes[-1]) == (most, 1)
    assert list(pieces(9, (8,))) == [(0, 8, 8), (8, 9, 8)]  # pieces of one size may be emptier


@pytest.mark.parametrize('candidate', CANDIDATES, ids=lambda candidate: candidate.name)
def test_no_size_compiles_after_warm_up_in_many_threads(network, compilations, candidate):
    """NumPy's, JAX's and committed arrays, dealt out to four threads; chunks with a criterion that looks back."""
    model, variables, images = network
    images = np.concatenate([np.asarray(images), np.asarray(images) * np.float32(0.7)])
    criterion = bj.criteria.ensemble() if candidate.executor == 'compacted' else bj.criteria.entropy
    never = bj.ExitPolicy(criterion, np.full(2, -np.inf, np.float32))
    uncertainty = np.sort(bj.inference.exit_outputs(model, variables, images, criterion=criterion).uncertainty, axis=1)
    thresholds = uncertainty[:2, 23:25].mean(1)
    run = runner(candidate, model, variables, images, never.replace(thresholds=thresholds))
    run.warm_up()
    applied = np.where(np.isin([0, 1], candidate.exits), thresholds, -np.inf).astype(np.float32)
    expected = jax.tree.map(np.asarray, dense(model)(variables, images, never.replace(thresholds=applied)))
    assert len(set(expected.exit_index.tolist())) > 1
    sizes = [1, 2, MOST, MOST + 1, len(images), *np.random.default_rng(0).integers(1, len(images) + 1, 10)]
    placed = [lambda batch: batch, jax.device_put, lambda batch: jax.device_put(batch, jax.devices()[0])]
    batches = [placed[number % 3](images[-size:]) for number, size in enumerate(sizes)]
    before = compilations.count
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, batches))
    assert run(images[:0]).label.shape == (0,)
    assert compilations.count == before
    for size, answer in zip(sizes, results, strict=True):
        assert isinstance(answer.label, jax.Array)
        check_same(answer, jax.tree.map(lambda x, size=size: x[-size:], expected), rtol=1e-4, atol=1e-5)


class Recording(nn.Module):
    """Hands the images on unchanged; a callback sees the images that come to the second stage."""

    see: object

    @nn.compact
    def __call__(self, x):
        seen = jax.pure_callback(self.see, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method='sequential')
        return x, seen


def recording():
    rows = []

    def see(x):
        rows.append(np.asarray(x)[:, 0].tolist())
        return x

    return Recording(see), rows


@pytest.mark.parametrize('on_host', [True, False])
def test_padding_runs_through_no_stage(on_host):
    """Hard images are the padding: only the two real ones come to the second stage, each in a chunk of its own."""
    model, rows = recording()
    images = np.float32([[9, 0], [9, 0], [9, 0], [9, 0], [9, 0], [0, 0], [0, 0]])
    candidate = Candidate('', 'compacted', (0, 1), optimized=False, chunk_sizes=(7, 1), on_host=on_host)
    answer = runner(candidate, model, {}, images, [0.1], 10)(images)
    assert answer.exit_index.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert rows == [[0.0], [0.0]]


def test_single_images_of_a_plan_leave_early():
    """Where `dense` is fastest in a batch, a single image still leaves at the first exit."""
    model, rows = recording()
    images = np.float32([[9, 0]] * 17)
    run = runner(Candidate('', 'dense', (0, 1), optimized=False), model, {}, images, [0.1], 16)
    for count, seen in ((1, []), (16, [16]), (17, [16])):
        rows.clear()
        jax.block_until_ready(run(images[:count]))
        assert [len(values) for values in rows] == seen


def test_workers_run_pieces_at_the_same_time():
    """Each of two pieces waits for the other; an error in a piece is raised."""
    together, warm = threading.Barrier(2, timeout=20), threading.Event()

    def meet(x):
        if warm.is_set():
            together.wait()
        return x

    images = np.float32([[0, 3], [0, 3]])
    candidate = Candidate('', 'sequential', (0, 1), optimized=False, chunk_sizes=(1,), workers=2)
    run = runner(candidate, Recording(meet), {}, images, [-np.inf])
    run.warm_up()  # the first call of a program makes others wait
    warm.set()
    assert run(images).label.tolist() == [1, 1]
    together.abort()
    with pytest.raises(Exception, match='BrokenBarrierError'):
        jax.block_until_ready(run(images))


def test_arrays_of_other_libraries_are_taken():
    class Lent:
        def __init__(self, values):
            self._values, self.shape, self.dtype = values, values.shape, values.dtype

        def __array__(self, dtype=None, copy=None):
            return self._values if dtype is None else self._values.astype(dtype)

    images = np.float32([[9, 0], [0, 3]])
    run = runner(Candidate('', 'dense', (0, 1), optimized=False), recording()[0], {}, images, [0.1], 2)
    assert run(Lent(images)).label.tolist() == [0, 1]
