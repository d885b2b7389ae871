r"""B-AlexNet on CIFAR-10, trained briefly: three real exits to study confidence on, where there is no GPU.

Paper: none of its figures; `alexnet_cifar10` is the reproduction. CIFAR-10 here was re-encoded as JPEG.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/alexnet_cifar10_brief.py --workdir=runs/alexnet_cifar10_brief
Run time: 40 minutes on 2 CPU cores.
Expect: about 70 %, the baseline 66.
"""

from ml_collections import ConfigDict

from experiments.configs import alexnet_cifar10


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = alexnet_cifar10.get_config()
    config.epochs_baseline = 4
    config.epochs = 4
    config.crop_padding = 0
    config.batch_size = 128
    config.learning_rate = 2e-3
    config.schedule = 'cosine'
    config.warmup = 0.1
    config.weight_decay = 1e-3
    config.decay_kernels_only = False
    config.cpu_devices = 1
    config.scan_epoch = True
    config.banded = True
    config.latency_images = 200
    return config
