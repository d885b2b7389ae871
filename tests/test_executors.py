"""Executors that do less than `dense` and answer the same."""

import collections
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, equations
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from test_inference import CRITERIA, check_same

import branchy_jax as bj
from branchy_jax.inference import compacted, compiler_options, dense, exit_outputs, sequential, staged

CRITERION = {criterion.name: criterion for criterion in CRITERIA}
BATCH_SIZES = (0, 1, 5, 24)
CHUNK_SIZES = (1, 3, 40, (5, 2, 1))


def executors(model):
    """Every executor of batches."""
    built = {'sequential': sequential(model)}
    for size in CHUNK_SIZES:
        built[f'loop {size}'] = compacted(model, chunk_size=size, on_host=False)
        built[f'host {size}'] = compacted(model, chunk_size=size, on_host=True)
    built['host 3 × 2'] = compacted(model, chunk_size=3, on_host=True, workers=2)
    return built


@pytest.fixture(scope='module')
def uncertainty(network):
    model, variables, images = network
    return {name: exit_outputs(model, variables, images, criterion=c).uncertainty for name, c in CRITERION.items()}


def between(values):
    """Returns thresholds that lie clearly between neighbouring values: rounding differs with the batch size."""
    ordered = np.sort(values)
    return [-np.inf, np.inf, *((a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-4)]


@pytest.mark.parametrize('criterion', CRITERION)
@settings(max_examples=100)
@given(data=st.data())
def test_all_executors_are_dense(network, uncertainty, criterion, data):
    """Whatever thresholds, batch and chunk sizes, two executors each."""
    model, variables, images = network
    batch_size = data.draw(st.sampled_from(BATCH_SIZES), label='batch size')
    seed = data.draw(st.integers(0, 1000), label='which images')
    thresholds = [data.draw(st.sampled_from(between(uncertainty[criterion][n]))) for n in range(2)]
    batch = np.random.default_rng(seed).permutation(np.asarray(images))[:batch_size]
    policy = bj.ExitPolicy(CRITERION[criterion], np.float32(thresholds))
    expected = dense(model)(variables, batch, policy)
    built = executors(model)
    for name in data.draw(st.tuples(*[st.sampled_from(sorted(built))] * 2), label='executors'):
        check_same(built[name](variables, batch, policy), expected)


@pytest.mark.parametrize('name', ['sequential', 'loop 3', 'host 3', 'host 3 × 2', 'host (5, 2, 1)'])
@pytest.mark.parametrize('leaves', [0, 1, 2])
def test_all_leave_at_one_exit(network, name, leaves):
    model, variables, images = network
    thresholds = [np.inf if n == leaves else -np.inf for n in range(2)]
    answer = executors(model)[name](variables, images, thresholds)
    assert set(answer.exit_index.tolist()) == {leaves}
    check_same(answer, dense(model)(variables, images, thresholds))


@pytest.mark.parametrize('exits', [(2,), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    'build',
    [
        dense,
        sequential,
        functools.partial(compacted, chunk_size=3, on_host=False),
        functools.partial(compacted, chunk_size=3, on_host=True),
    ],
)
def test_exits_left_out_are_thresholds_of_minus_infinity(network, uncertainty, exits, build):
    model, variables, images = network
    thresholds = np.median(uncertainty['entropy'][:2], axis=1)
    as_if = np.where(np.isin([0, 1], exits), thresholds, -np.inf)
    check_same(build(model, exits=exits)(variables, images, thresholds), dense(model)(variables, images, as_if))


def test_single_images_with_exits_left_out(network, uncertainty):
    model, variables, images = network
    thresholds = np.median(uncertainty['entropy'][:2], axis=1)
    expected = dense(model)(variables, images, [-np.inf, thresholds[1]])
    for b in range(4):
        alone = jax.tree.map(lambda x, b=b: x[b], expected)
        check_same(staged(model, exits=[1, 2])(variables, images[b], thresholds), alone)
        kept = sequential(model, exits=[1, 2])(variables, images[b : b + 1], thresholds)
        check_same(jax.tree.map(lambda x: x[0], kept), alone)


@pytest.mark.parametrize(
    'build',
    [
        dense,
        staged,
        sequential,
        functools.partial(compacted, chunk_size=2),
        functools.partial(compacted, chunk_size=2, on_host=False),
    ],
)
def test_compiler_options_reach_the_compiler(network, build):
    model, variables, images = network
    with pytest.raises(Exception, match='no_such_option'):
        build(model, compiler_options={'no_such_option': 1})(
            variables, images[0 if build is staged else slice(2)], [0, 0]
        )


def test_all_cores_are_used_where_there_are_several(all_compiler_options, monkeypatch):
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 2)
    assert compiler_options.may_use_all_cores() == compiler_options.may_use_one_core()  # a compiler knows both or none
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 1)
    assert not compiler_options.may_use_all_cores()


@pytest.mark.parametrize('build', [dense, staged, sequential, functools.partial(compacted, chunk_size=2)])
@pytest.mark.parametrize('exits', [[], [0], [2, 0], [0, 0, 2], [0, 3], [-1, 2]])
def test_impossible_exits_are_refused(network, build, exits):
    model, variables, images = network
    with pytest.raises(ValueError, match='exits: got'):  # those of a larger network when it is called
        build(model, exits=exits)(variables, images[0] if build is staged else images, [0.0, 0.0])


def test_a_criterion_that_uses_earlier_exits_needs_every_exit(network):
    model, variables, images = network
    with pytest.raises(ValueError, match="exits: criterion 'running mean' uses earlier exits"):
        dense(model, exits=[2])(variables, images, bj.ExitPolicy(CRITERIA[1], jnp.zeros(2)))


@pytest.mark.parametrize('chunk_size', [0, -1, 2.5, (1, 2), (1, 2, 0), 'two'])
def test_impossible_chunk_sizes_are_refused(network, chunk_size):
    with pytest.raises(ValueError, match='chunk_size: got'):
        compacted(network[0], chunk_size=chunk_size)(network[1], network[2], [0.0, 0.0])


def test_impossible_workers_are_refused(network):
    with pytest.raises(ValueError, match='workers: got 0'):
        compacted(network[0], chunk_size=1, workers=0)
    with pytest.raises(ValueError, match='workers: got 2 with on_host=False'):
        compacted(network[0], chunk_size=1, workers=2, on_host=False)


def test_host_driven_says_that_it_cannot_be_traced(network):
    model, variables, images = network
    execute = compacted(model, chunk_size=4, on_host=True)
    with pytest.raises(ValueError, match='on_host=False'):
        jax.jit(execute)(variables, images, jnp.zeros(2))


def test_loops_work_under_jit_and_vmap(network, uncertainty):
    model, variables, images = network
    execute = compacted(model, chunk_size=5, on_host=False)
    settings = jnp.asarray(np.quantile(uncertainty['entropy'][:2], [0.2, 0.8], axis=1), jnp.float32)
    mapped = jax.jit(jax.vmap(execute, in_axes=(None, None, 0)))(variables, images, settings)
    for n, thresholds in enumerate(settings):
        check_same(jax.tree.map(lambda x, n=n: x[n], mapped), dense(model)(variables, images, thresholds))


@pytest.mark.parametrize('execute', ['dense', 'sequential', 'loop 3', 'host 3', 'host 3 × 2'])
def test_bad_input_is_refused_by_all(network, execute):
    model, variables, images = network
    run = {**executors(model), 'dense': dense(model)}[execute]
    for thresholds in ([0.0], [0.0, np.nan], [[0.0, 0.0]], 'low'):
        with pytest.raises(ValueError, match='thresholds:'):
            run(variables, images, thresholds)
    with pytest.raises(ValueError, match='inputs: their shape does not fit the variables'):
        run(variables, images[:, :2], [0.0, 0.0])


def counting_network(runs):
    """A network whose stages count for how many images they run."""

    def count(n, x):
        runs[n] += len(x)
        return x

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, images):
            x, logits = images.reshape(images.shape[0], -1), []
            for n in range(3):
                counted = functools.partial(count, n)
                x = jax.pure_callback(counted, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + 1
                logits.append(nn.Dense(CLASSES)(x))
            return tuple(logits)

    return Counting()


@pytest.mark.parametrize(
    ('build', 'expected'),
    [
        (sequential, [{0: 24}, {0: 24, 1: 24}]),
        (functools.partial(compacted, chunk_size=8, on_host=False), [{0: 24}, {0: 24, 1: 24}]),
        (functools.partial(compacted, chunk_size=8, on_host=True), [{0: 24}, {0: 24, 1: 24}]),
        (functools.partial(compacted, chunk_size=8, on_host=True, workers=2), [{0: 24}, {0: 24, 1: 24}]),
        (dense, [{0: 24, 1: 24, 2: 24}] * 2),
    ],
)
def test_a_skipped_stage_runs_zero_times(network, build, expected):
    runs, images = collections.Counter(), network[2]
    model = counting_network(runs)
    variables = model.init(jax.random.key(0), images)
    execute = build(model)
    for thresholds, counts in zip(([np.inf, np.inf], [-np.inf, np.inf]), expected, strict=True):
        runs.clear()
        jax.block_until_ready(execute(variables, images, thresholds))
        assert dict(runs) == counts


def test_staged_runs_skipped_stages_zero_times(network):
    runs, image = collections.Counter(), network[2][0]
    model = counting_network(runs)
    variables = model.init(jax.random.key(0), image[None])
    for leaves in range(3):
        runs.clear()
        thresholds = [np.inf if n >= leaves else -np.inf for n in range(2)]
        jax.block_until_ready(staged(model)(variables, image, thresholds))
        assert dict(runs) == dict.fromkeys(range(leaves + 1), 1)


@pytest.mark.parametrize('on_host', [True, False])
def test_one_compilation_per_stage_however_many_survive(network, uncertainty, compilations, on_host):
    model, variables, images = network
    execute = compacted(model, chunk_size=7, on_host=on_host)
    execute(variables, images, np.full(2, -np.inf))
    before, survivors = compilations.count, set()
    for quantile in np.linspace(0, 1, 9):
        thresholds = np.quantile(uncertainty['entropy'][:2], quantile, axis=1)
        answer = execute(variables, images, thresholds)
        survivors.add(int((np.asarray(answer.exit_index) > 0).sum()))
    assert len(survivors) > 5
    assert compilations.count == before


@pytest.mark.parametrize('name', ['dense', 'sequential', 'loop', 'sharded', 'staged'])
def test_no_program_writes_or_reads_behind_a_buffer(network, uncertainty, name):
    """Compilers disagree about what happens there: IREE has put such a write into row 0."""
    model, variables, images = network
    mesh = bj.sharding.data_mesh(1)
    run = {
        'dense': dense,
        'sequential': sequential,
        'staged': staged,
        'loop': functools.partial(compacted, chunk_size=5, on_host=False),
        'sharded': functools.partial(bj.inference.sharded, mesh=mesh, chunk_size=5),
    }[name](model)
    policy = bj.ExitPolicy(bj.criteria.entropy, np.median(uncertainty['entropy'][:2], axis=1).astype(np.float32))
    inputs = images[0] if name == 'staged' else images
    modes = [
        equation.params['mode']
        for equation in equations(jax.make_jaxpr(lambda *arguments: run(*arguments))(variables, inputs, policy).jaxpr)
        if equation.primitive.name in ('gather', 'scatter', 'scatter-add')
    ]
    assert bool(modes) == (name in ('loop', 'sharded'))
    assert set(modes) <= {jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS, jax.lax.GatherScatterMode.CLIP}
    if name != 'sharded':  # which checkify does not know
        checked = checkify.checkify(lambda *arguments: run(*arguments), errors=checkify.index_checks)
        assert checked(variables, inputs, policy)[0].get() is None
