"""Modules get their mode under every recognised name of the flag; a flag of another name is reported."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import branchy_jax as bj
from branchy_jax import calling
from branchy_jax.models import attach, from_nnx

TRAINS = ('train', 'training', 'is_train', 'is_training')
RESTS = ('deterministic', 'inference', 'use_running_average')


def layers(x, *, train):
    """The flag decides whether statistics move and units drop."""
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name='norm')(nn.Dense(4, name='dense')(x))
    return nn.Dropout(0.5, name='dropout')(x, deterministic=not train)


def flagged(signature, train):
    """Returns a module whose call takes a flag as in ``signature``; ``train`` is an expression of that flag."""
    lines = ['@nn.compact', f'def __call__(self, x, {signature}):', f'    return layers(x, train={train})']
    names = {'nn': nn, 'layers': layers}
    exec('\n'.join(lines), names)
    return type('Flagged', (nn.Module,), {'__call__': names['__call__'], '__module__': __name__})


Train, IsTraining = flagged('train=False', 'train'), flagged('is_training: bool', 'is_training')
Positional = flagged('train', 'train')


class Held(nn.Module):
    """Has its flag as an attribute."""

    training: bool = False

    @nn.compact
    def __call__(self, x):
        return layers(x, train=self.training)


NETWORKS = {
    'train': Train,
    'training': flagged('*, training', 'training'),
    'is_train': flagged('is_train=True', 'is_train'),
    'is_training': IsTraining,
    'deterministic': flagged('*, deterministic=True', 'not deterministic'),
    'inference': flagged('inference=False', 'not inference'),
    'use_running_average': flagged('use_running_average=None', 'not use_running_average'),
    '**kwargs': flagged('**kwargs', "kwargs.get('train', False)"),
    'attribute': Held,
    'attribute that says training': functools.partial(Held, training=True),
    'Sequential': lambda: nn.Sequential([nn.Dense(4), nn.BatchNorm(momentum=0.5), nn.Dropout(0.5)]),
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


@pytest.mark.parametrize('is_attached', [False, True], ids=['model', 'attached'])
@pytest.mark.parametrize('name', NETWORKS)
def test_every_recognised_flag_sets_the_mode(name, is_attached):
    """Evaluation is deterministic and uses the running statistics; training moves them and drops units by the key."""
    images = jax.random.normal(jax.random.key(0), (8, 5)) + 3
    model = attach(NETWORKS[name](), [], inputs=images) if is_attached else NETWORKS[name]()
    variables = calling.init(model, jax.random.key(1), images)
    before = jax.tree.leaves(variables['batch_stats'])
    (rested,) = calling.apply(model, variables, images)

    def train(key, **options):
        rngs = {'dropout': jax.random.key(key)}
        return calling.apply(model, variables, images, train=True, rngs=rngs, mutable=['batch_stats'], **options)

    (logits,), updates = train(2)
    assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(updates['batch_stats']), strict=True))
    assert (logits != train(3)[0][0]).any()
    np.testing.assert_array_equal(rested, calling.apply(model, variables, images)[0])  # training left no trace
    np.testing.assert_array_equal(rested, train(2, frozen_trunk=True)[0][0])


@pytest.mark.parametrize('flag', [*TRAINS, *RESTS])
def test_every_recognised_flag_sets_the_mode_of_nnx(flag):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            setattr(self, flag, flag in TRAINS) if flag not in TRAINS[:1] else None

        def __call__(self, x):
            return self.dropout(self.norm(self.dense(x)))

    images = jax.random.normal(jax.random.key(0), (8, 5)) + 3
    model = from_nnx(Network(nnx.Rngs(0)))
    variables = model.init(jax.random.key(1), images)
    (rested,) = model.apply(variables, images)
    _, updates = model.apply(
        variables, images, train=True, rngs={'dropout': jax.random.key(2)}, mutable=['batch_stats']
    )
    assert (updates['batch_stats']['norm']['mean'] != variables['batch_stats']['norm']['mean']).all()
    np.testing.assert_array_equal(rested, model.apply(variables, images)[0])


def test_layers_frozen_by_hand_stay_so():
    frozen = [nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dropout(0.5, deterministic=True), nn.Dense(3)]
    images, rngs = jnp.ones((2, 5)), {'dropout': jax.random.key(0)}
    for model in (attach(nn.Sequential(frozen), [], inputs=images), nn.Sequential(frozen)):
        variables = calling.init(model, jax.random.key(1), images)
        logits, _ = calling.apply(model, variables, images, train=True, rngs=rngs, mutable=['batch_stats'])
        np.testing.assert_array_equal(logits[0], calling.apply(model, variables, images)[0])


def test_a_flag_of_another_name_is_reported():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, learn=False):
            return layers(x, train=learn)

    images = jnp.ones((4, 5))
    for model in (Odd(), attach(Odd(), [], inputs=images)):
        state = bj.training.create_train_state(model, model.init(jax.random.key(0), images), optax.sgd(0.1))
        batch = bj.Batch(images, jnp.zeros(4, jnp.int32))
        with pytest.warns(UserWarning, match='no argument or attribute with one of the recognised names'):
            bj.training.train_step(state, batch, jnp.ones(1), jax.random.key(1))
