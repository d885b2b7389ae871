"""Times one cell, a network at a batch size. Each contender has a process; they take turns, one at a time."""

import contextlib
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

import branchy_jax as bj
from experiments.peers.forcing import Forced
from experiments.peers.job import Job, Ready, open_contender, take_turn
from experiments.run.report import Row, of_ratio

Contender = Callable[[Job], Ready]

_TURN_SECONDS = 0.2  # of a tight loop: long beside waking up, short beside what disturbs a machine
# Two classes of random weights may be as likely but for rounding, which then decides between them.
_SAME_LABELS = 0.98


def measure(
    forced: Forced, contenders: Mapping[str, Contender], *, rounds: int, seconds: float = _TURN_SECONDS
) -> list[Row]:
    """Lets all contenders take turns, in an order that rotates from round to round.

    Args:
        forced: the job, and who leaves where.
        contenders: by name; the others are compared with the first. Those whose names start with its name may skip a
            head, so that an image leaves later than it could.
        rounds: turns of every contender.
        seconds: that a turn lasts at least.

    Returns:
        A row per contender: ``ms`` of an image, and its ``ratio`` to the first one's time, the median over rounds with
        its 95 % interval; or why it is ``absent``.

    Raises:
        ValueError: a contender has wrong exits or labels.
        RuntimeError: the first contender cannot take part.
    """
    first, absent = next(iter(contenders)), {}
    passes: dict[str, int] = {}
    settings: dict[str, Row] = {}
    turns: dict[str, list[float]] = {}

    def leave_out(name: str, reason: str) -> None:
        if name == first:
            raise RuntimeError(f'{name}: {reason}')
        print(f'  {name} is left out: {reason}', flush=True)
        absent[name] = reason
        turns.pop(name, None)

    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context('spawn')
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in contenders}
        for name, contender in contenders.items():
            opened = _ask(processes[name], open_contender, contender, forced.job, seconds)
            if isinstance(opened, str):
                leave_out(name, opened)
                continue
            labels, exits, described, passes[name] = opened
            exits = _checked(name, labels, exits, forced, may_skip=name.startswith(first))
            settings[name], turns[name] = {'settings': described, 'shares': _shares(exits, forced)}, []
            print(f'  {name} is ready: {described}', flush=True)
        for number in range(rounds):
            names = list(turns)
            for name in (*names[number % len(names) :], *names[: number % len(names)]):
                taken = _ask(processes[name], take_turn, passes[name])
                if isinstance(taken, str):
                    leave_out(name, f'{taken} in round {number + 1}')
                else:
                    turns[name].append(taken)
    job = forced.job
    cell = {'network': job.network, 'batch': job.batch, 'cores': job.cores, 'rounds': rounds}
    cell['forced'] = _shares(forced.exits, forced)
    rows = [
        {**cell, 'contender': name, **_clock(taken, turns[first], forced), **settings[name]}
        for name, taken in turns.items()
    ]
    return [*rows, *({**cell, 'contender': name, 'absent': reason} for name, reason in absent.items())]


def _ask(process: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in the process of a contender; in words, that the process died."""
    try:
        return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        return 'its process died'


def _clock(taken: list[float], first: list[float], forced: Forced) -> Row:
    ms = np.array(taken) / len(forced.exits) * 1e3
    ratio = of_ratio('ratio', bj.measure.paired_ratio(np.array(taken), np.array(first)))
    return {'ms': float(np.median(ms)), **ratio, 'ms_of_rounds': ms.tolist()}


def _checked(name: str, labels: np.ndarray, left: np.ndarray | None, forced: Forced, *, may_skip: bool) -> np.ndarray:
    """Returns the exits of a contender, for ``None`` the last; refuses a contender whose exits or labels are wrong."""
    exits = np.full_like(forced.exits, len(forced.logits) - 1) if left is None else left
    wrong = exits < forced.exits if may_skip else (exits != forced.exits) & (left is not None)
    if wrong.any():
        raise ValueError(f'{name}: {wrong.sum()} of {len(wrong)} images leave at other exits than forced')
    same = float((labels == forced.labels(exits)).mean())
    if same < _SAME_LABELS:
        raise ValueError(f"{name}: only {same:.1%} of the labels are the network's")
    return exits


def _shares(exits: np.ndarray, forced: Forced) -> list[float]:
    return (np.bincount(exits, minlength=len(forced.logits)) / len(exits)).tolist()
