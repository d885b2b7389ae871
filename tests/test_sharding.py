"""Eight simulated devices do what one does: training, checkpoints, inference with survivors dispatched out, plans."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_inference import check_same

import branchy_jax as bj
from branchy_jax import sharding
from branchy_jax.inference import dense, exit_outputs, plan, sharded
from branchy_jax.inference.planning.times import SegmentTimes

BATCH, KEY = 16, jax.random.key(7)
OPTIMIZER = optax.sgd(0.02, momentum=0.9)  # one object: jit compares optimisers by identity
DATA = bj.Batch(np.random.default_rng(0).integers(0, 256, (80, 4, 4, 1)).astype(np.uint8), np.arange(80) % 3)


class Network(nn.Module):
    """Three exits, BatchNorm and dropout; no bias before the BatchNorm, whose gradient would be rounding alone."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name='conv')(images)
        x = nn.relu(nn.BatchNorm(not train, name='norm')(x)).reshape(images.shape[0], -1)
        first = nn.Dense(3, name='head1')(x)
        x = nn.relu(nn.Dense(8, name='layer2')(x))
        second = nn.Dense(3, name='head2')(x)
        x = nn.Dropout(0.5, deterministic=not train, name='dropout')(nn.Dense(64, name='layer3')(x))
        return first, second, nn.Dense(3, name='h3')(nn.relu(x))


def augment(key, batch):
    """Scales stored pixels to floats and adds noise."""
    noise = 0.1 * jax.random.normal(key, batch.image.shape)
    return batch.replace(image=batch.image.astype(jnp.float32) / 255 + noise)


def distance(result, expected):
    """The largest ‖Δ‖ ÷ ‖θ‖ of all arrays."""

    def relative(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)

    return max(jax.tree.leaves(jax.tree.map(relative, result.variables, expected.variables)))


@pytest.fixture(scope='module')
def mesh():
    return sharding.data_mesh(8)


@pytest.fixture(scope='module')
def fresh():
    variables = jax.jit(Network().init)(jax.random.key(1), jnp.zeros((1, 4, 4, 1)))

    def make(mesh=None):
        state = bj.training.create_train_state(Network(), variables, OPTIMIZER)
        return state if mesh is None else sharding.replicate(mesh, state)

    return make


@pytest.fixture(scope='module')
def fit(fresh):
    def run(mesh, epochs, **options):
        options |= {'batch_size': BATCH, 'augment': augment}
        return bj.training.fit(fresh(mesh), DATA, jnp.ones(3), KEY, epochs=epochs, **options)

    return run


def test_eight_devices_train_what_one_trains(mesh, fresh, fit, tmp_path):
    """Several epochs, and epochs on another number of devices than those before, in both directions."""
    one, eight = fit(None, 2, directory=tmp_path / 'one'), fit(mesh, 2, directory=tmp_path / 'eight')
    on_one, on_eight = fit(None, 3, directory=tmp_path / 'eight'), fit(mesh, 3, directory=tmp_path / 'one')
    whole = fit(None, 3)
    assert distance(one, fresh()) > 0.1  # it did train
    assert max(distance(eight, one), distance(on_one, whole), distance(on_eight, whole)) <= 1e-5
    devices = [len(jax.tree.leaves(state.params)[0].sharding.device_set) for state in (one, eight, on_one, on_eight)]
    assert devices == [1, 8, 1, 8]


def test_each_device_computes_its_share_of_a_step(mesh, fresh):
    batch = bj.Batch(jnp.float32(DATA.image[:BATCH]) / 255, jnp.arange(BATCH) % 3)
    rest = jnp.ones(3), jax.random.key(0)
    step = bj.training.train_step.lower(fresh(mesh), sharding.shard(mesh, batch), *rest).compile()
    state, metrics = step(fresh(mesh), sharding.shard(mesh, batch), *rest)
    assert distance(state, bj.training.train_step(fresh(), batch, *rest)[0]) <= 1e-5
    assert metrics['loss'].sharding.is_fully_replicated
    assert f'f32[{BATCH // 8},4,4,4]' in step.as_text()
    assert f'f32[{BATCH},4,4,4]' not in step.as_text()


@pytest.fixture(scope='module')
def skewed(fit):
    """A trained network; images, the hardest first, so that survivors of the first exit are on one device; a policy."""
    model, variables = Network(), fit(None, 2).variables
    images = np.random.default_rng(2).normal(size=(48, 4, 4, 1)).astype(np.float32)
    uncertainty = exit_outputs(model, variables, images, batch_size=48).uncertainty
    order = np.argsort(-uncertainty[0])
    images, uncertainty = images[order], uncertainty[:, order]
    policy = [float(uncertainty[0, 5:7].mean()), float(np.sort(uncertainty[1, :6])[2:4].mean())]
    return model, variables, images, policy


def test_sharded_inference_is_dense(mesh, skewed):
    model, variables, images, policy = skewed
    run = sharded(model, mesh=mesh, chunk_size=(5, 2, 1))
    times = SegmentTimes(np.array([6]), np.ones((1, 3)), np.ones((1, 3)))
    planned = plan(model, variables, images, policy, mesh=mesh, passes=1, skip_heads=False, times=times)
    assert max(candidate.name for candidate in planned.candidates).startswith('sharded × 8')
    for count in (48, 13):
        check_same(planned(images[:count]), dense(model)(variables, images[:count], policy))
        for thresholds in (policy, [np.inf, 0.0], [-np.inf, -np.inf]):
            answer = run(variables, images[:count], thresholds)
            check_same(answer, dense(model)(variables, images[:count], thresholds))
    whole = run(variables, images, policy)
    assert {shard.data.shape[0] for shard in whole.label.addressable_shards} == {6}
    alone, together = (exit_outputs(model, variables, images[:20], batch_size=12, mesh=m) for m in (None, mesh))
    np.testing.assert_allclose(together.uncertainty, alone.uncertainty, rtol=1e-5, atol=1e-6)


def test_survivors_are_dispatched_to_all_devices(mesh, skewed):
    model, variables, images, policy = skewed
    run = sharded(model, mesh=mesh, chunk_size=(5, 2, 1))
    balance = run.balance(variables, images, policy)
    assert balance.waiting[1].tolist() == [6, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(balance.waiting.sum(1), balance.dispatched.sum(1))
    assert (np.ptp(balance.dispatched, axis=1) <= 1).all()
    assert balance.dispatched[1].tolist() == [1] * 6 + [0] * 2
    assert 0 < balance.dispatched[2].sum() < 6
    assert '100.0 %' in str(balance)
    few = run.balance(variables, images[:13], [-np.inf] * 2)
    assert few.waiting.sum(1).tolist() == [13, 13, 13]  # padding is not counted


def test_impossible_shares_are_refused(mesh, network):
    with pytest.raises(ValueError, match='got 12 rows for 8 devices'):
        sharding.shard(mesh, np.zeros((12, 2)))
    with pytest.raises(ValueError, match='num_devices: got 9'):
        sharding.data_mesh(9)
    model, variables, images = network
    run = sharded(model, mesh=sharding.data_mesh(1), chunk_size=2)
    with pytest.raises(ValueError, match='images: got none'):
        run.balance(variables, images[:0], [0.5, 0.5])


def test_one_device_is_a_mesh_too(network):
    mesh = sharding.data_mesh(1)
    variables = sharding.replicate(mesh, network[1])
    assert sharding.mesh_of(variables) == mesh
    assert sharding.mesh_of(network[1]) is None
    # Replicated arrays are returned as they are, others are copied, because training donates its state.
    first, again = jax.tree.leaves(variables)[0], jax.tree.leaves(sharding.replicate(mesh, variables))[0]
    assert first is again
    jax.tree.map(lambda leaf: leaf.delete(), variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network[1]))
