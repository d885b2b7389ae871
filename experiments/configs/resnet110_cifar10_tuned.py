r"""B-ResNet-110 on CIFAR-10 with three later branches, taught by the last exit.

Paper: BranchyNet (2016), Table I, ResNet rows: 80.70 % and 79.17 %, 41.5 and 13.8 % leave at the side exits.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/resnet110_cifar10_tuned.py --workdir=runs/resnet110_cifar10_tuned
Run time: about 10 minutes on an H100; not for a CPU.
Expect: not yet run; about the accuracy of resnet110_cifar10, with most images leaving before two thirds of the blocks.
"""

from ml_collections import ConfigDict

from experiments.configs import resnet110_cifar10


def get_config(variant: str = '') -> ConfigDict:
    """Returns the settings of this run, or of a variant of its base."""
    config = resnet110_cifar10.get_config(variant)
    config.placement = 'tuned'
    config.exit_weights = (0.3, 0.3, 0.4, 0.5, 1.5)
    config.distillation = 0.5
    return config
