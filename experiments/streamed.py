"""Host memory of training on a data set that stays on disk, epoch by epoch.

    TFDS_DATA_DIR=DIR python -m experiments.streamed --dataset=cifar10 --epochs=4

Trains B-LeNet, the cheapest network there is, by `branchy_jax.training.fit`, and prints the peak and the present
resident memory of the process after every epoch, and the peak of its largest worker. Takes a minute or two an epoch on
2 cores.
"""

from __future__ import annotations

import resource
import sys
import time

import jax
import jax.numpy as jnp
import psutil
from absl import app, flags, logging

import branchy_jax as bj
from experiments.records import describe_device

_DATASET = flags.DEFINE_string('dataset', 'cifar10', 'Of TFDS.')
_EPOCHS = flags.DEFINE_integer('epochs', 4, 'To train.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 128, 'Images in a step.', lower_bound=1)
_WORKERS = flags.DEFINE_integer('workers', 0, 'Processes that read and decode; 0 is a thread.', lower_bound=0)
_PREFETCH = flags.DEFINE_integer('prefetch', 4, 'Batches read ahead.', lower_bound=1)


def main(arguments: list[str]) -> None:
    """Trains and prints."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    dataset = bj.streaming.open_dataset(_DATASET.value, workers=_WORKERS.value, prefetch=_PREFETCH.value)
    normalize, shape = dataset.normalization, dataset.image_shape
    model = bj.models.create(
        'b-lenet', num_classes=dataset.num_classes, image_shape=shape, convolution=bj.models.banded_convolution
    )
    state = bj.training.create_train_state(model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape))))
    print(f'{describe_device()}; {len(dataset.train)} training images, {_gigabytes()}')
    started = time.perf_counter()

    def tell(epoch: int, state: bj.training.TrainState, metrics: bj.training.Metrics) -> None:
        accuracy = float(metrics['exit_accuracy'][-1])
        seconds = (time.perf_counter() - started) / epoch
        print(f'epoch {epoch}: {_gigabytes()}; {seconds:.0f} s an epoch, training accuracy {accuracy:.3f}', flush=True)

    def prepare(key: jax.Array, batch: bj.Batch) -> bj.Batch:
        return batch.replace(image=normalize(batch.image))

    bj.training.fit(
        state, dataset.train, jnp.array([1.0, 0.3]), jax.random.key(1), epochs=_EPOCHS.value,
        batch_size=_BATCH_SIZE.value, prepare=prepare, on_epoch=tell,
    )  # fmt: skip


def _gigabytes() -> str:
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    own, workers = (resource.getrusage(who).ru_maxrss * unit / 1e9
                    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
    now = psutil.Process().memory_info().rss / 1e9
    beside = f', of the largest worker so far {workers:.2f}' if workers > 0.01 else ''
    return f'peak {own:.2f} GB, now {now:.2f} GB{beside}'


if __name__ == '__main__':
    app.run(main)
