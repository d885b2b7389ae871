"""Settings and small networks that all tests share. Compilation dominates: networks are tiny, optimisations off."""

import functools
import itertools

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Shapes in annotations are checked wherever a test runs through them. An integer is a float, as PEP 484 has it.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook(['branchy_jax.criteria.named', 'branchy_jax.thresholds.screen'], 'conftest.check_types')

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

import branchy_jax as bj
from branchy_jax.inference.planning import candidates
from branchy_jax.inference.planning import plan as planning

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)
settings.register_profile('suite', deadline=None, max_examples=25, derandomize=True)
settings.load_profile('suite')

IMAGE_SHAPE = (4, 4, 1)
CLASSES = 3


def equations(jaxpr):
    """Yields every equation of a jaxpr, those of nested ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, 'jaxpr') or hasattr(inner, 'eqns'):
                    yield from equations(getattr(inner, 'jaxpr', inner))


def check_equal(found, expected):
    """Checks two trees of arrays to the bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def thresholds_between(model, variables, inputs):
    """Thresholds between the uncertainties of two inputs: rounding decides nothing, some leave everywhere."""
    uncertainty = np.sort(bj.inference.exit_outputs(model, variables, inputs, batch_size=4).uncertainty[:-1], axis=1)
    middle = uncertainty.shape[1] // 2
    return uncertainty[:, middle - 1 : middle + 1].mean(1)


@pytest.fixture(autouse=True)
def compiled_as_xla_does(monkeypatch):
    """Plans race what XLA compiles by itself, or every way would be traced three times.

    Whoever wants them all asks for `every_way`, or says how many cores there are.
    """
    monkeypatch.setattr(candidates, 'may_use_all_cores', lambda: False)
    monkeypatch.setattr(candidates, 'may_use_one_core', lambda: False)
    monkeypatch.setattr(planning, 'may_use_all_cores', lambda: False)


@pytest.fixture
def every_way(compiled_as_xla_does, monkeypatch):
    """Lets plans try all that they try where a user calls them."""
    monkeypatch.undo()


@pytest.fixture
def getkey():
    """Hands out a new PRNG key at every call."""
    numbers = itertools.count()
    return lambda: jax.random.key(next(numbers))


@pytest.fixture(scope='session')
def network():
    """A three-exit network with BatchNorm and dropout, its variables, and images that spread over its exits."""
    model = bj.BranchyNet(
        stages=(
            (bj.models.layers.flatten, nn.Dense(8, name='layer1'), nn.BatchNorm(name='norm1'), nn.relu),
            (nn.Dense(8, name='layer2'), nn.relu),
            (nn.Dense(8, name='layer3'), nn.Dropout(0.5, name='dropout'), nn.relu),
        ),
        exits=(nn.Dense(CLASSES, name='head1'), nn.Dense(CLASSES, name='head2'), nn.Dense(CLASSES, name='head3')),
        image_shape=IMAGE_SHAPE,
    )
    images = jax.random.normal(jax.random.key(1), (24, *IMAGE_SHAPE))
    return model, model.init(jax.random.key(2), images), images


@pytest.fixture(scope='session')
def small_data():
    """A learnable data set of 80 images: the class is the brightest of the first three pixels."""
    images = np.random.default_rng(0).integers(0, 256, (80, *IMAGE_SHAPE)).astype(np.uint8)
    return bj.Batch(image=images, label=images.reshape(80, -1)[:, :CLASSES].argmax(-1).astype(np.int32))


def prepare(key, batch):
    return batch.replace(image=batch.image.astype(jnp.float32) / 255)


@pytest.fixture
def train(small_data):
    """Runs epochs of the small data set on the network of three exits."""
    return functools.partial(
        bj.training.fit,
        data=jax.tree.map(jnp.asarray, small_data),
        exit_weights=jnp.ones(3),
        key=jax.random.key(7),
        batch_size=16,
        prepare=prepare,
    )


class Compilations:
    """Counts what XLA compiles, helper programs such as a slice included."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event, seconds, **_):
        self.count += event == '/jax/core/compile/backend_compile_duration'


@pytest.fixture(scope='session')
def compilations():
    return Compilations()


@pytest.fixture
def few_digits(monkeypatch):
    """Makes the digits that pages and the README load few: what a reader runs takes a minute, a test may not."""
    whole = bj.data.load_dataset

    def few(name, **options):
        found = whole(name, **options)
        counts = {'train': 64, 'validation': 128, 'test': 192}
        splits = {split: getattr(found, split) for split in counts}
        return found.replace(**{k: bj.Batch(v.image[: counts[k]], v.label[: counts[k]]) for k, v in splits.items()})

    monkeypatch.setattr(bj.data, 'load_dataset', few)
