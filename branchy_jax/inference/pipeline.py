"""Compaction from the host: stages with a line of waiting rows before each, run whenever one holds a chunk."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import struct

from branchy_jax.inference.steps import Step, at_rows
from branchy_jax.types import ExitPolicy, ExitPrediction

Steps = Sequence[Callable[..., Step]]
"""``(hidden, carry, policy) → Step`` of every exit asked, jitted."""
Policy = Callable[[], ExitPolicy]
"""Says when an image leaves, anew for every chunk."""
Submit = Callable[..., Callable[[], Any]]
"""``(function, *args)`` to a function that waits for the result and returns it."""


@struct.dataclass
class Rows:
    """Images on their way through the network.

    Attributes:
        ids: ``[M]`` which images these are.
        due: ``[M]`` from when on each of them waits for no others, in seconds of `time.monotonic`.
        values: pytree of NumPy arrays ``[M, …]``: hidden value and carry.
    """

    ids: np.ndarray
    due: np.ndarray
    values: Any


@dataclasses.dataclass(frozen=True)
class Answers:
    """Images that have left the network.

    Attributes:
        ids: ``[M]`` which images these are.
        prediction: of those.
    """

    ids: np.ndarray
    prediction: ExitPrediction


class Pipeline:
    """A network being run on images that come and go. Between runs fewer than a chunk of rows wait before each stage.

    Args:
        steps: of the exits asked.
        policy: when an image leaves.
        chunk_sizes: one per step.
        workers: how many chunks run at the same time, in threads if several.
    """

    def __init__(self, steps: Steps, policy: Policy, chunk_sizes: Sequence[int], *, workers: int) -> None:
        self._steps, self._policy, self._sizes = steps, policy, chunk_sizes
        self._waiting: list[list[Rows]] = [[] for _ in steps]  # before each stage, in the blocks in which they came
        self._workers, self._submit = workers, submitter(workers)
        self._running: deque[tuple[int, Rows, Callable[[], Step]]] = deque()

    def add(self, ids: np.ndarray, images: Any, due: Any = np.inf) -> None:
        """Lets images wait for the first stage, from ``due`` on, one time or one for each, for no others."""
        if len(ids):
            self._waiting[0].append(Rows(ids, np.broadcast_to(due, ids.shape), (images, None)))

    @property
    def due(self) -> float:
        """From when on a waiting image waits for no others; infinity if none waits."""
        return min(map(_due, self._waiting))

    def run(self, *, flush: bool = False) -> Iterator[Answers]:
        """Runs whole chunks, and what is due, until none is left; with ``flush`` whatever waits, too."""
        while True:
            while len(self._running) < self._workers and (n := self._next(flush=flush)) is not None:
                rows, size = self._take(n), self._sizes[n]
                values = rows.values
                if len(rows.ids) < size:  # the last row fills the chunk: any other filling might be slow, as NaN is
                    values = at_rows(values, np.minimum(np.arange(size), len(rows.ids) - 1))
                self._running.append((n, rows, self._submit(_finished, self._steps[n], *values, self._policy())))
            if not self._running:
                return
            n, rows, result = self._running.popleft()
            step = at_rows(result(), slice(len(rows.ids)))
            if not step.confident.all():  # never after the last stage
                remaining = dataclasses.replace(rows, values=(step.hidden, step.carry))
                self._waiting[n + 1].append(at_rows(remaining, ~step.confident))
            if step.confident.any():
                yield Answers(*at_rows((rows.ids, step.prediction), step.confident))

    def _next(self, *, flush: bool) -> int | None:
        """Returns the stage to run: one that is overdue, else the latest with a whole chunk: lines stay short."""
        first = min(range(len(self._steps)), key=lambda n: _due(self._waiting[n]))
        if _due(self._waiting[first]) <= time.monotonic():
            return first
        counts = [sum(len(block.ids) for block in blocks) for blocks in self._waiting]
        whole = [n for n, count in enumerate(counts) if count >= self._sizes[n]]
        if whole:
            return whole[-1]
        first_running = min((n for n, _, _ in self._running), default=len(self._steps))
        waiting = next((n for n, count in enumerate(counts) if count), None)
        # A chunk in an earlier stage may yet fill this waiting.
        return waiting if flush and waiting is not None and waiting <= first_running else None

    def _take(self, n: int) -> Rows:
        """Returns the next rows of a stage, at most a chunk."""
        first, *others = self._waiting[n]
        if others and len(first.ids) < self._sizes[n]:
            first, others = jax.tree.map(lambda *leaves: np.concatenate(leaves), first, *others), []
        rest = at_rows(first, slice(self._sizes[n], None))
        self._waiting[n] = [rest, *others] if len(rest.ids) else others
        return at_rows(first, slice(self._sizes[n]))


def _finished(step: Callable[..., Step], *arguments: Any) -> Step:
    """Runs a chunk and waits for it; on a CPU the NumPy arrays share its memory."""
    return jax.tree.map(np.asarray, jax.block_until_ready(step(*arguments)))


def _due(blocks: list[Rows]) -> float:
    return min((block.due.min() for block in blocks), default=float('inf'))


def submitter(workers: int) -> Submit:
    """Returns where chunks run: in the calling thread when asked for the result if one at a time, else in threads."""
    if workers == 1:
        return functools.partial
    pool = ThreadPoolExecutor(workers, thread_name_prefix='branchy_jax')
    return lambda *call: pool.submit(*call).result
