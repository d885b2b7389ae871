"""Data sets as arrays: decoded once, cached, split by a seed. Augmentation runs inside jit."""

from branchy_jax.data.augmentation import augment as augment
from branchy_jax.data.canvases import digit_canvases as digit_canvases
from branchy_jax.data.load import load_dataset as load_dataset
from branchy_jax.data.sources import default_cache as default_cache
from branchy_jax.data.splits import Dataset as Dataset
from branchy_jax.data.splits import fit_normalization as fit_normalization
from branchy_jax.data.splits import stratified_split as stratified_split

__all__ = [
    'Dataset',
    'augment',
    'default_cache',
    'digit_canvases',
    'fit_normalization',
    'load_dataset',
    'stratified_split',
]
