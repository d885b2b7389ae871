"""Uncertainties against NumPy in float64, one comparison, and policies that are read back as they were written."""

import decimal
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

import branchy_jax as bj
from branchy_jax import criteria
from branchy_jax.criteria import as_criterion, entropy, is_confident, margin, patience, replay

LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 12)),
    elements=st.floats(-100, 100, width=32) | st.sampled_from([-1e30, -1e4, 0.0, 1e4, 1e30]),
)
PIXELS = as_criterion(entropy, stride=2, quantile=0.9, name='every other')
ALL = [
    entropy,
    criteria.max_probability,
    margin,
    patience,
    criteria.ensemble(),
    criteria.ensemble('geometric'),
    criteria.ensemble('geometric', PIXELS),
    criteria.with_temperatures([2.0, 1.0, 0.5], margin),
    criteria.pixelwise([0.5, np.inf]),
    PIXELS,
    as_criterion(entropy, quantile=1.0, patch=2, name='patches'),
    criteria.fit_learned(np.random.default_rng(0).normal(size=(3, 9, 4)), np.arange(9) % 4, jax.random.key(0), steps=2),
]
every_criterion = pytest.mark.parametrize('criterion', ALL, ids=repr)


def reference_entropy(logits):
    return special.entr(special.softmax(np.asarray(logits, np.float64), axis=-1)).sum(-1)


@given(LOGITS)
def test_criteria_are_the_float64_reference(logits):
    probability = np.sort(special.softmax(logits.astype(np.float64), axis=-1), axis=-1)
    others = probability[:, :-1].sum(-1)
    expected = {entropy: reference_entropy(logits), criteria.max_probability: others}
    expected[margin] = others + probability[:, -2]
    for criterion, values in expected.items():
        result = np.asarray(criterion.uncertainty_of(jnp.asarray(logits)))
        np.testing.assert_allclose(result, values, rtol=1e-5, atol=1e-12)
        assert (result >= 0).all()
    assert (entropy.uncertainty_of(logits) <= np.log(logits.shape[-1]) + 1e-5).all()


@pytest.mark.parametrize('gap', [5.0, 15.0, 40.0, 80.0])
def test_small_entropies_keep_their_digits(gap):
    """The paper's thresholds go down to 1e-4. Here float64 would not do either: the reference has 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        others = 9 * decimal.Decimal(-gap).exp()
        expected = (1 + others).ln() + others * decimal.Decimal(gap) / (1 + others)
    np.testing.assert_allclose(entropy.uncertainty_of(jnp.array([gap] + [0.0] * 9)), float(expected), rtol=1e-5)


@pytest.mark.parametrize(('classes', 'dtype'), [*itertools.product([2, 10, 1000], [jnp.float32, jnp.bfloat16])])
def test_uniform_logits_have_entropy_log_k(classes, dtype):
    result = entropy.uncertainty_of(jnp.full((3, classes), 7.5, dtype))
    np.testing.assert_allclose(result, np.log(classes), rtol=1e-6)
    assert result.dtype == jnp.float32


@pytest.mark.parametrize('value', [1e4, 3e38])
def test_extreme_logits_have_finite_entropy_and_gradient(value):
    logits = jnp.array([value, -value, 0.0])
    assert float(entropy.uncertainty_of(logits)) == 0.0
    assert np.isfinite(jax.grad(entropy.uncertainty_of)(logits)).all()


def test_is_confident_is_strict():
    uncertainty = jnp.array([0.5, 0.5, 0.5, -jnp.inf, 1e30, jnp.nan, 0.5])
    thresholds = jnp.array([0.6, 0.5, 0.4, -jnp.inf, jnp.inf, jnp.inf, jnp.nan])
    assert is_confident(uncertainty, thresholds).tolist() == [True, False, False, False, True, False, False]


def test_pixels_are_pooled_as_asked():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    of_pixels = reference_entropy(logits)
    patches = np.stack([of_pixels[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2, 4) for j in (0, 2)], axis=1)
    expected = {
        entropy: of_pixels.mean((1, 2)),
        as_criterion(entropy, quantile=0.9): np.quantile(of_pixels.reshape(2, -1), 0.9, axis=1),
        as_criterion(entropy, quantile=1, patch=2): patches.max(1),
        as_criterion(entropy, stride=2): of_pixels[:, ::2, ::2].mean((1, 2)),
        as_criterion(lambda logits: jnp.ptp(logits, axis=(1, 2, 3))): np.ptp(logits, axis=(1, 2, 3)),
    }
    for criterion, values in expected.items():
        np.testing.assert_allclose(criterion(logits, None, 0)[1], values, rtol=1e-5)
    for options in ({'patch': 2}, {'stride': 2}):
        with pytest.raises(ValueError, match='logits: got shape .* need'):
            as_criterion(entropy, **options)(logits[:, 0], None, 0)
    for options in ({'stride': 0}, {'patch': 0}, {'quantile': 1.5}, {'quantile': np.nan}):
        with pytest.raises(ValueError, match=f'{next(iter(options))}.*: got'):
            as_criterion(entropy, **options)


@every_criterion
@pytest.mark.parametrize('shape', [(3, 4, 1), (3, 4, 2, 2, 1)], ids=['images', 'pixels'])
def test_heads_with_one_logit_are_refused(criterion, shape):
    """The softmax of one logit is 1: all inputs would leave at the first exit."""
    logits = jnp.zeros(shape)
    message = r'logits: got shape .*(give heads that end in two classes|need \[B, H, W, K\])'
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda logits: replay(criterion, logits))(logits)
    own = as_criterion(lambda logits: jnp.abs(logits[..., 0]), decide=lambda logits: logits[..., 0])
    assert replay(own, logits)[1].shape == (3, 4)


def test_functions_of_logits_are_criteria():
    def doubt(logits):
        return 1 - jax.nn.softmax(logits).max(-1)

    logits = jnp.array([[0.0, jnp.log(3.0)]])
    answer, uncertainty, carry = as_criterion(doubt)(logits, None, 0)
    assert (answer is logits, carry, as_criterion(doubt).name) == (True, None, 'doubt')
    np.testing.assert_allclose(uncertainty, [0.25], rtol=1e-6)
    assert as_criterion(doubt) == as_criterion(doubt) != as_criterion(doubt, name='other')
    np.testing.assert_array_equal(replay(doubt, logits[None])[1], [uncertainty])
    for given_name in ('margin', None):
        with pytest.raises(ValueError, match='criterion: got .*give a value'):
            as_criterion(given_name)
    for build in (lambda: criteria.ensemble(criterion=patience), lambda: criteria.pixelwise([0.5], patience)):
        with pytest.raises(ValueError, match="criterion: got 'patience'"):
            build()


def logits_of(labels, classes=3):
    return jnp.asarray(5.0 * np.eye(classes, dtype=np.float32)[np.array(labels)])


def test_patience_counts_agreements_in_a_row():
    labels = [[0, 1, 2], [0, 1, 1], [0, 2, 1], [1, 2, 1]]  # four exits, three inputs
    assert replay(patience, logits_of(labels))[1].tolist() == [[0, 0, 0], [-1, -1, 0], [-2, 0, -1], [0, -1, -2]]
    of_pixels = replay(patience, logits_of([[[0, 1]], [[0, 2]], [[0, 2]]]))[1]
    assert of_pixels.tolist() == [[0], [-0.5], [-1.5]]
    after_nan = jnp.zeros((3, 1, 4)).at[0].set(jnp.nan).at[1:, :, 0].set(1.0)  # NaN's argmax is class 0
    assert replay(patience, after_nan)[1].ravel().tolist()[1:] == [0, -1]


@pytest.mark.parametrize('kind', ['arithmetic', 'geometric'])
def test_ensembles_are_means_of_probabilities(kind):
    logits = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    probability = special.softmax(logits.astype(np.float64), axis=-1)
    answers, uncertainty = replay(criteria.ensemble(kind), logits)
    for n in range(4):
        expected = probability[: n + 1].mean(axis=0)
        if kind == 'geometric':
            expected = special.softmax(np.log(probability[: n + 1]).mean(axis=0), axis=-1)
        np.testing.assert_allclose(np.exp(answers[n]), expected, rtol=1e-5)
        np.testing.assert_allclose(uncertainty[n], special.entr(expected).sum(-1), rtol=1e-5)
    with pytest.raises(ValueError, match='kind: got'):
        criteria.ensemble('harmonic')


def test_temperatures_divide_each_exits_logits():
    logits = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    answers, uncertainty = replay(criteria.with_temperatures([2.0, 0.5]), logits)
    np.testing.assert_allclose(answers, logits / [[[2.0]], [[0.5]]], rtol=1e-6)
    np.testing.assert_allclose(uncertainty[1], reference_entropy(logits[1] * 2), rtol=1e-5)
    for impossible in ([1.0, 0.0], [1.0, -1.0], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match='temperatures: got'):
            criteria.with_temperatures(impossible)


@every_criterion
def test_nan_is_never_confident(criterion):
    """One NaN among the logits of an answer makes its uncertainty NaN."""
    logits = jnp.zeros((3, 2, 1, 2, 4)).at[:, 0, 0, 1, 2].set(jnp.nan)
    if criterion.name == 'patches':
        logits = logits.repeat(2, axis=2)
    uncertainty = replay(criterion, logits)[1]
    np.testing.assert_array_equal(np.isnan(uncertainty), [[True, False]] * 3)
    assert not is_confident(uncertainty[:, 0], jnp.full(3, jnp.inf)).any()


@every_criterion
def test_criteria_are_values_that_files_hold(criterion, tmp_path):
    for again in (jax.tree.map(lambda leaf: np.array(leaf), criterion), pickle.loads(pickle.dumps(criterion))):
        assert (again, hash(again)) == (criterion, hash(criterion))
    assert [other == criterion for other in ALL].count(True) == 1
    assert replay(criterion, jnp.zeros((3, 0, 4, 4, 4)))[1].shape == (3, 0)
    policy = bj.ExitPolicy(criterion, np.array([-np.inf, 0.1], np.float32))
    criteria.save_policy(tmp_path / 'policy.json', policy)
    result = criteria.load_policy(tmp_path / 'policy.json')
    assert (result, hash(result)) == (policy, hash(policy))
    assert result != policy.replace(thresholds=np.float32([np.inf, 0.1]))
    if criterion.num_exits is not None:
        with pytest.raises(ValueError, match='was learned for 3 exits, not for 4'):
            replay(criterion, jnp.zeros((4, 2, 4)))


def test_only_criteria_of_the_library_are_written(tmp_path):
    own = as_criterion(lambda logits: -logits.max(-1), name='own')
    for criterion in (own, criteria.ensemble(criterion=own), entropy.replace(decide=json.dumps)):
        with pytest.raises(ValueError, match='policy: its criterion holds .* not one of branchy_jax.criteria'):
            criteria.save_policy(tmp_path / 'policy.json', bj.ExitPolicy(criterion, np.zeros(1)))
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    bj.checkpoint.save_weights(tmp_path / 'old', {'a': np.zeros(2)}, metadata={'policy': '{}'})
    (tmp_path / 'text').write_text('{"policy": ')
    (tmp_path / 'list').write_text('[]')
    for name in ('old', 'text', 'list', 'nothing'):
        with pytest.raises(ValueError, match='holds no policy .* version 0.2'):
            criteria.load_policy(tmp_path / name)


THRESHOLDS = {'dtype': 'float32', 'shape': [2], 'values': ['-inf', 0.5]}


@pytest.mark.parametrize('kind', ['system', 'fit_learned', 'Ensemble', None])
def test_records_of_something_else_are_refused(kind):
    criterion = {'kind': kind, 'fields': {}} if kind else {'function': 'os.system'}
    for record in ({'criterion': criterion, 'thresholds': THRESHOLDS}, {'criterion': {}}, {'criterion': criterion}):
        with pytest.raises(ValueError, match='policy: cannot be read'):
            criteria.decode_policy(record)


@pytest.mark.parametrize('pool', [{'function': 'mean_over_pixels'}, {'kind': 'QuantileOverPixels', 'fields': {}}])
def test_cards_of_version_02_are_read(pool):
    fields = {'uncertainty_of': {'function': 'margin_of_logits'}, 'name': 'margin', 'pool': pool}
    policy = {'criterion': {'kind': '_FromLogits', 'fields': fields}, 'thresholds': {'array': 'array0'}}
    thresholds = ['0.25', '-inf']
    point = {'policy': policy, 'arrays': {'array0': thresholds}, 'thresholds': thresholds, 'accuracy': 0.9}
    expected = bj.ExitPolicy(margin, np.float32([0.25, -np.inf]))
    if 'kind' in pool:
        with pytest.raises(ValueError, match='policy: cannot be read'):
            criteria.decode_policy(point)
    else:
        assert criteria.decode_policy(point) == expected
    assert criteria.decode_policy({'criterion': 'margin', 'thresholds': [0.25, '-inf']}) == expected
    assert criteria.decode_policy({**criteria.encode_policy(expected), 'accuracy': 0.9}) == expected


def test_what_is_accepted_as_a_policy():
    policy = bj.ExitPolicy(margin, np.array([0.5]))
    point = bj.OperatingPoint(policy=policy, accuracy=0.9, split='test', exit_fractions=np.ones(2) / 2, cost=1.0)
    for form, criterion in ((policy, margin), (point, margin), ([0.5], entropy), (jnp.bfloat16([0.5]), entropy)):
        for result in (criteria.as_policy(form, 2), criteria.as_policy(form)):
            assert result == bj.ExitPolicy(criterion, np.array([0.5], np.float32))
            assert result.thresholds.dtype == np.float32


NAN = criteria.with_temperatures([1.0, 2.0]).replace(temperatures=np.full(2, np.nan))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ([0.5, 0.5], 'thresholds: a network with 2 exits takes 1'),
        ([np.nan], 'thresholds: got NaN'),
        ('entropy', 'thresholds: expected a number for each'),
        (jnp.array([1]), 'thresholds: expected floats'),
        (bj.ExitPolicy('margin', np.zeros(1)), "criterion: got 'margin'"),
        (bj.ExitPolicy(criteria.with_temperatures([1.0] * 3), np.zeros(1)), 'criterion: .* was learned for 3 exits'),
        (bj.ExitPolicy(NAN, [0.0]), "criterion: 'entropy, calibrated' has learned NaN"),
    ],
)
def test_other_policies_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        criteria.as_policy(given, 2)
