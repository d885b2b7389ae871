"""How survivors are dealt out over simulated devices when all hard digits come first.

    TFDS_DATA_DIR=DIR python -m experiments.balance --num_devices=8

Simulated devices share the cores of one CPU: this shows the balance and that answers stay the same, not a speed.
"""

from __future__ import annotations

import os

import numpy as np
from absl import app, flags, logging

_NUM_DEVICES = flags.DEFINE_integer('num_devices', 8, 'Simulated devices.', lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', 1000, 'Test digits.', lower_bound=1)
_CHUNK_SIZE = flags.DEFINE_integer('chunk_size', 16, 'Images that a stage takes at once on a device.', lower_bound=1)


def main(arguments: list[str]) -> None:
    """Runs B-LeNet sharded and dense, and prints the balance."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={_NUM_DEVICES.value}'
    import branchy_jax as bj  # jax starts only now

    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    thresholds = weights.operating_points[0].thresholds
    images = np.asarray(weights.normalize(bj.data.load_dataset('mnist').test.image[: _IMAGES.value]))
    doubt = bj.inference.exit_outputs(weights.model, weights.variables, images).uncertainty[0]
    images = images[np.argsort(-doubt)]
    mesh = bj.sharding.data_mesh()
    run = bj.inference.sharded(weights.model, mesh=mesh, chunk_size=_CHUNK_SIZE.value)
    found = run(weights.variables, images, thresholds)
    expected = bj.inference.dense(weights.model)(weights.variables, images, thresholds)
    print(run.balance(weights.variables, images, thresholds))
    for name in ('label', 'exit_index'):
        differ = int((np.asarray(getattr(found, name)) != np.asarray(getattr(expected, name))).sum())
        print(f'{name}: {differ} of {len(images)} differ from dense')


if __name__ == '__main__':
    app.run(main)
