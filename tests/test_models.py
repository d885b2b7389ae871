import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
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
def test_the_baseline_is_the_same_trunk_with_one_exit(trunk, placement):
    model, baseline = (bj.models.create(name, placement=placement, num_classes=7) for name in (f'b-{trunk}', trunk))
    images = jax.ShapeDtypeStruct((2, *SHAPES[trunk]), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    branchy, alone = traverse_util.flatten_dict(variables, sep='/'), shapes_of(baseline, SHAPES[trunk])
    exits = EXITS[trunk] + (trunk == 'resnet8' and placement == 'tuned')
    assert [(z.shape, z.dtype) for z in logits] == [((2, 7), jnp.float32)] * exits
    assert alone.items() <= branchy.items()
    assert all(path.split('/')[1].startswith('exit') for path in set(branchy) - set(alone))


def test_equal_arguments_give_equal_models():
    """Models are static arguments of jitted functions: unequal ones would compile again."""
    plain = [name for name in bj.models.names() if 'efficientnet' not in name]  # an attached one takes seconds
    assert all(bj.models.create(name) == bj.models.create(name) for name in plain)
    assert bj.models.create('b-lenet') != bj.models.create('b-lenet', placement='released')


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
        ('b-lenet', {'clases': 3}, "options: 'b-lenet' takes no clases; choose from .*num_classes"),
        ('b-vit', {'patch_size': 5}, 'patch_size: got 5'),
        ('b-vit', {'num_heads': 5}, 'num_heads: got 5'),
        ('b-vit', {'exits_after': (6,)}, 'exits_after: got'),
        ('b-vit', {'exits_after': (3, 1)}, 'exits_after: got'),
        ('b-vit', {'pool': 'max'}, "pool: got 'max'"),
        ('b-unet', {'image_shape': (20, 16, 1)}, 'image_shape: got .* multiples of 16'),
    ],
)
def test_unknown_names_and_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        bj.models.create(name, **options)


@pytest.mark.parametrize(('size', 'window', 'stride'), [(15, 2, 2), (7, 3, 3)])
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


def test_local_response_normalization_by_its_formula(getkey):
    x = np.asarray(jax.random.normal(getkey(), (2, 3, 3, 6)), np.float64) * 30
    expected = np.empty_like(x)
    for c in range(6):
        energy = (x[..., max(0, c - 1) : c + 2] ** 2).sum(-1)
        expected[..., c] = x[..., c] / (2 + 5e-5 * energy) ** 0.75
    np.testing.assert_allclose(layers.local_response_normalization(jnp.float32(x)), expected, rtol=1e-5)


def test_residual_block_without_weights_is_its_shortcut(getkey):
    """With the last scale at zero only the shortcut is left: strided, padded with zero channels, rectified."""
    x = jax.random.normal(getkey(), (1, 6, 6, 2))
    block = layers.ResidualBlock(5, stride=2)
    variables = random_variables(block, x)
    for name in ('norm2', 'conv2'):
        variables['params'][name] = jax.tree.map(jnp.zeros_like, variables['params'][name])
    variables['batch_stats']['norm2']['mean'] *= 0
    result = jax.jit(block.apply)(variables, x)
    np.testing.assert_allclose(result[..., :2], np.maximum(x[:, ::2, ::2], 0), atol=1e-6)
    np.testing.assert_array_equal(result[..., 2:], 0)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros((28, 28, 1), np.float32), 'leading batch axis'),
        (np.zeros((2, 27, 28, 1), np.float32), r'got shape \(2, 27, 28, 1\); resize'),
        (np.zeros((2, 28, 28, 1), np.uint8), 'got uint8; normalise'),
        ([[1.0]], 'got list'),
    ],
)
def test_bad_images_are_refused(images, message):
    model = bj.models.create('b-lenet')
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    with pytest.raises(ValueError, match=rf'images: .*{message}'):
        jax.eval_shape(lambda variables: model.apply(variables, images), variables)


def test_transformer_block_is_the_float64_reference():
    """Attention and feed-forward of the first block, written out, and the first exit's class token."""
    model = bj.models.create(
        'b-vit', image_shape=(4, 4, 1), patch_size=2, depth=2, width=8, num_heads=2, exits_after=(1,), num_classes=3
    )
    images = jax.random.normal(jax.random.key(0), (6, 4, 4, 1))
    variables = random_variables(model, images)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    embedded = np.asarray(images).reshape(6, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(6, 4, 4)
    patches = embedded @ p['embedding']['patches']['kernel'].reshape(4, 8) + p['embedding']['patches']['bias']
    tokens = np.concatenate([np.broadcast_to(p['embedding']['class_token'], (6, 1, 8)), patches], axis=1)
    x, block = tokens + p['embedding']['position'], p['block1']

    def norm(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * layer['scale'] + layer['bias']

    y, a = norm(x, block['norm1']), block['attention']
    q, k, v = (np.einsum('btf,fhd->bthd', y, a[n]['kernel']) + a[n]['bias'] for n in ('query', 'key', 'value'))
    scores = np.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum('bhqk,bkhd->bqhd', weights, v)
    x = x + np.einsum('bqhd,hdf->bqf', mixed, a['out']['kernel']) + a['out']['bias']
    h = norm(x, block['norm2']) @ block['expand']['kernel'] + block['expand']['bias']
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = x + h @ block['contract']['kernel'] + block['contract']['bias']
    expected = norm(x[:, 0], p['exit1_norm']) @ p['exit1_fc']['kernel'] + p['exit1_fc']['bias']
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images)[0], expected, rtol=1e-3, atol=1e-4)


def test_each_exit_of_the_encoder_decoder_reads_the_newest_level():
    model = bj.models.create('b-unet', width=2, head_width=2, image_shape=(16, 16, 1), num_classes=3)
    images = jax.ShapeDtypeStruct((9, 16, 16, 1), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(1), images)
    assert [z.shape for z in logits] == [(9, 16, 16, 3)] * 3
    costs = bj.costs.count_macs(model, inputs=images)
    assert costs.exits[0] + costs.stages[0] < costs.trunk / 2
    read = [bj.program.leaves_read(model, variables, images, [n]) for n in range(3)]
    newest = ['down3_conv2', 'up2_conv2', 'up0_conv2']
    assert [[f"['params']['{name}']['kernel']" in leaves for name in newest] for leaves in read] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
