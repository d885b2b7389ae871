"""All executors follow one rule, and do less than `dense`."""

import collections
import functools
import itertools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, Function, equations, random_variables
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from scipy import special
from test_inference import check_same, entropy64

import branchy_jax as bj
from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference import compacted, compiler_options, dense, sequential, sharded, staged, stream

BATCH = 8


def staged_in_turn(model, **options):
    """Returns what answers a batch with `staged`, one image after the other."""
    execute = staged(model, **options)

    def answer(variables, images, policy):
        answers = [execute(variables, image, policy) for image in np.asarray(images)]
        return jax.tree.map(lambda *values: np.stack(values), *answers)

    return answer


def streamed(model, **options):
    """Returns what answers a batch with `stream`, in two parts."""
    execute = stream(model, chunk_size=5, **options)

    def answer(variables, images, policy):
        parts = list(execute(variables, [images[:3], images[3:]], policy))
        order = np.argsort(np.concatenate([part.ids for part in parts]))
        answers = (part.prediction for part in parts)
        return jax.tree.map(lambda *values: np.concatenate(values)[order], *answers)

    return answer


BUILDERS = {
    'dense': dense,
    'staged': staged_in_turn,
    'sequential': sequential,
    'loop': functools.partial(compacted, chunk_size=(3, 2, 1), on_host=False),
    'loop of whole chunks': functools.partial(compacted, chunk_size=4, on_host=False),
    'loop of one chunk': functools.partial(compacted, chunk_size=40, on_host=False),
    'host': functools.partial(compacted, chunk_size=3, on_host=True),
    'host × 2': functools.partial(compacted, chunk_size=(5, 2, 1), on_host=True, workers=2),
    'sharded': functools.partial(sharded, chunk_size=3, mesh=bj.sharding.data_mesh(1)),
    'stream': streamed,
}
LOOKING_BACK = ('dense', 'staged', 'loop', 'host × 2', 'sharded', 'stream')
FEW = ('dense', 'staged', 'sequential', 'loop of whole chunks', 'host')


@functools.partial(struct.dataclass, eq=False, repr=False)
class RunningMean(Criterion):
    """A criterion that uses earlier exits: the mean of the entropies so far, answering with the summed logits."""

    name = 'running mean'

    def __call__(self, logits, carry, n):
        answer, total = (jnp.zeros_like(logits), jnp.zeros(logits.shape[0])) if carry is None else carry
        answer, total = answer + logits, total + entropy(logits, None, n)[1]
        return answer, total / (n + 1), (answer, total)


CRITERIA = {
    'entropy': entropy,
    'running mean': RunningMean(),
    'learned': bj.criteria.with_temperatures([2.0, 0.5, 1.0], bj.criteria.ensemble('geometric')),
}


@pytest.fixture(scope='module')
def every(network):
    """Answers and uncertainties ``[N, M, …]`` of every criterion, in NumPy float64."""
    model, variables, images = network
    logits = np.float64(jnp.stack(model.apply(variables, images)))
    mean = entropy64(logits).cumsum(0) / np.arange(1, 4)[:, None]
    calibrated = np.stack([special.log_softmax(z / t, axis=-1) for z, t in zip(logits, (2, 0.5, 1), strict=True)])
    answers = special.log_softmax(calibrated.cumsum(0) / np.arange(1, 4)[:, None, None], axis=-1)
    return {
        'entropy': (logits, entropy64(logits)),
        'running mean': (logits.cumsum(0), mean),
        'learned': (answers, entropy64(answers)),
    }


def by_the_rule(answers, uncertainty, thresholds):
    """The first exit whose uncertainty is below its threshold answers, else the last."""
    confident = np.vstack([uncertainty[:-1] < np.float64(thresholds)[:, None], np.ones(uncertainty.shape[1], bool)])
    exits, rows = confident.argmax(0), np.arange(uncertainty.shape[1])
    chosen = answers[exits, rows]
    return bj.types.ExitPrediction(chosen.argmax(-1), exits, chosen, uncertainty[exits, rows])


def between(values):
    """Returns thresholds that lie clearly between neighbouring values, so that rounding decides nothing."""
    ordered = np.sort(values)
    return [-np.inf, np.inf, *((a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-4)]


@pytest.mark.parametrize('criterion', CRITERIA)
@settings(max_examples=15)
@given(data=st.data())
def test_all_executors_follow_the_rule(network, every, criterion, data):
    model, variables, images = network
    answers, uncertainty = every[criterion]
    thresholds = [data.draw(st.sampled_from(between(uncertainty[n]))) for n in range(2)]
    rows = np.random.default_rng(data.draw(st.integers(0, 1000))).permutation(24)[:BATCH]
    policy = bj.ExitPolicy(CRITERIA[criterion], np.float32(thresholds))
    expected = by_the_rule(answers[:, rows], uncertainty[:, rows], thresholds)
    for name in BUILDERS if criterion == 'entropy' else LOOKING_BACK:
        answer = BUILDERS[name](model)(variables, np.asarray(images)[rows], policy)
        check_same(answer, expected)
        assert (answer.label.dtype, answer.exit_index.dtype) == (jnp.int32, jnp.int32)


@pytest.mark.parametrize('name', ['dense', 'sequential', 'loop', 'host', 'stream'])
def test_images_that_are_not_finite_leave_last_and_affect_no_other(network, name):
    model, variables, images = network
    odd = images[:BATCH].at[3, 1, 2, 0].set(jnp.nan).at[5].set(jnp.inf).at[6, 0, 0, 0].set(-jnp.inf)
    policy, finite = bj.ExitPolicy(CRITERIA['learned'], jnp.full(2, 0.9)), np.isfinite(odd).all((1, 2, 3))
    answer, expected = BUILDERS[name](model)(variables, odd, policy), dense(model)(variables, images[:BATCH], policy)
    np.testing.assert_array_equal(answer.exit_index, np.where(finite, expected.exit_index, 2))
    np.testing.assert_array_equal(np.isnan(answer.uncertainty), ~finite)


def test_thresholds_of_double_precision_decide_as_float32_does():
    """0.1 in float64 lies below 0.1 in float32: an uncertainty of float32 0.1 must not leave in either."""
    same, images = Function(lambda x: (x, x + 0.0)), jnp.array([[0.1, 0.0], [0.05, 0.0]], jnp.float32)
    for thresholds in (np.array([0.1]), np.float32([0.1]), [0.1]):
        policy = bj.ExitPolicy(lambda logits: logits[..., 0], thresholds)
        assert dense(same)({}, images, policy).exit_index.tolist() == [1, 0]


@pytest.mark.parametrize('name', ['dense', 'sequential', 'loop', 'host', 'sharded'])
def test_an_empty_batch_is_answered(network, name):
    model, variables, images = network
    answer = BUILDERS[name](model)(variables, images[:0], [0.1, 0.1])
    assert jax.tree.map(jnp.shape, answer) == bj.types.ExitPrediction((0,), (0,), (0, CLASSES), (0,))


@pytest.mark.parametrize('name', ['dense', 'staged', 'sequential', 'loop', 'host', 'sharded'])
def test_exits_left_out_are_thresholds_of_minus_infinity(network, every, name):
    model, variables, images = network
    answers, uncertainty = (values[:, :BATCH] for values in every['entropy'])
    middle = np.sort(uncertainty[1])[3:5].mean()
    options = {'chunk_size': (3, 2)} if name == 'loop' else {}
    execute = BUILDERS[name](model, exits=[1, 2], **options)
    answer = execute(variables, images[:BATCH], np.float32([np.inf, middle]))
    check_same(answer, by_the_rule(answers, uncertainty, [-np.inf, middle]))


def test_programs_can_be_mapped_and_jitted(network, every):
    model, variables, images = network
    images, (answers, uncertainty) = images[:BATCH], (values[:, :BATCH] for values in every['entropy'])
    settings = jnp.float32([[np.sort(u)[k : k + 2].mean() for u in uncertainty[:2]] for k in (2, 4)])
    for name in ('dense', 'loop'):
        mapped = jax.jit(jax.vmap(BUILDERS[name](model), in_axes=(None, None, 0)))(variables, images, settings)
        for n, thresholds in enumerate(settings):
            one_setting = jax.tree.map(lambda x, n=n: x[n], mapped)
            check_same(one_setting, by_the_rule(answers, uncertainty, thresholds))
    mapped = jax.vmap(staged(model), in_axes=(None, 0, None))(variables, images, settings[0])
    check_same(mapped, by_the_rule(answers, uncertainty, settings[0]))
    never = jax.jit(dense(model))(variables, images, jnp.full(2, jnp.nan))
    assert set(never.exit_index.tolist()) == {2}
    with pytest.raises(ValueError, match='on_host=False'):
        jax.jit(BUILDERS['host'](model))(variables, images, settings[0])


@pytest.mark.parametrize('name', FEW)
def test_nothing_compiles_however_many_survive(network, every, compilations, name):
    model, variables, images = network
    execute, images = BUILDERS[name](model), np.asarray(images[:BATCH])
    quantiles = np.quantile(every['entropy'][1][:2, :BATCH], np.linspace(0, 1, 5), axis=1)
    policies = (*np.float32(quantiles), [0.5, 0.5], jnp.array([0.1, 0.2]))
    execute(variables, images, np.full(2, -np.inf))
    before, survivors = compilations.count, set()
    for thresholds in policies:
        survivors.add(int((np.asarray(execute(variables, images, thresholds).exit_index) > 0).sum()))
    assert len(survivors) > 3
    assert compilations.count == before


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


@pytest.mark.parametrize('name', FEW)
def test_a_skipped_stage_runs_zero_times(network, name):
    runs, images = collections.Counter(), network[2][:9] if name == 'host' else network[2][:BATCH]
    model = counting_network(runs)
    variables, execute = random_variables(model, images), BUILDERS[name](model)
    for leaves in range(3):
        runs.clear()
        jax.block_until_ready(execute(variables, images, [np.inf if n >= leaves else -np.inf for n in range(2)]))
        assert dict(runs) == dict.fromkeys(range(3 if name == 'dense' else leaves + 1), len(images))


@pytest.mark.parametrize('name', ['loop', 'sharded'])
def test_no_program_writes_or_reads_behind_a_buffer(network, name):
    """Compilers disagree about what happens there: IREE has put such a write into row 0."""
    model, variables, images = network
    arguments = variables, images, bj.ExitPolicy(entropy, np.float32([0.9, 0.9]))
    execute = BUILDERS[name](model)
    jaxpr = jax.make_jaxpr(lambda *arguments: execute(*arguments))(*arguments).jaxpr
    kinds = ('gather', 'scatter', 'scatter-add')
    modes = {equation.params['mode'] for equation in equations(jaxpr) if equation.primitive.name in kinds}
    assert modes
    assert modes <= {jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS, jax.lax.GatherScatterMode.CLIP}
    if name != 'sharded':  # which checkify does not know
        checked = checkify.checkify(lambda *arguments: execute(*arguments), errors=checkify.index_checks)
        assert checked(*arguments)[0].get() is None


@pytest.mark.parametrize('name', FEW)
def test_compiler_options_reach_the_compiler(network, name):
    model, variables, images = network
    with pytest.raises(Exception, match='no_such_option'):
        BUILDERS[name](model, compiler_options={'no_such_option': 1})(variables, images, [0.0, 0.0])


def test_all_cores_are_used_where_there_are_several(all_compiler_options, monkeypatch):
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 2)
    assert compiler_options.usable_options() in (['one core', 'all cores'], [])  # a compiler knows both or none
    monkeypatch.setattr(compiler_options, 'num_cores', lambda: 1)
    assert compiler_options.usable_options() in (['one core'], [])


@pytest.mark.parametrize('name', FEW)
def test_bad_input_is_refused(network, name):
    model, variables, images = network
    execute = BUILDERS[name](model)
    for thresholds, message in (
        ([0.5], r'takes 2 thresholds; got shape \(1,\)'),
        (0.5, r'got shape \(\)'),
        (np.zeros((1, 2)), r'got shape \(1, 2\)'),
        ([0.5, np.nan], 'got NaN in'),
        (['low', 'high'], 'expected a number for each side exit'),
        (jnp.array([1, 2]), 'expected floats, got int32'),
    ):
        with pytest.raises(ValueError, match=f'thresholds: .*{message}'):
            execute(variables, images, thresholds)
    with pytest.raises(ValueError, match='inputs: their shape does not fit the variables'):
        execute(variables, images[:, :2], [0.0, 0.0])
    for exits in ([], [0], [2, 0], [0, 0, 2], [0, 3], [-1, 2], [0.9, 2], [False, 2]):
        with pytest.raises(ValueError, match='exits: got'):  # those of a larger network when it is called
            BUILDERS[name](model, exits=exits)(variables, images, [0.0, 0.0])
    policy = bj.ExitPolicy(CRITERIA['running mean'], jnp.zeros(2))
    with pytest.raises(ValueError, match="exits: criterion 'running mean' uses earlier exits"):
        BUILDERS[name](model, exits=[2])(variables, images, policy)


def test_impossible_settings_are_refused(network):
    model, variables, images = network
    for chunk_size in (0, -1, 2.5, (1, 2), (1, 2, 0), 'two'):
        with pytest.raises(ValueError, match='chunk_size: got'):
            compacted(model, chunk_size=chunk_size)(variables, images, [0.0, 0.0])
    with pytest.raises(ValueError, match='workers: got 0'):
        compacted(model, chunk_size=1, workers=0)
    with pytest.raises(ValueError, match='workers: got 2 with on_host=False'):
        compacted(model, chunk_size=1, workers=2, on_host=False)


def test_policies_are_checked_at_every_call(network):
    """The same array, list or holder may have other contents the next time."""
    model, variables, images = network

    def exits(policy):
        return set(dense(model)(variables, images[:BATCH], policy).exit_index.tolist())

    changing = np.array([-np.inf, -np.inf], np.float32)
    holder = types.SimpleNamespace(policy=jnp.full(2, -jnp.inf))
    listed = bj.ExitPolicy(entropy, [jnp.float32(-jnp.inf)] * 2)
    assert [exits(policy) for policy in (changing, holder, listed)] == [{2}] * 3
    changing[0], holder.policy, listed.thresholds[0] = np.inf, jnp.full(2, jnp.inf), jnp.float32(jnp.inf)
    assert [exits(policy) for policy in (changing, holder, listed)] == [{0}] * 3
    changing[0] = np.nan
    with pytest.raises(ValueError, match='thresholds: got NaN in'):
        exits(changing)
    weak = jnp.full(2, 0.5)  # weakly typed; what was converted under jit serves outside, too
    jax.make_jaxpr(lambda image: staged(model)(variables, image, weak))(images[0])
    exits(weak)
