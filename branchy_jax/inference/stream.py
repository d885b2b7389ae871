"""Batches that keep coming: survivors of several batches share the chunks of later stages."""

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference.compacted import host_steps
from branchy_jax.inference.pipeline import Answers, Pipeline, Policy
from branchy_jax.inference.steps import Exits, Network, check_chunk_sizes, chunk_size_of_each, kind_of, network
from branchy_jax.types import Array, Variables, num_rows, static

Arrival = Array | tuple[Array, Array] | tuple[Array, Array, Array]
"""``images [B, H, W, C]``, ``(ids [B], images)``, or ``(ids, images, due [B])``.

Inputs that are a tuple themselves come with ids: ``(ids, (a, b))``.
"""


@struct.dataclass
class Stream:
    """The executor that `stream` builds.

    Attributes:
        network: a model and its exits.
        chunk_size: rows that a stage takes at once.
        deadline: seconds from which an image waits for no others.
        workers: chunks that run at the same time.
        ahead: batches to read ahead.
    """

    network: Network = static()
    chunk_size: int | tuple[int, ...] = static()
    deadline: float = static()
    workers: int = static()
    ahead: int = static()

    def __call__(self, variables: Variables, supply: Iterable[Arrival], policy: Any) -> Iterator[Answers]:
        """Answers every image of a supply; see `stream`."""
        fixed = None if callable(policy) else as_policy(policy)
        return self._answers(variables, supply, lambda: as_policy(policy()) if fixed is None else fixed)

    def _answers(self, variables: Variables, supply: Iterable[Arrival], policy: Policy) -> Iterator[Answers]:
        """Answers a supply, which a thread reads a few ahead; the first images say which programs are needed."""
        items: queue.Queue[Any] = queue.Queue(maxsize=self.ahead)
        stopped, pipeline, end = threading.Event(), None, None
        reading = supply, self.deadline, items, stopped
        threading.Thread(target=_read, args=reading, name='branchy_jax supply', daemon=True).start()
        try:
            while end is None:
                due = float('inf') if pipeline is None else pipeline.due
                # Every arrival so far, so that several chunks can run at the same time.
                for item in _arrived(items, due - time.monotonic()):
                    if isinstance(item, BaseException):
                        end = item
                        break
                    if pipeline is None:
                        count = len(self.network.stages(variables, item[1]).exits)
                        steps = host_steps(self.network, variables, item[1], count)
                        sizes = chunk_size_of_each(self.chunk_size, count)
                        pipeline = Pipeline(steps, policy, sizes, workers=self.workers)
                    pipeline.add(*item)
                if pipeline is not None:
                    yield from pipeline.run(flush=end is not None)
        finally:
            stopped.set()
            while not items.empty():  # the thread may be waiting for a free place
                items.get_nowait()
        if not isinstance(end, StopIteration):
            raise end


def stream(
    model: Any,
    *,
    chunk_size: int | Sequence[int],
    deadline: float = float('inf'),
    exits: Exits = None,
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
        exits: the exits to ask, ascending, the last among them; the other exits never answer.
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
    if not deadline >= 0:
        raise ValueError(f'deadline: got {deadline}; give seconds, at least 0')
    if workers < 1 or ahead < 1:
        raise ValueError(f'workers and ahead: got {workers} and {ahead}; give at least 1')
    asked = network(model, exits, compiler_options)
    return Stream(asked, check_chunk_sizes(chunk_size), float(deadline), workers, ahead)


def _arrived(items: queue.Queue[Any], wait: float) -> Iterator[Any]:
    """Yields what has been read, as much as is read ahead; waits for the first. Nothing if none comes in time."""
    try:
        yield items.get(timeout=min(max(wait, 0.0), threading.TIMEOUT_MAX))
        for _ in range(items.maxsize - 1):
            yield items.get_nowait()
    except queue.Empty:
        return


def _read(supply: Iterable[Arrival], deadline: float, items: queue.Queue[Any], stopped: threading.Event) -> None:
    """Puts what a supply yields into a queue, and at the end what ended it: StopIteration, or the exception raised."""
    end: BaseException = StopIteration()
    count, first = 0, None
    try:
        for arrival in supply:
            ids, images, due = _check(arrival, count, time.monotonic() + deadline)
            first = kind_of(images, first)
            items.put((ids, images, due))
            if stopped.is_set():
                return
            count += len(ids)
    except BaseException as error:  # raised again where the answers are read
        end = error
    finally:
        if isinstance(supply, Generator):  # frames that JAX's traces keep may still refer to it
            supply.close()
    items.put(end)


def _check(arrival: Arrival, first_id: int, due: float) -> tuple[np.ndarray, Any, np.ndarray]:
    """Returns ids, a copy of the images, since a supply may fill its buffer again, and when each waits for no others.

    Ids count from ``first_id`` and all images are due at the same time, unless the arrival says otherwise.
    """
    parts: tuple[Any, ...] = arrival if isinstance(arrival, tuple) else (None, arrival)
    if len(parts) not in (2, 3):
        forms = 'images, (ids, images), or (ids, images, due); inputs that are a tuple themselves as (ids, (a, b))'
        raise ValueError(f'supply: got a tuple of {len(parts)}; yield {forms}')
    images = jax.tree.map(np.array, parts[1])
    count = num_rows(images, 'images')
    if isinstance(images, np.ndarray) and images.ndim < 2:
        raise ValueError(f'images: expected a batch [B, …], got shape {images.shape}')
    ids = np.arange(first_id, first_id + count) if parts[0] is None else np.array(parts[0])
    if ids.shape != (count,):
        raise ValueError(f'ids: got shape {ids.shape} for {count} images; give one id per image')
    times = np.array(parts[2], np.float64) if len(parts) == 3 else np.full(count, due)
    if times.shape != (count,) or np.isnan(times).any():
        raise ValueError(f'due: got shape {times.shape} for {count} images; give one time per image, not NaN')
    return ids, images, times
