import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import thresholds_between
from hypothesis import given, settings
from hypothesis import strategies as st

import branchy_jax as bj
from branchy_jax.inference import dense, optimize, staged
from branchy_jax.inference.rewriting.forms import Forms

ALL_FORMS = Forms(most_channel_pairs=1000, sliced_pooling=True, transposed_weights=True)
TOGETHER = Forms(most_pairs_together=256)
IMAGE_SHAPE = (8, 8, 2)


def with_statistics(variables, key):
    """Replaces initial values, under which a wrongly folded BatchNorm would go unnoticed."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    moved = [x + 0.2 * jnp.abs(jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def flatten(x):
    return x.reshape(x.shape[0], -1)


def pooled(x):
    return x.mean((1, 2))


class Layers(nn.Module):
    """Layers one after the other, and one exit."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x,)


class Two(nn.Module):
    """Two exits, BatchNorms of both kinds, dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(3, (3, 3))(x)))
        early = nn.Dense(5)(flatten(x))
        x = nn.BatchNorm(not train, use_scale=False)(nn.Conv(4, (3, 3), strides=2, use_bias=False)(x))
        x = nn.Dropout(0.5, deterministic=not train)(pooled(nn.LayerNorm()(nn.gelu(x))))
        return early, nn.Dense(5, use_bias=False)(x)


def check_same(model, variables, images, forms=ALL_FORMS):
    fast_model, fast_variables = optimize(model, variables, inputs=images, forms=forms)
    expected, result = (jax.jit(m.apply)(v, images) for m, v in ((model, variables), (fast_model, fast_variables)))
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    return fast_model, fast_variables


def primitives(model, variables, images):
    """Counts what a network executes, nested calls included."""
    names = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inner = [
                getattr(v, 'jaxpr', v) for v in equation.params.values() if hasattr(v, 'eqns') or hasattr(v, 'jaxpr')
            ]
            names.extend([] if inner else [equation.primitive.name])
            for body in inner:
                walk(body)

    walk(jax.make_jaxpr(model.apply)(variables, images).jaxpr)
    return names


@pytest.mark.parametrize('placement', ['text', 'released'])
@pytest.mark.parametrize(('name', 'image_shape'), [('b-lenet', (28, 28, 1)), ('b-resnet8', (32, 32, 3))])
def test_networks_keep_their_logits(getkey, name, image_shape, placement):
    model = bj.models.create(name, placement=placement)
    images = jax.random.normal(getkey(), (2, *image_shape))
    variables = with_statistics(jax.jit(model.init)(getkey(), images), getkey())
    emitted = primitives(*check_same(model, variables, images), images)
    assert 'rsqrt' not in emitted  # BatchNorm is gone
    assert 'reduce_window_max' not in emitted


@pytest.mark.parametrize('forms', [ALL_FORMS, Forms()], ids=['all forms', 'folding only'])
def test_own_network_keeps_its_logits(getkey, forms):
    model, images = Two(), jax.random.normal(getkey(), (3, *IMAGE_SHAPE))
    variables = with_statistics(model.init(getkey(), images), getkey())
    fast_model, fast_variables = check_same(model, variables, images, forms)
    emitted = primitives(fast_model, fast_variables, images)
    assert ('conv_general_dilated' in emitted) == (forms is not ALL_FORMS)
    assert emitted.count('sub') < primitives(model, variables, images).count('sub')
    assert set(fast_variables) == {'params'}
    assert {leaf.ndim for leaf in fast_variables['params'].values()} >= {1, 2}  # a flat dictionary of arrays


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(3, 7), st.integers(8, 13)),
    window=st.tuples(st.integers(1, 3), st.integers(3, 5)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(['SAME', 'VALID']) | st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 3))] * 2),
    channels=st.sampled_from([(1, 8), (2, 16), (3, 16), (3, 32), (4, 4), (16, 16)]),
)
def test_pixels_together_give_what_each_gives(size, window, strides, padding, channels):
    """Widths that the pixels do not divide, windows that do not reach the edge, other strides down than along."""
    model = Layers((nn.Conv(channels[1], window, strides, padding), flatten))
    images = jax.random.normal(jax.random.key(0), (2, *size, channels[0]))
    variables = model.init(jax.random.key(1), images)
    check_same(model, variables, images, TOGETHER)


@pytest.mark.parametrize(
    ('channels', 'features', 'pixels'),
    [
        (1, 16, 2),
        (3, 16, 4),
        (3, 32, 2),
        (4, 4, 8),
        (16, 16, 2),
        (3, 64, 1),
        (4, 32, 1),
        (3, 4, 1),
        (1, 5, 1),
        (20, 16, 1),
    ],
)
def test_pixels_are_taken_together_where_they_fill_the_processor(getkey, channels, features, pixels):
    model, images = Layers((nn.Conv(features, (3, 3)),)), jnp.zeros((1, 8, 8, channels))
    _, fast = optimize(model, model.init(getkey(), images), inputs=images, forms=TOGETHER)
    kernel = max(jax.tree.leaves(fast), key=lambda leaf: leaf.ndim)
    assert kernel.shape == (3, 3 + pixels - 1, channels, pixels * features)


def test_one_pixel_at_a_time_where_windows_share_nothing(getkey):
    model, images = Layers((nn.Conv(16, (2, 2), 2),)), jnp.zeros((1, 8, 8, 2))
    _, fast = optimize(model, model.init(getkey(), images), inputs=images, forms=TOGETHER)
    assert max(jax.tree.leaves(fast), key=lambda leaf: leaf.ndim).shape == (2, 2, 2, 16)


def test_value_that_others_look_at_is_computed_once(getkey):
    """A convolution whose raw output feeds both the BatchNorm and a shortcut: folding would convolve twice."""

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(2, (3, 3))(x)
            return y + nn.relu(nn.BatchNorm(use_running_average=True)(y))

    model = Layers((Shared(), pooled, nn.Dense(3)))
    images = jax.random.normal(getkey(), (2, *IMAGE_SHAPE))
    fast = check_same(model, with_statistics(model.init(getkey(), images), getkey()), images, Forms())
    assert primitives(*fast, images).count('conv_general_dilated') == 1


def test_shift_before_a_convolution_stays_before_it(getkey):
    """BatchNorm ahead of a padded convolution cannot be folded forward: the padding is zero after the shift."""
    model = Layers((nn.BatchNorm(True), nn.Conv(3, (3, 3)), lambda x: x.max((1, 2)), nn.Dense(3)))
    images = jax.random.normal(getkey(), (2, *IMAGE_SHAPE))
    check_same(model, with_statistics(model.init(getkey(), images), getkey()), images)


@pytest.mark.parametrize(
    'operation',
    [
        lambda y, w: y * w,
        lambda y, w: w - y,
        lambda y, w: y / (w + 2),
        lambda y, w: (w + 2) / (jnp.abs(y) + 1),
        lambda y, w: y + w[:, None] * jnp.ones(4),
        lambda y, w: y + jax.lax.broadcast_in_dim(w, y.shape, (1,)),
        lambda y, w: y * 3 - 1,
        lambda y, w: -y + w,
    ],
)
def test_arithmetic_with_weights(getkey, operation):
    """Every combination of a known vector and a product: some fold, some must not."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(4, use_bias=False)(x)  # [B, 4, 4]: a vector may run along rows or along features
            return operation(y, self.param('w', nn.initializers.normal(), (4,)))

    jax.config.update('jax_numpy_rank_promotion', 'allow')
    try:
        model = Layers((Layer(), lambda x: x.sum(1)))
        images = jax.random.normal(getkey(), (2, 4, 3))
        check_same(model, with_statistics(model.init(getkey(), images), getkey()), images)
    finally:
        jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.mark.parametrize(
    ('dtype', 'result', 'multiply', 'scale'),
    [
        (jnp.int8, jnp.int32, jax.lax.dot, lambda y: jax.lax.div(y, jnp.int32(7))),
        (jnp.int32, jnp.int32, jax.lax.dot, lambda y: jax.lax.div(y, jnp.int32(7))),
        (
            jnp.bfloat16,
            jnp.float32,
            functools.partial(jax.lax.conv, window_strides=(), padding='VALID'),
            lambda y: 3.0 * y,
        ),
    ],
    ids=['int8', 'int32', 'bfloat16'],
)
def test_scale_that_a_kernel_cannot_hold_stays_behind_it(getkey, dtype, result, multiply, scale):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('w', nn.initializers.normal(20), (3, 3)).astype(dtype)
            return scale(multiply((20 * x).astype(dtype), w, preferred_element_type=result)).astype(jnp.float32)

    model = Layers((Layer(),))
    images = jax.random.normal(getkey(), (2, 3))
    check_same(model, model.init(getkey(), images), images)


def test_convolution_that_crops_stays_one(getkey):
    model = Layers((nn.Conv(4, (3, 3), padding=((-1, 0), (1, -2))), pooled))
    images = jax.random.normal(getkey(), (2, *IMAGE_SHAPE))
    fast = check_same(model, model.init(getkey(), images), images)
    assert 'conv_general_dilated' in primitives(*fast, images)


COMBINATIONS = {
    'tile': lambda y, w: jnp.concatenate([jnp.tile(w[:, :1], (y.shape[0], 1, 1)), y], axis=1),
    'repeat': lambda y, w: jnp.concatenate([y, jnp.repeat(w, y.shape[0], axis=0)], axis=1),
    'broadcast': lambda y, w: jnp.concatenate([y, jnp.broadcast_to(w, y.shape) * 2 + 1], axis=1),
    'queries': lambda y, w: jax.nn.softmax(jnp.tile(w, (y.shape[0], 1, 1)) @ y.swapaxes(1, 2)) @ y,
    'scale': lambda y, w: y * w * y.shape[0] + w / y.shape[0],
    'arange': lambda y, w: y + w * jnp.arange(y.shape[0])[:, None, None],
    'weights alone': lambda y, w: y * w.sum() + w,
}


def network_that_combines(combine):
    """Applies ``combine(y [B, 2, 4], w [1, 2, 4])`` to what a small network and a parameter hold."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('w', nn.initializers.normal(), (1, 2, 4))
            return combine(nn.Dense(4)(nn.relu(nn.Dense(4)(x))), w)

    return Layers((Layer(), nn.Dense(3)))


@pytest.mark.parametrize('combine', COMBINATIONS.values(), ids=COMBINATIONS)
def test_what_depends_on_the_batch_size_is_computed_anew(getkey, combine):
    """Class tokens, learned queries and arithmetic on B: nothing of the batch that was traced may be stored."""
    model, images = network_that_combines(combine), jax.random.normal(getkey(), (7, 2, 4))
    variables = with_statistics(jax.jit(model.init)(getkey(), images), getkey())
    fast_model, fast_variables = optimize(model, variables, inputs=images, forms=ALL_FORMS)
    for batch in (1, 2, 7):
        (expected,) = jax.jit(model.apply)(variables, images[:batch])
        (result,) = jax.jit(fast_model.apply)(fast_variables, images[:batch])
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_class_token_is_repeated_for_any_number_of_images(getkey):
    model = network_that_combines(lambda y, w: jnp.concatenate([y, jnp.tile(w, (y.shape[0], 1, 1))], 1))
    images = jax.random.normal(getkey(), (5, 2, 4))
    variables = with_statistics(model.init(getkey(), images), getkey())
    fast_model, fast_variables = optimize(model, variables, inputs=images)
    (count,) = jax.export.symbolic_shape('count')
    program = jax.export.export(jax.jit(lambda images: fast_model.apply(fast_variables, images)[0]))(
        jax.ShapeDtypeStruct((count, 2, 4), jnp.float32)
    )
    np.testing.assert_allclose(program.call(images), model.apply(variables, images)[0], rtol=1e-4, atol=1e-4)


def test_batch_size_that_needs_other_weights_is_refused(getkey):
    model = network_that_combines(lambda y, w: y * w if len(y) > 3 else y)
    images = jax.random.normal(getkey(), (5, 2, 4))
    fast_model, fast_variables = optimize(model, model.init(getkey(), images), inputs=images[:1])
    with pytest.raises(ValueError, match='inputs: a batch of this size needs weights'):
        fast_model.apply(fast_variables, images)


def test_result_runs_in_every_executor_at_any_batch_size(getkey):
    model, images = Two(), jax.random.normal(getkey(), (9, *IMAGE_SHAPE))
    variables = with_statistics(model.init(getkey(), images), getkey())
    fast = optimize(model, variables, inputs=images)
    thresholds = thresholds_between(model, variables, images)
    expected = dense(model)(variables, images, thresholds)
    assert set(expected.exit_index.tolist()) == {0, 1}
    for batch in (images, images[:4]):
        answer = dense(fast[0])(fast[1], batch, thresholds)
        np.testing.assert_array_equal(answer.exit_index, expected.exit_index[: len(batch)])
    for image, index in zip(images, expected.exit_index, strict=True):
        assert int(staged(fast[0])(fast[1], image, thresholds).exit_index) == int(index)


def test_bfloat16_is_close_and_says_so(getkey):
    model, images = Two(), jax.random.normal(getkey(), (3, *IMAGE_SHAPE))
    variables = model.init(getkey(), images)
    fast_model, fast_variables = optimize(model, variables, inputs=images, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(fast_variables)} >= {jnp.dtype('bfloat16')}
    for a, b in zip(fast_model.apply(fast_variables, images), model.apply(variables, images), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max())
        assert (a != b).any()


def test_banded_products_in_bfloat16_accumulate_in_float32(getkey):
    """257 ones, a number that bfloat16 does not have."""
    model = Layers((nn.Conv(1, (1, 257), padding='VALID', kernel_init=nn.initializers.ones), pooled))
    images = jnp.ones((2, 1, 257, 1))
    forms = Forms(most_channel_pairs=1, dtype=jnp.bfloat16)
    fast_model, fast_variables = optimize(model, model.init(getkey(), images), inputs=images, forms=forms)
    assert fast_model.apply(fast_variables, images)[0].tolist() == [[257.0]] * 2


def test_a_rewritten_network_does_not_train(getkey):
    model, images = Two(), jax.random.normal(getkey(), (3, *IMAGE_SHAPE))
    fast_model, fast_variables = optimize(model, model.init(getkey(), images), inputs=images)
    with pytest.raises(ValueError, match='model: is rewritten for inference and cannot train'):
        fast_model.apply(fast_variables, images, train=True)
    with pytest.raises(ValueError, match='variables: have no '):
        fast_model.apply({'params': {}}, images)


def test_selected_exits_are_rewritten_alone(getkey):
    model, images = Two(), jax.random.normal(getkey(), (3, *IMAGE_SHAPE))
    variables = with_statistics(model.init(getkey(), images), getkey())
    _, whole = check_same(model, variables, images)
    _, alone = check_same(bj.models.without_branches(model), variables, images)
    assert len(alone['params']) < len(whole['params'])
