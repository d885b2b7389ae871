"""One cell: a network at a batch size, all contenders in turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import branchy_jax as bj
from experiments.peers.forcing import Forced
from experiments.peers.workers import Contender, Opened, Turn, Unavailable, Worker
from experiments.run.records import Numbers

_TURN_SECONDS = 0.3  # of a tight loop: long beside waking up, short beside what disturbs a machine
# Two classes of random weights may be as likely but for rounding, which then decides between them.
_SAME_LABELS = 0.98


@dataclasses.dataclass(frozen=True)
class Timed:
    """How one contender did.

    Attributes:
        name: its name.
        ms: an image, the median over rounds.
        ratio: its time ÷ that of what is planned here, the median of paired rounds.
        ratio_low: lower end of the 95 % interval of that median.
        ratio_high: upper end.
        shares: ``[N]`` of images that left at each exit.
        told: the settings that it ran with.
        burnt: cores that it kept busy while it waited, the median over rounds.
        ms_of_rounds: an image, of each round.
    """

    name: str
    ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    shares: Numbers
    told: str
    burnt: float
    ms_of_rounds: Numbers


@dataclasses.dataclass(frozen=True)
class Cell:
    """A network at a batch size.

    Attributes:
        network: its name.
        batch: images in a call.
        cores: that everyone worked with.
        images: in a pass.
        rounds: how many.
        shares: ``[N]`` that were forced.
        contenders: what is planned here first.
        absent: why others could not take part, by name.
    """

    network: str
    batch: int
    cores: int
    images: int
    rounds: int
    shares: Numbers
    contenders: tuple[Timed, ...]
    absent: Mapping[str, str]


def measure(
    forced: Forced, contenders: Mapping[str, Contender], *, rounds: int, seconds: float = _TURN_SECONDS
) -> Cell:
    """Lets all contenders take turns.

    Args:
        forced: the job, and who leaves where.
        contenders: by name; the first is the one that others are compared with, and the only one that may skip a head,
            so that an image leaves later than it could.
        rounds: how many turns everyone has.
        seconds: that a turn lasts at least.

    Raises:
        ValueError: a contender answers otherwise than it should.
        Unavailable: the first contender cannot take part.
    """
    job, absent = forced.job, {}
    with _opened(forced, contenders, absent, seconds) as (workers, opened):
        turns = _take_turns(workers, opened, absent, rounds)
    pace, *_ = turns.values()
    return Cell(
        network=job.network,
        batch=job.batch,
        cores=job.cores,
        images=len(forced.exits),
        rounds=rounds,
        shares=_shares(forced.exits, forced),
        contenders=tuple(_timed(name, opened[name], taken, pace, forced) for name, taken in turns.items()),
        absent=absent,
    )


def _timed(name: str, opened: Opened, turns: Sequence[Turn], pace: Sequence[Turn], forced: Forced) -> Timed:
    seconds, paced = (np.array([turn.seconds for turn in taken]) for taken in (turns, pace))
    ratio, ms = bj.measure.paired_ratio(seconds, paced), seconds / len(forced.exits) * 1e3
    return Timed(
        name=name,
        ms=float(np.median(ms)),
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        shares=_shares(opened.exits, forced),
        told=opened.told,
        burnt=float(np.median([turn.burnt for turn in turns])),
        ms_of_rounds=tuple(ms.tolist()),
    )


@contextlib.contextmanager
def _opened(
    forced: Forced, contenders: Mapping[str, Contender], absent: dict[str, str], seconds: float
) -> Iterator[tuple[dict[str, Worker], dict[str, Opened]]]:
    """Yields the workers that are ready, and what each returned; one gets ready at a time."""
    workers: dict[str, Worker] = {}
    opened: dict[str, Opened] = {}
    with contextlib.ExitStack() as stack:
        for name, contender in contenders.items():
            worker = Worker(name, contender)
            stack.callback(worker.close)
            try:
                opened[name] = worker.open(forced.job, seconds=seconds)
            except Unavailable as error:
                _leave_out(name, str(error), absent, needed=not opened)
                continue
            _check(name, opened[name], forced, may_skip=not workers)
            workers[name] = worker
            print(f'  {name} is ready: {opened[name].told}', flush=True)
        yield workers, opened


def _take_turns(
    workers: Mapping[str, Worker], opened: Mapping[str, Opened], absent: dict[str, str], rounds: int
) -> dict[str, list[Turn]]:
    """Returns the turns of those who were there to the end, in an order that rotates from round to round."""
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for number in range(rounds):
        names = list(turns)
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            try:
                turns[name].append(workers[name].turn(opened[name].passes))
            except Unavailable as error:
                _leave_out(name, f'{error} in round {number + 1}', absent, needed=name == next(iter(workers)))
                del turns[name]
    return turns


def _leave_out(name: str, reason: str, absent: dict[str, str], *, needed: bool) -> None:
    """Notes why a contender is not there; without the one that others are compared with there is no cell."""
    if needed:
        raise Unavailable(f'{name}: {reason}')
    print(f'  {name} is left out: {reason}', flush=True)
    absent[name] = reason


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


def _shares(exits: np.ndarray | None, forced: Forced) -> Numbers:
    if exits is None:
        exits = np.full_like(forced.exits, forced.num_exits - 1)
    return tuple((np.bincount(exits, minlength=forced.num_exits) / len(exits)).tolist())
