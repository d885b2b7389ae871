"""The planner: forecasts against brute force, choices that keep their promise, plans that equal `dense`."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_inference import CRITERIA, check_same

import branchy_jax as bj
from branchy_jax.inference import SegmentTimes, dense, exit_outputs, plan, segment_times
from branchy_jax.inference.planning import candidates as candidates_room
from branchy_jax.inference.planning import plan as plan_room
from branchy_jax.inference.planning import race as race_room
from branchy_jax.inference.planning.candidates import Candidate, Way, ways_to_race
from branchy_jax.inference.planning.forecast import forecast
from branchy_jax.inference.planning.plan import _batches
from branchy_jax.inference.planning.progress import Progress
from branchy_jax.inference.planning.race import choose, race
from branchy_jax.measure import Ratio


def linear_times(stages, exits, sizes=(1, 4, 16), overhead=0.0):
    """Times that grow linearly with the batch, plus an overhead per call."""
    sizes = np.array(sizes)
    return SegmentTimes(
        batch_sizes=sizes,
        stages=overhead + sizes[:, None] * np.array(stages, float),
        exits=sizes[:, None] * np.array(exits, float),
    )


def brute_force(stages, exits, confident):
    """Mean cost of an image by walking it through the network, for every choice of exits."""
    num_exits, count = len(stages), confident.shape[1]
    found = {}
    for k in range(num_exits):
        for side in itertools.combinations(range(num_exits - 1), k):
            total = 0.0
            for image in range(count):
                for n in range(num_exits):
                    total += stages[n]
                    if n in side or n == num_exits - 1:
                        total += exits[n]
                        if n < num_exits - 1 and confident[n, image]:
                            break
            found[*side, num_exits - 1] = total / count
    return found


@given(
    stages=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    exits=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_forecast_without_overhead_is_the_mean_cost_of_an_image(stages, exits, seed):
    confident = np.random.default_rng(seed).random((3, 8)) < 0.5
    found = forecast(linear_times(stages, exits), np.repeat(confident, 2, axis=1), 1)
    # Chunks of one image have no remainder; draws of one image scatter, so compare at the same draws.
    rows = np.random.default_rng(0).integers(16, size=(32, 1)).ravel() // 2
    expected = brute_force(stages, exits, confident[:, rows])
    useful = {exits for exits in expected if all(confident[n].any() for n in exits[:-1])}
    assert {option.exits for option in found} == useful
    for option in found:
        np.testing.assert_allclose(option.ms, expected[option.exits], rtol=1e-9)
    assert [option.ms for option in found] == sorted(option.ms for option in found)


def test_forecast_skips_a_head_that_costs_more_than_it_saves():
    confident = np.array([[True] * 2 + [False] * 8, [True] * 8 + [False] * 2])
    # The first head costs 3 and saves two images of ten a stage of 10: 2 an image.
    best = forecast(linear_times([1, 10, 10], [3, 1, 1]), confident, 10)[0]
    assert best.exits == (1, 2)
    # At a cost of 1 it is worth it.
    assert forecast(linear_times([1, 10, 10], [1, 1, 1]), confident, 10)[0].exits == (0, 1, 2)
    # Nobody leaves: no head at all, even where a cut between stages would allow better chunks.
    nobody = forecast(linear_times([1, 10, 10], [0, 0, 0], overhead=5.0), confident & False, 10)
    assert [option.exits for option in nobody] == [(2,)]
    assert forecast(linear_times([1, 10, 10], [9, 9, 1]), confident, 10, may_skip=False)[0].exits == (0, 1, 2)


def test_forecast_counts_the_remainders_of_chunks():
    """16 images, 5 survive. An overhead of 1 a chunk and 1 an image: 5 + 1 in one chunk of 5."""
    times = linear_times([1, 1], [0, 0], overhead=1.0)
    confident = np.array([[True] * 11 + [False] * 5])
    best = forecast(times, np.tile(confident, (1, 1)), 16)
    assert best[0].exits == (0, 1)
    sizes = best[0].chunk_sizes
    assert sizes[0] == 16
    assert 4 <= sizes[1] <= 8  # batches drawn from the images leave 2 to 8 survivors


def test_times_are_interpolated_and_the_best_size_is_found():
    times = SegmentTimes(
        batch_sizes=np.array([1, 4]),
        stages=np.array([[2.0, 2.0], [4.0, 12.0]]),
        exits=np.array([[1.0, 1.0], [4.0, 4.0]]),
    )
    np.testing.assert_allclose(times.per_image(2).stages, [1.5, 2.5])
    np.testing.assert_allclose(times.per_image(64).stages, [1.0, 3.0])
    few = SegmentTimes(batch_sizes=np.array([8]), stages=np.array([[4.0, 8.0]]), exits=np.array([[4.0, 4.0]]))
    np.testing.assert_allclose(few.per_image(2).stages, [2.0, 4.0])  # as long as eight
    assert not few.heavy
    heavy = few.replace(stages=2 * few.stages, exits=2 * few.exits)
    assert heavy.heavy
    # A quarter of what eight need, 8 and 16, and two eighths of the rest.
    np.testing.assert_allclose(heavy.per_image(2).stages * 2, [2 + 1.5, 4 + 3])
    best = times.best()
    np.testing.assert_allclose((best.stages, best.exits), ([1.0, 2.0], [1.0, 1.0]))
    assert bj.costs.expected_cost(best, [0.5, 0.5]) == 3.5


def test_segments_are_measured_on_this_device(network):
    times = segment_times(*network, batch_sizes=[4, 2, 4], passes=2)
    assert times.batch_sizes.tolist() == [2, 4]
    assert times.stages.shape == times.exits.shape == (2, 3)
    assert (times.stages > 0).all()
    with pytest.raises(ValueError, match='batch_sizes'):
        segment_times(*network, batch_sizes=[0])


SETTINGS = [(0.7, 0.5), (-np.inf, -np.inf), (np.inf, -np.inf), (0.3, np.inf)]


@pytest.fixture(scope='module')
def uncertainty(network):
    return exit_outputs(*network).uncertainty


def thresholds_at(uncertainty, quantiles):
    return np.array([q if np.isinf(q) else np.quantile(uncertainty[n], q) for n, q in enumerate(quantiles)], np.float32)


def names_of(ways):
    return [way.name.split(',')[0].split(' of')[0] for way, _ in ways]


@pytest.fixture(params=[1, 2], ids=['one core', 'two cores'])
def cores(request, monkeypatch):
    """How many cores to plan for; a CPU that has another number compiles the same."""
    monkeypatch.setattr(candidates_room, 'num_cores', lambda: request.param)
    monkeypatch.setattr(candidates_room, 'may_use_all_cores', lambda: request.param > 1)
    monkeypatch.setattr(candidates_room, 'may_use_one_core', lambda: True)
    return request.param


@pytest.mark.parametrize('batch_size', [1, 24])
def test_every_candidate_answers_as_dense_does(network, uncertainty, batch_size, cores):
    model, variables, images = network
    thresholds = thresholds_at(uncertainty, (0.7, 0.5))
    times = linear_times([0.1, 0.1, 0.1], [0.01, 0.01, 0.01], sizes=(1, 8, 24))
    confident = uncertainty[:2] < thresholds[:, None]
    ways, otherwise = ways_to_race(times, confident, batch_size, batch_size, skip=True)
    names = names_of(ways)
    assert names[0] == 'baseline'
    assert set(names[1:]) - {'sequential × 2'} == ({'staged'} if batch_size == 1 else {'sequential', 'compacted'})
    assert ('sequential × 2' in names) == (batch_size > 1 and cores > 1)
    for way, _ in (*ways, *otherwise):
        run = way.build(model, batch_size)
        if way.kind == 'baseline':
            expected = model.apply(variables, images)[-1]
            np.testing.assert_allclose(run(variables, images, None)[0], expected, rtol=1e-5, atol=1e-6)
            continue
        as_if = np.where(np.isin([0, 1], way.exits), thresholds, -np.inf)
        expected = dense(model)(variables, images[:batch_size], as_if)
        check_same(run(variables, images[:batch_size], thresholds), expected)


@pytest.mark.parametrize('batch_size', [1, 24])
def test_ways_are_compiled_as_suits_them(network, uncertainty, batch_size, cores):
    """What runs image by image for one core, too; what shares a batch among workers not for all cores."""
    confident = uncertainty[:2] < thresholds_at(uncertainty, (0.7, 0.5))[:, None]
    times = linear_times([0.1, 0.1, 0.1], [0.01, 0.01, 0.01], sizes=(1, 8, 24))
    ways, otherwise = ways_to_race(times, confident, batch_size, batch_size, skip=True)
    several, one, found = ['all cores'] * (cores > 1), ['one core'], {}
    for way, _ in (*ways, *otherwise):
        if way.exits in (ways[1][0].exits, (2,)) and way.optimized:  # the best choice of exits, or the last alone
            found.setdefault((way.kind, way.kind == 'sequential' and way.workers > 1), []).append(way.compiled)
            assert way.name.endswith(way.compiled)
    expected = {('sequential', False): [*one, *several, ''], ('dense', False): [*several, '']}
    if batch_size == 1:
        expected['dense', False] = [*one, *several, '']
    else:
        expected['compacted', False] = [*several, ''] * 3
        if cores > 1:
            expected['sequential', True] = [*one, '']
    assert found == expected


def test_what_cannot_win_is_not_compiled(cores):
    """Of a heavy network few ways; without branches only where the forecast is close to it."""
    confident = np.array([[True] * 7 + [False] * 3, [True] * 9 + [False]])
    light, heavy = linear_times([0.1, 0.1, 0.1], [0, 0, 0]), linear_times([10, 10, 10], [0, 0, 0])
    assert {name.split(' ×')[0] for name in names_of(ways_to_race(light, confident, 16, 16, skip=True)[0])} == {
        'baseline',
        'sequential',
        'compacted',
    }
    raced, otherwise = ways_to_race(heavy, confident, 16, 16, skip=True)
    several = ['all cores'] if cores > 1 else ['']
    alone = [('sequential', cores, 'one core')]
    driven = [('compacted', workers, *several) for workers in (1, 2)]
    assert [(way.kind, way.workers, way.compiled) for way, _ in raced[1:]] == [*alone, *driven]
    assert names_of(otherwise) == ['last exit'] * (cores + 1)
    raced, otherwise = ways_to_race(heavy, confident & False, 16, 16, skip=True)
    assert names_of(raced)[-1] == 'last exit'
    assert len(otherwise) == 1
    raced, otherwise = ways_to_race(heavy, confident, 16, 16, skip=False)
    assert names_of(otherwise) == ['dense'] * cores


def test_workers_take_turns_at_pieces_that_last(cores):
    """2 ms at least, and as many for each worker."""
    confident = np.ones((2, 10), bool)
    shared = {}
    for ms in (0.01, 1.0, 100.0):
        ways, _ = ways_to_race(linear_times([ms, 0, 0], [0, 0, 0]), confident, 64, 64, skip=True)
        shared[ms] = [way.chunk_sizes for way, _ in ways if way.kind == 'sequential' and way.workers > 1][:1]
    assert shared == ({0.01: [(32,)], 1.0: [(2,)], 100.0: [(1,)]} if cores > 1 else {ms: [] for ms in shared})


@pytest.mark.parametrize(
    ('batch_size', 'quantiles', 'ways'),
    [(1, SETTINGS[0], ''), (8, SETTINGS[0], 'every_way'), (24, SETTINGS[1], ''), (24, SETTINGS[3], '')],
)
def test_plan_is_dense_at_its_thresholds(network, uncertainty, batch_size, quantiles, ways, request):
    if ways:
        request.getfixturevalue(ways)
    model, variables, images = network
    thresholds = thresholds_at(uncertainty, quantiles)
    times = segment_times(model, variables, images, batch_sizes=[1, 8], passes=2)
    planned = plan(model, variables, images, thresholds, batch_size=batch_size, times=times, passes=2)
    kept = np.isin([0, 1], planned.exits)
    np.testing.assert_array_equal(planned.thresholds, np.where(kept, thresholds, -np.inf).astype(np.float32))
    for size in {batch_size, 5}:
        found = planned(images[:size])
        check_same(found, dense(model)(variables, images[:size], planned.thresholds))
    table = str(planned).splitlines()
    assert table[0] == f'batches of {batch_size}'
    assert [line.startswith(f'> {planned.executor} ') for line in table].count(True) == 1
    assert ('sequential, one core' in str(planned)) == (ways == 'every_way')
    assert isinstance(hash(planned), int)


def test_plan_keeps_all_heads_where_it_is_told_to(network, uncertainty):
    model, variables, images = network
    planned = plan(model, variables, images, [-np.inf, -np.inf], skip_heads=False, passes=1)
    assert planned.exits == (0, 1, 2)


def test_plan_with_a_criterion_that_remembers_asks_every_exit(network):
    model, variables, images = network
    planned = plan(model, variables, images, bj.ExitPolicy(CRITERIA[1], jnp.full(2, -np.inf)), passes=1)
    assert planned.exits == (0, 1, 2)
    assert planned.policy.criterion == CRITERIA[1]
    check_same(planned(images), dense(model)(variables, images, planned.policy))


def test_plan_of_a_network_without_image_shape(network):
    model, variables, images = network
    planned = plan(model.clone(image_shape=None), variables, images, [0.0, 0.0], passes=1)
    assert planned(images).label.shape == (24,)


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
def test_plan_refuses_impossible_settings(network, options, message):
    with pytest.raises(ValueError, match=message):
        plan(*network, [0.0, 0.0], **options)


def raced(name, low, median, high, *, exits=(0, 2), finalist=True):
    way = Way(name, 'baseline' if name == 'pace' else 'dense', exits)
    return Candidate(way, measured_ms=1.0, slowdown=Ratio(median, low, high), finalist=finalist)


PACE = raced('pace', 1, 1, 1, exits=(2,))
WITHOUT = raced('without', 0.9, 1.0, 1.1, exits=(2,))


@pytest.mark.parametrize(
    ('others', 'chosen'),
    [
        ([raced('a', 0.5, 0.6, 0.7), raced('b', 0.6, 0.7, 0.8)], 'a'),
        ([raced('a', 0.8, 0.95, 1.1), raced('b', 0.97, 0.98, 0.99)], 'b'),  # a is faster, but not for certain
        ([raced('a', 0.8, 0.95, 1.1), raced('b', 1.2, 1.3, 1.4)], 'without'),
        ([raced('a', 0.3, 0.4, 0.5, finalist=False), raced('b', 0.6, 0.7, 0.8)], 'b'),  # a was timed thrice
    ],
)
def test_what_does_not_beat_the_baseline_for_certain_loses(others, chosen):
    candidates = [PACE, WITHOUT, *others]
    assert choose(candidates, 3).name == chosen


def test_where_the_network_without_branches_is_no_choice_the_fastest_wins():
    candidates = [PACE, raced('a', 0.8, 0.95, 1.1), raced('b', 1.2, 1.3, 1.4)]
    assert choose(candidates, 3).name == 'a'


def test_race_batches_hold_the_shares_of_all_images():
    confident = np.array([[True] * 700 + [False] * 300, [True] * 900 + [False] * 100])
    images = np.arange(1000, dtype=np.float32)
    batches = _batches(images, confident, 32)
    assert [len(batch) for batch in batches] == [32] * 4
    drawn = np.concatenate(batches)
    assert abs((drawn < 700).mean() - 0.7) < 0.02
    assert abs((drawn >= 900).mean() - 0.1) < 0.02
    assert isinstance(_batches(images, confident, 1000)[0], jax.Array)
    assert len(_batches(jnp.asarray(images), confident, 1000)) == 1


def run_race(seconds, *, otherwise=None, budget=None, passes=6):
    """Races ways that sleep; returns the candidates by name, who was built, and what was told."""
    built, told = [], []

    def build(way):
        built.append(way.name)
        return lambda variables, batch, policy: time.sleep((seconds | (otherwise or {}))[way.name]), None

    def ways(names):
        return [
            (Way(n, 'baseline' if n == 'pace' else 'dense', (2,) if n == 'without' else (0, 2)), 1.0) for n in names
        ]

    progress = Progress(lambda text, share: told.append((text, share)), budget)
    found = race(ways(seconds), ways(otherwise or {}), build, [None], None, passes=passes, progress=progress)
    return {candidate.name: candidate for candidate in found}, built, told


PACE_SECONDS = 0.02


def test_the_network_without_branches_is_compiled_only_where_it_may_be_needed():
    slow, fast = {'pace': PACE_SECONDS, 'a': PACE_SECONDS * 1.2}, {'pace': PACE_SECONDS, 'a': PACE_SECONDS / 4}
    _, built, _ = run_race(fast, otherwise={'without': PACE_SECONDS})
    assert built == ['pace', 'a']
    found, built, _ = run_race(slow, otherwise={'without': PACE_SECONDS})
    assert built == ['pace', 'a', 'without']
    assert found['without'].finalist
    assert choose(list(found.values()), 3).name == 'without'


def test_a_clear_race_is_short_and_losers_leave_in_the_heat(monkeypatch):
    passes = []
    timed = race_room.interleaved_passes

    def note(functions, **options):
        passes.append((len(functions), options['passes']))
        return timed(functions, **options)

    monkeypatch.setattr(race_room, 'interleaved_passes', note)
    found, _, told = run_race({'pace': PACE_SECONDS, 'a': PACE_SECONDS / 8, 'b': PACE_SECONDS * 2}, passes=12)
    assert passes == [(3, 1), (3, 3), (2, 6)]
    assert [found[name].finalist for name in ('pace', 'a', 'b')] == [True, True, False]
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    assert told[0][0] == 'racing: pace'


def test_chunks_are_no_smaller_than_what_was_measured_without_need():
    confident = np.tile([[True] * 48 + [False] * 16], (1, 1))
    best = forecast(linear_times([40, 40], [0, 0], sizes=(8, 64)), confident, 64)[0]
    assert min(best.chunk_sizes) >= 8


def test_a_budget_that_is_spent_leaves_one_choice():
    found, built, _ = run_race({'pace': PACE_SECONDS, 'a': PACE_SECONDS / 4, 'b': PACE_SECONDS / 8}, budget=0.0)
    assert built == ['pace', 'a']
    assert choose(list(found.values()), 3).name == 'a'


def test_plan_tells_what_it_does_and_keeps_to_its_budget(network, uncertainty):
    model, variables, images = network
    told = []
    planned = plan(
        model,
        variables,
        images,
        thresholds_at(uncertainty, SETTINGS[0]),
        budget_seconds=0.0,
        on_progress=lambda text, share: told.append((text, share)),
    )
    texts, shares = zip(*told, strict=True)
    assert texts[:2] == ('rewriting the network', 'stages and heads at 8 images')
    assert texts[-1] == f'chosen: {planned.executor}'
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert list(shares) == sorted(shares)
    assert planned.times.batch_sizes.tolist() == [8]
    check_same(planned(images), dense(model)(variables, images, planned.policy))


def test_an_earlier_plan_saves_rewriting_measuring_and_compiling(network, uncertainty, monkeypatch):
    model, variables, images = network
    first = plan(model, variables, images, thresholds_at(uncertainty, SETTINGS[0]), passes=1)
    for name in ('optimize', 'segment_times'):
        monkeypatch.setattr(plan_room, name, None)  # nobody calls these
    second = plan(model, variables, images, thresholds_at(uncertainty, (0.5, 0.5)), passes=1, earlier=first)
    assert second.times is first.times
    check_same(second(images), dense(model)(variables, images, second.policy))
    for other in ((model.clone(image_shape=None), variables), (model, jax.tree.map(jnp.copy, variables))):
        with pytest.raises(ValueError, match='earlier: is a plan of another network or other weights'):
            plan(*other, images, [0.0, 0.0], earlier=first)
