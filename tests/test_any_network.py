"""Networks that are not ours: misfits are named, functional forms and NNX, a transformer, an encoder–decoder."""

import gc
import importlib
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import branchy_jax as bj
from branchy_jax.models import Functional, from_nnx, without_branches
from branchy_jax.models.branchy import side_head_names
from branchy_jax.models.layers import depth_to_space, space_to_depth


@pytest.mark.parametrize(
    ('stages', 'exits', 'message'),
    [
        ((nn.Dense(3), lambda x: x + jnp.ones((1, 4))), (nn.Dense(2),) * 2, r'stages\[1\]: .*shape \(2, 3\)'),
        ((nn.Dense(3), lambda x: x.reshape(-1, 5)), (nn.Dense(2),) * 2, r'stages\[1\]: cannot take'),
        ((nn.Dense(3),), (lambda x: x.reshape(7, 7),), r'exits\[0\]: cannot take a hidden value'),
        ((nn.Dense(3),), (lambda x: x.argmax(-1),), r'exits\[0\]: a head returns logits .* got int32 \(2,\)'),
        ((nn.Dense(3),), (lambda x: (x, x),), r'exits\[0\]: a head returns logits .* got tuple'),
    ],
)
def test_layers_that_do_not_meet_are_named(stages, exits, message):
    with pytest.raises(ValueError, match=message):
        bj.BranchyNet(stages=stages, exits=exits).init(jax.random.key(0), jnp.ones((2, 6)))


def test_variables_of_another_shape_name_the_stage():
    model = bj.BranchyNet(stages=(nn.Dense(3), nn.Dense(3)), exits=(nn.Dense(2),) * 2)
    variables = model.init(jax.random.key(0), jnp.ones((2, 6)))
    variables['params']['stages_1']['kernel'] = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r'stages\[1\]: .*kernel'):
        model.apply(variables, jnp.ones((2, 6)))


def test_layers_that_cannot_be_traced_keep_their_error():
    model = bj.BranchyNet(stages=(lambda x: x if x.sum() > 0 else -x,), exits=(nn.Dense(2),))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 6)))


def test_functional_layers_train(getkey):
    def initialize(key):
        return {'w': jax.random.normal(key, (6, 3))}

    layer = Functional(lambda p, x: jnp.tanh(x @ p['w']), initialize, name='plain')
    model = bj.BranchyNet(stages=(layer,), exits=(nn.Dense(2),))
    images = jax.random.normal(getkey(), (4, 6))
    variables = model.init(getkey(), images)
    kernel = variables['params']['plain']['parameters']['w']
    (logits,) = model.apply(variables, images)
    head = variables['params']['exits_0']
    np.testing.assert_allclose(logits, jnp.tanh(images @ kernel) @ head['kernel'] + head['bias'][None], rtol=1e-5)
    state = bj.training.create_train_state(model, variables)
    state, _ = bj.training.train_step(state, bj.Batch(images, jnp.zeros(4, int)), jnp.ones(1), getkey())
    assert (state.params['plain']['parameters']['w'] != kernel).any()


def test_nnx_modules_give_what_they_give_alone(getkey):
    trained = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(1)), nnx.relu, nnx.Linear(5, 4, rngs=nnx.Rngs(2)))
    model = bj.BranchyNet(
        stages=(from_nnx(lambda rngs: trained, name='trunk'), from_nnx(lambda rngs: nnx.Linear(4, 4, rngs=rngs))),
        exits=(nn.Dense(3), from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))),
    )
    images = jax.random.normal(getkey(), (2, 6))
    variables = model.init(getkey(), images)
    np.testing.assert_allclose(
        model.apply(variables, images, 0, method='run_stage'), trained(images), rtol=1e-5, atol=1e-6
    )
    other = model.init(getkey(), images)['params']['stages_1']['parameters']
    assert (other['kernel'] != variables['params']['stages_1']['parameters']['kernel']).any()
    assert bj.inference.staged(model)(variables, images[0], [0.5]).label.shape == ()


@pytest.mark.parametrize('build', [lambda r: nnx.BatchNorm(3, rngs=r), lambda r: nnx.Dropout(0.5, rngs=r)])
def test_nnx_state_beside_parameters_is_refused(build):
    with pytest.raises(ValueError, match='build: .*(BatchStat|RngKey).*attach'):
        from_nnx(build)


@pytest.fixture(scope='module')
def vit():
    model = bj.models.b_vit(
        image_shape=(4, 4, 1), patch_size=2, depth=3, width=8, num_heads=2, exits_after=(1, 2), num_classes=3
    )
    images = jax.random.normal(jax.random.key(0), (6, 4, 4, 1))
    return model, model.init(jax.random.key(1), images), images


def test_transformer_exits_after_the_blocks_asked_for(vit):
    model, variables, images = vit
    assert model.num_exits == 3
    hidden = model.apply(variables, images, 0, method='run_stage')
    assert hidden.shape == (6, 1 + 4, 8)
    assert {'block1', 'block2', 'block3', 'embedding', 'exit1_fc', 'exit2_fc', 'head_fc'} <= set(variables['params'])
    assert side_head_names(model) == {'exit1_fc', 'exit1_norm', 'exit2_fc', 'exit2_norm'}
    assert without_branches(model).apply(variables, images)[0].shape == (6, 3)
    single = bj.inference.staged(model)(variables, images[0], [0.0, 0.0])
    np.testing.assert_allclose(single.logits, model.apply(variables, images[:1])[-1][0], rtol=1e-4, atol=1e-5)


def test_transformer_block_is_the_float64_reference(vit):
    """Attention and feed-forward of the first block, written out."""
    model, variables, images = vit
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
    np.testing.assert_allclose(model.apply(variables, images, 0, method='run_stage'), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'patch_size': 5}, 'patch_size: got 5'),
        ({'num_heads': 5}, 'num_heads: got 5'),
        ({'exits_after': (6,)}, 'exits_after: got'),
        ({'exits_after': (3, 1)}, 'exits_after: got'),
        ({'pool': 'max'}, "pool: got 'max'"),
        ({'heads': [None]}, 'heads: got 1'),
    ],
)
def test_impossible_transformers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bj.models.b_vit(**options)


@pytest.fixture(scope='module')
def unet():
    model = bj.models.b_unet(width=2, head_width=2, image_shape=(16, 16, 1), num_classes=3)
    images = jax.random.normal(jax.random.key(0), (9, 16, 16, 1))
    return model, model.init(jax.random.key(1), images), images


def test_masks_have_the_size_of_the_image(unet):
    model, variables, images = unet
    assert [logits.shape for logits in model.apply(variables, images)] == [(9, 16, 16, 3)] * 3
    baseline = without_branches(model)
    np.testing.assert_array_equal(baseline.apply(variables, images)[0], model.apply(variables, images)[-1])
    assert not any('exit' in name for name in baseline.init(jax.random.key(0), images)['params'])
    costs = bj.costs.count_macs(model, (16, 16, 1))
    assert costs.exits[0] + costs.stages[0] < bj.costs.count_macs(baseline, (16, 16, 1)).trunk / 2


def test_each_exit_of_the_encoder_decoder_reads_the_newest_level(unet):
    model, variables, images = unet
    gradients = [
        jax.grad(lambda p, n=n: (model.apply({**variables, 'params': p}, images)[n] ** 2).sum())(variables['params'])
        for n in range(3)
    ]
    reached = [
        {name for name, g in gradient.items() if any(x.any() for x in jax.tree.leaves(g))} for gradient in gradients
    ]
    newest = ['down3_conv2', 'up2_conv2', 'up0_conv2']
    assert [[name in names for name in newest] for names in reached] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_folding_pixels_is_exact(getkey):
    x = jax.random.normal(getkey(), (2, 4, 6, 3))
    folded = space_to_depth(x, size=2)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(folded, size=2), x)


def test_executors_agree_on_masks(unet):
    model, variables, images = unet
    criterion = bj.criteria.from_logits(
        bj.criteria.entropy_of_logits, name='patches', pool=bj.criteria.QuantileOverPatches(1.0, size=4)
    )
    outputs = bj.inference.exit_outputs(model, variables, images, criterion=criterion)
    thresholds = np.quantile(outputs.uncertainty[:2], [0.4, 0.6], axis=1).diagonal()
    policy = bj.ExitPolicy(criterion, jnp.asarray(thresholds))
    expected = bj.inference.dense(model)(variables, images, policy)
    found = bj.inference.compacted(model, chunk_size=4)(variables, images, policy)
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_array_equal(found.label, expected.label)
    assert found.label.shape == (9, 16, 16)
    assert len(set(expected.exit_index.tolist())) > 1
    one = bj.inference.staged(model)(variables, images[0], policy)
    assert one.exit_index == expected.exit_index[0]
    np.testing.assert_array_equal(one.label, expected.label[0])


def test_impossible_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match='image_shape: got .* multiples of 16'):
        bj.models.b_unet(image_shape=(20, 16, 1))
    with pytest.raises(ValueError, match='heads: this network has 2 side heads, got 1'):
        bj.models.b_unet(heads=[None])


def test_regression_end_to_end(getkey):
    """A task that is neither classification nor segmentation: mean and log variance, own loss and metric."""

    def no_metrics(outputs, targets):  # one function: another at every step would be compiled at every step
        return {}

    def negative_log_likelihood(outputs, targets):
        return jnp.stack([0.5 * jnp.mean(z[:, 1] + (targets - z[:, 0]) ** 2 / jnp.exp(z[:, 1])) for z in outputs])

    variance = bj.criteria.from_logits(
        lambda z: jnp.exp(z[..., 1]), name='predicted variance', decide=lambda z: z[..., 0]
    )
    inputs = jax.random.uniform(getkey(), (256, 2), minval=-1)
    targets = jnp.where(inputs[:, 1] > 0, jnp.sin(4 * inputs[:, 0]), 0.0)  # half of it needs no deep network
    model = bj.BranchyNet(
        stages=((nn.Dense(4), nn.tanh), (nn.Dense(32), nn.tanh)),
        exits=(nn.Dense(2), (nn.Dense(32), nn.tanh, nn.Dense(2))),
    )
    state = bj.training.create_train_state(model, model.init(getkey(), inputs), bj.training.paper_adam(1e-2))
    batch, key = bj.Batch(inputs, targets), getkey()
    first = None
    for _ in range(150):
        state, metrics = bj.training.train_step(
            state, batch, jnp.ones(2), key, loss=negative_log_likelihood, metrics=no_metrics
        )
        first = metrics['loss'] if first is None else first
    assert metrics['loss'] < first
    outputs = bj.inference.exit_outputs(model, state.variables, inputs, criterion=variance)
    errors = (outputs.logits[..., 0] - np.asarray(targets)) ** 2
    table = bj.thresholds.ExitTable(
        uncertainty=outputs.uncertainty,
        statistics=errors[..., None],
        costs=bj.costs.StageCosts([1, 9], [0, 0]),
        criterion=variance,
        metric=lambda sums, n: -sums[..., 0] / n,
        split='train',
    )
    chosen = table.screen().for_cost(6.0)
    expected = bj.inference.dense(model)(state.variables, inputs, chosen)
    assert -np.mean((expected.label - targets) ** 2) == pytest.approx(chosen.accuracy, rel=1e-4)
    found = bj.inference.compacted(model, chunk_size=64)(state.variables, inputs, chosen)
    np.testing.assert_allclose(found.label, expected.label, rtol=1e-5, atol=1e-6)
    assert found.label.dtype == jnp.float32


class Large:
    """Something that a layer closes over."""


def network_around(kept):
    """Returns a network with a layer that closes over ``kept``."""

    def layer(x):
        return x if kept is not None else -x

    return bj.BranchyNet(stages=((layer, nn.Dense(3)), nn.relu), exits=(nn.Dense(3), nn.Dense(3)))


@pytest.mark.parametrize('name', [None, 'dense', 'staged'])
def test_what_a_layer_closes_over_is_freed_with_the_network(getkey, name):
    kept, images = Large(), jnp.ones((2, 4))
    freed, model = weakref.ref(kept), network_around(kept)
    variables = model.init(getkey(), images)
    if name is not None:
        getattr(bj.inference, name)(model)(variables, images if name == 'dense' else images[0], [0.5])
        module = importlib.import_module(f'branchy_jax.inference.{name}')
        builders = [value for value in vars(module).values() if hasattr(value, 'cache_clear')]
    del kept, model
    if name is not None:  # equal networks compile once: the last 128 builds are kept
        gc.collect()
        assert freed() is not None
        for builder in builders:
            builder.cache_clear()
    gc.collect()
    assert freed() is None
