import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import branchy_jax as bj
from branchy_jax.models import layers

SHAPES = {'lenet': (28, 28, 1), 'alexnet': (32, 32, 3), 'resnet8': (32, 32, 3)}
EXITS = {'lenet': 2, 'alexnet': 3, 'resnet8': 3}


def shapes_of(model, image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images), sep='/')


@pytest.mark.parametrize('placement', ['text', 'released', 'tuned'])
@pytest.mark.parametrize('trunk', SHAPES)
def test_contract(trunk, placement):
    model = bj.models.create(f'b-{trunk}', placement=placement, num_classes=7)
    images = jax.ShapeDtypeStruct((2, *SHAPES[trunk]), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    exits = EXITS[trunk] + (trunk == 'resnet8' and placement == 'tuned')
    assert [(z.shape, z.dtype) for z in logits] == [((2, 7), jnp.float32)] * exits


@pytest.mark.parametrize('placement', ['text', 'released', 'tuned'])
@pytest.mark.parametrize('trunk', SHAPES)
def test_baseline_is_the_same_trunk_with_one_exit(trunk, placement):
    baseline = bj.models.create(trunk, placement=placement)
    branchy = shapes_of(bj.models.create(f'b-{trunk}', placement=placement), SHAPES[trunk])
    alone = shapes_of(baseline, SHAPES[trunk])
    assert baseline.num_exits == 1
    assert {path: x.shape for path, x in alone.items()}.items() <= {p: x.shape for p, x in branchy.items()}.items()
    assert all(path.split('/')[1].startswith('exit') for path in set(branchy) - set(alone))


def test_baseline_computes_what_the_last_exit_computes(getkey):
    branchy, baseline = bj.models.create('b-lenet'), bj.models.create('lenet')
    images = jax.random.normal(getkey(), (2, 28, 28, 1))
    variables = branchy.init(getkey(), images)
    np.testing.assert_array_equal(baseline.apply(variables, images)[0], branchy.apply(variables, images)[1])


def test_equal_arguments_give_equal_models():
    """Models are static arguments of jitted functions: unequal ones would compile again."""
    for name in bj.models.names():
        assert bj.models.create(name) == bj.models.create(name)
        assert hash(bj.models.create(name)) == hash(bj.models.create(name))
    assert bj.models.create('b-lenet') != bj.models.create('b-lenet', placement='released')


def test_bfloat16_keeps_float32_parameters():
    found = shapes_of(bj.models.create('b-resnet8', dtype=jnp.bfloat16), SHAPES['resnet8'])
    assert {x.dtype for x in found.values()} == {jnp.dtype('float32')}


def test_own_heads(getkey):
    head = (layers.flatten, nn.Dense(10, name='mine'))
    model = bj.models.create('b-alexnet', heads=[None, head])
    names = {path.split('/')[1] for path in shapes_of(model, SHAPES['alexnet'])}
    assert 'mine' in names
    assert 'exit1_conv1' in names
    assert 'exit2_conv1' not in names
    with pytest.raises(ValueError, match='heads: this network has 2 side heads, got 1'):
        bj.models.create('b-alexnet', heads=[None])


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('b-lenett', {}, r"name: unknown network 'b-lenett'; choose from b-lenet, b-alexnet, b-resnet110"),
        ('lenet5', {}, 'name: unknown'),
        ('b-resnet', {}, 'name: unknown'),
        (None, {}, 'name: unknown'),
        ('b-resnet111', {}, 'depth: got 111'),
        ('b-resnet2', {}, 'depth: got 2'),
        ('b-lenet', {'placement': 'txt'}, "placement: got 'txt'; choose from 'text', 'released', 'tuned'"),
        ('b-lenet', {'clases': 3}, "options: 'b-lenet' takes no clases; choose from num_classes"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_choices(name, options, message):
    with pytest.raises(ValueError, match=message):
        bj.models.create(name, **options)


@pytest.mark.parametrize(('size', 'window', 'stride'), [(30, 2, 2), (15, 2, 2), (32, 3, 2), (16, 3, 2), (7, 3, 3)])
def test_max_pool_rounds_up(getkey, size, window, stride):
    x = np.asarray(jax.random.normal(getkey(), (1, size, size, 2)))
    out = -(-(size - window) // stride) + 1
    expected = np.array(
        [
            [x[0, i * stride : i * stride + window, j * stride : j * stride + window].max((0, 1)) for j in range(out)]
            for i in range(out)
        ]
    )
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), window=window, stride=stride)[0], expected)


@pytest.mark.parametrize('beta', [0.75, 0.5])
def test_local_response_normalization_by_its_formula(getkey, beta):
    x = np.asarray(jax.random.normal(getkey(), (2, 3, 3, 6)), np.float64) * 30
    expected = np.empty_like(x)
    for c in range(6):
        energy = (x[..., max(0, c - 1) : c + 2] ** 2).sum(-1)
        expected[..., c] = x[..., c] / (2 + 5e-5 * energy) ** beta
    found = layers.local_response_normalization(jnp.float32(x), beta=beta)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_residual_block_without_weights_is_its_shortcut(getkey):
    """With the last scale at zero only the shortcut is left: strided, padded with zero channels, rectified."""
    x = jax.random.normal(getkey(), (1, 6, 6, 2))
    block = layers.ResidualBlock(5, stride=2)
    variables = block.init(getkey(), x)
    variables['params']['norm2']['scale'] = jnp.zeros(5)
    found = block.apply(variables, x)
    np.testing.assert_allclose(found[..., :2], np.maximum(x[:, ::2, ::2], 0), atol=1e-6)
    np.testing.assert_array_equal(found[..., 2:], 0)
