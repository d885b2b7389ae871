"""What `test_sharding` runs on eight simulated devices: run as a program, prints one line of JSON.

The number of simulated devices is set before jax starts, so this is a process of its own, one for all checks.
"""

import json
import os
import sys
import tempfile

if __name__ == '__main__':
    flags = os.environ.get('XLA_FLAGS', '')  # of the suite, which compile faster
    os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax import sharding
from branchy_jax.inference import dense, exit_outputs, plan, sharded
from branchy_jax.inference.planning.times import SegmentTimes

BATCH = 16
OPTIMIZER = optax.sgd(0.02, momentum=0.9)  # one object: jit compares optimisers by identity


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


def furthest(result, expected):
    """The largest ‖Δ‖ ÷ ‖θ‖ of all arrays."""

    def distance(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)

    return max(jax.tree.leaves(jax.tree.map(distance, result.variables, expected.variables)))


def check_training(mesh, folder):
    images = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 1)).astype(np.uint8)
    data, model = bj.Batch(images, np.arange(80) % 3), Network()
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4, 4, 1)))

    def fresh(on=None):
        state = bj.training.create_train_state(model, variables, OPTIMIZER)
        return state if on is None else sharding.replicate(on, state)

    def fit(on, epochs, **options):
        options = {'key': jax.random.key(7), 'batch_size': BATCH, 'augment': augment, **options}
        return bj.training.fit(fresh(on), data, jnp.ones(3), epochs=epochs, **options)

    one, scanned = fit(None, 2, directory=folder / 'one'), fit(mesh, 2, directory=folder / 'eight')
    # An epoch on another number of devices than the epochs before it, in both directions.
    through, on_one, on_eight = (
        fit(None, 3),
        fit(None, 3, directory=folder / 'eight'),
        fit(mesh, 3, directory=folder / 'one'),
    )

    by_hand_one, by_hand = fresh(), fresh(mesh)
    batch, arguments = (
        bj.Batch(jnp.float32(images[:BATCH]) / 255, jnp.arange(BATCH) % 3),
        (jnp.ones(3), jax.random.key(0)),
    )
    step = bj.training.train_step.lower(by_hand, sharding.shard(mesh, batch), *arguments).compile()
    by_hand_one, _ = bj.training.train_step(by_hand_one, batch, *arguments)
    by_hand, metrics = step(by_hand, sharding.shard(mesh, batch), *arguments)
    devices = [jax.tree.leaves(state.params)[0].sharding.device_set for state in (one, scanned, on_one, on_eight)]
    return one, {
        'scanned': furthest(scanned, one),
        'by hand': furthest(by_hand, by_hand_one),
        'moved': furthest(one, fresh()),
        'loss is everywhere': metrics['loss'].sharding.is_fully_replicated,
        'whole batches on a device': f'f32[{BATCH},4,4,4]' in step.as_text(),
        'shares of batches on a device': f'f32[{BATCH // 8},4,4,4]' in step.as_text(),
        'eight to one': furthest(on_one, through),
        'one to eight': furthest(on_eight, through),
        'devices': list(map(len, devices)),
    }


def same(result, expected):
    close = bool(np.allclose(result.logits, expected.logits, rtol=1e-5, atol=1e-6))
    return close and all(np.array_equal(getattr(result, k), getattr(expected, k)) for k in ('label', 'exit_index'))


def check_inference(mesh, state):
    model, variables = state.model, state.variables
    images = np.random.default_rng(2).normal(size=(48, 4, 4, 1)).astype(np.float32)
    uncertainty = exit_outputs(model, variables, images, batch_size=48).uncertainty
    # The hardest images first: all survivors of the first exit are on the first device.
    order = np.argsort(-uncertainty[0])
    images, uncertainty = images[order], uncertainty[:, order]
    skewed = [float(uncertainty[0, 5:7].mean()), float(np.sort(uncertainty[1, :6])[2:4].mean())]
    run, oracle, few, never = sharded(model, mesh=mesh, chunk_size=(5, 2, 1)), dense(model), images[:13], [-np.inf] * 2
    checks = {
        name: same(run(variables, images, thresholds), oracle(variables, images, thresholds))
        for name, thresholds in {'skewed': skewed, 'all': [np.inf, 0.0], 'none': never}.items()
    }
    expected = oracle(variables, images, skewed)
    first = jax.tree.map(lambda values: values[:13], expected)
    checks['uneven'] = same(run(variables, few, skewed), first)
    times = SegmentTimes(np.array([6]), np.ones((1, 3)), np.ones((1, 3)))
    planned = plan(model, variables, images, skewed, mesh=mesh, passes=1, skip_heads=False, times=times)
    checks['planned'] = same(planned(images), expected) and same(planned(few), first)
    balance = run.balance(variables, images, skewed)
    together = exit_outputs(model, variables, images[:20], batch_size=12, mesh=mesh)
    return {
        'same as dense': checks,
        'waiting': balance.waiting.tolist(),
        'dispatched': balance.dispatched.tolist(),
        'report': str(balance),
        'uneven waiting': run.balance(variables, few, never).waiting.sum(axis=1).tolist(),
        'rows of a device': list(
            {shard.data.shape[0] for shard in run(variables, images, skewed).label.addressable_shards}
        ),
        'planned': max(candidate.name for candidate in planned.candidates),
        'outputs': bool(np.allclose(together.uncertainty, uncertainty[:, :20], rtol=1e-5, atol=1e-6)),
    }


def refusal(mesh):
    try:
        return str(sharding.shard(mesh, np.zeros((12, 2))))
    except ValueError as error:
        return str(error)


def main():
    jax.config.update('jax_disable_most_optimizations', True)
    mesh = sharding.data_mesh()
    with tempfile.TemporaryDirectory() as folder:
        state, training = check_training(mesh, Path(folder))
    results = {'training': training, 'inference': check_inference(mesh, state), 'refusal': refusal(mesh)}
    json.dump(results, sys.stdout)


if __name__ == '__main__':
    main()
