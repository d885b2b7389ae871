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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax import sharding
from branchy_jax.inference import compacted, dense, exit_outputs, plan, segment_times, sharded
from branchy_jax.training.fit import epoch_order, step_keys, take_steps

STEPS, BATCH = 20, 16
OPTIMIZER = optax.sgd(0.1, momentum=0.9)  # one object: jit compares optimisers by identity


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
    return bj.data.augment(key, batch.replace(image=batch.image.astype(jnp.float32) / 255), crop_padding=1)


def furthest(result, expected):
    """The largest ‖Δ‖ ÷ ‖θ‖ of all arrays."""

    def distance(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)

    return max(jax.tree.leaves(jax.tree.map(distance, result, expected)))


def fresh(model, variables, mesh=None):
    state = bj.training.create_train_state(model, variables, OPTIMIZER)
    return state if mesh is None else sharding.replicate(mesh, state)


def check_training(mesh, folder):
    images = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 1)).astype(np.uint8)
    data, model, key = bj.Batch(images, np.arange(80) % 3), Network(), jax.random.key(7)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4, 4, 1)))
    options = {'exit_weights': jnp.ones(3), 'key': key, 'batch_size': BATCH, 'augment': augment}
    fit, epochs = bj.training.fit, STEPS // 5
    one = fit(fresh(model, variables), data, epochs=epochs, directory=folder / 'one', **options)
    scanned = fit(fresh(model, variables, mesh), data, epochs=epochs, directory=folder / 'eight', **options)

    by_hand_one, by_hand = fresh(model, variables), fresh(model, variables, mesh)
    for step, rows in enumerate(np.random.default_rng(1).integers(0, 80, (STEPS, BATCH))):
        batch = bj.Batch(jnp.float32(images[rows]) / 255, jnp.asarray(data.label[rows]))
        arguments = jnp.ones(3), jax.random.key(step)
        by_hand_one, _ = bj.training.train_step(by_hand_one, batch, *arguments)
        by_hand, metrics = bj.training.train_step(by_hand, sharding.shard(mesh, batch), *arguments)

    # An epoch on another number of devices than the epochs before it, in both directions.
    on_one = fit(fresh(model, variables), data, epochs=epochs + 1, directory=folder / 'eight', **options)
    on_eight = fit(fresh(model, variables, mesh), data, epochs=epochs + 1, directory=folder / 'one', **options)
    through = fit(fresh(model, variables), data, epochs=epochs + 1, **options)

    program = (
        take_steps.lower(
            fresh(model, variables, mesh),
            sharding.replicate(mesh, data),
            epoch_order(key, 0, 80, BATCH),
            step_keys(key, 0, 5),
            jnp.ones(3),
            augment=augment,
            mesh=mesh,
            loss=bj.losses.cross_entropy_per_exit,
            metrics=bj.losses.accuracy_per_exit,
        )
        .compile()
        .as_text()
    )
    return one, {
        'scanned': furthest(scanned.variables, one.variables),
        'by hand': furthest(by_hand.variables, by_hand_one.variables),
        'moved': furthest(one.variables, variables),
        'loss is everywhere': metrics['loss'].sharding.is_fully_replicated,
        'devices of parameters': sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(scanned)}),
        'whole batches on a device': f'f32[{BATCH},4,4,4]' in program,
        'shares of batches on a device': f'f32[{BATCH // 8},4,4,4]' in program,
        'eight to one': furthest(on_one.variables, through.variables),
        'one to eight': furthest(on_eight.variables, through.variables),
        'devices after restoring': [
            len(jax.tree.leaves(state.params)[0].sharding.device_set) for state in (on_one, on_eight)
        ],
    }


def same(result, expected):
    close = bool(np.allclose(result.logits, expected.logits, rtol=1e-5, atol=1e-6))
    return close and all(np.array_equal(getattr(result, k), getattr(expected, k)) for k in ('label', 'exit_index'))


def check_inference(mesh, state):
    model, variables = state.model, state.variables
    images = np.random.default_rng(2).normal(size=(96, 4, 4, 1)).astype(np.float32)
    uncertainty = exit_outputs(model, variables, images).uncertainty
    # The hardest images first: all survivors of the first exit are on the first device.
    order = np.argsort(-uncertainty[0])
    images, uncertainty = images[order], uncertainty[:, order]
    skewed = [float(uncertainty[0, 11:13].mean()), float(np.sort(uncertainty[1, :12])[5:7].mean())]
    settings = {
        'skewed': skewed,
        'all': [np.inf, 0.0],
        'none': [-np.inf, -np.inf],
        'half': np.median(uncertainty[:2], axis=1) + 1e-4,
    }
    oracle, checks = dense(model), {}
    run = sharded(model, mesh=mesh, chunk_size=(5, 2, 1))
    for name, thresholds in settings.items():
        expected = oracle(variables, images, thresholds)
        checks[name] = same(run(variables, images, thresholds), expected)
    uneven = images[:13]
    checks['uneven'] = same(run(variables, uneven, skewed), oracle(variables, uneven, skewed))
    balance = run.balance(variables, images, skewed)
    times = segment_times(model, variables, images, batch_sizes=[2, 12], passes=1)
    planned = plan(model, variables, images, skewed, mesh=mesh, passes=1, skip_heads=False, times=times)
    raced = [candidate for candidate in planned.candidates if candidate.name.startswith('sharded')]
    together = exit_outputs(model, variables, images[:50], batch_size=20, mesh=mesh)
    return {
        'same as dense': checks,
        'same as compacted': same(
            run(variables, images, skewed), compacted(model, chunk_size=2)(variables, images, skewed)
        ),
        'waiting': balance.waiting.tolist(),
        'uneven waiting': run.balance(variables, uneven, [-np.inf, -np.inf]).waiting.sum(axis=1).tolist(),
        'dispatched': balance.dispatched.tolist(),
        'report': str(balance),
        'rows of a device': sorted(
            {shard.data.shape[0] for shard in run(variables, images, skewed).label.addressable_shards}
        ),
        'plan': {
            'same as dense': all(
                same(planned(images[:size]), oracle(variables, images[:size], planned.thresholds)) for size in (96, 13)
            ),
            'races on the mesh': len(raced),
            'chunks fit a share': max(
                (int(size) for c in raced for size in c.name.split(', ')[1].split('/')), default=99
            )
            <= 12,
        },
        'outputs': bool(np.allclose(together.uncertainty, uncertainty[:, :50], rtol=1e-5, atol=1e-6)),
    }


def check_refusals(mesh):
    messages = {}
    tries = {
        'batch': lambda: sharding.shard(mesh, np.zeros((12, 2))),
        'devices': lambda: sharding.data_mesh(9),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main():
    from pathlib import Path

    jax.config.update('jax_disable_most_optimizations', True)
    mesh = sharding.data_mesh()
    with tempfile.TemporaryDirectory() as folder:
        state, training = check_training(mesh, Path(folder))
    results = {'training': training, 'inference': check_inference(mesh, state), 'refusals': check_refusals(mesh)}
    json.dump(results, sys.stdout)


if __name__ == '__main__':
    main()
