"""Data sets by name, in memory or left on disk, split by a seed. Augmentation runs inside jit."""

from branchy_jax.data.augmentation import augment as augment
from branchy_jax.data.canvases import digit_canvases as digit_canvases
from branchy_jax.data.dataset import Dataset as Dataset
from branchy_jax.data.dataset import fit_normalization as fit_normalization
from branchy_jax.data.dataset import stratified_split as stratified_split
from branchy_jax.data.load import load_dataset as load_dataset
from branchy_jax.data.tfds import OnDisk as OnDisk

__all__ = ['Dataset', 'OnDisk', 'augment', 'digit_canvases', 'fit_normalization', 'load_dataset', 'stratified_split']
