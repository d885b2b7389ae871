r"""B-ResNet-110 on CIFAR-10, for a GPU: both networks from random weights, as many epochs each.

Paper: BranchyNet (2016), Table I, ResNet rows: 80.70 % and 79.17 %, 41.5 and 13.8 % leave at the side exits.
Command, which stops after five minutes, and goes on from its newest checkpoint when it is started again:
    timeout 300 python -m experiments.main --config=experiments/configs/resnet110_cifar10_gpu.py --workdir=DIR
Run time: not measured yet. An earlier version took 2.4 s an epoch on an H100 at batch 256, 89.6 % after 60 epochs;
    steps of larger batches should take hardly longer.
Longer, in several starts: --config.epochs=150 --config.epochs_baseline=150
"""

from ml_collections import ConfigDict

from experiments.configs import resnet110_cifar10


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = resnet110_cifar10.get_config()
    config.update(crop_padding=4, image_sides=(), dtype='bfloat16', shallow_depth=0, cpu_devices=1)
    config.update(epochs_baseline=60, epochs=60, batch_size=512, scan_epoch=True, save_every=10 * 87)  # 10 epochs
    config.update(learning_rate=0.3, schedule='cosine', warmup=0.1)
    config.update(latency_batch=1024, latency_images=1024)
    return config
