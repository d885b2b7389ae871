"""One value says when an input leaves: every executor follows it, equal ones compile once, bad ones are refused."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax import inference
from experiments import run_exported

CRITERIA = {
    'entropy': bj.criteria.entropy,
    'max probability': bj.criteria.max_probability,
    'margin': bj.criteria.margin,
    'patience': bj.criteria.patience,
    'arithmetic ensemble': bj.criteria.ensemble(),
    'geometric ensemble': bj.criteria.ensemble('geometric'),
    'entropy, calibrated': bj.criteria.with_temperatures([2.0, 0.5, 1.0]),
}
EXECUTORS = ('dense', 'staged', 'sequential', 'loop', 'host', 'host × 2', 'stream', 'sharded')


def run(executor, model, variables, images, policy):
    """Runs images through any executor; returns label and exit of each."""
    if executor == 'staged':
        answers = [inference.staged(model)(variables, image, policy) for image in images]
        return np.array([(answer.label, answer.exit_index) for answer in answers]).T
    if executor == 'stream':
        result = list(inference.stream(model, chunk_size=5)(variables, [images[:9], images[9:]], policy))
        order = np.argsort(np.concatenate([answers.ids for answers in result]))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts)[order], *(answers.prediction for answers in result))
        return np.array([whole.label, whole.exit_index])
    answer = built(executor, model)(variables, images, policy)
    return np.array([answer.label, answer.exit_index])


def built(executor, model):
    compacted = functools.partial(inference.compacted, model, chunk_size=5)
    return {
        'dense': lambda: inference.dense(model),
        'sequential': lambda: inference.sequential(model),
        'loop': lambda: compacted(on_host=False),
        'host': lambda: compacted(on_host=True),
        'host × 2': lambda: compacted(on_host=True, workers=2),
        'sharded': lambda: inference.sharded(model, mesh=bj.sharding.data_mesh(1), chunk_size=5),
    }[executor]()


@pytest.fixture(scope='module')
def logits(network):
    model, variables, images = network
    return np.stack(model.apply(variables, images))


@pytest.fixture(scope='module')
def learned(logits):
    return bj.criteria.fit_learned(logits, np.arange(24) % CLASSES, jax.random.key(0), steps=20)


def outcome(policy, logits):
    """Label and exit of every row by a loop over exits; `test_criteria` holds the criteria to NumPy."""
    answers, uncertainty = map(np.asarray, bj.criteria.replay(policy.criterion, logits))
    exits = np.full(logits.shape[1], 2)
    for n in (1, 0):
        exits[uncertainty[n] < np.asarray(policy.thresholds)[n]] = n
    return np.array([answers[exits, np.arange(logits.shape[1])].argmax(-1), exits])


def policy_between(data, criterion, logits):
    """Draws thresholds clearly between neighbouring uncertainties, where rounding decides nothing."""
    thresholds = []
    for row in np.asarray(bj.criteria.replay(criterion, logits)[1])[:2]:
        gaps = [(a + b) / 2 for a, b in itertools.pairwise(np.unique(row)) if b - a > 1e-4]
        thresholds.append(data.draw(st.sampled_from([-np.inf, np.inf, *gaps])))
    return bj.ExitPolicy(criterion, jnp.asarray(thresholds, jnp.float32))


@pytest.mark.parametrize('executor', EXECUTORS)
@settings(max_examples=40)
@given(data=st.data())
def test_every_executor_follows_every_policy(network, logits, learned, executor, data):
    policy = policy_between(data, data.draw(st.sampled_from([*CRITERIA.values(), learned])), logits)
    np.testing.assert_array_equal(run(executor, *network, policy), outcome(policy, logits))


@pytest.mark.parametrize('executor', ['dense', 'staged', 'sequential', 'loop', 'host', 'stream'])
@pytest.mark.parametrize('name', ['entropy', 'patience', 'geometric ensemble'])
def test_images_that_are_not_finite_are_answered_last(network, name, executor):
    """NaN reaches the logits here: the last exit answers, uncertainty is NaN, and other images are not affected."""
    model, variables, images = network
    odd = images.at[3, 1, 2, 0].set(jnp.nan).at[12].set(jnp.inf).at[20, 0, 0, 0].set(-jnp.inf)
    policy = bj.ExitPolicy(CRITERIA[name], jnp.array([-0.5 if name == 'patience' else 1.0, jnp.inf]))
    expected, result = run(executor, model, variables, images, policy), run(executor, model, variables, odd, policy)
    finite = np.isfinite(odd).all(axis=(1, 2, 3))
    assert result[1, ~finite].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(result[:, finite], expected[:, finite])
    uncertainty = inference.dense(model)(variables, odd, policy).uncertainty
    np.testing.assert_array_equal(np.isnan(uncertainty), ~finite)


def test_plans_and_exports_follow_a_policy(network, logits, tmp_path):
    model, variables, images = network
    uncertainty = np.sort(bj.criteria.replay(bj.criteria.margin, logits)[1][:2], axis=1)
    thresholds = uncertainty[:, 8:10].mean(axis=1)  # halfway between two images
    policy = bj.ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.asarray(thresholds, jnp.float32))
    _, exits = outcome(policy, logits)
    assert len(set(exits)) > 1
    planned = inference.plan(model, variables, images, policy, skip_heads=False, passes=1)
    assert planned.policy == policy
    np.testing.assert_array_equal(planned(images).exit_index, exits)
    bj.export.save(tmp_path / 'exported', model, variables, policy, inputs=images, batch_size=24)
    exported = run_exported.load(tmp_path / 'exported')
    for answers in (run_exported.run_staged, run_exported.run_batch):
        np.testing.assert_array_equal(answers(exported, np.asarray(images))['exit_index'], exits)


def test_points_functions_and_bare_thresholds_are_policies(network):
    model, variables, images = network
    run_dense = inference.dense(model)
    data = bj.Batch(images, np.arange(24) % CLASSES)
    table = inference.exit_table(model, variables, data, criterion=bj.criteria.margin)
    point = table.screen().knee()
    result = run_dense(variables, images, point).exit_index
    np.testing.assert_allclose(np.bincount(result, minlength=3) / 24, point.exit_fractions)
    forms = {
        bj.criteria.margin: [point.policy, bj.ExitPolicy(bj.criteria.margin.uncertainty_of, point.thresholds)],
        bj.criteria.entropy: [point.thresholds, point.thresholds.tolist()],
    }
    for criterion, policies in forms.items():
        expected = run_dense(variables, images, bj.ExitPolicy(criterion, point.thresholds)).exit_index
        for policy in policies:
            np.testing.assert_array_equal(run_dense(variables, images, policy).exit_index, expected)


@pytest.mark.parametrize('executor', EXECUTORS)
def test_equal_executors_compile_once(network, compilations, executor):
    """An equal model, an equal executor, an equal criterion, other thresholds: nothing is compiled."""
    model, variables, images = network
    policy = bj.ExitPolicy(bj.criteria.ensemble(), jnp.array([0.5, 0.5]))
    run(executor, model, variables, images, policy)
    before = compilations.count
    again = bj.ExitPolicy(bj.criteria.ensemble(), jnp.array([0.5, 0.25]))
    run(executor, model.clone(), variables, images, again)
    assert compilations.count == before
    other = bj.criteria.as_criterion(lambda logits: -logits.max(-1))
    run(executor, model, variables, images, bj.ExitPolicy(other, again.thresholds))
    assert compilations.count > before


def test_outputs_and_tables_compile_once(network, compilations):
    model, variables, images = network
    data, scale = bj.Batch(images, np.arange(24) % CLASSES), bj.Normalization(jnp.zeros(1), jnp.ones(1))
    for same in (model, model.clone()):
        before = compilations.count
        inference.exit_outputs(same, variables, images, preprocess=scale)
        inference.exit_table(same, variables, data, preprocess=scale)
        scale = scale.replace(mean=jnp.ones(1))
    assert compilations.count == before


@pytest.mark.parametrize('executor', EXECUTORS)
@pytest.mark.parametrize(
    ('policy', 'message'),
    [
        (bj.ExitPolicy(bj.criteria.margin, jnp.zeros(3)), r'thresholds: .* takes 2 thresholds'),
        (bj.ExitPolicy(bj.criteria.margin, jnp.array([0.0, jnp.nan])), 'thresholds: got NaN'),
        (bj.ExitPolicy('margin', jnp.zeros(2)), "criterion: got 'margin'; give a value"),
        (bj.ExitPolicy(bj.criteria.with_temperatures([1.0, 2.0]), jnp.zeros(2)), 'was learned for 2 exits'),
    ],
)
def test_policies_that_do_not_fit_are_refused(network, executor, policy, message):
    """By every executor; `test_criteria` has the other reasons."""
    with pytest.raises(ValueError, match=message):
        run(executor, *network, policy)


def test_thresholds_of_double_precision_decide_as_float32_does():
    """0.1 in float64 lies below 0.1 in float32: an uncertainty of float32 0.1 must not leave in either."""

    class Same(nn.Module):
        def __call__(self, x, train=False):
            return x, x + 0.0

    own = bj.criteria.as_criterion(lambda logits: logits[..., 0])
    images = jnp.array([[0.1, 0.0], [0.05, 0.0]], jnp.float32)
    for thresholds in (np.array([0.1]), np.float32([0.1]), [0.1]):
        result = inference.dense(Same())({}, images, bj.ExitPolicy(own, thresholds))
        assert result.exit_index.tolist() == [1, 0]


def test_policies_map_over_thresholds(network):
    model, variables, images = network
    many = bj.ExitPolicy(bj.criteria.margin, jnp.array([[0.2, 0.5], [0.6, 0.1]]))
    mapped = jax.vmap(inference.dense(model), in_axes=(None, None, 0))(variables, images, many)
    for n in range(2):
        one = bj.ExitPolicy(bj.criteria.margin, many.thresholds[n])
        np.testing.assert_array_equal(mapped.exit_index[n], inference.dense(model)(variables, images, one).exit_index)
