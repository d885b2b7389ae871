r"""B-AlexNet on CIFAR-10.

Paper: BranchyNet (2016), Table I, AlexNet rows: 78.38 % and 79.19 %, 65.6 and 25.2 % leave at the side exits.
Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/alexnet_cifar10.py --workdir=runs/alexnet_cifar10
Run time: minutes on a GPU; hours on 2 CPU cores.
Expect: about 82 % with this recipe (a prototype's figure, on CIFAR-10 re-encoded as JPEG); not yet run with this code.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = common.get_config()
    config.dataset = 'cifar10'
    config.crop_padding = 2
    config.flip = True

    config.network = 'b-alexnet'

    config.regime = 'joint'  # as long as the baseline, and from as little
    config.epochs_baseline = 16
    config.epochs = 16
    config.cpu_devices = 2
    config.batch_size = 64
    config.scan_epoch = False
    config.optimizer = 'adamw'
    config.learning_rate = 2e-3
    config.schedule = 'linear'
    config.warmup = 0.2
    config.weight_decay = 5e-2
    config.decay_kernels_only = True

    config.exit_weights = (1.0, 1.0, 1.0)
    return config
