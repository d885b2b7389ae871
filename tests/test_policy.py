"""One value says when an input leaves: every executor follows it, equal ones compile once, bad ones are refused."""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

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


def reference(name, logits):
    """Answers ``[N, B, K]`` and uncertainty ``[N, B]`` in NumPy float64."""
    logits = logits.astype(np.float64)
    if name == 'entropy, calibrated':
        logits = logits / np.array([2.0, 0.5, 1.0])[:, None, None]
    probability = special.softmax(logits, axis=-1)
    count = np.arange(1, len(logits) + 1)[:, None, None]
    if name == 'arithmetic ensemble':
        probability = probability.cumsum(0) / count
    if name == 'geometric ensemble':
        probability = special.softmax(np.log(probability).cumsum(0) / count, axis=-1)
    ordered = np.sort(probability, axis=-1)
    if name == 'max probability':
        return probability, 1 - ordered[..., -1]
    if name == 'margin':
        return probability, 1 - (ordered[..., -1] - ordered[..., -2])
    if name == 'patience':
        labels, agreed = logits.argmax(-1), np.zeros(logits.shape[:2])
        for n in range(1, len(labels)):
            agreed[n] = np.where(labels[n] == labels[n - 1], agreed[n - 1] + 1, 0)
        return probability, -agreed
    return probability, special.entr(probability).sum(-1)


def run(executor, model, variables, images, policy):
    """Runs images through any executor; returns label and exit of each."""
    if executor == 'staged':
        answers = [inference.staged(model)(variables, image, policy) for image in images]
        return np.array([(answer.label, answer.exit_index) for answer in answers]).T
    if executor == 'stream':
        found = list(inference.stream(model, chunk_size=5)(variables, [images[:9], images[9:]], policy))
        order = np.argsort(np.concatenate([answers.ids for answers in found]))
        labels, exits = (
            np.concatenate([getattr(answers.prediction, name) for answers in found])[order]
            for name in ('label', 'exit_index')
        )
        return np.array([labels, exits])
    answer = built(executor, model)(variables, images, policy)
    return np.array([answer.label, answer.exit_index])


@pytest.mark.parametrize('executor', ['dense', 'staged', 'sequential', 'loop', 'host', 'stream'])
@pytest.mark.parametrize('name', ['entropy', 'patience', 'geometric ensemble'])
def test_images_that_are_not_finite_are_answered_last(network, name, executor):
    """Here NaN reaches the logits: the last exit answers, uncertainty says NaN, and other images are none the worse."""
    model, variables, images = network
    odd = images.at[3, 1, 2, 0].set(jnp.nan).at[12].set(jnp.inf).at[20, 0, 0, 0].set(-jnp.inf)
    policy = bj.ExitPolicy(CRITERIA[name], jnp.array([-0.5 if name == 'patience' else 1.0, jnp.inf]))
    expected, found = run(executor, model, variables, images, policy), run(executor, model, variables, odd, policy)
    finite = np.isfinite(odd).all(axis=(1, 2, 3))
    assert found[1, ~finite].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(found[:, finite], expected[:, finite])
    uncertainty = inference.dense(model)(variables, odd, policy).uncertainty
    np.testing.assert_array_equal(np.isnan(uncertainty), ~finite)


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


def policy_between(data, name, logits):
    """Draws thresholds clearly between neighbouring uncertainties, and what must come out."""
    answers, uncertainty = reference(name, logits)
    thresholds = []
    for row in uncertainty[:2]:
        ordered = np.unique(row)
        gaps = [(a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-4]
        thresholds.append(data.draw(st.sampled_from([-np.inf, np.inf, *gaps])))
    confident = np.vstack([uncertainty[:2] < np.array(thresholds)[:, None], np.ones((1, logits.shape[1]), bool)])
    exits = confident.argmax(0)
    labels = answers[exits, np.arange(logits.shape[1])].argmax(-1)
    return bj.ExitPolicy(CRITERIA[name], jnp.asarray(thresholds, jnp.float32)), np.array([labels, exits])


@pytest.mark.parametrize('executor', EXECUTORS)
@settings(max_examples=40)
@given(data=st.data())
def test_every_executor_follows_every_policy(network, logits, executor, data):
    name = data.draw(st.sampled_from(sorted(CRITERIA)))
    policy, expected = policy_between(data, name, logits)
    np.testing.assert_array_equal(run(executor, *network, policy), expected)


def test_plans_and_exports_follow_a_policy(network, tmp_path):
    model, variables, images = network
    _, uncertainty = reference('margin', np.stack(model.apply(variables, images)))
    ordered = np.sort(uncertainty[:2], axis=1)
    thresholds = ordered[:, 8:10].mean(axis=1)  # halfway between two images
    policy = bj.ExitPolicy(criterion=bj.criteria.margin, thresholds=jnp.asarray(thresholds, jnp.float32))
    exits = np.vstack([uncertainty[:2] < thresholds[:, None], np.ones((1, 24), bool)]).argmax(0)
    assert len(set(exits)) > 1
    planned = inference.plan(model, variables, images, policy, skip_heads=False, passes=1)
    assert planned.policy == policy
    np.testing.assert_array_equal(planned(images).exit_index, exits)
    bj.export.save(tmp_path / 'exported', model, variables, thresholds=policy, batch_size=24)
    exported = run_exported.load(tmp_path / 'exported')
    for answers in (run_exported.run_staged, run_exported.run_batch):
        np.testing.assert_array_equal(answers(exported, np.asarray(images))['exit_index'], exits)


def test_whatever_holds_a_policy_goes_straight_in(network):
    model, variables, images = network
    labels = np.arange(24) % CLASSES
    table = inference.exit_table(model, variables, bj.Batch(images, labels), criterion=bj.criteria.margin)
    point = table.screen().knee()
    expected = inference.dense(model)(variables, images, point.policy)
    np.testing.assert_array_equal(inference.dense(model)(variables, images, point).exit_index, expected.exit_index)
    np.testing.assert_allclose(np.bincount(expected.exit_index, minlength=3) / 24, point.exit_fractions)
    bare, entropy = np.float32([0.5, 0.5]), bj.ExitPolicy(bj.criteria.entropy, np.float32([0.5, 0.5]))
    np.testing.assert_array_equal(
        *(inference.dense(model)(variables, images, policy).exit_index for policy in (bare, entropy))
    )


@pytest.mark.parametrize('executor', EXECUTORS)
def test_equal_executors_compile_once(network, compilations, executor):
    """An equal model, an equal policy, another builder's call, other thresholds: nothing is compiled."""
    model, variables, images = network
    policy = bj.ExitPolicy(bj.criteria.ensemble(), jnp.array([0.5, 0.5]))
    run(executor, model, variables, images, policy)
    before = compilations.count
    again = bj.ExitPolicy(bj.criteria.ensemble(), jnp.array([0.5, 0.25]))
    run(executor, model.clone(), variables, images, again)
    assert compilations.count == before
    other = bj.criteria.from_logits(lambda logits: -logits.max(-1), name='of this test alone')
    run(executor, model, variables, images, bj.ExitPolicy(other, again.thresholds))
    assert compilations.count > before


def test_outputs_and_tables_compile_once(network, compilations):
    model, variables, images = network
    data, scale = bj.Batch(images, np.arange(24) % CLASSES), bj.Normalization(jnp.zeros(1), jnp.ones(1))
    for same in (model, model.clone()):
        before = compilations.count
        inference.exit_outputs(same, variables, images, prepare=scale)
        inference.exit_table(same, variables, data, prepare=scale)
        scale = scale.replace(mean=jnp.ones(1))
    assert compilations.count == before


@pytest.mark.parametrize('name', CRITERIA)
def test_policies_are_values(name, tmp_path):
    criterion, same = CRITERIA[name], pickle.loads(pickle.dumps(CRITERIA[name]))
    policy = bj.ExitPolicy(criterion, jnp.array([-jnp.inf, 0.5]))
    assert (criterion, hash(criterion)) == (same, hash(same))
    assert policy == bj.ExitPolicy(same, np.float32([-np.inf, 0.5]))
    assert policy != bj.ExitPolicy(criterion, jnp.array([-jnp.inf, 0.25]))
    assert all(criterion != other for other_name, other in CRITERIA.items() if other_name != name)
    bj.criteria.save_policy(tmp_path / 'policy.safetensors', policy)
    assert bj.criteria.load_policy(tmp_path / 'policy.safetensors') == policy


def test_learned_criteria_are_saved_whole_and_run(network, tmp_path):
    model, variables, images = network
    outputs = inference.exit_outputs(model, variables, images)
    learned = bj.criteria.fit_learned(outputs.logits, np.arange(24) % CLASSES, jax.random.key(0), steps=5)
    policy = bj.ExitPolicy(learned, jnp.array([0.6, 0.6]))
    bj.criteria.save_policy(tmp_path / 'policy.safetensors', policy)
    found = bj.criteria.load_policy(tmp_path / 'policy.safetensors')
    assert found == policy
    _, uncertainty = bj.criteria.replay(found.criterion, outputs.logits)
    exits = np.vstack([np.asarray(uncertainty)[:2] < 0.6, np.ones((1, 24), bool)]).argmax(0)
    np.testing.assert_array_equal(inference.dense(model)(variables, images, found).exit_index, exits)


def test_only_criteria_of_the_library_are_saved(tmp_path):
    own = bj.criteria.from_logits(lambda logits: logits[..., 0], name='own')
    with pytest.raises(ValueError, match="holds '<lambda>', which is not one of branchy_jax.criteria"):
        bj.criteria.save_policy(tmp_path / 'p', bj.ExitPolicy(own, jnp.zeros(1)))
    assert not list(tmp_path.iterdir())
    bj.checkpoint.save_weights(tmp_path / 'weights', {'a': jnp.zeros(1)})
    with pytest.raises(ValueError, match='holds no policy'):
        bj.criteria.load_policy(tmp_path / 'weights')


@pytest.mark.parametrize(
    'record',
    [
        {'criterion': {'kind': 'system', 'fields': {}}, 'thresholds': {'array': 'array0'}},
        {'criterion': {'kind': 'fit_learned', 'fields': {}}, 'thresholds': {'array': 'array0'}},
        {'criterion': {'function': 'os.system'}, 'thresholds': {'array': 'array0'}},
        {'criterion': {'kind': '_Ensemble', 'fields': {}}, 'thresholds': {'array': 'array0'}},
        {'thresholds': {'array': 'nowhere'}},
    ],
)
def test_records_of_something_else_are_refused(record):
    with pytest.raises(ValueError, match='policy: cannot be read'):
        bj.criteria.policy.decode_policy(record, {'array0': np.zeros(2)})


@pytest.mark.parametrize('executor', EXECUTORS)
@pytest.mark.parametrize(
    ('policy', 'message'),
    [
        (bj.ExitPolicy(bj.criteria.margin, jnp.zeros(3)), r'thresholds: .* takes 2 thresholds'),
        (bj.ExitPolicy(bj.criteria.margin, jnp.array([0.0, jnp.nan])), 'thresholds: got NaN'),
        (bj.ExitPolicy('margin', jnp.zeros(2)), "criterion: got 'margin'; give a value"),
        (bj.ExitPolicy(bj.criteria.with_temperatures([1.0, 2.0]), jnp.zeros(2)), 'was learned for 2 exits'),
        (
            bj.ExitPolicy(
                bj.criteria.with_temperatures([1.0] * 3).replace(temperatures=jnp.full(3, jnp.nan)), jnp.zeros(2)
            ),
            'has learned NaN',
        ),
    ],
)
def test_policies_that_do_not_fit_are_refused(network, executor, policy, message):
    with pytest.raises(ValueError, match=message):
        run(executor, *network, policy)


def test_criteria_learned_on_another_network_are_refused(network):
    model, variables, images = network
    learned = bj.criteria.fit_learned(np.zeros((3, 8, 7)), np.arange(8) % 7, jax.random.key(0), steps=1)
    with pytest.raises(ValueError, match='was learned on the 7 largest probabilities, this network has 3'):
        inference.dense(model)(variables, images, bj.ExitPolicy(learned, jnp.zeros(2)))


def test_thresholds_of_double_precision_decide_as_float32_does(network):
    """0.1 in float64 lies below 0.1 in float32: an uncertainty of float32 0.1 must not leave in either."""
    model = bj.BranchyNet(stages=(lambda x: x, lambda x: x), exits=(lambda x: x, lambda x: x))
    own = bj.criteria.from_logits(lambda logits: logits[..., 0], name='first')
    images, variables = jnp.array([[0.1, 0.0], [0.05, 0.0]], jnp.float32), {}
    for thresholds in (np.array([0.1]), np.float32([0.1]), [0.1]):
        found = inference.dense(model)(variables, images, bj.ExitPolicy(own, thresholds))
        assert found.exit_index.tolist() == [1, 0]


def test_policies_map_over_thresholds(network):
    model, variables, images = network
    many = bj.ExitPolicy(bj.criteria.margin, jnp.array([[0.2, 0.5], [0.6, 0.1]]))
    mapped = jax.vmap(inference.dense(model), in_axes=(None, None, 0))(variables, images, many)
    for n in range(2):
        one = bj.ExitPolicy(bj.criteria.margin, many.thresholds[n])
        np.testing.assert_array_equal(mapped.exit_index[n], inference.dense(model)(variables, images, one).exit_index)
