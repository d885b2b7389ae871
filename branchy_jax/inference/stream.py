"""Batches that keep coming: survivors of several batches share the chunks of later stages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.checks import check_thresholds
from branchy_jax.inference.compacted import check_chunk_sizes
from branchy_jax.inference.pipeline import Answers, Pipeline, submitter
from branchy_jax.inference.steps import build_steps
from branchy_jax.models.branchy import BranchyNet, check_images
from branchy_jax.types import Array, Variables

Arrival = Array | tuple[Array, Array]
"""``images [B, H, W, C]``, or ``(ids [B], images)``."""

_POLL_SECONDS = 0.1


def stream(
    model: BranchyNet,
    *,
    chunk_size: int | Sequence[int],
    deadline: float = float('inf'),
    criterion: Criterion = entropy,
    exits: Sequence[int] | None = None,
    workers: int = 1,
    ahead: int = 2,
) -> Callable[[Variables, Iterable[Arrival], Array], Iterator[Answers]]:
    """Builds the executor for an endless supply of batches of any size.

    Before each stage images wait until a whole chunk of them has come together, from one batch or from many, so that
    every stage runs full. The supply is read in a thread of its own, ``ahead`` batches ahead at most; while the caller
    does not ask for answers, nothing more is read. In memory are at most those batches, one more, and less than a
    chunk before each stage (in the host's memory, also on a GPU).

    Every image is answered exactly once, in no particular order. When the supply ends, whatever waits is answered.
    When it raises, so too, and then its exception is raised here; a batch of the wrong shape counts as that. When the
    caller stops early (``close()``, ``break``), reading stops.

    Args:
        model: a network with N exits.
        chunk_size: images that a stage takes at once; one number, or one for each exit that is asked.
        deadline: seconds after its arrival from which an image no longer waits for others: chunks are then padded.
            Counts while the caller asks for answers.
        criterion: how unsure an exit is.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        workers: chunks that run at the same time, in threads.
        ahead: batches to read ahead.

    Returns:
        ``(variables, supply, thresholds [N - 1])`` to an iterator of `Answers`: ``ids [M]`` and their prediction. The
        supply yields ``images [B, H, W, C]``, whose ids count from 0 in order of arrival, or ``(ids [B], images)``.

    Raises:
        ValueError: a chunk size, deadline, ``workers`` or ``ahead`` out of range, or impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), np.ones((3, 28, 28, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> answer = stream(model, chunk_size=2)
        >>> sorted(int(i) for found in answer(variables, [images, images], [1.0]) for i in found.ids)
        [0, 1, 2, 3, 4, 5]
    """
    built = build_steps(model, criterion, exits)
    chunk_sizes = check_chunk_sizes(chunk_size, len(built))
    if not deadline >= 0:
        raise ValueError(f'deadline: got {deadline}; give seconds, at least 0')
    if workers < 1 or ahead < 1:
        raise ValueError(f'workers and ahead: got {workers} and {ahead}; give at least 1')
    steps, submit = [jax.jit(step) for step in built], submitter(workers)

    def execute(variables: Variables, supply: Iterable[Arrival], thresholds: Array) -> Iterator[Answers]:
        thresholds = np.asarray(check_thresholds(thresholds, model.num_exits))
        pipeline = Pipeline(steps, variables, thresholds, chunk_sizes, workers=workers, submit=submit)
        return _answers(pipeline, supply, model.image_shape, deadline, ahead)

    return execute


def _answers(
    pipeline: Pipeline, supply: Iterable[Arrival], image_shape: tuple[int, ...] | None, deadline: float, ahead: int
) -> Iterator[Answers]:
    reader, seen, failure = _Reader(supply, ahead), 0, None
    try:
        while not reader.ended:
            arrival = reader.next(timeout=pipeline.oldest + deadline - time.monotonic())
            if arrival is not None:
                try:
                    ids, images = _checked(arrival, seen, image_shape)
                except ValueError as error:
                    failure = error
                    break
                pipeline.add(ids, images)
                seen += len(images)
            yield from pipeline.run(due=time.monotonic() - deadline)
        yield from pipeline.run(due=float('inf'))
    finally:
        reader.stop()
    failure = failure or reader.failure
    if failure is not None:
        raise failure


def _checked(arrival: Arrival, seen: int, image_shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    ids, images = arrival if isinstance(arrival, tuple) else (None, arrival)
    images = np.asarray(images)
    if image_shape is not None:
        check_images(images, image_shape)
    ids = np.arange(seen, seen + len(images)) if ids is None else np.asarray(ids)
    if ids.shape != (len(images),):
        raise ValueError(f'ids: got shape {ids.shape} for {len(images)} images; give one id per image')
    return ids, images


class _Reader:
    """Reads a supply in a thread, a few items ahead."""

    def __init__(self, supply: Iterable[Any], ahead: int) -> None:
        self.ended = False
        self.failure: BaseException | None = None
        self._items: queue.Queue = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        threading.Thread(target=self._read, args=(supply,), name='branchy_jax supply', daemon=True).start()

    def next(self, timeout: float) -> Any:
        """Returns the next item; ``None`` if none comes in time, or none comes any more and ``ended`` is set."""
        try:
            kind, value = self._items.get(timeout=None if timeout == float('inf') else max(0.0, timeout))
        except queue.Empty:
            return None
        if kind == 'item':
            return value
        self.ended, self.failure = True, value
        return None

    def stop(self) -> None:
        """Lets the thread end after the item that it is waiting for."""
        self._stopped.set()

    def _read(self, supply: Iterable[Any]) -> None:
        failure = None
        try:
            for item in supply:
                if not self._put(('item', item)):
                    return
        except BaseException as error:  # raised again where the answers are read
            failure = error
        self._put(('end', failure))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._items.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
