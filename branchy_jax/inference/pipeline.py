"""Compaction from the host: stages with a line of waiting rows before each, run whenever one holds a chunk."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import struct

from branchy_jax.inference.steps import Step, at_rows
from branchy_jax.types import ExitPolicy, ExitPrediction

Submit = Callable[..., Future]
"""``(function, *args) → Future``, such as `concurrent.futures.ThreadPoolExecutor.submit`."""


@struct.dataclass
class Rows:
    """Images on their way through the network.

    Attributes:
        ids: ``[M]`` which images these are.
        values: pytree of NumPy arrays ``[M, …]``: hidden value and carry.
        due: from when on none of them waits for others, in seconds of `time.monotonic`.
    """

    ids: np.ndarray
    values: Any
    due: float = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Images that have left the network.

    Attributes:
        ids: ``[M]`` which images these are.
        prediction: of those.
    """

    ids: np.ndarray
    prediction: ExitPrediction


class Waiting:
    """Rows that wait for a stage.

    Args:
        chunk_size: how many the stage takes at once.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.count = 0
        self._blocks: deque[Rows] = deque()

    @property
    def due(self) -> float:
        """From when on one of these images waits for no others; infinity if none waits."""
        return min((block.due for block in self._blocks), default=float('inf'))

    def add(self, rows: Rows) -> None:
        """Lets rows wait."""
        if len(rows.ids):
            self._blocks.append(rows)
            self.count += len(rows.ids)

    def take(self) -> Rows:
        """Returns the next chunk: at most ``chunk_size`` ids, and values padded to exactly that."""
        parts, missing = [], self.chunk_size
        while missing and self._blocks:
            block = self._blocks.popleft()
            parts.append(at_rows(block, slice(missing)))
            if len(block.ids) > missing:
                self._blocks.appendleft(at_rows(block, slice(missing, None)))
            missing -= len(parts[-1].ids)
        ids = np.concatenate([part.ids for part in parts])
        self.count -= len(ids)
        values = jax.tree.map(lambda *leaves: _chunk(leaves, self.chunk_size), *(part.values for part in parts))
        return Rows(ids, values, min(part.due for part in parts))


def _chunk(leaves: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Joins arrays to one of ``size`` rows, repeating the last row: any other filling might be slow, as NaN is."""
    if len(leaves) == 1 and len(leaves[0]) == size:
        return leaves[0]
    missing = size - sum(len(leaf) for leaf in leaves)
    return np.concatenate([*leaves, np.repeat(leaves[-1][-1:], missing, axis=0)])


class Pipeline:
    """A network being run on images that come and go. Between runs fewer than a chunk of rows wait before each stage.

    Args:
        steps: jitted, ``(hidden, carry, policy) → Step``.
        policy: tells when an image leaves, anew for every chunk.
        chunk_sizes: one per step.
        workers: how many chunks run at the same time, in threads if several.
    """

    def __init__(
        self,
        steps: Sequence[Callable[..., Step]],
        policy: Callable[[], ExitPolicy],
        chunk_sizes: Sequence[int],
        *,
        workers: int,
    ) -> None:
        self._steps, self._policy = steps, policy
        self._waiting = [Waiting(size) for size in chunk_sizes]
        self._workers, self._submit = workers, submitter(workers)
        self._running: deque[tuple[int, Rows, Future]] = deque()

    def add(self, ids: np.ndarray, images: Any, due: float = float('inf')) -> None:
        """Lets images wait for the first stage, from ``due`` on for no others."""
        self._waiting[0].add(Rows(ids, (images, None), due))

    @property
    def due(self) -> float:
        """From when on a waiting image waits for no others; infinity if none waits."""
        return min(waiting.due for waiting in self._waiting)

    def run(self, *, flush: bool = False) -> Iterator[Answers]:
        """Runs whole chunks, and what is due, until none is left; with ``flush`` whatever waits, too."""
        while True:
            while len(self._running) < self._workers and (n := self._next(flush=flush)) is not None:
                chunk = self._waiting[n].take()
                arguments = (*chunk.values, self._policy())
                self._running.append((n, chunk, self._submit(_finished, self._steps[n], *arguments)))
            if not self._running:
                return
            n, chunk, future = self._running.popleft()
            yield from self._leave(n, chunk, future.result())

    def _next(self, *, flush: bool) -> int | None:
        """Returns the stage to run: one that is overdue, else the latest with a whole chunk: lines stay short."""
        first = min(range(len(self._waiting)), key=lambda n: self._waiting[n].due)
        if self._waiting[first].due <= time.monotonic():
            return first
        whole = [n for n, waiting in enumerate(self._waiting) if waiting.count >= waiting.chunk_size]
        if whole:
            return whole[-1]
        if not flush:
            return None
        waiting = [n for n, waiting in enumerate(self._waiting) if waiting.count]
        first_running = min((n for n, _, _ in self._running), default=len(self._steps))
        # A chunk in an earlier stage may yet fill this waiting.
        return waiting[0] if waiting and waiting[0] <= first_running else None

    def _leave(self, n: int, chunk: Rows, step: Step) -> Iterator[Answers]:
        step = at_rows(step, slice(len(chunk.ids)))
        if n + 1 < len(self._waiting):
            rows = Rows(chunk.ids, (step.hidden, step.carry), chunk.due)
            self._waiting[n + 1].add(at_rows(rows, ~step.confident))
        if step.confident.any():
            yield Answers(*at_rows((chunk.ids, step.prediction), step.confident))


def _finished(step: Callable[..., Step], *arguments: Any) -> Step:
    """Runs a chunk and waits for it; on a CPU the NumPy arrays share its memory."""
    return jax.tree.map(np.asarray, jax.block_until_ready(step(*arguments)))


def inline(function: Callable[..., Any], *arguments: Any) -> Future:
    """Submits to the calling thread."""
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def submitter(workers: int) -> Submit:
    """Returns where chunks run: in the calling thread if one at a time, else in a pool of threads."""
    return inline if workers == 1 else ThreadPoolExecutor(workers, thread_name_prefix='branchy_jax').submit
