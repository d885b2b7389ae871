"""Networks are told whether they train, whatever they call it and wherever they keep it; else it is said."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import branchy_jax as bj
from branchy_jax.models import attach

TRAINS = ('train', 'training', 'is_train', 'is_training')
RESTS = ('deterministic', 'inference', 'use_running_average')


def layers(x, *, train):
    """What all networks here do: the flag decides whether statistics move and units drop."""
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name='norm')(nn.Dense(4, name='dense')(x))
    return nn.Dropout(0.5, name='dropout')(x, deterministic=not train)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return layers(x, train=train)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        return layers(x, train=training)


class IsTrain(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=True):
        return layers(x, train=is_train)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training: bool):
        return layers(x, train=is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return layers(x, train=not deterministic)


class Inference(nn.Module):
    @nn.compact
    def __call__(self, x, inference=False):
        return layers(x, train=not inference)


class RunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return layers(x, train=not use_running_average)


class Anything(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return layers(x, train=kwargs.get('train', False))


class Held(nn.Module):
    """Keeps its flag as an attribute."""

    training: bool = False

    @nn.compact
    def __call__(self, x):
        return layers(x, train=self.training)


class Positional(nn.Module):
    """Takes its flag by place."""

    @nn.compact
    def __call__(self, x, train):
        return layers(x, train=train)


def plain():
    """Layers that no call tells anything."""
    return [nn.Dense(4), nn.BatchNorm(momentum=0.5), nn.Dropout(0.5)]


NETWORKS = {
    **dict(
        zip(
            (*TRAINS, *RESTS),
            (Train, Training, IsTrain, IsTraining, Deterministic, Inference, RunningAverage),
            strict=True,
        )
    ),
    '**kwargs': Anything,
    'attribute': Held,
    'attribute that says training': functools.partial(Held, training=True),
    'Sequential': lambda: nn.Sequential(plain()),
    'Sequential of attributes': lambda: nn.Sequential([Held(), nn.relu]),
    'Sequential of modules with a flag': lambda: nn.Sequential([IsTraining(), nn.relu, nn.Sequential([Train()])]),
    'attributes of layers': lambda: nn.Sequential(
        [nn.Dense(4), nn.BatchNorm(momentum=0.5, use_running_average=False), nn.Dropout(0.5, deterministic=False)]
    ),
    'remat': lambda: nn.remat(Positional, static_argnums=(2,))(),
    'remat, attribute': lambda: nn.remat(Held)(),
    'jit': lambda: nn.jit(Positional, static_argnums=(2,))(),
    'jit, attribute': lambda: nn.jit(Held)(),
}


def attached(network, images):
    return attach(network, [], inputs=images)


def in_a_stage(network, images):
    return bj.BranchyNet(stages=(network,), exits=(nn.Dense(3),))


@pytest.mark.parametrize('build', [in_a_stage, attached], ids=['stage', 'attached'])
@pytest.mark.parametrize('name', NETWORKS)
def test_the_flag_is_heard(name, build):
    """In evaluation twice the same, by the running statistics; in training these move, and units drop by the key."""
    images = jax.random.normal(jax.random.key(0), (8, 5)) + 3
    model = build(NETWORKS[name](), images)
    variables = model.init(jax.random.key(1), images)
    before = jax.tree.leaves(variables['batch_stats'])
    (rested,) = model.apply(variables, images)
    np.testing.assert_array_equal(rested, model.apply(variables, images)[0])

    def train(key):
        rngs = {'dropout': jax.random.key(key)}
        return model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])

    (logits,), updates = train(2)
    assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(updates['batch_stats']), strict=True))
    assert (logits != train(3)[0][0]).any()
    np.testing.assert_array_equal(rested, model.apply(variables, images)[0])  # no trace of the training is left
    frozen = model.apply(
        variables, images, train=True, frozen_trunk=True, rngs={'dropout': jax.random.key(2)}, mutable=['batch_stats']
    )
    np.testing.assert_array_equal(frozen[0][0], rested)


@pytest.mark.parametrize('flag', [*TRAINS, *RESTS])
def test_the_flag_is_heard_by_nnx(flag):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            setattr(self, flag, flag in TRAINS) if flag not in TRAINS[:1] else None

        def __call__(self, x):
            return self.dropout(self.norm(self.dense(x)))

    images = jax.random.normal(jax.random.key(0), (8, 5)) + 3
    model = attach(Network(nnx.Rngs(0)), [], inputs=images)
    variables = model.init(jax.random.key(1), images)
    (rested,) = model.apply(variables, images)
    _, updates = model.apply(
        variables, images, train=True, rngs={'dropout': jax.random.key(2)}, mutable=['batch_stats']
    )
    assert (updates['batch_stats']['norm']['mean'] != variables['batch_stats']['norm']['mean']).all()
    np.testing.assert_array_equal(rested, model.apply(variables, images)[0])


def test_layers_frozen_by_hand_stay_so():
    frozen = [nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dropout(0.5, deterministic=True), nn.Dense(3)]
    images = jnp.ones((2, 5))
    for model in (
        attach(nn.Sequential(frozen), [], inputs=images),
        bj.BranchyNet(stages=(tuple(frozen),), exits=(nn.relu,)),
    ):
        variables = model.init(jax.random.key(1), images)
        rngs = {'dropout': jax.random.key(0)}
        logits, _updates = model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])
        np.testing.assert_array_equal(logits[0], model.apply(variables, images)[0])


def test_a_flag_of_another_name_is_said():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, learn=False):
            return layers(x, train=learn)

    images = jnp.ones((4, 5))
    for model in (bj.BranchyNet(stages=(Odd(),), exits=(nn.Dense(3),)), attach(Odd(), [], inputs=images)):
        state = bj.training.create_train_state(model, model.init(jax.random.key(0), images), optax.sgd(0.1))
        batch = bj.Batch(images, jnp.zeros(4, jnp.int32))
        with pytest.warns(UserWarning, match='statistics of BatchNorm, which this training step leaves'):
            bj.training.train_step(state, batch, jnp.ones(1), jax.random.key(1))
