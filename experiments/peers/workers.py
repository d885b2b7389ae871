"""A process for each contender, all ready at once, of which one works at a time.

A worker waits for its turn in a blocking read. What it burns meanwhile, such as threads that spin, is measured.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from experiments.peers.job import Job, Ready

Contender = Callable[[Job], Ready]

# Of this process, if it is a worker's: who works here, and its clocks when it last went to sleep.
_ready: Ready
_slept_at: tuple[float, float]


class Unavailable(Exception):
    """A contender cannot take part, or cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """What a contender returns when it is ready.

    Attributes:
        labels: ``[M]`` that it answers.
        exits: ``[M]`` where it does; ``None`` where it knows no exit but the last.
        told: the settings that it runs with.
        passes: that last as long as a turn should.
    """

    labels: np.ndarray
    exits: np.ndarray | None
    told: str
    passes: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a clock in the worker said.

    Attributes:
        seconds: of a pass.
        burnt: seconds of all cores that the process used while it waited for its turn, for each second of waiting.
    """

    seconds: float
    burnt: float


class Worker:
    """A contender in a process of its own.

    Args:
        name: of the contender.
        contender: what makes itself ready there; a function that processes find by its name.
    """

    def __init__(self, name: str, contender: Contender) -> None:
        self.name, self._contender = name, contender
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'))

    def open(self, job: Job, *, seconds: float) -> Opened:
        """Makes the contender ready.

        Args:
            job: what is to be done.
            seconds: that a turn is to last.

        Raises:
            Unavailable: it cannot do the job.
        """
        found = self._ask(_open, self._contender, job, seconds)
        if isinstance(found, str):
            raise Unavailable(found)
        return found

    def turn(self, passes: int) -> Turn:
        """Lets it work.

        Raises:
            Unavailable: its process died.
        """
        return self._ask(_turn, passes)

    def close(self) -> None:
        """Ends the process."""
        self._process.shutdown()

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise Unavailable(f'the process of {self.name!r} died') from error


def _open(contender: Contender, job: Job, seconds: float) -> Opened | str:
    """Makes a contender ready in this process; returns why not, in words, where it cannot be."""
    global _ready
    if job.cores == 1 and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        _ready = contender(job)
        labels, exits = _ready.answers()
        passes = _ready.passes_of(seconds)
    except Exception as error:  # of whatever runtime, whose own classes of errors need not be known elsewhere
        reason = str(error).strip().partition('\n')[0]
        return f'{type(error).__name__}: {reason}'
    _sleep()
    return Opened(labels, exits, _ready.told, passes)


def _turn(passes: int) -> Turn:
    woken_at, (cores, wall) = _clocks(), _slept_at
    burnt = (woken_at[0] - cores) / (woken_at[1] - wall)
    _ready.run(1)  # memory that nothing has touched for a while is slow to touch again
    seconds = _ready.run(passes) / passes
    _sleep()
    return Turn(seconds, burnt)


def _sleep() -> None:
    global _slept_at
    _slept_at = _clocks()


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
