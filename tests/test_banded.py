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


@settings(max_examples=10)
@given(
    width=st.integers(3, 8),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(['SAME', 'VALID']) | st.tuples(PAIR, PAIR),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
)
def test_equals_the_convolution(width, window, strides, padding, channels):
    random = np.random.default_rng(0)
    images, kernel = (
        random.standard_normal(shape, np.float32) for shape in ((2, 4, width, channels[0]), (*window, *channels))
    )

    @jax.jit  # compiles once, not operation by operation
    def both(images, kernel):
        plain = lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NHWC)
        return plain, banded_convolution(images, kernel, strides, padding)

    expected, result = both(images, kernel)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_a_plain_layer(getkey):
    images = jax.random.normal(getkey(), (2, 6, 6, 1))
    layers = [
        nn.Conv(3, (5, 5), (2, 1), padding=3, conv_general_dilated=f)
        for f in (lax.conv_general_dilated, banded_convolution)
    ]
    variables = layers[0].init(getkey(), images)
    expected, result = (jax.jit(jax.grad(lambda v, f=f: jnp.sin(f.apply(v, images)).sum()))(variables) for f in layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


@pytest.mark.parametrize('options', [{'rhs_dilation': (2, 2)}, {'feature_group_count': 2}, {'lhs_dilation': (2, 1)}])
def test_forms_it_does_not_have_are_refused(options):
    with pytest.raises(ValueError, match='banded_convolution: only undilated, ungrouped'):
        banded_convolution(jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2)), (1, 1), 'SAME', **options)
