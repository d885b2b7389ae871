"""Modules get their mode under every recognised name of the flag; a flag of another name is reported."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import branchy_jax as bj
from branchy_jax import calling
from branchy_jax.models import attach, from_nnx

TRAINS = ('train', 'training', 'is_train', 'is_training', 'enable_dropout')
RESTS = ('deterministic', 'inference', 'use_running_average', 'is_eval')
IMAGES = np.random.default_rng(0).normal(3, 1, (8, 5)).astype(np.float32)


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
Positional, Odd = flagged('train', 'train'), flagged('learn=False', 'learn')


class Held(nn.Module):
    """Has its flag as an attribute."""

    training: bool = False

    @nn.compact
    def __call__(self, x):
        return layers(x, train=self.training)


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration with a flag, perhaps inside another."""

    is_training: bool = True
    inner: object = None


class Configured(nn.Module):
    """Has its flag in a configuration of a configuration."""

    config: object

    @nn.compact
    def __call__(self, x):
        return layers(x, train=self.config.inner.is_training)


class Made(nn.Module):
    """Makes its layer by a function that it holds in a dictionary."""

    parts: dict

    @nn.compact
    def __call__(self, x):
        return self.parts['make'](name='made')(x)


class Wrapper(nn.Module):
    """Passes on all arguments."""

    layer: nn.Module

    def __call__(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


BY_NAME = {
    **{name: flagged(f'{name}=False', name) for name in TRAINS},
    **{name: flagged(f'*, {name}=True', f'not {name}') for name in RESTS},
}
FORMS = {
    'no default': IsTraining,
    '**kwargs': flagged('**kwargs', "kwargs.get('train', False)"),
    'attribute that says training': functools.partial(Held, training=True),
    'Sequential of attributes': lambda: nn.Sequential([Held(), nn.relu]),
    'Sequential of modules with a flag': lambda: nn.Sequential([IsTraining(), nn.relu, nn.Sequential([Train()])]),
    'Sequential of layers': lambda: nn.Sequential(
        [nn.Dense(4), nn.BatchNorm(momentum=0.5, use_running_average=False), nn.Dropout(0.5)]
    ),
    'configuration': lambda: Configured(Config(inner=Config())),
    'ConfigDict': lambda: Configured(ml_collections.FrozenConfigDict({'inner': {'is_training': True}})),
    'partial in a dictionary': lambda: Made({'make': functools.partial(Held, training=True)}),
    'wrappers': lambda: nn.Sequential([nn.WeightNorm(nn.Dense(4)), Wrapper(BY_NAME['deterministic']())]),
    'spectral': lambda: nn.Sequential([IsTraining(), nn.SpectralNorm(nn.Dense(4))]),
    'bridge': lambda: nn.Sequential([IsTraining(), bridge.to_linen(nnx.Linear, 4, 4)]),
    'remat': lambda: nn.remat(Positional, static_argnums=(2,))(),
    'remat, attribute': lambda: nn.remat(Held)(),
    'jit': lambda: nn.jit(Positional, static_argnums=(2,))(),
}


@pytest.mark.parametrize(
    'name', [*BY_NAME, *FORMS, 'attached no default', 'attached Sequential of modules with a flag', 'by hand']
)
def test_every_recognised_flag_sets_the_mode(name):
    """Evaluation is deterministic and uses the running statistics; training moves them and drops units by the key."""
    if name == 'by hand':
        model = attach(flagged('mode', "mode == 'learn'")(), [], inputs=IMAGES, train={'mode': ('rest', 'learn')})
    else:
        model = {**BY_NAME, **FORMS}[name.removeprefix('attached ')]()
    if name.startswith('attached'):
        model = attach(model, [], inputs=IMAGES)
    variables = calling.init(model, jax.random.key(1), IMAGES)
    before = jax.tree.leaves(variables['batch_stats'])
    (rested,) = calling.apply(model, variables, IMAGES)

    def train(key, **options):
        rngs = {'dropout': jax.random.key(key)}
        return calling.apply(model, variables, IMAGES, train=True, rngs=rngs, mutable=['batch_stats'], **options)

    (logits,), updates = train(2)
    assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(updates['batch_stats']), strict=True))
    assert (logits != train(3)[0][0]).any()
    np.testing.assert_array_equal(rested, calling.apply(model, variables, IMAGES)[0])  # training left no trace
    np.testing.assert_array_equal(rested, train(2, frozen_trunk=True)[0][0])


@pytest.mark.parametrize('flag', ['train', 'is_training', 'deterministic'])
def test_every_recognised_flag_sets_the_mode_of_nnx(flag):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            if flag != 'train':  # a method of every NNX module
                setattr(self, flag, flag in TRAINS)

        def __call__(self, x):
            return self.dropout(self.norm(self.dense(x)))

    model = from_nnx(Network(nnx.Rngs(0)))
    variables = model.init(jax.random.key(1), IMAGES)
    (rested,) = model.apply(variables, IMAGES)
    options = {'rngs': {'dropout': jax.random.key(2)}, 'mutable': ['batch_stats']}
    _, updates = model.apply(variables, IMAGES, train=True, **options)
    assert (updates['batch_stats']['norm']['mean'] != variables['batch_stats']['norm']['mean']).all()
    np.testing.assert_array_equal(rested, model.apply(variables, IMAGES)[0])


def test_layers_frozen_by_hand_stay_so():
    frozen = [nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dropout(0.5, deterministic=True), nn.Dense(3)]
    for model in (attach(nn.Sequential(frozen), [], inputs=IMAGES), nn.Sequential(frozen)):
        variables = calling.init(model, jax.random.key(1), IMAGES)
        options = {'rngs': {'dropout': jax.random.key(0)}, 'mutable': ['batch_stats']}
        with pytest.warns(UserWarning, match="Dropout 'layers_2' drops nothing in training"):
            logits, _ = calling.apply(model, variables, IMAGES, train=True, **options)
        np.testing.assert_array_equal(logits[0], calling.apply(model, variables, IMAGES)[0])


class Tied(nn.Module):
    first: nn.Module
    second: nn.Module

    def __call__(self, x):
        return self.second(self.first(x))


def test_a_module_held_twice_stays_one_module():
    layer = Held()
    assert set(calling.init(Tied(layer, layer), jax.random.key(0), IMAGES[:, :4])['params']) == {'first'}


class OddNnx(nnx.Module):
    """A flag of another name in a call."""

    def __init__(self, rngs):
        self.norm, self.dropout = nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, learn=False):
        return self.dropout(self.norm(x, use_running_average=not learn), deterministic=not learn)


@pytest.mark.parametrize(
    'build', [Odd, lambda: attach(Odd(), [], inputs=IMAGES), lambda: from_nnx(OddNnx(nnx.Rngs(0)))]
)
def test_a_flag_of_another_name_is_reported(build):
    model = build()
    state = bj.training.create_train_state(model, model.init(jax.random.key(0), IMAGES), optax.sgd(0.1))
    batch = bj.Batch(IMAGES, jnp.zeros(8, jnp.int32))
    advice = r'.*recognised by the names train, .*attach\(…, train='
    with (
        pytest.warns(UserWarning, match="does not change the statistics of 'norm'" + advice),
        pytest.warns(UserWarning, match="Dropout 'dropout' drops nothing in training" + advice),
    ):
        bj.training.train_step(state, batch, jnp.ones(1), jax.random.key(1))
