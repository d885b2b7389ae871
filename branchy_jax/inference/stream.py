"""Batches that keep coming: survivors of several batches share the chunks of later stages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax.criteria import as_policy
from branchy_jax.inference.compacted import host_steps
from branchy_jax.inference.pipeline import Answers, Pipeline
from branchy_jax.inference.steps import Network, check_chunk_sizes, chunk_sizes_of, network, static
from branchy_jax.types import Array, Variables, num_rows

Arrival = Array | tuple[Array, Array] | tuple[Array, Array, Array]
"""``images [B, H, W, C]``, ``(ids [B], images)``, or ``(ids, images, due [B])``.

Inputs that are a tuple themselves come with ids: ``(ids, (a, b))``.
"""

_Checked = tuple[np.ndarray, Any, float]
"""Ids ``[B]``, NumPy arrays of images ``[B, …]``, and when they wait for no others."""


@static
class Stream:
    """The executor that `stream` builds.

    Attributes:
        network: a model and its exits.
        chunk_size: rows that a stage takes at once.
        deadline: seconds from which an image waits for no others.
        workers: chunks that run at the same time.
        ahead: batches to read ahead.
    """

    network: Network
    chunk_size: int | tuple[int, ...]
    deadline: float
    workers: int
    ahead: int

    def __call__(self, variables: Variables, supply: Iterable[Arrival], policy: Any) -> Iterator[Answers]:
        """Answers every image of a supply; see `stream`."""
        fixed = None if callable(policy) else as_policy(policy)

        def start(images: Any) -> Pipeline:
            sizes = chunk_sizes_of(self.chunk_size, self.network.stages(variables, images))
            steps = host_steps(self.network, variables, images, len(sizes))
            return Pipeline(steps, lambda: as_policy(policy()) if fixed is None else fixed, sizes, workers=self.workers)

        return _answers(start, _checked(supply, self.deadline), self.ahead)


def stream(
    model: Any,
    *,
    chunk_size: int | Sequence[int],
    deadline: float = float('inf'),
    exits: Sequence[int] | None = None,
    workers: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    ahead: int = 2,
) -> Stream:
    """Builds the executor for an endless supply of batches of any size.

    Before each stage images wait until a whole chunk of them has come together, from one batch or from many, so that
    every stage runs full. The supply is read in a thread of its own, ``ahead`` batches ahead at most; while the caller
    does not ask for answers, nothing more is read. In memory are at most twice those batches, one more in the reader's
    hand, and less than a chunk before each stage (in the host's memory, also on a GPU).

    Every image is answered exactly once, in no particular order. When the supply ends, whatever waits is answered.
    When it raises, so too, and then its exception is raised here; a batch of the wrong shape counts as that. When the
    caller stops early (``close()``, ``break``), reading stops.

    Args:
        model: a network with N exits.
        chunk_size: images that a stage takes at once; one number, or one for each exit that is asked.
        deadline: seconds after its arrival from which an image no longer waits for others: chunks are then padded.
            Kept while the caller asks for answers, up to the chunks that are running. A supply that yields ``due``
            says so of each image instead, in seconds of `time.monotonic`.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.
        workers: chunks that run at the same time, in threads.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.
        ahead: batches to read ahead.

    Returns:
        ``(variables, supply, policy)`` to an iterator of `Answers`: ``ids [M]`` and their prediction. The
        supply yields ``images [B, H, W, C]``, whose ids count from 0 in order of arrival, ``(ids [B], images)``, or
        ``(ids [B], images, due [B])``; inputs that are a tuple themselves as ``(ids, (a, b))``. ``policy`` may be a
        function of no arguments that returns one: it is asked anew for every chunk, so that thresholds can follow the
        load or a `branchy_jax.thresholds.Controller`.

    Raises:
        ValueError: a chunk size, deadline, ``workers`` or ``ahead`` out of range, or impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax
        >>> model, images = bj.models.create('b-lenet'), np.ones((3, 28, 28, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> answer = stream(model, chunk_size=2)
        >>> sorted(int(i) for found in answer(variables, [images, images], [1.0]) for i in found.ids)
        [0, 1, 2, 3, 4, 5]
    """
    chunk_size = check_chunk_sizes(chunk_size)
    if not deadline >= 0:
        raise ValueError(f'deadline: got {deadline}; give seconds, at least 0')
    if workers < 1 or ahead < 1:
        raise ValueError(f'workers and ahead: got {workers} and {ahead}; give at least 1')
    return Stream(network(model, exits, compiler_options), chunk_size, float(deadline), workers, ahead)


def _answers(start: Callable[[Any], Pipeline], arrivals: Generator[_Checked], ahead: int) -> Iterator[Answers]:
    """Answers arrivals; ``start`` makes a pipeline for images like the first."""
    reader, pipeline = _Reader(arrivals, ahead), None
    try:
        while not reader.ended:
            # Every arrival so far, so that several chunks can run at the same time.
            due_next = float('inf') if pipeline is None else pipeline.due
            for ids, images, due in reader.next(timeout=due_next - time.monotonic()):
                pipeline = start(images) if pipeline is None else pipeline
                pipeline.add(ids, images, due)
            if pipeline is not None:
                yield from pipeline.run(flush=reader.ended)
    finally:
        reader.stop()
    if reader.failure is not None:
        raise reader.failure


def _checked(supply: Iterable[Arrival], deadline: float) -> Generator[_Checked]:
    """Checks what a supply yields, and copies it: a supply may fill the same buffer again."""
    count, first = 0, None
    try:
        for arrival in supply:
            ids, images, due = _check(arrival, count, time.monotonic() + deadline)
            kind = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), images)
            first = kind if first is None else first
            if kind != first:
                raise ValueError(
                    f'images: all batches of a stream are alike; the first had images {first}, this one {kind}'
                )
            yield ids, images, due
            count += len(ids)
    finally:
        if isinstance(supply, Generator):  # frames that JAX's traces keep may still refer to it
            supply.close()


def _check(arrival: Arrival, first_id: int, due: float) -> _Checked:
    """Checks one arrival; ids count from ``first_id`` and all are due at the same time unless the arrival says so."""
    parts: tuple[Any, ...] = arrival if isinstance(arrival, tuple) else (None, arrival)
    if len(parts) not in (2, 3):
        raise ValueError(
            f'supply: got a tuple of {len(parts)}; yield images, (ids, images), or (ids, images, due), and inputs '
            'that are a tuple themselves as (ids, (a, b))'
        )
    images = jax.tree.map(np.array, parts[1])
    count = num_rows(images, 'images')
    if isinstance(images, np.ndarray) and images.ndim < 2:
        raise ValueError(f'images: expected a batch [B, …], got shape {images.shape}')
    ids = np.arange(first_id, first_id + count) if parts[0] is None else np.array(parts[0])
    if ids.shape != (count,):
        raise ValueError(f'ids: got shape {ids.shape} for {count} images; give one id per image')
    if len(parts) == 3:
        times = np.asarray(parts[2], np.float64)
        if times.shape != (count,) or np.isnan(times).any():
            raise ValueError(f'due: got shape {times.shape} for {count} images; give one time per image, not NaN')
        # Images that came together go together: the first one that is due takes the others along.
        due = float(times.min(initial=np.inf))
    return ids, images, due


class _Reader:
    """Reads arrivals in a thread, a few ahead.

    Attributes:
        ended: whether nothing comes any more.
        failure: why; ``None`` if the supply ended.
    """

    def __init__(self, arrivals: Generator[_Checked], ahead: int) -> None:
        self.ended = False
        self.failure: BaseException | None = None
        self._items: queue.Queue = queue.Queue(maxsize=ahead)
        self._stopped = False
        threading.Thread(target=self._read, args=(arrivals,), name='branchy_jax supply', daemon=True).start()

    def next(self, *, timeout: float) -> list[_Checked]:
        """Returns the arrivals so far, as many as are read ahead; waits for the first. Empty if none comes in time."""
        arrivals: list[_Checked] = []
        try:
            while len(arrivals) < self._items.maxsize and not self.ended:
                wait = 0.0 if arrivals else max(0.0, min(timeout, threading.TIMEOUT_MAX))
                arrival, self.failure = self._items.get(timeout=wait)
                self.ended = arrival is None
                if arrival is not None:
                    arrivals.append(arrival)
        except queue.Empty:
            pass
        return arrivals

    def stop(self) -> None:
        """Lets the thread end after the item that it is waiting for."""
        self._stopped = True
        while not self._items.empty():  # the thread may be waiting for a free place
            self._items.get_nowait()

    def _read(self, arrivals: Generator[_Checked]) -> None:
        failure = None
        try:
            for arrival in arrivals:
                self._items.put((arrival, None))
                if self._stopped:
                    arrivals.close()
                    return
        except BaseException as error:  # raised again where the answers are read
            failure = error
        self._items.put((None, failure))
