r"""B-AlexNet on CIFAR-10.

Paper: BranchyNet (2016), Table I, AlexNet rows: 78.38 % and 79.19 %, 65.6 and 25.2 % leave at the side exits.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/alexnet_cifar10.py --workdir=runs/alexnet_cifar10
Run time: 80 minutes on 2 CPU cores that do nothing else, 1.6 an epoch.
Expect: 81.3 % at 1.83 times the speed of the baseline's 80.1; the exits alone 76.5 / 79.7 / 81.9 %. A probe with weight
decay 0.01 and label smoothing 0.1 had 67.8 / 70.8 / 68.0 on validation data after three of five epochs.
On a GPU, longer: --config.crop_padding=4 --config.epochs_baseline=120 --config.epochs=120 --config.batch_size=128
    --config.scan_epoch --config.learning_rate=3e-3 --config.schedule=cosine --config.weight_decay=1e-2
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = common.get_config()
    config.update(dataset='cifar10', crop_padding=2, flip=True)
    config.update(network='b-alexnet', exit_weights=(1.0, 1.0, 1.0))
    config.update(regime='joint', epochs_baseline=24, epochs=24)  # as long as the baseline, and from as little
    config.update(cpu_devices=2, batch_size=64, scan_epoch=False)
    config.update(optimizer='adamw', learning_rate=2e-3, schedule='linear', warmup=0.2)
    config.update(weight_decay=5e-2, decay_kernels_only=True)
    return config
