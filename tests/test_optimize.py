"""A rewritten network has the logits of the network it was, at every batch size, with fewer and faster operations.

Cases are exits of one network wherever they can be: each network is compiled once.
"""

from collections import Counter

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Function, equations, random_variables, thresholds_between

import branchy_jax as bj
from branchy_jax.inference import dense, optimize, staged

IMAGE_SHAPE = (8, 8, 2)


class Exits(nn.Module):
    """A network in which every layer is an exit of its own."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        return tuple(layer(x) for layer in self.layers)


class Combined(nn.Module):
    """What a function makes of what a dense layer computes and of a parameter."""

    combine: object
    shape: tuple

    @nn.compact
    def __call__(self, x):
        return self.combine(nn.Dense(4, use_bias=False)(x), self.param('w', nn.initializers.normal(), self.shape))


class Two(nn.Module):
    """Two exits, BatchNorms of both kinds, dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(3, (3, 3))(x)))
        early = nn.Dense(5)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not train, use_scale=False)(nn.Conv(4, (3, 3), strides=2, use_bias=False)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(nn.gelu(x)).mean((1, 2)))
        return early, nn.Dense(5, use_bias=False)(x)


@pytest.fixture(scope='module')
def two():
    images = jax.random.normal(jax.random.key(1), (9, *IMAGE_SHAPE))
    return Two(), random_variables(Two(), images), images


def check_same(model, variables, inputs, banded=True, sizes=()):
    """Returns the rewritten network, whose logits are the same at every batch size."""
    fast_model, fast_variables = optimize(model, variables, inputs=inputs, banded=banded)
    for size in sizes or [len(inputs)]:
        expected = jax.jit(model.apply)(variables, inputs[:size])
        result = jax.jit(fast_model.apply)(fast_variables, inputs[:size])
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    return fast_model, fast_variables


def primitives(model, variables, images):
    """Counts what a network executes, nested calls included."""
    jaxpr = jax.make_jaxpr(model.apply)(variables, images).jaxpr
    return Counter(equation.primitive.name for equation in equations(jaxpr))


@pytest.mark.parametrize(
    ('name', 'shape', 'placement'), [('b-lenet', (28, 28, 1), 'released'), ('b-resnet8', (8, 8, 3), 'text')]
)
def test_networks_keep_their_logits(getkey, name, shape, placement):
    model = bj.models.create(name, placement=placement, image_shape=shape)
    images = jax.random.normal(getkey(), (2, *shape))
    emitted = primitives(*check_same(model, random_variables(model, images), images), images)
    assert not emitted['rsqrt']  # BatchNorm is gone


@pytest.mark.parametrize('banded', [True, False])
def test_own_network_keeps_its_logits(two, banded):
    model, variables, images = two
    fast = check_same(model, variables, images, banded)
    emitted = primitives(*fast, images)
    assert bool(emitted['conv_general_dilated']) != banded
    assert emitted['sub'] < primitives(*two)['sub']
    assert set(fast[1]) == {'params'}
    assert {leaf.ndim for leaf in fast[1]['params'].values()} >= {1, 2}  # a flat dictionary of arrays
    alone = check_same(bj.models.without_branches(model), variables, images, banded)
    assert len(alone[1]['params']) < len(fast[1]['params'])


def test_only_convolutions_with_few_channels_are_banded(getkey):
    several = Function(lambda x: (nn.Conv(16, (3, 3))(x), nn.Conv(16, (3, 3))(nn.Conv(17, (3, 3))(x))))
    images = jax.random.normal(getkey(), (2, 6, 11, 4))
    emitted = primitives(*check_same(several, random_variables(several, images), images), images)
    assert emitted['conv_general_dilated'] == 2  # 4 × 17 and 17 × 16; 4 × 16 is banded


def shared(x):
    """A raw output feeds both a BatchNorm and a shortcut: folding would convolve twice."""
    y = nn.Conv(2, (3, 3))(x)
    return y + nn.relu(nn.BatchNorm(use_running_average=True)(y))


def scaled(x, w, result, scale):
    """A product whose scale its kernel cannot hold: integers divide with a remainder, bfloat16 would round."""
    product = jax.lax.dot_general((20 * x).astype(w.dtype), w, (((3,), (0,)), ((), ())), None, result)
    return scale(product).astype(jnp.float32)


def seventh(y):
    return jax.lax.div(y, jnp.int32(7))


class Odd(nn.Module):
    """What must not be folded, or not be emitted in another form."""

    @nn.compact
    def __call__(self, x):
        w = 20 * self.param('w', nn.initializers.normal(), (2, 3))
        return (
            shared(x),
            # The padding of the convolution is zero after the shift.
            nn.Conv(3, (3, 3))(nn.BatchNorm(True)(x)),
            nn.Conv(4, (3, 3), padding=((-1, 0), (1, -2)))(x),
            scaled(x, w.astype(jnp.int8), jnp.int32, seventh),
            scaled(x, w.astype(jnp.int32), jnp.int32, seventh),
            scaled(x, w.astype(jnp.bfloat16), jnp.float32, lambda y: 3.1 * y),
        )


def test_what_cannot_be_folded_stays(getkey):
    images = jax.random.normal(getkey(), (2, *IMAGE_SHAPE))
    variables = random_variables(Odd(), images)
    emitted = primitives(*check_same(Odd(), variables, images), images)
    assert emitted['conv_general_dilated'] == 1  # the one that crops
    folded = primitives(*check_same(Odd(), variables, images, False), images)
    assert folded['conv_general_dilated'] == 3


def test_arithmetic_with_weights(getkey):
    """Every combination of a known vector and a product ``[B, 4, 4]``: some fold, some must not."""
    operations = (
        lambda y, w: y * w[None, None],
        lambda y, w: w[None, None] - y,
        lambda y, w: y / (w + 2)[None, None],
        lambda y, w: (w + 2)[None, None] / (jnp.abs(y) + 1),
        lambda y, w: y + (w[:, None] * jnp.ones((1, 4)))[None],
        lambda y, w: y + jax.lax.broadcast_in_dim(w, y.shape, (1,)),
        lambda y, w: y * 3 - 1,
        lambda y, w: -y + w[None, None],
    )
    model = Exits(tuple(Combined(operation, (4,)) for operation in operations))
    images = jax.random.normal(getkey(), (2, 4, 3))
    check_same(model, random_variables(model, images), images)


def test_what_depends_on_the_batch_size_is_computed_anew(getkey):
    """Class tokens, learned queries and arithmetic on B: nothing of the batch that was traced may be stored."""
    combinations = (
        lambda y, w: jnp.concatenate([jnp.tile(w[:, :1], (y.shape[0], 1, 1)), y], axis=1),
        lambda y, w: jnp.concatenate([y, jnp.repeat(w, y.shape[0], axis=0)], axis=1),
        lambda y, w: jnp.concatenate([y, jnp.broadcast_to(w, y.shape) * 2 + 1], axis=1),
        lambda y, w: jax.nn.softmax(jnp.tile(w, (y.shape[0], 1, 1)) @ y.swapaxes(1, 2)) @ y,
        lambda y, w: y * w * y.shape[0] + w / y.shape[0],
        lambda y, w: y + w * jnp.arange(y.shape[0])[:, None, None],
        lambda y, w: y * w.sum() + w,
    )
    model = Exits(tuple(Combined(combine, (1, 2, 4)) for combine in combinations))
    images = jax.random.normal(getkey(), (7, 2, 4))
    variables = random_variables(model, images)
    fast_model, fast_variables = check_same(model, variables, images, sizes=(1, 7))
    (count,) = jax.export.symbolic_shape('count')
    exported = jax.export.export(jax.jit(lambda images: fast_model.apply(fast_variables, images)[0]))(
        jax.ShapeDtypeStruct((count, 2, 4), jnp.float32)
    )
    np.testing.assert_allclose(exported.call(images), model.apply(variables, images)[0], rtol=1e-4, atol=1e-4)


def test_batch_size_that_needs_other_weights_is_refused(getkey):
    model = Exits((Combined(lambda y, w: y * w if len(y) > 3 else y, (1, 2, 4)),))
    images = jnp.ones((5, 2, 4))
    fast_model, fast_variables = optimize(model, random_variables(model, images), inputs=images[:1])
    with pytest.raises(ValueError, match='inputs: a batch of this size needs weights'):
        fast_model.apply(fast_variables, images)


def test_result_runs_in_executors_at_any_batch_size_but_does_not_train(two):
    model, variables, images = two
    fast_model, fast_variables = optimize(model, variables, inputs=images)
    thresholds = thresholds_between(model, variables, images)
    expected = dense(model)(variables, images, thresholds).exit_index
    assert set(expected.tolist()) == {0, 1}
    answer = dense(fast_model)(fast_variables, images[:4], thresholds)
    np.testing.assert_array_equal(answer.exit_index, expected[:4])
    for image, index in zip(images[:4], expected, strict=False):
        assert int(staged(fast_model)(fast_variables, image, thresholds).exit_index) == int(index)
    with pytest.raises(ValueError, match='model: is rewritten for inference and cannot train'):
        fast_model.apply(fast_variables, images, train=True)
    with pytest.raises(ValueError, match='model: is rewritten for inference; its variables'):
        fast_model.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match='variables: have no '):
        fast_model.apply({'params': {}}, images)


def test_bfloat16_is_close_and_accumulates_in_float32(two, getkey):
    model, variables, images = two
    fast_model, fast_variables = optimize(model, variables, inputs=images, dtype=jnp.bfloat16)
    assert jnp.dtype('bfloat16') in {x.dtype for x in jax.tree.leaves(fast_variables)}
    result, expected = jax.jit(fast_model.apply)(fast_variables, images), jax.jit(model.apply)(variables, images)
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max())
        assert (a != b).any()
    # 257 ones as a banded product: a number that bfloat16 does not have.
    model, images = (
        Exits((nn.Conv(1, (1, 257), padding='VALID', kernel_init=nn.initializers.ones),)),
        jnp.ones((2, 1, 257, 1)),
    )
    options = {'dtype': jnp.bfloat16, 'banded': True}
    fast_model, fast_variables = optimize(model, model.init(getkey(), images), inputs=images, **options)
    assert np.ravel(fast_model.apply(fast_variables, images)[0]).tolist() == [257.0] * 2
