import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import branchy_jax as bj
from branchy_jax import jaxprs
from branchy_jax.costs import StageCosts, expected_cost, mac_limit


def macs_of_network(name, image_shape, **options):
    model = bj.models.create(name, **options)
    return bj.costs.count_macs(model, inputs=jax.ShapeDtypeStruct((5, *image_shape), jnp.float32))


def macs_of(function, *arguments):
    return jaxprs.count_macs(jax.make_jaxpr(function)(*arguments).jaxpr.eqns)


def test_lenet_by_hand():
    costs = macs_of_network('b-lenet', (28, 28, 1))
    conv1 = 30 * 30 * 5 * 25
    conv2, conv3, fc1, fc2 = 17 * 17 * 10 * 25 * 5, 11 * 11 * 20 * 25 * 10, 720 * 84, 84 * 10
    assert costs.stages.tolist() == [conv1, conv2 + conv3 + fc1 + fc2]
    assert costs.exits.tolist() == [5 * 5 * 16 * 9 * 5 + 400 * 10, 0]
    assert costs.trunk == conv1 + conv2 + conv3 + fc1 + fc2


def test_resnet_by_hand():
    blocks = 2  # depth 14
    costs = macs_of_network('b-resnet14', (32, 32, 3))
    group1 = 32 * 32 * 9 * 16 * 16
    strided2, group2 = 16 * 16 * 9 * 16 * 32, 16 * 16 * 9 * 32 * 32
    strided3, group3 = 8 * 8 * 9 * 32 * 64, 8 * 8 * 9 * 64 * 64
    assert costs.stages.tolist() == [
        32 * 32 * 9 * 3 * 16 + 2 * group1,
        2 * group1 * (blocks - 1),
        strided2 + strided3 + (2 * blocks - 1) * (group2 + group3) + 640,
    ]
    assert costs.exits[2] == 0


@pytest.mark.slow
def test_side_heads_are_cheap():
    costs = macs_of_network('b-resnet110', (32, 32, 3), placement='tuned')
    assert (costs.exits[:-1] <= 0.02 * costs.trunk).all()
    share = np.cumsum(costs.stages)[:-1] / costs.trunk
    np.testing.assert_allclose(share, [1 / 54, 1 / 2, 2 / 3], atol=0.01)  # where the branches leave
    assert 250e6 < costs.trunk < 260e6  # about 0.25 GMACs, as He et al. report


def test_expected_cost_counts_every_head_on_the_way():
    costs = StageCosts(stages=np.array([10, 20, 70]), exits=np.array([1, 2, 3]))
    assert costs.to_exit.tolist() == [11, 33, 106]
    assert costs.trunk == 103
    expected = 0.5 * 11 + 0.25 * 33 + 0.25 * 106
    assert expected_cost(costs, np.array([0.5, 0.25, 0.25])) == expected
    assert mac_limit(costs, np.array([0.5, 0.25, 0.25])) == 103 / expected


def test_structured_control_flow():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    assert macs_of(lambda x: lax.scan(lambda h, _: (h @ w, None), x, length=5)[0], x) == 5 * 18
    assert macs_of(lambda x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x) == 36
    assert macs_of(jax.jit(lambda x: jnp.einsum('ij,kj->ik', x, w)), x) == 18
    with pytest.raises(ValueError, match='while_loop'):
        macs_of(lambda x: lax.while_loop(lambda h: h[0, 0] < 5, lambda h: h @ w, x), x)


def test_grouped_convolution_counts_its_own_channels():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    depthwise = lambda x: lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=4
    )
    assert macs_of(depthwise, x) == 8 * 8 * 4 * 9


@pytest.mark.parametrize(
    ('kernel', 'strides', 'padding'),
    [((3, 4), (3, 2), 'SAME'), ((2, 2), (3, 2), 'VALID'), ((3, 4), (2, 2), ((0, 3), (2, 1)))],
)
def test_transposed_convolution_counts_what_its_pixels_give(kernel, strides, padding):
    """By brute force: with ones for pixels and weights, the sum of the outputs is how many products are not zero."""
    x, ones = jnp.ones((2, 4, 5, 3)), jnp.ones((*kernel, 3, 6))

    def transposed(x):
        return lax.conv_transpose(x, ones, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    assert macs_of(transposed, x) == transposed(x).sum()
    if padding == 'VALID':  # every pixel meets every tap once
        assert macs_of(transposed, x) == x.size * ones.size // 3
