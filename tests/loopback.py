"""One of several processes that train B-LeNet together on the loopback: what `test_distributed` starts.

python loopback.py PROCESS_ID NUM_PROCESSES PORT FOLDER

First they train and evaluate, and write what they found; then they train again, slowly, with checkpoints, for one of
them to be killed.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax import sharding

BATCH, EPOCHS, KEY = 12, 3, 3
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
SAVE_EVERY = 2
_SLOW_SECONDS = 0.3


def data():
    """60 images of 12 × 12 pixels whose class is the bright quarter."""
    labels = np.arange(60, dtype=np.int32) % 4
    images = np.random.default_rng(0).integers(0, 100, (60, 12, 12, 1))
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
    return bj.Batch(images.astype(np.uint8), labels)


def augment(key, batch):
    batch = batch.replace(image=batch.image.astype(jnp.float32) / 255)
    return bj.data.augment(key, batch, crop_padding=1, flip=False)


def fresh(mesh=None):
    model = bj.models.create('b-lenet', num_classes=4, image_shape=(12, 12, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 12, 1)))  # initialising costs seconds
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: generator.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    state = bj.training.create_train_state(model, variables, OPTIMIZER)
    return state if mesh is None else sharding.replicate(mesh, state)


def train(fit, state, data, **options):
    return fit(
        state,
        data,
        jnp.array([1.0, 0.3]),
        jax.random.key(KEY),
        epochs=EPOCHS,
        batch_size=BATCH,
        augment=augment,
        **options,
    )


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
        return 60

    def batches(self, order, first_step=0):
        for rows in order[first_step:]:
            self.rows.append(rows)
            yield jax.tree.map(lambda values, rows=rows: values[rows], data())


def say(epoch, done, steps, metrics):
    print(f'step {epoch * steps + done}: {float(metrics["loss"])}', flush=True)
    time.sleep(_SLOW_SECONDS)  # time to be killed


def main(process_id, num_processes, port, folder):
    jax.config.update('jax_disable_most_optimizations', True)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
        f'localhost:{port}',
        int(num_processes),
        int(process_id),
        heartbeat_timeout_seconds=15,
        initialization_timeout=150,
        shutdown_timeout_seconds=30,
    )
    folder, mesh = Path(folder), sharding.data_mesh()
    stream = Recorded()
    state = train(bj.training.fit, fresh(mesh), stream)
    outputs = evaluate(state, mesh)
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    np.savez(
        folder / f'{process_id}.npz',
        *params,
        uncertainty=outputs.uncertainty,
        logits=outputs.logits,
        rows=np.array(stream.rows),
        devices=mesh.size,
    )
    fit, options = bj.training.fit, {'directory': folder / 'checkpoints', 'save_every': SAVE_EVERY}
    train(fit, fresh(mesh), Recorded(), **options, on_step=say)


if __name__ == '__main__':
    main(*sys.argv[1:])
