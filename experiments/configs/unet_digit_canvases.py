r"""B-U-Net on canvases of handwritten digits: segmentation, thresholds on images, anytime prediction on pixels.

Paper: BranchyNet (2016), conclusion: image segmentation is named as a task to come; no figures.
Command: python -m experiments.main \
    --config=experiments/configs/unet_digit_canvases.py --workdir=runs/unet_digit_canvases
    (a smaller one: --config=experiments/configs/unet_digit_canvases.py:quick)
Run time: 20 minutes on 2 CPU cores; the smaller one 4.
Expect: 54.5 % mIoU on test canvases, as a baseline trained as long has, with 2.6 times fewer multiply-accumulates.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str = '') -> ConfigDict:
    """Returns the settings of this run.

    Args:
        variant: ``'quick'`` for few epochs.

    Raises:
        ValueError: another variant.
    """
    quick, config = common.is_quick(variant), common.get_config()
    # 'digit_canvases/mnist' has fifteen times as many.
    config.update(task='segmentation', dataset='digit_canvases', choose='baseline', tolerance=0.002)  # of mIoU
    config.update(network='b-unet', placement='', exit_weights=(1.0, 1.0, 1.0))
    config.network_options = ConfigDict({'width': 16, 'head_width': 32})
    epochs = (5, 0, 4) if quick else (45, 25, 20)  # as many in all as the branchy network has
    config.epochs_baseline, config.epochs_start, config.epochs = epochs
    config.update(batch_size=32, optimizer='adamw', learning_rate=3e-3, weight_decay=1e-4)
    config.scan_epoch = False  # on a CPU, convolutions in a scanned loop are many times slower
    config.update(latency_batch=32, latency_images=256 if quick else 512)
    return config
