"""One cell: a network at a batch size. Each contender has a process; all are ready at once, and one works at a time."""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

import branchy_jax as bj
from experiments.peers.forcing import Forced
from experiments.peers.job import Job, Ready

Contender = Callable[[Job], Ready]
Row = dict[str, Any]

_TURN_SECONDS = 0.3  # of a tight loop: long beside waking up, short beside what disturbs a machine
# Two classes of random weights may be as likely but for rounding, which then decides between them.
_SAME_LABELS = 0.98

# Of this process, if it is a worker's.
_ready: Ready


class Unavailable(Exception):
    """A contender cannot take part, or cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """What a contender returns when it is ready.

    Attributes:
        labels: ``[M]`` that it answers.
        exits: ``[M]`` where it does; ``None`` where it knows no exit but the last.
        settings: that it runs with.
        passes: that last as long as a turn should.
    """

    labels: np.ndarray
    exits: np.ndarray | None
    settings: str
    passes: int


class Worker:
    """A contender in a process of its own.

    Args:
        name: of the contender.
        contender: what makes itself ready there; a function that processes find by its name.
    """

    def __init__(self, name: str, contender: Contender) -> None:
        self.name, self._contender = name, contender
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'))
        self.close = self._process.shutdown

    def open(self, job: Job, *, seconds: float) -> Opened:
        """Makes the contender ready for turns of so many seconds.

        Raises:
            Unavailable: it cannot do the job.
        """
        opened = self._ask(_open, self._contender, job, seconds)
        if isinstance(opened, str):
            raise Unavailable(opened)
        return opened

    def turn(self, passes: int) -> float:
        """Lets it work; returns the seconds of a pass, by a clock in the worker.

        Raises:
            Unavailable: its process died.
        """
        return self._ask(_turn, passes)

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
        return Opened(*_ready.answers(), _ready.settings, _ready.passes_of(seconds))
    except Exception as error:  # of whatever runtime, whose own classes of errors need not be known elsewhere
        return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def _turn(passes: int) -> float:
    _ready.run(1)  # memory that nothing has touched for a while is slow to touch again
    return _ready.run(passes) / passes


def measure(
    forced: Forced, contenders: Mapping[str, Contender], *, rounds: int, seconds: float = _TURN_SECONDS
) -> list[Row]:
    """Lets all contenders take turns, in an order that rotates from round to round.

    Args:
        forced: the job, and who leaves where.
        contenders: by name; the first is the one that others are compared with, and the only one that may skip a head,
            so that an image leaves later than it could.
        rounds: how many turns everyone has.
        seconds: that a turn lasts at least.

    Returns:
        A row per contender: ``ms`` of an image, and its ``ratio`` to the first one's time, the median over rounds with
        its 95 % interval; or why it is ``absent``.

    Raises:
        ValueError: a contender answers otherwise than it should.
        Unavailable: the first contender cannot take part.
    """
    first, absent = next(iter(contenders)), {}
    workers: dict[str, Worker] = {}
    opened: dict[str, Opened] = {}
    turns: dict[str, list[float]] = {}

    def leave_out(name: str, reason: str) -> None:
        if name == first:
            raise Unavailable(f'{name}: {reason}')
        print(f'  {name} is left out: {reason}', flush=True)
        absent[name] = reason
        turns.pop(name, None)

    with contextlib.ExitStack() as stack:
        for name, contender in contenders.items():
            workers[name] = Worker(name, contender)
            stack.callback(workers[name].close)
            try:
                opened[name] = workers[name].open(forced.job, seconds=seconds)
            except Unavailable as error:
                leave_out(name, str(error))
                continue
            _check(name, opened[name], forced, may_skip=name == first)
            turns[name] = []
            print(f'  {name} is ready: {opened[name].settings}', flush=True)
        for number in range(rounds):
            names = list(turns)
            for place in range(len(names)):
                name = names[(place + number) % len(names)]
                try:
                    turns[name].append(workers[name].turn(opened[name].passes))
                except Unavailable as error:
                    leave_out(name, f'{error} in round {number + 1}')
    job = forced.job
    cell = {'network': job.network, 'batch': job.batch, 'cores': job.cores, 'rounds': rounds}
    cell['forced'] = _shares(forced.exits, forced)
    rows = [
        {**cell, 'contender': name, **_clock(taken, turns[first], forced), 'settings': opened[name].settings}
        for name, taken in turns.items()
    ]
    for row in rows:
        row['shares'] = _shares(opened[row['contender']].exits, forced)
    return [*rows, *({**cell, 'contender': name, 'absent': reason} for name, reason in absent.items())]


def _clock(taken: list[float], first: list[float], forced: Forced) -> Row:
    ms = np.array(taken) / len(forced.exits) * 1e3
    ratio = bj.measure.paired_ratio(np.array(taken), np.array(first))
    figures = {'ms': float(np.median(ms)), 'ratio': ratio.median, 'ratio_low': ratio.low, 'ratio_high': ratio.high}
    return {**figures, 'ms_of_rounds': ms.tolist()}


def _check(name: str, opened: Opened, forced: Forced, *, may_skip: bool) -> None:
    """Refuses a contender that does other work than it should."""
    exits = opened.exits
    if exits is None:
        exits = np.full_like(forced.exits, forced.num_exits - 1)
    else:
        wrong = exits < forced.exits if may_skip else exits != forced.exits
        if wrong.any():
            raise ValueError(f'{name}: {wrong.sum()} of {len(wrong)} images leave at other exits than forced')
    same = float((opened.labels == forced.labels(exits)).mean())
    if same < _SAME_LABELS:
        raise ValueError(f"{name}: only {same:.1%} of the labels are the network's")


def _shares(exits: np.ndarray | None, forced: Forced) -> list[float]:
    if exits is None:
        exits = np.full_like(forced.exits, forced.num_exits - 1)
    return (np.bincount(exits, minlength=forced.num_exits) / len(exits)).tolist()
