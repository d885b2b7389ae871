"""How survivors are dealt out over simulated devices when all hard digits come first.

    TFDS_DATA_DIR=DIR python -m experiments.study.balance --num_devices=8

Simulated devices share the cores of one CPU: this shows the balance and that answers stay the same, not a speed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from experiments.run import command


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs B-LeNet sharded and dense, and prints the balance."""
    parser = command.parser(__doc__)
    parser.add_argument('--num_devices', type=command.positive, default=8, help='Simulated devices.')
    parser.add_argument('--images', type=command.positive, default=1000, help='Test digits.')
    parser.add_argument('--chunk_size', type=command.positive, default=16, help='That a stage takes at once, a device.')
    options = parser.parse_args(arguments)
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={options.num_devices}'
    import branchy_jax as bj  # jax starts its devices only now

    weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
    point = weights.operating_points[0]
    images = np.asarray(weights.normalize(bj.data.load_dataset('mnist').test.image[: options.images]))
    doubt = bj.inference.exit_outputs(weights.model, weights.variables, images).uncertainty[0]
    images = images[np.argsort(-doubt)]
    run = bj.inference.sharded(weights.model, mesh=bj.sharding.data_mesh(), chunk_size=options.chunk_size)
    found = run(weights.variables, images, point)
    expected = bj.inference.dense(weights.model)(weights.variables, images, point)
    print(run.balance(weights.variables, images, point))
    for name in ('label', 'exit_index'):
        differ = int((np.asarray(getattr(found, name)) != np.asarray(getattr(expected, name))).sum())
        print(f'{name}: {differ} of {len(images)} differ from dense')


if __name__ == '__main__':
    main()
