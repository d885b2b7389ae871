r"""EfficientNet-Lite0 with ImageNet weights and three exits, fine-tuned on CIFAR-10 at 128 pixels.

Command: TFDS_DATA_DIR=DIR python -m experiments.main \
    --config=experiments/configs/efficientnet_lite0_cifar10.py --workdir=runs/efficientnet_lite0_cifar10
    (a short form, of 300 images: --config=experiments/configs/efficientnet_lite0_cifar10.py:quick)
docs/training/training.md says how to make the file of weights.
Run time on 2 CPU cores, beside tests: half an hour for activations (1.8 GB on disk), 55 minutes for each network, 20
minutes to evaluate and to time. The short form takes 7 minutes.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str = '') -> ConfigDict:
    """Returns the settings of this run.

    Args:
        variant: ``'quick'`` for few images.

    Raises:
        ValueError: another variant.
    """
    quick, config = common.is_quick(variant), common.get_config()
    config.update(dataset='cifar10', network='b-efficientnet-lite0', placement='', convolution='products')
    config.update(
        regime='finetune', pretrained='runs/efficientnet_lite0.safetensors', normalization=(127 / 255, 128 / 255)
    )
    config.network_options = ConfigDict({'side': 128})
    # An epoch is all training images and their mirror images.
    config.update(epochs_baseline=2, epochs=2, batch_size=64, optimizer='sgd', weight_decay=1e-4)
    config.update(images=300 if quick else 0, learning_rate=0.002 if quick else 0.02)  # 0.02 needs many steps of warmup
    config.update(scan_epoch=False, warmup=0.1, heads_first=0.05, fresh_rate=5.0, crop_padding=1, label_smoothing=0.1)
    config.exit_weights = (0.3, 0.3, 0.3, 1.0)
    config.criteria = ('entropy', 'max_probability', 'margin')  # label smoothing spoils entropy
    # XLA's depthwise convolutions take long in the plain jitted baseline that the clock runs too.
    config.update(latency_images=20 if quick else 100, latency_passes=10)
    return config
