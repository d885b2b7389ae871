import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from branchy_jax.models import banded_convolution

NHWC = ('NHWC', 'HWIO', 'NHWC')
PAIR = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(['SAME', 'VALID']) | st.tuples(PAIR, PAIR),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
)
def test_equals_the_convolution(size, window, strides, padding, channels):
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (2, *size, channels[0]))
    kernel = jax.random.normal(keys[1], (*window, *channels))
    expected = lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NHWC)
    np.testing.assert_allclose(banded_convolution(images, kernel, strides, padding), expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_the_convolutions(getkey):
    images, kernel = jax.random.normal(getkey(), (2, 6, 5, 2)), jax.random.normal(getkey(), (3, 3, 2, 4))

    def loss(convolve, images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel, (2, 1), 'SAME', dimension_numbers=NHWC)))

    expected = jax.grad(loss, argnums=(1, 2))(lax.conv_general_dilated, images, kernel)
    result = jax.grad(loss, argnums=(1, 2))(banded_convolution, images, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


def test_is_a_drop_in_for_flax(getkey):
    images = jax.random.normal(getkey(), (2, 6, 6, 1))
    plain = nn.Conv(3, (5, 5), padding=3)
    variables = plain.init(getkey(), images)
    banded = nn.Conv(3, (5, 5), padding=3, conv_general_dilated=banded_convolution)
    np.testing.assert_allclose(banded.apply(variables, images), plain.apply(variables, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [{'rhs_dilation': (2, 2)}, {'feature_group_count': 2}, {'lhs_dilation': (2, 1)}])
def test_forms_it_does_not_have_are_refused(options):
    with pytest.raises(ValueError, match='banded_convolution: only undilated, ungrouped'):
        banded_convolution(jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2)), (1, 1), 'SAME', **options)
