"""Data sets that stay on disk: grain reads them in the very order that data in memory is trained in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax.checkpoint import write_atomically
from branchy_jax.data import default_cache, stratified_split
from branchy_jax.data.prepared import Prepared, open_prepared
from branchy_jax.types import Batch, Normalization

_BLOCK = 512

Transform = Callable[[np.ndarray], np.ndarray]
"""``image as decoded → image [H, W, C]`` of one size for all, on the host: a resize, a crop of the centre."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples on disk, read in any order.

    Attributes:
        source: of TFDS, random access.
        image_key: of the image in an example.
        label_key: of the label.
        rows: ``[M]`` which of the source's examples these are.
        image_shape: ``(H, W, C)``.
        workers: processes that read and decode; 0 reads in a thread of this one.
        prefetch: batches read ahead.
        transform: of each image, before batching.
    """

    source: Any
    image_key: str
    label_key: str
    rows: np.ndarray
    image_shape: tuple[int, ...]
    workers: int = 0
    prefetch: int = 4
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> Batch:
        """Reads and decodes examples by their position, as `Dataset.train` would have them: uint8 and int32."""
        found = self.source.__getitems__(self.rows[np.asarray(rows)].tolist())
        images = [example[self.image_key] for example in found]
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        labels = np.array([example[self.label_key] for example in found], np.int32)
        return Batch(np.stack(images), labels)

    def batches(self, order: np.ndarray, first_step: int = 0) -> Iterator[Batch]:
        """Reads the batches of an epoch, ahead of their use.

        Args:
            order: ``[steps, batch_size]`` positions, as from `branchy_jax.training.epoch_order`; some of its columns,
                where several hosts share each batch.
            first_step: where to begin, in the middle of an epoch perhaps.
        """
        import grain

        steps = grain.MapDataset.source(_Steps(self, np.asarray(order)))[first_step:]
        options = grain.ReadOptions(num_threads=0 if self.workers else 1, prefetch_buffer_size=self.prefetch)
        stream = steps.to_iter_dataset(options)
        if self.workers:
            _let_grain_read_its_flags()
            ahead = max(1, self.prefetch // self.workers)
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead))
        for image, label in stream:
            # Copies: the arrays of other processes lie in shared memory, which is to be given back at once.
            yield Batch(np.array(image), np.array(label))


def _let_grain_read_its_flags() -> None:
    """Stands in for `absl.app.run`, without which grain's processes refuse to start."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class _Steps:
    """Whole batches as grain's examples: however many workers read, the batches and their order stay the same."""

    def __init__(self, examples: Examples, order: np.ndarray) -> None:
        self._examples, self._order = examples, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        batch = self._examples.read(self._order[step])
        return batch.image, batch.label


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataset:
    """A `branchy_jax.data.Dataset` whose training part stays on disk.

    Attributes:
        name: what `open_dataset` was asked for.
        train: the training part; same examples, in the same positions, as in memory.
        validation: for thresholds and every other choice, in memory.
        test: for one evaluation, at the end, in memory.
        num_classes: K.
        normalization: from the training images.
    """

    name: str
    train: Examples
    validation: Batch
    test: Batch
    num_classes: int
    normalization: Normalization

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.train.image_shape


def open_dataset(
    name: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    workers: int = 0,
    prefetch: int = 4,
    transform: Transform | None = None,
    cache: Path | str | None = None,
    download: bool = False,
) -> StreamedDataset:
    """Opens a data set of TFDS without reading its training images into memory.

    Splits, order and normalisation are those of `branchy_jax.data.load_dataset` with the same arguments. For the split
    and the normalisation, labels and images are read through once, a block at a time; what they gave is cached.

    Args:
        name: of an image classification data set of TensorFlow Datasets, prepared as array_record.
        validation_fraction: share of the training part, per class, in (0, 1); is held in memory.
        seed: of the validation split.
        workers: processes that read and decode; 0 reads in a thread of this one. Each costs the memory of a Python
            with jax imported; they pay off where decoding is slower than training.
        prefetch: batches read ahead.
        transform: of each image on the host; needed where images are not of one size.
        cache: folder for what was found; by default ``$BRANCHY_JAX_CACHE`` or ``~/.cache/branchy_jax``.
        download: lets TFDS fetch a data set that is not prepared yet.

    Raises:
        ValueError: unknown name, data set not at hand, or impossible settings.

    Example:
        >>> cifar = open_dataset('cifar10')  # doctest: +SKIP
        >>> len(cifar.train), cifar.image_shape  # doctest: +SKIP
        (45000, (32, 32, 3))
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f'validation_fraction: expected a share in (0, 1), got {validation_fraction}')
    if workers < 0 or prefetch < 1:
        raise ValueError(f'workers, prefetch: got {workers} and {prefetch}; give at least 0 and 1')
    prepared = open_prepared(name, download=download)
    cache = Path(cache) if cache is not None else default_cache()
    settings = f'{validation_fraction}-{seed}' + ('' if transform is None else '-transformed')
    labels = _remembered(cache / f'{prepared.file_name}-labels.npz', lambda: {'train': _labels(prepared)})['train']
    kept, held_out = stratified_split(labels, fraction=validation_fraction, seed=seed)
    settings_of_all = {'workers': workers, 'prefetch': prefetch, 'transform': transform}
    train = _examples(prepared, 'train', kept, **settings_of_all)
    test = _examples(prepared, 'test', None, **settings_of_all)

    def scale() -> dict[str, np.ndarray]:
        return vars(fit_normalization_by_blocks(train))

    scaled = scale() if transform is not None else _remembered(cache / f'{prepared.file_name}-{settings}.npz', scale)
    test = test.read(np.arange(len(test)))
    return StreamedDataset(
        name=name,
        train=train,
        validation=dataclasses.replace(train, rows=held_out).read(np.arange(len(held_out))),
        test=test,
        num_classes=int(max(labels.max(), test.label.max())) + 1,
        normalization=Normalization(**{key: jnp.asarray(value) for key, value in scaled.items()}),
    )


def fit_normalization_by_blocks(examples: Examples) -> Normalization:
    """Computes what `branchy_jax.data.fit_normalization` does, holding a block of images at a time."""
    total, square, count = 0, 0, 0
    for start in range(0, len(examples), _BLOCK):
        images = examples.read(np.arange(start, min(start + _BLOCK, len(examples)))).image.astype(np.int64)
        axes = tuple(range(images.ndim - 1))
        total, square, count = total + images.sum(axes), square + (images**2).sum(axes), count + images[..., 0].size
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 1.0))
    return Normalization(mean=jnp.float32(mean / 255), deviation=jnp.float32(deviation / 255))


def _examples(prepared: Prepared, split: str, rows: np.ndarray | None, **settings: Any) -> Examples:
    source = prepared.builder.as_data_source(split=split)
    rows = np.arange(len(source)) if rows is None else rows
    examples = Examples(source, prepared.image_key, prepared.label_key, rows, (), **settings)
    try:
        first = examples.read([0, 1])
    except ValueError as error:  # np.stack of two sizes
        raise ValueError(f'transform: images of {split} differ in size ({error}); give one that resizes') from error
    if first.image.ndim != 4 or first.image.dtype != np.uint8:
        raise ValueError(f'transform: images must be uint8 [H, W, C], got {first.image.dtype} {first.image.shape[1:]}')
    return dataclasses.replace(examples, image_shape=first.image.shape[1:])


def _labels(prepared: Prepared) -> np.ndarray:
    import tensorflow_datasets as tfds

    undecoded = {prepared.image_key: tfds.decode.SkipDecoding()}
    source = prepared.builder.as_data_source(split='train', decoders=undecoded)
    blocks = (range(start, min(start + _BLOCK, len(source))) for start in range(0, len(source), _BLOCK))
    found = [[example[prepared.label_key] for example in source.__getitems__(list(block))] for block in blocks]
    return np.concatenate(found).astype(np.int32)


def _remembered(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """Reads arrays from a file, or computes and writes them."""
    if not path.exists():
        found = jax.tree.map(np.asarray, compute())

        def write(temporary: Path) -> None:
            with temporary.open('wb') as file:
                np.savez(file, **found)

        write_atomically(path, write)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)
