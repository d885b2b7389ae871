"""Data sets by name, in memory or on disk, split by a seed. Augmentation runs inside jit."""

from branchy_jax.data.dataset import Dataset, augment, digit_canvases, fit_normalization
from branchy_jax.data.load import load_dataset
from branchy_jax.data.tfds import OnDisk as OnDisk

__all__ = ['Dataset', 'augment', 'digit_canvases', 'fit_normalization', 'load_dataset']
