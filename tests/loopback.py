"""One of two processes that train a network together on the loopback: what `test_distributed` starts.

python loopback.py PROCESS_ID PORT FOLDER

First they train and evaluate, and write the results; then they train again, slowly, with checkpoints, for one of them
to be killed.
"""

import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax import sharding

BATCH, EPOCHS, ROWS = 12, 3, 60
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
SAVE_EVERY = 2
_SLOW_SECONDS = 0.2


class Network(nn.Module):
    """Two exits after dense layers."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(16)(images.reshape(images.shape[0], -1)))
        return nn.Dense(4)(x), nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def data():
    """60 images of 4 × 4 pixels whose class is the bright quarter."""
    labels = np.arange(ROWS, dtype=np.int32) % 4
    images = np.random.default_rng(0).integers(0, 100, (ROWS, 4, 4, 1))
    for image, label in zip(images, labels, strict=True):
        image[2 * (label // 2) :, 2 * (label % 2) :][:2, :2] += 120
    return bj.Batch(images.astype(np.uint8), labels)


def augment(key, batch):
    """Scales stored pixels to floats and adds noise."""
    noise = 0.1 * jax.random.normal(key, batch.image.shape)
    return batch.replace(image=batch.image.astype(jnp.float32) / 255 + noise)


def fresh(mesh=None):
    variables = jax.jit(Network().init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    state = bj.training.create_train_state(Network(), variables, OPTIMIZER)
    return state if mesh is None else sharding.replicate(mesh, state)


def train(state, data, **options):
    options = {'epochs': EPOCHS, 'batch_size': BATCH, 'augment': augment, **options}
    return bj.training.fit(state, data, jnp.array([1.0, 0.3]), jax.random.key(3), **options)


def evaluate(state, mesh=None):
    return bj.inference.exit_outputs(
        state.model,
        jax.tree.map(np.asarray, state.variables),
        data().image,
        batch_size=20,
        preprocess=lambda images: images.astype(jnp.float32) / 255,
        mesh=mesh,
    )


class Recorded:
    """Reads rows of the data in memory, and remembers which."""

    def __init__(self):
        self.rows = []

    def __len__(self):
        return ROWS

    def batches(self, order, first_step=0):
        for rows in order[first_step:]:
            self.rows.append(rows)
            yield jax.tree.map(lambda values, rows=rows: values[rows], data())


def say(epoch, done, steps, metrics):
    print(f'step {epoch * steps + done}: {float(metrics["loss"])}', flush=True)
    time.sleep(_SLOW_SECONDS)  # time to be killed


def main(process_id, port, folder):
    jax.config.update('jax_disable_most_optimizations', True)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
        f'localhost:{port}',
        2,
        int(process_id),
        heartbeat_timeout_seconds=6,
        initialization_timeout=150,
        shutdown_timeout_seconds=30,
    )
    mesh, stream = sharding.data_mesh(), Recorded()
    state = train(fresh(mesh), stream)
    outputs = evaluate(state, mesh)
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    answers = {'uncertainty': outputs.uncertainty, 'logits': outputs.logits}
    np.savez(Path(folder) / f'{process_id}.npz', *params, **answers, rows=np.array(stream.rows), devices=mesh.size)
    train(fresh(mesh), Recorded(), directory=Path(folder) / 'checkpoints', save_every=SAVE_EVERY, on_step=say)


if __name__ == '__main__':
    main(*sys.argv[1:])
