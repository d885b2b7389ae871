"""Exits on whole NNX networks, which come with their weights and take them back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import thresholds_between
from flax import nnx

import branchy_jax as bj
from branchy_jax.models import attach


class NnxBlock(nnx.Module):
    """A residual block with everything that keeps state."""

    def __init__(self, width, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        """Adds to what comes in."""
        return x + nnx.relu(self.dropout(self.norm(self.linear(x))))


class NnxNetwork(nnx.Module):
    """A network in Flax's newer form."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 8, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(8, rngs) for _ in range(3)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        """Returns logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_nnx_networks_keep_their_weights_and_take_them_back(getkey):
    network, images = NnxNetwork(nnx.Rngs(0)), jax.random.normal(getkey(), (6, 3))
    network.train()
    network(images)  # statistics that are not those of any batch to come
    model = attach(network, ['blocks/0', 'blocks/1'], inputs=images)
    variables = model.init(getkey(), images)
    network.eval()
    np.testing.assert_allclose(model.apply(variables, images)[-1], network(images), atol=1e-6)
    policy = thresholds_between(model, variables, images)
    oracle = bj.inference.dense(model)(variables, images, policy)
    answer = bj.inference.compacted(model, chunk_size=2)(variables, images, policy)
    assert (answer.exit_index == oracle.exit_index).all()
    assert len(set(np.asarray(oracle.exit_index))) > 1
    state = bj.training.create_train_state(model, variables, optax.sgd(0.1))
    state, _ = bj.training.train_step(state, bj.Batch(images, jnp.arange(6) % 4), jnp.ones(3), getkey())
    mean = variables['batch_stats']['blocks']['0']['norm']['mean']
    inside = network.blocks[0].linear(network.stem(images)).mean(0)
    np.testing.assert_allclose(
        state.model_state['batch_stats']['blocks']['0']['norm']['mean'], 0.99 * mean + 0.01 * inside, atol=1e-5
    )
    nnx.update(network, model.trained(state.variables))
    network.eval()
    np.testing.assert_allclose(model.apply(state.variables, images)[-1], network(images), atol=1e-6)
    with pytest.raises(ValueError, match=r"no 'blocks/9'; it passes .*'blocks/0'"):
        attach(network, ['blocks/9'], inputs=images)
    with pytest.raises(ValueError, match='variables: have no params/'):
        model.apply({'params': {}}, images)


def test_nnx_dropout_drops_by_the_key(getkey):
    network, images = NnxNetwork(nnx.Rngs(0)), jax.random.normal(getkey(), (6, 3))
    model = attach(network, ['blocks/0'], inputs=images)
    variables = model.init(getkey(), images)

    def logits(key):
        rngs = {'dropout': jax.random.key(key)}
        return model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])[0][-1]

    np.testing.assert_array_equal(logits(1), logits(1))
    assert (logits(1) != logits(2)).any()
