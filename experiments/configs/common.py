"""Every setting of a run, its default and its meaning."""

from ml_collections import ConfigDict


def is_quick(variant: str) -> bool:
    """Whether a config's variant is ``'quick'``, a short form.

    Raises:
        ValueError: another variant.
    """
    if variant not in ('', 'quick'):
        raise ValueError(f"variant: got {variant!r}; there is 'quick', or nothing after the file's name")
    return variant == 'quick'


def get_config() -> ConfigDict:
    """Returns the default settings, without a ``network`` and a ``dataset``."""
    config = ConfigDict()
    config.seed = 0

    config.task = 'classification'  # or 'segmentation'
    # 'mnist5k', 'digit_canvases', a TFDS name, or a path ending in .npz. Where the environment variable
    # BRANCHY_JAX_PACKS names a folder with NAME.npz (x_train, y_train, x_test, y_test), data set NAME comes from there:
    # for machines without TensorFlow Datasets.
    config.dataset = ''
    config.image_size = ()  # (H, W) to resize to, where images of a TFDS data set differ in size
    config.validation_fraction = 0.1  # of the training part, per class; thresholds are picked on it
    config.images = 0  # of each part at most, for a short trial; 0: all
    config.in_memory = True  # False leaves the training images of a TFDS data set on disk
    config.workers = 0  # processes that read and decode images on disk; 0 is a thread
    config.normalization = ()  # (mean, deviation) of pixels in [0, 1]; (): those of the training images
    config.prefetch = 4  # batches of them read ahead
    config.crop_padding = 0  # random shifts, in pixels
    config.flip = False  # random mirroring, left and right
    # Sides in pixels that training images are resized to, one after another, each for as many epochs; (): as they are.
    config.image_sides = ()

    config.network = ''  # the branchy one; its baseline is trained on its own
    # Where the branches leave: the paper's 'text', the 'released' code, 'tuned'; '' elsewhere.
    config.placement = 'text'
    config.network_options = ConfigDict()  # further arguments of the network's builder
    config.dtype = 'float32'  # of the computation; 'bfloat16' on accelerators
    # Form of convolutions in training on a CPU: 'banded' products where channels are few, 'products' where
    # many convolutions are pointwise and depthwise; '' is XLA's own.
    config.convolution = ''

    config.epochs_baseline = 1
    # of a shorter-trained baseline to start from, so that both networks see as many epochs in all; 0: start from the
    # baseline itself
    config.epochs_start = 0
    config.epochs = 1
    # Depth of a ResNet that is trained for those epochs and then grown to the whole network, whose new blocks start as
    # identities; 0: the network itself.
    config.shallow_depth = 0
    config.epochs_grown = 0.0  # of the grown network, in steps of `batch_size_grown`, all at the last rate given
    config.batch_size_grown = 64
    config.learning_rate_grown = 1e-3
    config.batch_size = 64
    config.cpu_devices = 1  # host devices of a CPU that share each step: faster for all but tiny networks
    config.optimizer = 'adam'  # as in the paper; 'adamw'; 'sgd' with Nesterov momentum 0.9
    config.learning_rate = 1e-3
    config.schedule = 'cosine'  # after a linear warm-up; 'linear' likewise; 'constant', as in the paper
    config.warmup = 0.05  # share of the steps, for 'cosine' and 'linear'
    config.weight_decay = 0.0  # for 'adamw' and 'sgd'
    config.decay_kernels_only = False  # biases and BatchNorm's parameters are left alone
    config.scan_epoch = True  # an epoch as one program; not where images are on disk
    config.save_every = 0  # steps between checkpoints; 0: an epoch, or four minutes

    # Start from the trained baseline; 'joint': from random; 'frozen': train heads only; 'finetune': start from the
    # weights in `pretrained`, and train what comes after the first exit's stage on cached activations.
    config.regime = 'baseline'
    config.pretrained = ''  # a file that `python -m experiments.peers --imagenet` wrote
    config.heads_first = 0.0  # share of the steps in which only layers that are not pretrained train
    config.fresh_rate = 1.0  # factor of the learning rate of such layers
    config.exit_weights = (1.0,)  # one per exit
    config.distillation = 0.0  # share of each exit's loss that draws it to the last exit instead of the labels
    config.temperature = 2.0  # of the distillation
    config.label_smoothing = 0.0  # probability shared out among all classes

    # 'accuracy': the cheapest thresholds that on validation data are at most so many standard errors below the best
    # and, if any do, reach the baseline; 'baseline': the cheapest that reach the baseline; 'knee': the knee of the
    # frontier.
    config.choose = 'accuracy'
    # Names in branchy_jax.criteria, such as 'max_probability', to compare on validation data; (): those of the task,
    # entropy for classification.
    config.criteria = ()
    config.standard_errors = 1.0
    config.tolerance = 0.0  # accuracy that 'accuracy' and 'baseline' may give up

    config.latency_batch = 1  # images in a call; above 1 the planner chooses how they run
    config.latency_images = 1000  # of the test part, per pass
    config.latency_passes = 20
    return config
