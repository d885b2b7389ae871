import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

import branchy_jax as bj
from branchy_jax.criteria import EveryOther, entropy_of_logits, from_logits, is_confident

LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 12)),
    elements=st.floats(-100, 100, width=32) | st.sampled_from([-1e30, -1e4, 0.0, 1e4, 1e30]),
)


def reference_entropy(logits):
    probability = special.softmax(logits.astype(np.float64), axis=-1)
    return special.entr(probability).sum(-1)


@given(LOGITS)
def test_entropy_is_the_float64_reference(logits):
    found = np.asarray(entropy_of_logits(jnp.asarray(logits)))
    np.testing.assert_allclose(found, reference_entropy(logits), rtol=1e-5, atol=1e-12)
    assert (found >= 0).all()
    assert (found <= np.log(logits.shape[-1]) + 1e-5).all()


@pytest.mark.parametrize('gap', [5.0, 15.0, 40.0, 80.0])
def test_small_entropies_keep_their_digits(gap):
    """The paper's thresholds go down to 1e-4. Here float64 would not do either: the reference has 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        others = 9 * decimal.Decimal(-gap).exp()
        expected = (1 + others).ln() + others * decimal.Decimal(gap) / (1 + others)
    found = entropy_of_logits(jnp.array([gap] + [0.0] * 9))
    np.testing.assert_allclose(found, float(expected), rtol=1e-5)


@pytest.mark.parametrize('classes', [2, 10, 1000])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_uniform_logits_have_entropy_log_k(classes, dtype):
    found = entropy_of_logits(jnp.full((3, classes), 7.5, dtype))
    np.testing.assert_allclose(found, np.log(classes), rtol=1e-6)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize('value', [1e4, 3e38])
def test_extreme_logits_have_finite_entropy_and_gradient(value):
    logits = jnp.array([value, -value, 0.0])
    assert float(entropy_of_logits(logits)) == 0.0
    assert np.isfinite(jax.grad(entropy_of_logits)(logits)).all()


def test_entropy_batches():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    one_by_one = jax.vmap(jax.vmap(entropy_of_logits))(logits)
    np.testing.assert_allclose(entropy_of_logits(logits), one_by_one, rtol=1e-6)


def test_dense_predictions_average_over_their_axes():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    _, uncertainty, _ = bj.criteria.entropy.update(logits, (), 0)
    np.testing.assert_allclose(uncertainty, reference_entropy(np.asarray(logits)).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ('uncertainty', 'threshold', 'expected'),
    [
        (0.5, 0.6, True),
        (0.5, 0.5, False),
        (0.5, 0.4, False),
        (0.0, -np.inf, False),
        (-np.inf, -np.inf, False),
        (1e30, np.inf, True),
        (np.nan, np.inf, False),
        (0.5, np.nan, False),
    ],
)
def test_is_confident_is_strict(uncertainty, threshold, expected):
    assert bool(is_confident(jnp.float32(uncertainty), jnp.float32(threshold))) is expected


@pytest.mark.parametrize(
    'criterion',
    [
        bj.criteria.entropy,
        bj.criteria.margin,
        bj.criteria.max_probability,
        bj.criteria.patience,
        bj.criteria.ensemble(),
        bj.criteria.ensemble('geometric'),
        bj.criteria.pixelwise([0.5]),
        bj.criteria.with_temperatures([1.0, 1.0]),
    ],
    ids=repr,
)
@pytest.mark.parametrize('shape', [(4, 1), (4, 2, 2, 1)], ids=['images', 'pixels'])
def test_heads_with_one_logit_are_refused(criterion, shape):
    """The softmax of one logit is 1: all would leave at the first exit, whatever they are."""
    logits = jnp.zeros(shape)
    with pytest.raises(ValueError, match='logits: got shape .*give heads that end in two classes'):
        jax.jit(lambda logits: criterion.update(logits, criterion.init(logits), 0)[1])(logits)
    own = from_logits(lambda logits: jnp.abs(logits[..., 0]), name='own', decide=lambda logits: logits[..., 0])
    assert own.update(logits, (), 0)[1].shape == (4,)


def test_own_criterion_keeps_name_and_logits():
    criterion = from_logits(lambda logits: 1 - jax.nn.softmax(logits).max(-1), name='max probability')
    logits = jnp.array([[0.0, jnp.log(3.0)]])
    answer, uncertainty, carry = criterion.update(logits, criterion.init(logits), 0)
    assert criterion.name == 'max probability'
    assert answer is logits
    assert carry == ()
    np.testing.assert_allclose(uncertainty, [0.25], rtol=1e-6)


@given(LOGITS)
def test_max_probability_and_margin_are_the_float64_reference(logits):
    probability = np.sort(special.softmax(logits.astype(np.float64), axis=-1), axis=-1)
    doubt = np.asarray(bj.criteria.max_probability_of_logits(jnp.asarray(logits)))
    closeness = np.asarray(bj.criteria.margin_of_logits(jnp.asarray(logits)))
    np.testing.assert_allclose(doubt, probability[:, :-1].sum(-1), rtol=1e-5, atol=1e-12)
    expected = probability[:, :-1].sum(-1) + probability[:, -2]
    np.testing.assert_allclose(closeness, expected, rtol=1e-5, atol=1e-12)


def walk(criterion, logits):
    """Returns answers and uncertainties of a criterion over exits ``[N, B, K]``."""
    return tuple(np.asarray(found) for found in bj.criteria.replay(criterion, logits))


def logits_of(labels, classes=3):
    return jnp.asarray(5.0 * np.eye(classes, dtype=np.float32)[np.array(labels)])


def test_patience_counts_agreements_in_a_row():
    labels = [[0, 1, 2], [0, 1, 1], [0, 2, 1], [1, 2, 1]]  # four exits, three inputs
    _, uncertainty = walk(bj.criteria.patience, logits_of(labels))
    assert uncertainty.tolist() == [[0, 0, 0], [-1, -1, 0], [-2, 0, -1], [0, -1, -2]]


def test_patience_of_dense_predictions_is_the_mean_over_pixels():
    labels = [[[0, 1]], [[0, 2]], [[0, 2]]]
    _, uncertainty = walk(bj.criteria.patience, logits_of(labels))
    assert uncertainty.tolist() == [[0], [-0.5], [-1.5]]


@pytest.mark.parametrize('kind', ['arithmetic', 'geometric'])
def test_ensembles_are_means_of_probabilities(kind):
    logits = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    probability = special.softmax(logits.astype(np.float64), axis=-1)
    answers, uncertainty = walk(bj.criteria.ensemble(kind), jnp.asarray(logits))
    for n in range(4):
        if kind == 'arithmetic':
            expected = probability[: n + 1].mean(axis=0)
        else:
            expected = np.exp(np.log(probability[: n + 1]).mean(axis=0))
            expected /= expected.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(np.exp(answers[n]), expected, rtol=1e-5)
        np.testing.assert_allclose(uncertainty[n], special.entr(expected).sum(-1), rtol=1e-5)


def test_temperatures_divide_each_exits_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32))
    answers, uncertainty = walk(bj.criteria.with_temperatures([2.0, 0.5]), logits)
    np.testing.assert_allclose(answers, np.asarray(logits) / [[[2.0]], [[0.5]]], rtol=1e-6)
    np.testing.assert_allclose(uncertainty[1], reference_entropy(np.asarray(logits[1]) * 2), rtol=1e-5)


@pytest.mark.parametrize('temperatures', [[1.0, 0.0], [1.0, -1.0], [np.nan], [[1.0]]])
def test_impossible_temperatures_are_refused(temperatures):
    with pytest.raises(ValueError, match='temperatures: got'):
        bj.criteria.with_temperatures(temperatures)


@pytest.mark.parametrize('value', [-np.inf, np.nan])
def test_temperatures_are_not_fitted_on_what_is_not_finite(value):
    logits = np.zeros((2, 4, 3))
    logits[1, 2, 0] = value
    with pytest.raises(ValueError, match='logits: got 1 values that are not finite'):
        bj.criteria.fit_temperatures(logits, [0, 1, 2, 0])


def test_criteria_refuse_exits_they_know_nothing_of():
    logits = jnp.zeros((3, 2, 4))
    with pytest.raises(ValueError, match='temperatures: there are 2'):
        bj.criteria.replay(bj.criteria.with_temperatures([1.0, 2.0]), logits)
    fitted = bj.criteria.fit_learned(logits[:2], np.zeros(2, int), jax.random.key(0), steps=1)
    with pytest.raises(ValueError, match='learned criterion: there are 2'):
        bj.criteria.replay(fitted, logits)


@pytest.mark.parametrize(
    'criterion',
    [
        bj.criteria.entropy,
        bj.criteria.margin,
        bj.criteria.max_probability,
        bj.criteria.patience,
        bj.criteria.ensemble(),
        bj.criteria.ensemble('geometric'),
        bj.criteria.pixelwise([0.5, 0.5]),
        bj.criteria.with_temperatures([1.0] * 3),
        from_logits(EveryOther(entropy_of_logits), name='every other'),
        bj.criteria.ensemble(uncertainty_of=EveryOther(entropy_of_logits)),
    ],
    ids=repr,
)
def test_nan_is_never_confident(criterion):
    """One NaN among the logits of an answer makes its uncertainty NaN, which no threshold takes for sure."""
    logits = jnp.zeros((3, 2, 1, 2, 4)).at[:, 0, 0, 1, 2].set(jnp.nan)
    uncertainty = bj.criteria.replay(criterion, logits)[1]
    np.testing.assert_array_equal(np.isnan(uncertainty), [[True, False]] * 3)
    assert not is_confident(uncertainty[:, 0], jnp.full(3, jnp.inf)).any()


def test_patience_takes_no_agreement_from_nan():
    logits = jnp.zeros((3, 1, 4)).at[0].set(jnp.nan).at[1:, :, 0].set(1.0)  # NaN's argmax is class 0
    assert bj.criteria.replay(bj.criteria.patience, logits)[1].ravel().tolist()[1:] == [0, -1]


def test_unknown_ensembles_are_refused():
    with pytest.raises(ValueError, match='kind: got'):
        bj.criteria.ensemble('harmonic')


@pytest.mark.parametrize(
    'criterion',
    [
        bj.criteria.max_probability,
        bj.criteria.margin,
        bj.criteria.patience,
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures([2.0, 1.0, 0.5], bj.criteria.ensemble()),
        'learned',
    ],
    ids=lambda criterion: getattr(criterion, 'name', criterion),
)
def test_every_criterion_runs_in_every_executor(network, criterion):
    model, variables, images = network
    if criterion == 'learned':
        logits = bj.inference.exit_outputs(model, variables, images).logits
        labels = np.arange(len(images)) % logits.shape[-1]
        criterion = bj.criteria.fit_learned(logits, labels, jax.random.key(0), steps=20)
    every = bj.inference.exit_outputs(model, variables, images, criterion=criterion)
    spread = np.sort(every.uncertainty[:2], axis=1)
    middle = np.array([(row[11] + row[12]) / 2 if row[11] < row[12] else -0.5 for row in spread], np.float32)
    policy = bj.ExitPolicy(criterion, middle)
    expected = bj.inference.dense(model)(variables, images, policy)
    executors = {
        'loop': bj.inference.compacted(model, chunk_size=5, on_host=False),
        'host': bj.inference.compacted(model, chunk_size=5, on_host=True),
        'sequential': bj.inference.sequential(model),
    }
    streamed = list(bj.inference.stream(model, chunk_size=5)(variables, [images], policy))
    ids = np.concatenate([answers.ids for answers in streamed])
    exits = np.concatenate([answers.prediction.exit_index for answers in streamed])
    np.testing.assert_array_equal(exits[np.argsort(ids)], expected.exit_index)
    for execute in executors.values():
        found = execute(variables, images, policy)
        np.testing.assert_array_equal(found.exit_index, expected.exit_index)
        np.testing.assert_array_equal(found.label, expected.label)
    alone = bj.inference.staged(model)(variables, images[3], policy)
    assert int(alone.exit_index) == int(expected.exit_index[3])
    assert len(set(expected.exit_index.tolist())) > 1


ALL = [
    bj.criteria.entropy,
    bj.criteria.max_probability,
    bj.criteria.margin,
    bj.criteria.patience,
    bj.criteria.ensemble('geometric'),
    bj.criteria.with_temperatures([2.0, 1.0], bj.criteria.margin),
    bj.criteria.pixelwise([0.5]),
    from_logits(bj.criteria.entropy_of_logits, name='worst pixel', pool=bj.criteria.QuantileOverPixels(1.0)),
    from_logits(bj.criteria.entropy_of_logits, name='patch', pool=bj.criteria.QuantileOverPatches(1.0, size=2)),
]


@pytest.mark.parametrize('criterion', ALL, ids=lambda criterion: criterion.name)
def test_no_images_have_no_uncertainty(criterion):
    assert bj.criteria.replay(criterion, jnp.zeros((2, 0, 4, 4, 3)))[1].shape == (2, 0)


@pytest.mark.parametrize('criterion', ALL, ids=lambda criterion: criterion.name)
def test_criteria_are_values(criterion):
    again = jax.tree.map(lambda leaf: np.array(leaf), criterion)
    assert again == criterion
    assert hash(again) == hash(criterion)
    assert [other == criterion for other in ALL].count(True) == 1


@pytest.mark.parametrize('criterion', [*ALL, 'learned'], ids=lambda criterion: getattr(criterion, 'name', criterion))
def test_policies_come_back_from_files(tmp_path, criterion):
    if criterion == 'learned':
        logits = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
        criterion = bj.criteria.fit_learned(logits, np.arange(9) % 3, jax.random.key(0), steps=2)
    policy = bj.ExitPolicy(criterion, np.array([0.25], np.float32))
    bj.criteria.save_policy(tmp_path / 'policy.safetensors', policy)
    assert bj.criteria.load_policy(tmp_path / 'policy.safetensors') == policy


def test_policies_with_functions_of_their_own_are_not_written(tmp_path):
    own = from_logits(lambda logits: -logits.max(-1), name='own')
    with pytest.raises(ValueError, match='policy: its criterion holds'):
        bj.criteria.save_policy(tmp_path / 'policy.safetensors', bj.ExitPolicy(own, np.zeros(1)))
    assert not list(tmp_path.iterdir())


def test_files_without_a_policy_are_refused(tmp_path):
    bj.checkpoint.save_weights(tmp_path / 'weights.safetensors', {'a': np.zeros(2)})
    with pytest.raises(ValueError, match='holds no policy'):
        bj.criteria.load_policy(tmp_path / 'weights.safetensors')


def test_what_goes_for_a_policy():
    policy = bj.ExitPolicy(bj.criteria.margin, np.array([0.5]))
    point = bj.OperatingPoint(policy=policy, accuracy=0.9, split='test', exit_fractions=np.ones(2) / 2, cost=1.0)
    for form, criterion in ((policy, bj.criteria.margin), (point, bj.criteria.margin), ([0.5], bj.criteria.entropy)):
        found = bj.criteria.as_policy(form, 2)
        assert found == bj.ExitPolicy(criterion, np.array([0.5], np.float32))
        assert found.thresholds.dtype == np.float32


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ([0.5, 0.5], 'thresholds: a network with 2 exits takes 1'),
        ([np.nan], 'thresholds: got NaN'),
        ('entropy', 'thresholds: expected 1 numbers'),
        (jnp.array([1]), 'thresholds: expected floats'),
        (bj.ExitPolicy('margin', np.zeros(1)), "criterion: got 'margin'"),
        (bj.ExitPolicy(bj.criteria.with_temperatures([1.0] * 3), np.zeros(1)), 'criterion: .* was learned for 3 exits'),
        (
            bj.ExitPolicy(bj.criteria.with_temperatures([1.0, 2.0]).replace(temperatures=np.full(2, np.nan)), [0.0]),
            'criterion: .* has learned NaN',
        ),
    ],
)
def test_what_does_not_go_for_a_policy(given, message):
    with pytest.raises(ValueError, match=message):
        bj.criteria.as_policy(given, 2)
