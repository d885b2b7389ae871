r"""B-AlexNet on CIFAR-10 with stronger heads, taught by the last exit.

Paper: BranchyNet (2016), Table I, AlexNet rows: 78.38 % and 79.19 %, 65.6 and 25.2 % leave at the side exits.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/alexnet_cifar10_tuned.py --workdir=runs/alexnet_cifar10_tuned
Run time: an hour on 2 CPU cores.
Expect: not yet run; about the accuracy of alexnet_cifar10, with more images leaving first.
"""

from ml_collections import ConfigDict

from experiments.configs import alexnet_cifar10


def get_config(variant: str = '') -> ConfigDict:
    """Returns the settings of this run, or of a variant of its base."""
    config = alexnet_cifar10.get_config(variant)
    config.placement = 'tuned'
    config.distillation = 0.5
    return config
