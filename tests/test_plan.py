"""The planner: forecasts against brute force, trials, and plans that equal `dense`."""

import functools
import gc
import itertools
import re
import sys
import time
import types
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_inference
from conftest import Function, random_variables
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.inference import Plan, dense, exit_outputs, plan, segment_times
from branchy_jax.inference.planning import candidates
from branchy_jax.inference.planning import plan as planning
from branchy_jax.inference.planning import times as planning_times
from branchy_jax.inference.planning.candidates import Candidate, Progress, candidates_to_try, choose, try_candidates
from branchy_jax.inference.planning.programs import Programs
from branchy_jax.inference.planning.times import SegmentTimes, forecast
from branchy_jax.measure import interleaved_passes

pytestmark = pytest.mark.usefixtures('xla_defaults')
LOOKING_BACK = bj.criteria.ensemble()
ONE_CANDIDATE = {
    'engine': 'xla',
    'passes': 1,
    'budget_seconds': 0.0,
}  # beside the baseline: compiling takes most of a plan's time


check_same = functools.partial(test_inference.check_same, rtol=1e-4, atol=1e-5)


def linear_times(stages, exits, sizes=(1, 4, 16), overhead=0.0):
    """Times that grow linearly with the batch, plus an overhead per call."""
    sizes = np.array(sizes)
    grid = sizes[:, None]
    return SegmentTimes(sizes, overhead + grid * np.array([stages], float), grid * np.array([exits], float))


def brute_force(stages, exits, confident):
    """Mean cost of an input that walks through the network, for every choice of exits."""
    last, costs = len(stages) - 1, {}
    for count in range(last + 1):
        for side in itertools.combinations(range(last), count):
            asked, totals = (*side, last), []
            for row in confident.T:
                leaves = next((n for n in side if row[n]), last)
                totals.append(sum(stages[: leaves + 1]) + sum(exits[n] for n in asked if n <= leaves))
            costs[asked] = np.mean(totals)
    return costs


@given(
    stages=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    exits=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_forecast_without_overhead_is_the_mean_cost_of_an_input(stages, exits, seed):
    confident = np.repeat(np.random.default_rng(seed).random((3, 8)) < 0.5, 2, axis=1)
    results = forecast(linear_times(stages, exits), confident, 1)
    # Chunks of one input have no remainder; draws of one input scatter, so the same draws are compared.
    rows = np.random.default_rng(0).integers(16, size=(32, 1)).ravel()
    expected = brute_force(stages, exits, confident[:, rows])
    assert {asked for _, asked, _ in results} == {e for e in expected if all(confident[n].any() for n in e[:-1])}
    for ms, asked, _ in results:
        np.testing.assert_allclose(ms, expected[asked], rtol=1e-9)
    assert results == sorted(results)


def test_forecast_skips_a_head_that_costs_more_than_it_saves():
    confident = np.array([[True] * 2 + [False] * 8, [True] * 8 + [False] * 2])
    # The first head costs 3 and saves two inputs of ten a stage of 10, which is 2 an input.
    assert forecast(linear_times([1, 10, 10], [3, 1, 1]), confident, 10)[0][1] == (1, 2)
    assert forecast(linear_times([1, 10, 10], [1, 1, 1]), confident, 10)[0][1] == (0, 1, 2)
    never = forecast(linear_times([1, 10, 10], [0, 0, 0], overhead=5.0), confident & False, 10)
    assert [asked for _, asked, _ in never] == [(2,)]
    assert forecast(linear_times([1, 10, 10], [9, 9, 1]), confident, 10, may_skip=False)[0][1] == (0, 1, 2)


def test_forecast_counts_the_remainders_of_chunks():
    """Of 16 inputs 5 survive, 2 to 8 in batches that are drawn. An overhead of 1 a chunk and 1 an input."""
    _, asked, sizes = forecast(linear_times([1, 1], [0, 0], overhead=1.0), np.array([[True] * 11 + [False] * 5]), 16)[0]
    assert (asked, sizes[0]) == ((0, 1), 16)
    assert 4 <= sizes[1] <= 8


def test_times_are_interpolated_and_the_best_size_is_taken():
    times = SegmentTimes(np.array([1, 4]), np.array([[2.0, 2.0], [4.0, 12.0]]), np.array([[1.0, 1.0], [4.0, 4.0]]))
    np.testing.assert_allclose(times.per_image(2).stages, [1.5, 2.5])
    np.testing.assert_allclose(times.per_image(64).stages, [1.0, 3.0])
    few = SegmentTimes(np.array([8]), np.array([[4.0, 8.0]]), np.array([[4.0, 4.0]]))
    np.testing.assert_allclose(few.per_image(2).stages, [2.0, 4.0])  # as long as eight
    joined = SegmentTimes.joined([few, times])
    assert (joined.batch_sizes.tolist(), joined.stages[:, 0].tolist()) == ([1, 4, 8], [2.0, 4.0, 4.0])
    best = times.best()
    np.testing.assert_allclose((best.stages, best.exits), ([1.0, 2.0], [1.0, 1.0]))
    assert bj.costs.expected_cost(best, [0.5, 0.5]) == 3.5


def test_stages_and_heads_are_measured(network):
    times = segment_times(*network, batch_sizes=[4, 2, 4], passes=2)
    assert times.batch_sizes.tolist() == [2, 4]
    assert times.stages.shape == times.exits.shape == (2, 3)
    assert (times.stages > 0).all()
    with pytest.raises(ValueError, match='batch_sizes'):
        segment_times(*network, batch_sizes=[0])


@pytest.fixture(scope='module')
def thresholds(network):
    return np.diag(np.quantile(exit_outputs(*network).uncertainty[:2], [0.7, 0.5], axis=1)).astype(np.float32)


def plan_for(cores, monkeypatch):
    """Sets the number of cores to plan for; a CPU that has another number compiles the same."""
    monkeypatch.setattr(candidates, 'num_cores', lambda: cores)
    monkeypatch.setattr(candidates, 'usable_options', lambda: ['one core', *['all cores'] * (cores > 1)])


def test_every_candidate_answers_as_dense_does(network, thresholds, monkeypatch):
    plan_for(2, monkeypatch)
    model, variables, images = network
    times, leaves = linear_times([0.1, 0.1, 0.1], [0.01, 0.01, 0.01], sizes=(1, 8, 24)), np.ones((2, 1), bool)
    programs = Programs(model, variables, bj.calling.with_batch(images, 1), None)
    policy = bj.ExitPolicy(bj.criteria.entropy, jnp.asarray(thresholds))
    for candidate in candidates_to_try(times, leaves, 24, may_skip=True):
        applied = np.where(np.isin([0, 1], candidate.exits), thresholds, -np.inf)
        check_same(programs.runner(candidate, policy, 24)(images), dense(model)(variables, images, applied))


def settings_tried(times, confident, batch_size, **options):
    tried = candidates_to_try(times, confident, batch_size, **{'may_skip': True, **options})[1:]
    return [(c.executor, c.on_host, c.workers, c.compiler_options) for c in tried if c.executor != 'onnx']


LIGHT, HEAVY = linear_times([0.1, 10, 10], [0, 0, 0]), linear_times([10, 10, 10], [0, 0, 0])
CONFIDENT = np.array([[True] * 7 + [False] * 3, [True] * 9 + [False]])


@pytest.mark.parametrize('cores', [1, 2])
def test_candidates_depend_on_batch_and_cores(cores, monkeypatch):
    """The most promising compiler options of every executor come before the others."""
    plan_for(cores, monkeypatch)
    several = ['all cores'] * (cores > 1)
    whole, dense = ('sequential', False, cores), ('dense', False, 1)
    chunked = [('compacted', True, cores), ('compacted', False, 1)]
    best = [*several, ''][0]
    tried = settings_tried(HEAVY, CONFIDENT, 16)
    assert tried[:4] == [(*whole, 'one core'), *((*each, best) for each in (*chunked, dense))]
    plain = {each[:3] for each in tried[4:] if each[3] == ''}
    assert plain == {whole, *([*chunked, dense] if several else [])}
    alone, single = ['one core', *several, ''], ('sequential', False, 1)
    tried = settings_tried(LIGHT, CONFIDENT, 1)
    assert tried[:2] == [(*single, 'one core'), (*dense, 'one core')]
    assert sorted(tried) == sorted((*each, options) for each in (single, dense) for options in alone)
    first = candidates_to_try(LIGHT, CONFIDENT, 16, may_skip=True)
    assert (first[0].name, first[0].exits, first[0].optimized) == ('baseline', (2,), False)
    in_onnx_runtime = [(c.exits, c.workers) for c in first[1:] if c.executor == 'onnx']
    assert in_onnx_runtime == [(exits, workers) for exits in ((0, 1, 2), (2,)) for workers in range(1, cores + 1)]
    every = candidates_to_try(LIGHT, CONFIDENT, 16, may_skip=False)[1:]
    assert {candidate.exits for candidate in every} == {(0, 1, 2)}


def test_workers_take_pieces_of_two_milliseconds_of_batches_that_take_longer(monkeypatch):
    plan_for(2, monkeypatch)
    pieces = []
    for ms in (0.01, 1.0, 100.0):
        first = candidates_to_try(linear_times([ms, 0, 0], [0, 0, 0]), np.ones((2, 10), bool), 64, may_skip=True)
        pieces += [(c.workers, c.chunk_sizes) for c in first if c.executor == 'sequential'][:1]
    assert pieces == [(1, ()), (2, (2,)), (2, (1,))]


@pytest.mark.parametrize('engine', ['xla', 'onnxruntime'])
@pytest.mark.parametrize(('batch_size', 'options'), [(1, ''), (8, 'all_compiler_options')])
def test_plan_is_dense_at_its_thresholds(network, thresholds, batch_size, options, engine, request):
    if options:
        request.getfixturevalue(options)
    model, variables, images = network
    times = segment_times(model, variables, images, batch_sizes=[1, 8], passes=2)
    planned = plan(model, variables, images, thresholds, batch_size=batch_size, engine=engine, times=times, passes=2)
    asked = np.isin([0, 1], planned.exits)
    np.testing.assert_array_equal(planned.thresholds, np.where(asked, thresholds, -np.inf).astype(np.float32))
    planned.warm_up()
    for size in {batch_size, 24, 5, 1, 0}:
        result = planned(images[:size])
        check_same(result, dense(model)(variables, images[:size], planned.thresholds))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result))
        on_host = planned(images[:size], as_numpy=True)
        check_same(on_host, result)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    table = str(planned).splitlines()
    assert table[0] == f'batches of {batch_size}'
    assert [line.startswith(f'> {planned.executor} ') for line in table].count(True) == 1
    assert {candidate.executor == 'onnx' for candidate in planned.candidates} - {False} == {engine != 'xla'} - {False}
    assert ('sequential, one core' in str(planned)) == (bool(options) and engine == 'xla')
    with pytest.raises(ValueError, match='plan: cannot run under jit'):
        jax.jit(planned)(images)
    with pytest.raises(ValueError, match='inputs: expected'):
        planned(images[:, :2])


def test_a_criterion_that_looks_back_or_a_guarantee_asks_every_exit(network):
    model, variables, images = network
    policy = bj.ExitPolicy(LOOKING_BACK, jnp.full(2, -jnp.inf))
    for arguments, options in ((policy, {}), ([-np.inf, -np.inf], {'skip_heads': False})):
        planned = plan(model, variables, images, arguments, **ONE_CANDIDATE, **options)
        assert planned.exits == (0, 1, 2)
        check_same(planned(images), dense(model)(variables, images, planned.policy))


class Pair(nn.Module):
    """A plain module of two inputs, one of them integers."""

    @nn.compact
    def __call__(self, pair, deterministic=True):
        x = nn.relu(nn.Dense(8)(pair[0]) + nn.Embed(5, 8)(pair[1]).mean(axis=1))
        return nn.Dense(3)(x), nn.Dense(3)(nn.relu(nn.Dense(8)(nn.Dropout(0.5)(x, deterministic=deterministic))))


def asks_for_the_batch(x):
    """Cannot be traced with a symbolic batch size."""
    x = nn.relu(nn.Dense(8)(x if int(x.shape[0]) > 4 else x * 1))
    return nn.Dense(3)(x), nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name='first')(x))
        return nn.Dense(3)(nn.relu(nn.Dense(8, name='second')(x)))


IMAGES = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
OF_USERS = {
    'two inputs': (Pair(), {'pair': (IMAGES, np.arange(48).reshape(12, 4) % 5)}),
    'fixed batch': (Function(asks_for_the_batch), IMAGES),
}


@pytest.mark.parametrize('name', OF_USERS)
def test_networks_of_users_are_planned(name, tmp_path):
    model, inputs = OF_USERS[name]
    variables = bj.calling.init(model, jax.random.key(1), inputs)
    policy = [float(np.median(exit_outputs(model, variables, inputs).uncertainty[0]))]
    planned = plan(model, variables, inputs, policy, batch_size=6, skip_heads=False, **ONE_CANDIDATE)
    planned.warm_up()
    planned.save(tmp_path / 'plan.json')
    for each in (planned, bj.inference.Plan.load(tmp_path / 'plan.json', model, variables)):
        for size in (1, 6, 7):
            rows = jax.tree.map(lambda leaf, size=size: leaf[:size], inputs)
            check_same(each(rows), dense(model)(variables, rows, policy))


def test_a_deleted_plan_frees_models_weights_and_programs():
    inputs, freed = IMAGES[:8], []
    for width, engine in ((3, 'xla'), (4, 'onnxruntime')):
        model = bj.models.attach(Plain(name=f'net{width}'), ['first'], inputs=inputs)
        variables = bj.calling.init(model, jax.random.key(width), inputs)
        planned = plan(model, variables, inputs, [0.5], skip_heads=False, **ONE_CANDIDATE | {'engine': engine})
        planned(inputs)
        programs = planned._programs
        fast_model, fast_variables = programs.optimized
        leaves = jax.tree.leaves((variables, fast_variables))
        owned = planned, programs, planned._run.together, model, fast_model, *leaves
        freed += [weakref.ref(value) for value in owned]
        freed += [weakref.ref(value) for value in programs._functions.values() if callable(value)]
        del model, variables, planned, programs, fast_model, fast_variables, leaves, owned
    gc.collect()
    assert [reference() for reference in freed if reference() is not None] == []


def multiplies(x):
    """The first head has no ONNX form."""
    x = nn.relu(nn.Dense(8)(x))
    return jnp.cumprod(nn.Dense(3)(x), axis=-1), nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def test_where_onnx_runtime_cannot_run_the_plan_is_of_xla_and_says_why(monkeypatch):
    model = Function(multiplies)
    variables = random_variables(model, IMAGES)
    options = ONE_CANDIDATE | {'skip_heads': False}
    for missing, message in ((False, "model: exit 0 computes 'cumprod'"), (True, r"pip install '.\[onnx\]'")):
        if missing:
            monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        planned = plan(model, variables, IMAGES, [0.5], **options | {'engine': None})
        assert re.search(f'\nXLA alone .*{message}', str(planned))
        check_same(planned(IMAGES), dense(model)(variables, IMAGES, [0.5]))
        with pytest.raises(ValueError, match=message):
            plan(model, variables, IMAGES, [0.5], **options | {'engine': 'onnxruntime'})


def test_impossible_settings_are_refused(network):
    for name, value in (
        ('batch_size', 0),
        ('batch_size', 25),
        ('batch_size', 2.5),
        ('passes', 0),
        ('engine', 'onnx'),
        ('times', linear_times([1, 1], [1, 1])),
    ):
        with pytest.raises(ValueError, match=f'{name}: (got|are of)'):
            plan(*network, [0.0, 0.0], **{name: value})
    with pytest.raises(ValueError, match='thresholds: a network with 3 exits'):
        plan(*network, [0.0])


def test_an_exit_that_saves_nothing_is_warned_of():
    def last_layer_first(x):
        x = nn.Dense(8)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(64)(nn.relu(x)), nn.Dense(2)(x)

    images, model = jnp.ones((4, 6)), Function(last_layer_first)
    with pytest.warns(UserWarning, match='exit 0 costs 624 MACs'):
        plan(model, random_variables(model, images), images, [0.0], **ONE_CANDIDATE)


def tried(name, low, median, high, *, exits=(0, 2), eliminated=False):
    return Candidate(name, 'dense', exits, measured_ms=1.0, ratio=(median, low, high), eliminated=eliminated)


BASELINE = tried('baseline', 1, 1, 1, exits=(2,))
WITHOUT = tried('without', 0.9, 1.0, 1.1, exits=(2,))


@pytest.mark.parametrize(
    ('candidates', 'chosen'),
    [
        ([BASELINE, tried('a', 0.8, 0.95, 1.1), tried('without', 1.0, 1.1, 1.2, exits=(2,))], 'baseline'),
        ([WITHOUT, tried('a', 0.5, 0.6, 0.7), tried('b', 0.6, 0.7, 0.8)], 'a'),
        ([WITHOUT, tried('a', 0.8, 0.95, 1.1), tried('b', 0.97, 0.98, 0.99)], 'b'),  # a is not certain
        ([WITHOUT, tried('a', 0.8, 0.95, 1.1), tried('b', 1.2, 1.3, 1.4)], 'without'),
        ([WITHOUT, tried('a', 0.3, 0.4, 0.5, eliminated=True), tried('b', 0.6, 0.7, 0.8)], 'b'),
        ([tried('a', 0.8, 0.95, 1.1), tried('b', 1.2, 1.3, 1.4)], 'a'),  # without branches is no candidate
    ],
)
def test_a_candidate_that_does_not_beat_the_baseline_for_certain_loses(candidates, chosen):
    assert choose(candidates).name == chosen


def test_a_clear_trial_is_short_and_slow_candidates_are_eliminated():
    seconds, reports = {'baseline': 0.02, 'a': 0.0025, 'b': 0.04}, []
    results = try_candidates(
        [Candidate(name, 'dense', (0, 2)) for name in seconds],
        lambda candidate: lambda batch: time.sleep(seconds[candidate.name]),
        [None],
        passes=12,
        progress=Progress(lambda text, share: reports.append(text), None),
    )
    assert reports == [*(f'trying {name}' for name in seconds), 'comparing 2 candidates: 9 of at most 12 passes']
    assert [candidate.eliminated for candidate in results] == [False, False, True]
    assert results[1].ratio[0] < 0.5 < results[2].ratio[0]


def test_a_trial_spends_little_time_on_what_is_far_slower(monkeypatch):
    """The baseline's pass is long and counts again; a candidate with a forecast of 50 times the best is not built."""
    seconds, built, calls, now = {'baseline': 0.3, 'a': 0.02, 'b': 1.0}, [], [], [0.0]
    forecasts = {'baseline': None, 'a': None, 'b': 1e3}
    for module in (candidates, bj.measure):
        clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
        monkeypatch.setattr(module, 'time', clock)

    def build(candidate):
        built.append(candidate.name)

        def run(batch):
            calls.append(candidate.name)
            now[0] += seconds[candidate.name]

        return run

    given = [Candidate(name, 'dense', (0, 2), predicted_ms=ms) for name, ms in forecasts.items()]
    baseline, a = try_candidates(given, build, [None], passes=12, progress=Progress(None, None))
    assert built == ['baseline', 'a']
    assert (calls.count('baseline'), calls.count('a')) == (2, 8)  # one call to compile, then passes
    assert baseline.ratio == (1, 1, 1)
    np.testing.assert_allclose(a.ratio, [0.02 / 0.3] * 3)


class OneSecond:
    """Segments that take a second for eight inputs."""

    def __init__(self, size):
        self.size = size

    def times(self, images, *, passes):
        ms = np.array([[self.size * 100.0, self.size * 25.0]])
        return SegmentTimes(np.array([self.size]), ms, 0 * ms)


@pytest.mark.parametrize(('budget', 'sizes'), [(0.0, [8]), (10.0, [1, 8]), (40.0, [1, 8, 64]), (None, [1, 8, 64, 256])])
def test_a_batch_size_is_measured_where_the_budget_allows_it(budget, sizes):
    """Three runs of the stages at 1, 64 and 256 inputs take 0.4, 24 and 96 seconds."""
    measured = planning._measured(OneSecond, None, [8, 256, 64, 1], Progress(None, budget))
    assert measured.batch_sizes.tolist() == sizes


@pytest.mark.parametrize(('seconds', 'expected'), [(0.0, [1]), (1e9, [1, 4])])
def test_stages_that_take_long_are_timed_once(network, seconds, expected, monkeypatch):
    passes = []

    def recorded(functions, **options):
        passes.append(options['passes'])
        return interleaved_passes(functions, **options)

    monkeypatch.setattr(planning_times, '_ENOUGH_SECONDS', seconds)
    monkeypatch.setattr(planning_times, 'interleaved_passes', recorded)
    assert (segment_times(*network, batch_sizes=[4], passes=4).stages > 0).all()
    assert passes == expected


def test_plan_reports_its_steps_and_keeps_to_its_budget(network, thresholds, monkeypatch):
    """The budget is spent at once: one candidate is tried. Here its weights are arguments, as large ones are."""
    monkeypatch.setattr(planning_times, '_MOST_EMBEDDED_BYTES_ON_CPU', 0)
    model, variables, images = network
    reports = []
    options = {'budget_seconds': 0.0, 'on_progress': lambda text, share: reports.append((text, share))}
    planned = plan(model, variables, images, thresholds, **options)
    texts, shares = zip(*reports, strict=True)
    assert texts[:2] == ('rewriting the network', 'stages and heads at 8 images')
    assert texts[-1] == f'chosen: {planned.executor}'
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert list(shares) == sorted(shares)
    assert planned.times.batch_sizes.tolist() == [8]
    assert len(planned.candidates) == 2
    check_same(planned(images), dense(model)(variables, images, planned.policy))


@pytest.mark.parametrize('engine', ['xla', 'onnxruntime'])
def test_an_earlier_plan_saves_rewriting_measuring_and_compiling(network, thresholds, engine, compilations, tmp_path):
    model, variables, images = network
    options = {'skip_heads': False, **ONE_CANDIDATE, 'engine': engine}
    first = plan(model, variables, images, thresholds, **options)
    before = compilations.count
    second = plan(model, variables, images, thresholds, earlier=first, **options)
    assert compilations.count == before
    assert second.times is first.times
    third = plan(model, variables, images, thresholds / 2, earlier=first, **options)
    check_same(third(images), dense(model)(variables, images, third.policy))
    third.save(tmp_path / 'plan.json')
    before = compilations.count
    loaded = Plan.load(tmp_path / 'plan.json', model, variables, earlier=first)
    check_same(loaded(images), third(images))
    assert compilations.count == before
    copies = jax.tree.map(jnp.copy, variables)
    for make in (plan, functools.partial(Plan.load, tmp_path / 'plan.json')):
        arguments = (images, [0.0, 0.0]) if make is plan else ()
        with pytest.raises(ValueError, match='earlier: is a plan of another network, other weights'):
            make(model, copies, *arguments, earlier=first)
