r"""B-ViT on MNIST: a small vision transformer with exits after its second and fourth block.

Paper: none of its own; BranchyNet (2016) builds convolutional networks only.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/vit_mnist.py --workdir=runs/vit_mnist
Run time: 40 minutes on 2 CPU cores.
Expect: 99.25 % on the test digits, baseline and branchy alike; 19 of 20 leave at the first exit.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = common.get_config()
    config.update(dataset='mnist', crop_padding=2)
    config.update(network='b-vit', placement='', exit_weights=(1.0, 1.0, 1.0))
    config.network_options = ConfigDict({'patch_size': 7, 'depth': 6, 'width': 64, 'exits_after': (2, 4)})
    config.update(epochs_baseline=25, epochs_start=5, epochs=20)  # as many in all as the baseline has
    config.update(batch_size=128, optimizer='adamw', learning_rate=1.5e-3, weight_decay=0.01)
    config.scan_epoch = False  # an epoch is a minute on a CPU: progress within it is worth a dispatch per step
    config.standard_errors = 0.0  # there is gain to spare: the most accurate setting
    return config
