"""Executors that do less than `dense` and answer the same."""

import collections
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, IMAGE_SHAPE, equations
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from test_inference import CRITERIA, check_same

import branchy_jax as bj
from branchy_jax.inference import compacted, compiler_options, dense, exit_outputs, sequential, staged

CRITERION = {criterion.name: criterion for criterion in CRITERIA}
BATCH_SIZES = (0, 1, 5, 24)
CHUNK_SIZES = (1, 3, 40, (5, 2, 1))


@functools.cache
def executors(model):
    """Every executor of batches."""
    found = {'sequential': sequential(model)}
    for size in CHUNK_SIZES:
        found[f'loop {size}'] = compacted(model, chunk_size=size, on_host=False)
        found[f'host {size}'] = compacted(model, chunk_size=size, on_host=True)
    found['host 3 × 2'] = compacted(model, chunk_size=3, on_host=True, workers=2)
    return found


@pytest.fixture(scope='module')
def uncertainty(network):
    model, variables, images = network
    return {name: exit_outputs(model, variables, images, criterion=c).uncertainty for name, c in CRITERION.items()}


def between(values):
    """Returns thresholds that lie clearly between neighbouring values: rounding differs with the batch size."""
    ordered = np.sort(values)
    return [-np.inf, np.inf, *((a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-4)]


@pytest.mark.parametrize('criterion', CRITERION)
@settings(max_examples=510)
@given(data=st.data())
def test_all_executors_are_dense(network, uncertainty, criterion, data):
    """Whatever thresholds, batch and chunk sizes: 1,020 cases, two executors each."""
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
def test_everyone_leaves_at_one_exit(network, name, leaves):
    model, variables, images = network
    thresholds = [np.inf if n == leaves else -np.inf for n in range(2)]
    found = executors(model)[name](variables, images, thresholds)
    assert set(found.exit_index.tolist()) == {leaves}
    check_same(found, dense(model)(variables, images, thresholds))


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
        functools.partial(dense, max_batch=2),
        functools.partial(sequential, max_batch=2),
        functools.partial(compacted, chunk_size=2, max_batch=2),
    ],
)
def test_compiler_options_reach_the_compiler(network, build):
    model, variables, images = network
    with pytest.raises(Exception, match='no_such_option'):
        build(model, compiler_options={'no_such_option': 1})(
            variables, images[0 if build is staged else slice(2)], [0, 0]
        )


def test_all_cores_are_used_where_there_are_several_and_the_compiler_knows_how(monkeypatch):
    monkeypatch.setattr(compiler_options, 'ALL_CORES', {})
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 2)
    assert compiler_options.may_use_all_cores() == (jax.default_backend() == 'cpu')
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 1)
    assert not compiler_options.may_use_all_cores()
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 2)
    monkeypatch.setattr(compiler_options, 'ALL_CORES', {'no_such_option': 1})
    assert not compiler_options.may_use_all_cores()


def test_one_core_is_used_where_the_compiler_knows_how(monkeypatch):
    monkeypatch.setattr(compiler_options, 'ONE_CORE', {})
    assert compiler_options.may_use_one_core() == (jax.default_backend() == 'cpu')
    monkeypatch.setattr(compiler_options, 'ONE_CORE', {'no_such_option': 1})
    assert not compiler_options.may_use_one_core()


@pytest.mark.parametrize('build', [dense, staged, sequential, functools.partial(compacted, chunk_size=2)])
@pytest.mark.parametrize('exits', [[], [0], [2, 0], [0, 0, 2], [0, 3], [-1, 2]])
def test_impossible_exits_are_refused(network, build, exits):
    with pytest.raises(ValueError, match='exits: got'):
        build(network[0], exits=exits)


def test_a_criterion_that_remembers_needs_every_exit(network):
    model, variables, images = network
    with pytest.raises(ValueError, match='remembers earlier exits'):
        dense(model, exits=[2])(variables, images, bj.ExitPolicy(CRITERIA[1], jnp.zeros(2)))


@pytest.mark.parametrize('chunk_size', [0, -1, 2.5, (1, 2), (1, 2, 0), 'two'])
def test_impossible_chunk_sizes_are_refused(network, chunk_size):
    with pytest.raises(ValueError, match='chunk_size: got'):
        compacted(network[0], chunk_size=chunk_size)


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
    with pytest.raises(ValueError, match='images: expected'):
        run(variables, images[:, :2], [0.0, 0.0])


def counting_network(runs, traces):
    """A network whose stages count how often they run, and for how many images."""

    def stage(n):
        def run(hidden):
            traces[n] += 1
            jax.debug.callback(lambda hidden: runs.update({n: len(hidden)}), hidden)
            return hidden + 1

        return run

    return bj.BranchyNet(
        stages=tuple((bj.models.layers.flatten, stage(n)) for n in range(3)),
        exits=tuple(nn.Dense(CLASSES) for _ in range(3)),
        image_shape=IMAGE_SHAPE,
    )


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
    model = counting_network(runs, collections.Counter())
    variables = model.init(jax.random.key(0), images)
    execute = build(model)
    for thresholds, counts in zip(([np.inf, np.inf], [-np.inf, np.inf]), expected, strict=True):
        jax.effects_barrier()
        runs.clear()
        jax.block_until_ready(execute(variables, images, thresholds))
        jax.effects_barrier()
        assert dict(runs) == counts


def test_staged_runs_skipped_stages_zero_times(network):
    runs, image = collections.Counter(), network[2][0]
    model = counting_network(runs, collections.Counter())
    variables = model.init(jax.random.key(0), image[None])
    for leaves in range(3):
        jax.effects_barrier()
        runs.clear()
        thresholds = [np.inf if n >= leaves else -np.inf for n in range(2)]
        jax.block_until_ready(staged(model)(variables, image, thresholds))
        jax.effects_barrier()
        assert dict(runs) == dict.fromkeys(range(leaves + 1), 1)


@pytest.mark.parametrize('on_host', [True, False])
def test_one_compilation_per_stage_however_many_survive(network, on_host):
    traces = collections.Counter()
    model, images = counting_network(collections.Counter(), traces), network[2]
    variables = model.init(jax.random.key(0), images)
    uncertainty = exit_outputs(model, variables, images).uncertainty
    execute = compacted(model, chunk_size=4, on_host=on_host)
    survivors, traced = set(), []
    traces.clear()
    for quantile in np.linspace(0, 1, 9):
        thresholds = np.quantile(uncertainty[:2], quantile, axis=1)
        survivors.add(int((execute(variables, images, thresholds).exit_index > 0).sum()))
        traced.append(dict(traces))
    assert len(survivors) > 5
    assert all(now == traced[-1] for now in traced[3 if on_host else 0 :])
    assert not on_host or set(traced[-1].values()) == {1}


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
