"""One value says when an input leaves: every executor follows it, whatever form it comes in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES

import branchy_jax as bj
from branchy_jax import inference

# It has learned, looks back, and answers otherwise than the heads; `test_executors` has criteria without arrays.
CRITERION = bj.criteria.with_temperatures([2.0, 0.5, 1.0], bj.criteria.ensemble('geometric'))


def stream(model):
    """Answers a batch with `inference.stream`, in two parts."""

    def run(variables, images, policy):
        result = list(inference.stream(model, chunk_size=5)(variables, [images[:9], images[9:]], policy))
        order = np.argsort(np.concatenate([answers.ids for answers in result]))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *(answers.prediction for answers in result))

    return run


EXECUTORS = {
    'dense': inference.dense,
    'sequential': inference.sequential,
    'loop': lambda model: inference.compacted(model, chunk_size=5, on_host=False),
    'host': lambda model: inference.compacted(model, chunk_size=5, on_host=True),
    'stream': stream,
}


@pytest.mark.parametrize('executor', EXECUTORS)
def test_every_executor_follows_a_learned_criterion(network, executor):
    """A loop over exits is the reference. Images that are not finite are answered last, and affect no other image."""
    model, variables, images = network
    logits = np.stack(model.apply(variables, images))
    answers, uncertainty = map(np.asarray, bj.criteria.replay(CRITERION, logits))
    thresholds = [np.sort(uncertainty[n])[k : k + 2].mean() for n, k in ((0, 8), (1, 11))]
    exits = np.full(24, 2)
    for n in (1, 0):
        exits[uncertainty[n] < thresholds[n]] = n
    assert set(exits) == {0, 1, 2}
    run, policy = EXECUTORS[executor](model), bj.ExitPolicy(CRITERION, jnp.float32(thresholds))
    answer = run(variables, images, policy)
    np.testing.assert_array_equal(answer.exit_index, exits)
    np.testing.assert_array_equal(answer.label, answers[exits, np.arange(24)].argmax(-1))
    odd = images.at[3, 1, 2, 0].set(jnp.nan).at[12].set(jnp.inf).at[20, 0, 0, 0].set(-jnp.inf)
    again = run(variables, odd, policy)
    finite = np.isfinite(odd).all(axis=(1, 2, 3))
    assert again.exit_index[~finite].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(again.exit_index[finite], exits[finite])
    np.testing.assert_array_equal(np.isnan(again.uncertainty), ~finite)


def test_points_functions_and_bare_thresholds_are_policies(network, tmp_path):
    model, variables, images = network
    run, margin = inference.dense(model), bj.criteria.margin
    table = inference.exit_table(model, variables, bj.Batch(images, np.arange(24) % CLASSES), criterion=margin)
    point = table.screen().knee()
    result = run(variables, images, point).exit_index
    np.testing.assert_allclose(np.bincount(result, minlength=3) / 24, point.exit_fractions)
    for policy, same in (
        (bj.ExitPolicy(margin.uncertainty_of, point.thresholds), point),
        (point.thresholds.tolist(), bj.ExitPolicy(bj.criteria.entropy, point.thresholds)),
    ):
        expected = run(variables, images, same).exit_index
        bj.criteria.save_policy(tmp_path / 'policy.json', same)
        assert bj.criteria.load_policy(tmp_path / 'policy.json') == getattr(same, 'policy', same)
        np.testing.assert_array_equal(run(variables, images, policy).exit_index, expected)


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
