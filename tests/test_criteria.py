"""Uncertainties against NumPy in float64, one comparison, and policies that are read back as they were written."""

import decimal
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
from branchy_jax.criteria.policy import as_policy, decode_policy, encode_policy

PIXELS = as_criterion(entropy, stride=2, quantile=0.9, name='every other')
KINDS = [
    entropy,
    patience,
    criteria.ensemble(),
    criteria.ensemble('geometric', PIXELS),
    criteria.with_temperatures([2.0, 1.0, 0.5], margin),
    criteria.pixelwise([0.5, np.inf]),
    as_criterion(entropy, quantile=1.0, patch=2, name='patches'),
    criteria.fit_learned(np.random.default_rng(0).normal(size=(3, 9, 4)), np.arange(9) % 4, jax.random.key(0), steps=2),
]
every_kind = pytest.mark.parametrize('criterion', KINDS, ids=repr)


def reference_entropy(logits):
    return special.entr(special.softmax(np.asarray(logits, np.float64), axis=-1)).sum(-1)


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32) | st.sampled_from([-1e30, 0.0, 1e30])))
def test_criteria_are_the_float64_reference(logits):
    probability = np.sort(special.softmax(logits.astype(np.float64), axis=-1), axis=-1)
    others = probability[:, :-1].sum(-1)
    expected = {entropy: reference_entropy(logits), criteria.max_probability: others}
    expected[margin] = others + probability[:, -2]
    for criterion, values in expected.items():
        result = np.asarray(criterion.uncertainty_of(jnp.asarray(logits)))
        np.testing.assert_allclose(result, values, rtol=1e-5, atol=1e-12)
        assert (result >= 0).all()


def test_small_entropies_keep_their_digits():
    """The paper's thresholds go down to 1e-4. Here float64 would not do either: the reference has 50 digits."""
    gaps, expected = [5, 15, 40, 80], []
    with decimal.localcontext(decimal.Context(prec=50)):
        for gap in gaps:
            others = 9 * decimal.Decimal(-gap).exp()
            expected.append(float((1 + others).ln() + others * gap / (1 + others)))
    logits = jnp.zeros((4, 10)).at[:, 0].set(jnp.float32(gaps))
    np.testing.assert_allclose(entropy.uncertainty_of(logits), expected, rtol=1e-5)
    result = entropy.uncertainty_of(jnp.full((3, 1000), 7.5, jnp.bfloat16))
    np.testing.assert_allclose(result, np.log(1000), rtol=1e-6)
    assert result.dtype == jnp.float32
    extreme = jnp.array([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0]])
    assert entropy.uncertainty_of(extreme).tolist() == [0, 0]
    assert np.isfinite(jax.grad(lambda logits: entropy.uncertainty_of(logits).sum())(extreme)).all()


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


def test_functions_of_logits_are_criteria():
    def largest(logits):
        return -logits.max(-1)

    assert (as_criterion(largest).name, replay(largest, jnp.ones((1, 2, 3)))[1].tolist()) == ('largest', [[-1, -1]])
    assert as_criterion(largest) == as_criterion(largest) != as_criterion(largest, name='other')


def test_a_criterion_decides_as_the_one_that_it_is_built_on():
    least = as_criterion(entropy, decide=lambda logits: logits.argmin(-1))
    of_parts = (criteria.ensemble(criterion=least), criteria.with_temperatures([1.0], least))
    for criterion in (least, *of_parts, criteria.pixelwise([0.5], least)):
        assert criterion.decide(jnp.array([[1.0, 2.0, 0.0]])).tolist() == [2]


def test_patience_counts_agreements_in_a_row():
    labels = np.array([[0, 1, 2], [0, 1, 1], [0, 2, 1], [1, 2, 1]])  # four exits, three inputs
    expected = [[0, 0, 0], [-1, -1, 0], [-2, 0, -1], [0, -1, -2]]
    assert replay(patience, 5 * np.eye(3)[labels])[1].tolist() == expected
    of_pixels = replay(patience, 5 * np.eye(3)[[[[0, 1]], [[0, 2]], [[0, 2]]]])[1]
    assert of_pixels.tolist() == [[0], [-0.5], [-1.5]]
    after_nan = jnp.zeros((3, 1, 4)).at[0].set(jnp.nan).at[1:, :, 0].set(1.0)  # NaN's argmax is class 0
    assert replay(patience, after_nan)[1].ravel().tolist()[1:] == [0, -1]


@pytest.mark.parametrize('kind', ['arithmetic', 'geometric'])
def test_ensembles_are_means_of_probabilities(kind):
    logits = np.random.default_rng(0).normal(size=(3, 5, 3)).astype(np.float32)
    probability = special.softmax(logits.astype(np.float64), axis=-1)
    answers, uncertainty = replay(criteria.ensemble(kind), logits)
    for n in range(3):
        expected = probability[: n + 1].mean(axis=0)
        if kind == 'geometric':
            expected = special.softmax(np.log(probability[: n + 1]).mean(axis=0), axis=-1)
        np.testing.assert_allclose(np.exp(answers[n]), expected, rtol=1e-5)
        np.testing.assert_allclose(uncertainty[n], special.entr(expected).sum(-1), rtol=1e-5)
    calibrated, _ = replay(criteria.with_temperatures([2.0, 1.0, 0.5], criteria.ensemble(kind)), logits)
    np.testing.assert_allclose(calibrated[0], special.log_softmax(logits[0] / 2, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: as_criterion('margin'), "criterion: got 'margin'; give a value"),
        (lambda: criteria.ensemble(criterion=patience), "criterion: got 'patience'; give one of single logits"),
        (lambda: criteria.pixelwise([0.5], patience), "criterion: got 'patience'"),
        (lambda: criteria.pixelwise([[0.1]]), 'pixel_thresholds: expected one number'),
        (lambda: criteria.pixelwise([np.nan]), 'pixel_thresholds: expected one number'),
        (lambda: criteria.ensemble('harmonic'), 'kind: got'),
        (lambda: as_criterion(entropy, stride=0), 'stride and patch: got 0 and 1'),
        (lambda: as_criterion(entropy, patch=0), 'stride and patch: got 1 and 0'),
        (lambda: as_criterion(entropy, quantile=np.nan), 'quantile: got nan'),
        (lambda: as_criterion(entropy, stride=2)(jnp.zeros((2, 3)), None, 0), 'stride and patch need'),
        (lambda: criteria.with_temperatures([1.0, 0.0]), 'temperatures: got'),
        (lambda: criteria.with_temperatures([np.nan]), 'temperatures: got'),
        (lambda: criteria.with_temperatures([[1.0]]), 'temperatures: got'),
        (lambda: replay(criteria.with_temperatures([1.0] * 3), jnp.zeros((4, 2, 4))), 'for 3 exits, not for 4'),
    ],
)
def test_bad_criteria_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@every_kind
def test_nan_and_single_logits_are_never_confident(criterion):
    """One NaN among the logits of an answer makes its uncertainty NaN. The softmax of one logit is 1 for all inputs."""
    logits = jnp.zeros((3, 2, 2, 2, 4)).at[:, 0, 0, 0, 2].set(jnp.nan)
    uncertainty = replay(criterion, logits)[1]
    np.testing.assert_array_equal(np.isnan(uncertainty), [[True, False]] * 3)
    with pytest.raises(ValueError, match='logits: got shape .*give heads that end in two classes'):
        jax.eval_shape(lambda logits: replay(criterion, logits), logits[..., :1])


@every_kind
def test_criteria_are_values_that_files_hold(criterion, tmp_path):
    for again in (jax.tree.map(lambda leaf: np.array(leaf), criterion), pickle.loads(pickle.dumps(criterion))):
        assert (again, hash(again)) == (criterion, hash(criterion))
    assert [other == criterion for other in KINDS].count(True) == 1
    assert jax.eval_shape(lambda logits: replay(criterion, logits), jnp.zeros((3, 0, 4, 4, 4)))[1].shape == (3, 0)
    policy = bj.ExitPolicy(criterion, np.array([-np.inf, 0.1], np.float32))
    criteria.save_policy(tmp_path / 'policy.json', policy)
    result = criteria.load_policy(tmp_path / 'policy.json')
    assert (result, hash(result)) == (policy, hash(policy))


def test_other_criteria_files_and_records_are_refused(tmp_path):
    own = as_criterion(lambda logits: -logits.max(-1), name='own')
    for criterion in (own, criteria.ensemble(criterion=own), entropy.replace(decide=json.dumps)):
        with pytest.raises(ValueError, match='policy: its criterion holds .* not one of branchy_jax.criteria'):
            criteria.save_policy(tmp_path / 'policy.json', bj.ExitPolicy(criterion, np.zeros(1)))
    assert not list(tmp_path.iterdir())
    (tmp_path / 'text').write_text('{"policy": ')
    (tmp_path / 'list').write_text('[]')
    for name in ('text', 'list', 'nothing'):
        with pytest.raises(ValueError, match='holds no policy .* version 0.2'):
            criteria.load_policy(tmp_path / name)
    good = encode_policy(bj.ExitPolicy(entropy, np.float32([0.5])))
    for bad in ({'kind': 'system', 'fields': {}}, {'kind': 'Ensemble', 'fields': {}}, {'function': 'os.system'}, {}):
        with pytest.raises(ValueError, match='policy: cannot be read'):
            decode_policy({**good, 'criterion': bad})


def test_cards_of_version_02_are_read():
    expected = bj.ExitPolicy(margin, np.float32([0.25, -np.inf]))
    pool, thresholds = {'function': 'mean_over_pixels'}, ['0.25', '-inf']
    fields = {'uncertainty_of': {'function': 'margin_of_logits'}, 'name': 'margin', 'pool': pool}
    point = {'policy': {'criterion': {'kind': '_FromLogits', 'fields': fields}}, 'thresholds': thresholds}
    assert decode_policy(point) == expected
    assert decode_policy({'criterion': 'margin', 'thresholds': [0.25, '-inf']}) == expected
    pool['function'] = 'another'
    with pytest.raises(ValueError, match='policy: cannot be read'):
        decode_policy(point)


def test_what_is_a_policy_and_what_is_not():
    policy = bj.ExitPolicy(margin, np.array([0.5]))
    point = bj.OperatingPoint(policy=policy, accuracy=0.9, split='test', exit_fractions=np.ones(2) / 2, cost=1.0)
    for form, criterion in ((policy, margin), (point, margin), ([0.5], entropy), (jnp.bfloat16([0.5]), entropy)):
        for result in (as_policy(form, 2), as_policy(form)):
            assert result == bj.ExitPolicy(criterion, np.array([0.5], np.float32))
            assert result.thresholds.dtype == np.float32
    has_nan = criteria.with_temperatures([1.0, 2.0]).replace(temperatures=np.full(2, np.nan))
    for other, message in (
        ([0.5, 0.5], 'thresholds: a network with 2 exits takes 1'),
        ([np.nan], 'thresholds: got NaN'),
        ('entropy', 'thresholds: expected a number for each'),
        (jnp.array([1]), 'thresholds: expected floats'),
        (bj.ExitPolicy('margin', np.zeros(1)), "criterion: got 'margin'"),
        (bj.ExitPolicy(KINDS[4], np.zeros(1)), 'criterion: .* was learned for 3 exits'),
        (bj.ExitPolicy(has_nan, [0.0]), "criterion: 'entropy, calibrated' has learned NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            as_policy(other, 2)
