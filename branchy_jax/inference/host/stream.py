"""Batches that keep coming: survivors of several batches share the chunks of later stages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax.criteria import as_policy
from branchy_jax.inference.compacted import jitted_steps
from branchy_jax.inference.compiler_options import in_order
from branchy_jax.inference.host.pipeline import Answers, Pipeline, submitter
from branchy_jax.inference.steps import asked_exits, check_chunk_sizes
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPolicy, Variables, check_inputs, input_specs, num_rows

Arrival = Array | tuple[Array, Array] | tuple[Array, Array, Array]
"""``images [B, H, W, C]``, ``(ids [B], images)``, or ``(ids, images, due [B])``.

Inputs that are a tuple themselves come with ids: ``(ids, (a, b))``.
"""

_POLL_SECONDS = 0.1


def stream(
    model: BranchyNet,
    *,
    chunk_size: int | Sequence[int],
    deadline: float = float('inf'),
    exits: Sequence[int] | None = None,
    workers: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    ahead: int = 2,
) -> Callable[[Variables, Iterable[Arrival], Any], Iterator[Answers]]:
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
    asked = asked_exits(model, exits)
    chunk_sizes = check_chunk_sizes(chunk_size, len(asked))
    if not deadline >= 0:
        raise ValueError(f'deadline: got {deadline}; give seconds, at least 0')
    if workers < 1 or ahead < 1:
        raise ValueError(f'workers and ahead: got {workers} and {ahead}; give at least 1')
    steps, submit = jitted_steps(model, asked, in_order(compiler_options)), submitter(workers)

    def execute(variables: Variables, supply: Iterable[Arrival], policy: Any) -> Iterator[Answers]:
        def current() -> ExitPolicy:
            return as_policy(policy(), model.num_exits)

        fixed = policy if callable(policy) else as_policy(policy, model.num_exits)
        pipeline = Pipeline(
            steps,
            variables,
            current if callable(policy) else lambda: fixed,
            chunk_sizes,
            workers=workers,
            submit=submit,
        )
        return _answers(pipeline, supply, model.image_shape, deadline, ahead)

    return execute


def _answers(
    pipeline: Pipeline, supply: Iterable[Arrival], image_shape: Any, deadline: float, ahead: int
) -> Iterator[Answers]:
    reader, failure = _Reader(supply, _Door(image_shape), ahead), None
    try:
        while not reader.ended:
            # All that has come in by now, so that several chunks can run at the same time.
            arrivals = reader.next(timeout=pipeline.due - time.monotonic(), most=ahead)
            for since, ids, images, due in arrivals:
                pipeline.add(ids, images, due=since + deadline if due is None else due)
            yield from pipeline.run()
        yield from pipeline.run(flush=True)
        failure = reader.failure
    finally:
        reader.stop()
    if failure is not None:
        raise failure


class _Door:
    """Checks what the supply yields, and makes copies: a supply may fill the same buffer again."""

    def __init__(self, image_shape: Any) -> None:
        self._image_shape, self._seen, self._first = image_shape, 0, None
        self._takes_tuples = image_shape is not None and isinstance(input_specs(image_shape, 1), tuple)

    def __call__(self, arrival: Arrival) -> tuple[np.ndarray, np.ndarray, float | None]:
        parts: tuple[Any, ...] = arrival if isinstance(arrival, tuple) else (None, arrival)
        is_item = len(parts) in (2, 3) and (isinstance(parts[1], tuple) or not self._takes_tuples)
        if isinstance(arrival, tuple) and not is_item:
            raise ValueError(
                f'supply: got a tuple of {len(parts)}; yield images, (ids, images), or (ids, images, due), and inputs '
                'that are a tuple themselves as (ids, (a, b))'
            )
        images = jax.tree.map(np.array, parts[1])
        if self._image_shape is not None:
            check_inputs(images, self._image_shape)
        count = num_rows(images)
        if isinstance(images, np.ndarray) and images.ndim < 2:
            raise ValueError(f'images: expected a batch [B, …], got shape {images.shape}')
        kind = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), images)
        self._first = kind if self._first is None else self._first
        if kind != self._first:
            raise ValueError(
                f'images: all batches of a stream are alike; the first had images {self._first}, this one {kind}'
            )
        ids = np.arange(self._seen, self._seen + count) if parts[0] is None else np.array(parts[0])
        if ids.shape != (count,):
            raise ValueError(f'ids: got shape {ids.shape} for {count} images; give one id per image')
        due = np.asarray(parts[2], np.float64) if len(parts) == 3 else None
        if due is not None and (due.shape != (count,) or np.isnan(due).any()):
            raise ValueError(f'due: got shape {due.shape} for {count} images; give one time per image, not NaN')
        self._seen += count
        # Those that came together go together: the first that is due takes the others along.
        return ids, images, None if due is None else float(due.min(initial=np.inf))


class _Reader:
    """Reads a supply in a thread, a few items ahead."""

    def __init__(
        self,
        supply: Iterable[Arrival],
        door: Callable[[Arrival], tuple[np.ndarray, np.ndarray, float | None]],
        ahead: int,
    ) -> None:
        self.ended = False
        self.failure: BaseException | None = None
        self._items: queue.Queue = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        threading.Thread(target=self._read, args=(supply, door), name='branchy_jax supply', daemon=True).start()

    def next(self, *, timeout: float, most: int) -> list[tuple[float, np.ndarray, np.ndarray, float | None]]:
        """Returns what has come in: when, ids, images and when they are due; waits for the first.

        Empty if nothing comes in time, or nothing comes any more: then ``ended`` is set, and ``failure`` if the supply
        raised.
        """
        found: list[tuple[float, np.ndarray, np.ndarray, float | None]] = []
        try:
            while len(found) < most:
                wait = max(0.0, min(timeout, threading.TIMEOUT_MAX)) if not found else 0.0
                kind, value = self._items.get(block=wait > 0, timeout=wait)
                if kind == 'end':
                    self.ended, self.failure = True, value
                    break
                found.append(value)
        except queue.Empty:
            pass
        return found

    def stop(self) -> None:
        """Lets the thread end after the item that it is waiting for."""
        self._stopped.set()

    def _read(self, supply: Iterable[Arrival], door: Callable[[Arrival], tuple[np.ndarray, np.ndarray]]) -> None:
        failure = None
        try:
            for arrival in supply:
                if not self._put(('item', (time.monotonic(), *door(arrival)))):
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
