"""The planner: forecasts against brute force, trials, and plans that equal `dense`."""

import gc
import itertools
import time
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.inference import dense, exit_outputs, plan, segment_times
from branchy_jax.inference.planning import candidates, segments
from branchy_jax.inference.planning.candidates import Candidate, Progress, candidates_to_try, choose, try_candidates
from branchy_jax.inference.planning.plan import _batches
from branchy_jax.inference.planning.programs import Programs
from branchy_jax.inference.planning.times import SegmentTimes, forecast

LOOKING_BACK = bj.criteria.ensemble()
ONE_CANDIDATE = {'passes': 1, 'budget_seconds': 0.0}  # beside the baseline: compiling takes most of a plan's time


def check_same(result, expected):
    assert result.label.shape == expected.label.shape
    np.testing.assert_array_equal(result.label, expected.label)
    np.testing.assert_array_equal(result.exit_index, expected.exit_index)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-5)


def linear_times(stages, exits, sizes=(1, 4, 16), overhead=0.0):
    """Times that grow linearly with the batch, plus an overhead per call."""
    sizes = np.array(sizes)
    grid = sizes[:, None]
    return SegmentTimes(sizes, overhead + grid * np.array([stages], float), grid * np.array([exits], float))


def brute_force(stages, exits, confident):
    """Mean cost of an input that walks through the network, for every choice of exits."""
    num_exits, count = len(stages), confident.shape[1]
    costs = {}
    for k in range(num_exits):
        for side in itertools.combinations(range(num_exits - 1), k):
            total = 0.0
            for row in range(count):
                for n in range(num_exits):
                    total += stages[n]
                    if n in side or n == num_exits - 1:
                        total += exits[n]
                        if n < num_exits - 1 and confident[n, row]:
                            break
            costs[*side, num_exits - 1] = total / count
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
    heavy = SegmentTimes(few.batch_sizes, 2 * few.stages, 2 * few.exits)
    assert (few.heavy, heavy.heavy) == (False, True)
    # A quarter of what eight need, 8 and 16, and two eighths of the rest.
    np.testing.assert_allclose(heavy.per_image(2).stages * 2, [2 + 1.5, 4 + 3])
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
def uncertainty(network):
    return exit_outputs(*network).uncertainty


def thresholds_at(uncertainty, quantiles):
    return np.array([q if np.isinf(q) else np.quantile(uncertainty[n], q) for n, q in enumerate(quantiles)], np.float32)


def plan_for(cores, monkeypatch):
    """Sets the number of cores to plan for; a CPU that has another number compiles the same."""
    monkeypatch.setattr(candidates, 'num_cores', lambda: cores)
    monkeypatch.setattr(candidates, 'may_use_all_cores', lambda: cores > 1)
    monkeypatch.setattr(candidates, 'may_use_one_core', lambda: True)


@pytest.mark.parametrize(('batch_size', 'cores'), [(1, 1), (24, 2)])
def test_every_candidate_answers_as_dense_does(network, uncertainty, batch_size, cores, monkeypatch):
    plan_for(cores, monkeypatch)
    model, variables, images = network
    thresholds = thresholds_at(uncertainty, (0.7, 0.5))
    times = linear_times([0.1, 0.1, 0.1], [0.01, 0.01, 0.01], sizes=(1, 8, 24))
    first, reserve = candidates_to_try(times, uncertainty[:2] < thresholds[:, None], batch_size, may_skip=True)
    baseline, *others = [*first, *reserve]
    programs = Programs(model, variables, bj.calling.with_batch(images, 1), None)
    policy = bj.ExitPolicy(bj.criteria.entropy, jnp.asarray(thresholds))
    expected = model.apply(variables, images)[-1]
    np.testing.assert_allclose(programs.runner(baseline, policy, batch_size)(images)[0], expected, rtol=1e-5, atol=1e-6)
    for candidate in others:
        applied = np.where(np.isin([0, 1], candidate.exits), thresholds, -np.inf)
        expected = dense(model)(variables, images[:batch_size], applied)
        check_same(programs.runner(candidate, policy, batch_size)(images[:batch_size]), expected)


def settings_tried(times, confident, batch_size, **options):
    first, reserve = candidates_to_try(times, confident, batch_size, **{'may_skip': True, **options})
    return [
        [(c.executor, c.on_host, c.workers, c.compiler_options) for c in several] for several in (first[1:], reserve)
    ]


LIGHT, HEAVY = linear_times([0.1, 10, 10], [0, 0, 0]), linear_times([10, 10, 10], [0, 0, 0])
CONFIDENT = np.array([[True] * 7 + [False] * 3, [True] * 9 + [False]])
WITHOUT_BRANCHES = ('dense', False, 1)


@pytest.mark.parametrize('cores', [1, 2])
def test_candidates_depend_on_batch_cores_and_weight(cores, monkeypatch):
    plan_for(cores, monkeypatch)
    several = ['all cores'] * (cores > 1)
    shared = ('sequential', False, cores)
    first, reserve = settings_tried(HEAVY, CONFIDENT, 16)
    assert first == [(*shared, 'one core'), ('compacted', True, cores, [*several, ''][0])]
    assert reserve == [(*WITHOUT_BRANCHES, options) for options in (*several, '', '')]
    first, _ = settings_tried(LIGHT, CONFIDENT & False, 16)
    assert first[-1] == (*WITHOUT_BRANCHES, '')  # nearly as fast, by the forecast
    first, reserve = settings_tried(LIGHT, CONFIDENT, 1)
    alone = ['one core', *several, '']
    assert first[:3] == [('sequential', False, 1, options) for options in alone][:3]
    assert reserve == [(*WITHOUT_BRANCHES, options) for options in (*alone, '')]
    first, reserve = settings_tried(HEAVY, CONFIDENT, 16, may_skip=False)
    assert len(first) == 2  # every exit is asked
    assert reserve == [(*WITHOUT_BRANCHES, options) for options in (*several, '')]


def test_workers_take_pieces_of_two_milliseconds_of_batches_that_take_longer(monkeypatch):
    plan_for(2, monkeypatch)
    pieces = []
    for ms in (0.01, 1.0, 100.0):
        first, _ = candidates_to_try(linear_times([ms, 0, 0], [0, 0, 0]), np.ones((2, 10), bool), 64, may_skip=True)
        pieces += [(c.workers, c.chunk_sizes) for c in first if c.executor == 'sequential'][:1]
    assert pieces == [(1, ()), (2, (2,)), (2, (1,))]


SETTINGS = [(0.7, 0.5), (-np.inf, -np.inf), (0.3, np.inf)]


@pytest.mark.parametrize(
    ('batch_size', 'quantiles', 'options'),
    [(1, SETTINGS[0], ''), (8, SETTINGS[0], 'all_compiler_options'), (24, SETTINGS[2], '')],
)
def test_plan_is_dense_at_its_thresholds(network, uncertainty, batch_size, quantiles, options, request):
    if options:
        request.getfixturevalue(options)
    model, variables, images = network
    thresholds = thresholds_at(uncertainty, quantiles)
    times = segment_times(model, variables, images, batch_sizes=[1, 8], passes=2)
    planned = plan(model, variables, images, thresholds, batch_size=batch_size, times=times, passes=2)
    asked = np.isin([0, 1], planned.exits)
    np.testing.assert_array_equal(planned.thresholds, np.where(asked, thresholds, -np.inf).astype(np.float32))
    for size in {batch_size, 5, 0}:
        check_same(planned(images[:size]), dense(model)(variables, images[:size], planned.thresholds))
    table = str(planned).splitlines()
    assert table[0] == f'batches of {batch_size}'
    assert [line.startswith(f'> {planned.executor} ') for line in table].count(True) == 1
    assert ('sequential, one core' in str(planned)) == bool(options)
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


class TwoInputs(nn.Module):
    """A plain module of two inputs, one of them integers."""

    @nn.compact
    def __call__(self, image, tokens, deterministic=True):
        x = nn.relu(nn.Dense(8)(image) + nn.Embed(5, 8)(tokens).mean(axis=1))
        early = nn.Dense(3)(x)
        return early, nn.Dense(3)(nn.relu(nn.Dense(8)(nn.Dropout(0.5)(x, deterministic=deterministic))))


class AsksForTheBatch(nn.Module):
    """A module that cannot be traced with a symbolic batch size."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x if int(x.shape[0]) > 4 else x * 1))
        return nn.Dense(3)(x), nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name='first')(x))
        return nn.Dense(3)(nn.relu(nn.Dense(8, name='second')(x)))


def networks_of_users():
    image = jax.random.normal(jax.random.key(0), (12, 6))
    tokens = np.arange(48).reshape(12, 4) % 5
    return {
        'two inputs': (TwoInputs(), (image, tokens)),
        'a dictionary': (TwoInputs(), {'image': image, 'tokens': tokens}),
        'fixed batch': (AsksForTheBatch(), image),
    }


@pytest.mark.parametrize('name', ['two inputs', 'a dictionary', 'fixed batch'])
def test_networks_of_users_are_planned(name, tmp_path):
    model, inputs = networks_of_users()[name]
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
    inputs, freed = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32), []
    for width in (3, 4, 5):
        model = bj.models.attach(Plain(name=f'net{width}'), ['first'], inputs=inputs)
        variables = bj.calling.init(model, jax.random.key(width), inputs)
        planned = plan(model, variables, inputs, [0.5], skip_heads=False, **ONE_CANDIDATE)
        planned(inputs)
        programs = planned._programs
        fast_model, fast_variables = programs.optimized
        leaves = jax.tree.leaves((variables, fast_variables))
        freed += [weakref.ref(value) for value in (planned, programs, model, fast_model, *leaves)]
        freed += [weakref.ref(value) for value in programs._functions.values() if callable(value)]
        del model, variables, planned, programs, fast_model, fast_variables, leaves
    gc.collect()
    assert [reference() for reference in freed if reference() is not None] == []


def test_large_weights_are_arguments(network, monkeypatch):
    monkeypatch.setattr(segments, '_MOST_EMBEDDED_BYTES_ON_CPU', 0)
    model, variables, images = network
    planned = plan(model, variables, images, [0.5, 0.5], **ONE_CANDIDATE)
    check_same(planned(images), dense(model)(variables, images, planned.policy))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch_size': 0}, 'batch_size: got'),
        ({'batch_size': 25}, 'batch_size: got'),
        ({'batch_size': 2.5}, 'batch_size: got'),
        ({'passes': 0}, 'passes: got'),
        ({'times': linear_times([1, 1], [1, 1])}, 'times: are of'),
    ],
)
def test_impossible_settings_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        plan(*network, [0.0, 0.0], **options)
    with pytest.raises(ValueError, match='thresholds: a network with 3 exits'):
        plan(*network, [0.0])


def test_an_exit_that_saves_nothing_is_warned_of():
    class LastLayerFirst(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(nn.relu(nn.Dense(8)(x)))
            return nn.Dense(64)(nn.relu(x)), nn.Dense(2)(x)

    images = jnp.ones((4, 6))
    model = LastLayerFirst()
    with pytest.warns(UserWarning, match='exit 0 costs 624 MACs'):
        plan(model, model.init(jax.random.key(0), images), images, [0.0], **ONE_CANDIDATE)


def tried(name, low, median, high, *, exits=(0, 2), eliminated=False):
    executor = 'baseline' if name == 'baseline' else 'dense'
    return Candidate(name, executor, exits, measured_ms=1.0, ratio=(median, low, high), eliminated=eliminated)


BASELINE = tried('baseline', 1, 1, 1, exits=(2,))
WITHOUT = tried('without', 0.9, 1.0, 1.1, exits=(2,))


@pytest.mark.parametrize(
    ('candidates', 'chosen'),
    [
        ([WITHOUT, tried('a', 0.5, 0.6, 0.7), tried('b', 0.6, 0.7, 0.8)], 'a'),
        ([WITHOUT, tried('a', 0.8, 0.95, 1.1), tried('b', 0.97, 0.98, 0.99)], 'b'),  # a is not certain
        ([WITHOUT, tried('a', 0.8, 0.95, 1.1), tried('b', 1.2, 1.3, 1.4)], 'without'),
        ([WITHOUT, tried('a', 0.3, 0.4, 0.5, eliminated=True), tried('b', 0.6, 0.7, 0.8)], 'b'),
        ([tried('a', 0.8, 0.95, 1.1), tried('b', 1.2, 1.3, 1.4)], 'a'),  # without branches is no candidate
    ],
)
def test_a_candidate_that_does_not_beat_the_baseline_for_certain_loses(candidates, chosen):
    assert choose([BASELINE, *candidates], 3).name == chosen


def test_batches_of_a_trial_hold_the_shares_of_all_images():
    confident = np.array([[True] * 700 + [False] * 300, [True] * 900 + [False] * 100])
    images = np.arange(1000, dtype=np.float32)
    batches = _batches(images, confident, 32)
    assert [len(batch) for batch in batches] == [32] * 4
    drawn = np.concatenate(batches)
    assert abs((drawn < 700).mean() - 0.7) < 0.02
    assert abs((drawn >= 900).mean() - 0.1) < 0.02
    assert len(_batches(images, confident, 1000)) == 1


SECONDS = 0.02


def run_trial(seconds, *, budget=None, passes=12):
    """Tries candidates that sleep; returns them by name, and what was reported."""
    reports = []
    given = [Candidate(name, 'baseline' if name == 'baseline' else 'dense', (0, 2)) for name in seconds]
    results = try_candidates(
        given,
        (),
        lambda candidate: lambda batch: time.sleep(seconds[candidate.name]),
        [None],
        passes=passes,
        progress=Progress(lambda text, share: reports.append((text, share)), budget),
    )
    return {candidate.name: candidate for candidate in results}, reports


def test_a_clear_trial_is_short_and_slow_candidates_are_eliminated(monkeypatch):
    passes, timed = [], candidates.interleaved_passes

    def record(functions, **options):
        passes.append((len(functions), options['passes']))
        return timed(functions, **options)

    monkeypatch.setattr(candidates, 'interleaved_passes', record)
    results, reports = run_trial({'baseline': SECONDS, 'a': SECONDS / 8, 'b': SECONDS * 2})
    assert passes == [(3, 1), (3, 3), (2, 6)]
    assert [results[name].eliminated for name in ('baseline', 'a', 'b')] == [False, False, True]
    assert results['a'].ratio[0] < 0.5 < results['b'].ratio[0]
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert reports[0] == ('trying baseline', 0.0)


def test_a_budget_that_is_spent_leaves_one_candidate():
    results, _ = run_trial({'baseline': SECONDS, 'a': SECONDS / 4, 'b': SECONDS / 8}, budget=0.0)
    assert list(results) == ['baseline', 'a']
    assert choose(list(results.values()), 3).name == 'a'


def test_plan_reports_its_steps_and_keeps_to_its_budget(network, uncertainty):
    model, variables, images = network
    reports, thresholds = [], thresholds_at(uncertainty, SETTINGS[0])
    options = {'budget_seconds': 0.0, 'on_progress': lambda text, share: reports.append((text, share))}
    planned = plan(model, variables, images, thresholds, **options)
    texts, shares = zip(*reports, strict=True)
    assert texts[:2] == ('rewriting the network', 'stages and heads at 8 images')
    assert texts[-1] == f'chosen: {planned.executor}'
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert list(shares) == sorted(shares)
    assert planned.times.batch_sizes.tolist() == [8]
    check_same(planned(images), dense(model)(variables, images, planned.policy))


def test_an_earlier_plan_saves_rewriting_measuring_and_compiling(network, uncertainty, compilations):
    model, variables, images = network
    # Without a budget the clock of this run decides whether the reserve is tried.
    options = {'skip_heads': False, **ONE_CANDIDATE}
    first = plan(model, variables, images, thresholds_at(uncertainty, SETTINGS[0]), **options)
    before = compilations.count
    second = plan(model, variables, images, thresholds_at(uncertainty, SETTINGS[0]), earlier=first, **options)
    assert compilations.count == before
    assert second.times is first.times
    third = plan(model, variables, images, thresholds_at(uncertainty, (0.5, 0.5)), earlier=first, **options)
    check_same(third(images), dense(model)(variables, images, third.policy))
    with pytest.raises(ValueError, match='earlier: is a plan of another network, other weights'):
        plan(model, jax.tree.map(jnp.copy, variables), images, [0.0, 0.0], earlier=first)
