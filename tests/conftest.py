"""Settings and small networks that all tests share. Compilation dominates: networks are tiny, optimisations off."""

import collections.abc
import functools
import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

import branchy_jax as bj

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_num_cpu_devices', 8)  # for meshes; everything else runs on the first one
settings.register_profile('suite', deadline=None, max_examples=15, derandomize=True)
settings.load_profile('suite')

# Files whose tests compile many programs, or start processes: `pytest -m 'not slow'` leaves them out.
SLOW = {
    *('any_batch', 'any_network', 'attach', 'docs', 'export', 'onnx', 'optimize', 'plan', 'plan_file', 'pretrained'),
    *('command', 'distributed', 'grain', 'resume', 'sharding', 'training'),
    *('benchmark', 'experiments', 'peers', 'reproduction', 'service'),
}
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


def check_equal(result, expected):
    """Checks two trees of arrays to the bit."""
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def random_variables(model, inputs):
    """Variables drawn by NumPy, none of them 0 or 1: `init` would compile programs for the shape of every leaf."""
    numbers = np.random.default_rng(0)

    def draw(path, leaf):
        start = numbers.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0
        positive = 1 if path[-1].key in ('scale', 'var') else start
        return jnp.asarray(positive + 0.2 * abs(numbers.normal(size=leaf.shape)), leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), inputs))


def thresholds_between(model, variables, inputs):
    """Thresholds between the uncertainties of two inputs: rounding decides nothing, some leave everywhere."""
    uncertainty = np.sort(bj.inference.exit_outputs(model, variables, inputs, batch_size=4).uncertainty[:-1], axis=1)
    middle = uncertainty.shape[1] // 2
    return uncertainty[:, middle - 1 : middle + 1].mean(1)


def pytest_collection_modifyitems(items):
    """Marks the tests of slow files, and puts these first: a worker that starts one last leaves the other idle."""
    for item in items:
        if item.path.stem.removeprefix('test_') in SLOW:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def xla_defaults(monkeypatch):
    """Plans try only the compiler options that XLA has by itself: every other set compiles each candidate once more."""
    for name, module in list(sys.modules.items()):
        if name.startswith('branchy_jax.') and hasattr(module, 'usable_options'):
            monkeypatch.setattr(module, 'usable_options', list)


@pytest.fixture
def all_compiler_options(xla_defaults, monkeypatch):
    """Lets plans of a module that uses `xla_defaults` try every compiler option, as where a user calls them."""
    monkeypatch.undo()


@pytest.fixture
def getkey():
    """Returns a new PRNG key at every call."""
    numbers = itertools.count()
    return lambda: jax.random.key(next(numbers))


class Function(nn.Module):
    """A network that is a function; the function may make layers."""

    function: collections.abc.Callable

    @nn.compact
    def __call__(self, x):
        return self.function(x)


class ThreeExits(nn.Module):
    """Dense layers with BatchNorm and dropout."""

    @nn.compact
    def __call__(self, images, train=False, frozen_trunk=False):
        learns = train and not frozen_trunk
        x = nn.Dense(8, name='layer1')(images.reshape(images.shape[0], -1))
        x = nn.relu(nn.BatchNorm(not learns, name='norm1')(x))
        first = nn.Dense(CLASSES, name='head1')(x)
        x = nn.relu(nn.Dense(8, name='layer2')(x))
        second = nn.Dense(CLASSES, name='head2')(x)
        x = nn.Dense(8, name='layer3')(x)
        x = nn.relu(nn.Dropout(0.5, deterministic=not learns, name='dropout')(x))
        return first, second, nn.Dense(CLASSES, name='head3')(x)


@pytest.fixture(scope='session')
def network():
    """A network of three exits, its variables, and images that spread over its exits."""
    model, images = ThreeExits(), jax.random.normal(jax.random.key(1), (24, *IMAGE_SHAPE))
    return model, model.init(jax.random.key(2), images), images


@pytest.fixture(scope='session')
def small_data():
    """A learnable data set of 80 images: the class is the brightest of the first three pixels."""
    images = np.random.default_rng(0).integers(0, 256, (80, *IMAGE_SHAPE)).astype(np.uint8)
    return bj.Batch(image=images, label=images.reshape(80, -1)[:, :CLASSES].argmax(-1).astype(np.int32))


def augment(key, batch):
    """Scales stored pixels to floats."""
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
        augment=augment,
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
def few_digits(monkeypatch, xla_defaults):
    """Makes the digits that pages and the README load few, and their plans short: a reader can wait for a minute."""
    load = bj.data.load_dataset

    def few(name, **options):
        whole = load(name, **options)
        counts = {'train': 64, 'validation': 128, 'test': 192}
        splits = {split: getattr(whole, split) for split in counts}
        return whole.replace(**{k: bj.Batch(v.image[: counts[k]], v.label[: counts[k]]) for k, v in splits.items()})

    monkeypatch.setattr(bj.data, 'load_dataset', few)
