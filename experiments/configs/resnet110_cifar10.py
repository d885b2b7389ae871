r"""B-ResNet-110 on CIFAR-10.

Paper: BranchyNet (2016), Table I, ResNet rows: 80.70 % and 79.17 %, 41.5 and 13.8 % leave at the side exits.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/resnet110_cifar10.py --workdir=runs/resnet110_cifar10
Run time: 110 minutes on 2 CPU cores that do nothing else: 30 epochs at depth 20 with images of 16, 24 and 32 pixels,
then grown to 110 layers, whose new blocks start as identities, and a quarter of an epoch more.
Expect: 86.0 % 1.7 times as fast as the baseline's 86.4; the exits alone 77.8 / 76.4 / 86.2 %.
On a GPU, longer: --config.crop_padding=4 --config.image_sides='()' --config.dtype=bfloat16 --config.shallow_depth=0
    --config.epochs_baseline=60 --config.epochs=60 --config.batch_size=256 --config.scan_epoch
    --config.learning_rate=0.4 --config.schedule=cosine --config.weight_decay=1e-4
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = common.get_config()
    config.update(dataset='cifar10', crop_padding=2, flip=True, image_sides=(16, 24, 32))
    config.update(network='b-resnet110', exit_weights=(0.3, 0.3, 1.0), label_smoothing=0.1)
    config.update(regime='joint', epochs_baseline=30, epochs=30)  # as long as the baseline, and from as little
    config.update(shallow_depth=20, epochs_grown=0.25, batch_size_grown=32, learning_rate_grown=5e-3)
    config.update(cpu_devices=2, batch_size=64, scan_epoch=False)
    config.update(optimizer='sgd', learning_rate=0.12, schedule='linear', warmup=0.2)
    config.update(weight_decay=5e-4, decay_kernels_only=True)
    config.latency_images = 200
    return config
