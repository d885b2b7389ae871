"""The race of the likeliest ways: who is compiled, who is timed how often, who wins."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from branchy_jax.inference.planning.candidates import Candidate, Prediction, Way
from branchy_jax.inference.planning.progress import Progress
from branchy_jax.inference.steps import Executor
from branchy_jax.measure import interleaved_passes, one_by_one, paired_ratio
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables

_HEAT_PASSES = 3
# A pass of all that takes longer is told from others by one of them, noise being short. Where the baseline's alone
# does, touching memory that others' turns left cold counts for little.
_LONG_SECONDS = 0.3
_OUT_OF_THE_RACE = 1.25
_CLEARLY_FASTER = 0.8
# The least for which the range of all ratios holds their median with 95 %.
_FEWEST_PASSES = 6

Runner = tuple[Executor, Variables]
"""An executor and the weights that it runs on."""


def race(
    ways: Sequence[Prediction],
    otherwise: Sequence[Prediction],
    build: Callable[[Way], Runner],
    batches: Sequence[Array],
    policy: ExitPolicy,
    *,
    passes: int,
    progress: Progress,
) -> list[Candidate]:
    """Times ways a little, the promising ones and the baseline well; others only if nothing is clearly faster than it.

    Args:
        ways: the baseline, then the others, the likeliest first, each with the time predicted for a batch.
        otherwise: more of them, each as costly to compile.
        build: of an executor and its weights.
        batches: to time on.
        policy: when an image leaves.
        passes: of the final race at most; no more than 6 where these decide.
        progress: tells what is going on, and when time is up. Then no more ways are tried: one that is no baseline is.
    """
    predicted = dict([*ways, *otherwise])
    progress.expect(len(ways) + 2)
    functions: dict[Way, Callable[[], None]] = {}
    heat = _heat([way for way, _ in ways], functions, build, batches, policy, progress)
    if heat.fastest > _CLEARLY_FASTER and otherwise:
        more = _heat([ways[0][0], *(way for way, _ in otherwise)], functions, build, batches, policy, progress)
        heat = _Heat({**more.seconds, **heat.seconds}, {**more.paces, **heat.paces})
    finalists = heat.finalists()
    settle = _settle(heat.seconds[ways[0][0]], progress)
    final = _final({way: functions[way] for way in finalists}, ways[0][0], passes, progress, settle)
    found = []
    for way, seconds in heat.seconds.items():
        paces = heat.paces[way]
        if way in finalists:
            seconds, paces = final[way], final[ways[0][0]]
        ms = float(np.median(seconds)) / len(batches) * 1e3
        found.append(Candidate(way, predicted[way], ms, paired_ratio(seconds, paces), finalist=way in finalists))
    return found


@dataclasses.dataclass(frozen=True)
class _Heat:
    """Seconds of a few passes of each way, and of the baseline in the same passes."""

    seconds: Mapping[Way, np.ndarray]
    paces: Mapping[Way, np.ndarray]

    def slowdown(self, way: Way) -> float:
        return float(np.median(self.seconds[way]) / np.median(self.paces[way]))

    @property
    def fastest(self) -> float:
        """Time of the fastest ÷ the baseline's; infinity of none."""
        return min((self.slowdown(way) for way in self.seconds if way.kind != 'baseline'), default=float('inf'))

    def finalists(self) -> set[Way]:
        """Returns the baseline, who is nearly the fastest, and the network without branches where it may be needed."""
        close = self.fastest > _CLEARLY_FASTER
        return {
            way
            for way in self.seconds
            if way.kind == 'baseline'
            or self.slowdown(way) < _OUT_OF_THE_RACE * self.fastest
            or (close and len(way.exits) == 1)
        }


def _heat(
    ways: Sequence[Way],
    functions: dict[Way, Callable[[], None]],
    build: Callable[[Way], Runner],
    batches: Sequence[Array],
    policy: ExitPolicy,
    progress: Progress,
) -> _Heat:
    """Compiles ways and times them a little; ``functions`` remembers how to run them."""
    pace, *others = ways
    for way in ways:
        tried = any(other in functions for other in others)
        if way in functions or (progress.is_over and tried and way != pace):
            continue
        progress.tell(f'racing: {way.name}')
        functions[way] = one_by_one(functools.partial(_run, *build(way), policy), batches)
        functions[way]()  # compiles
    here = {way: functions[way] for way in ways if way in functions}
    seconds = interleaved_passes(here, passes=1, warmup=0)
    if settle := _settle(seconds[pace], progress):
        passes = _HEAT_PASSES if sum(taken[0] for taken in seconds.values()) < _LONG_SECONDS else 1
        seconds = interleaved_passes(here, passes=passes, warmup=0, settle=settle)
    return _Heat(seconds, dict.fromkeys(here, seconds[pace]))


def _settle(pace: np.ndarray, progress: Progress) -> int:
    """Returns how often a way is called before its time counts, given seconds of the baseline."""
    return int(not progress.is_over and float(pace[0]) < _LONG_SECONDS)


def _run(execute: Executor, variables: Variables, policy: ExitPolicy, batch: Array) -> ExitPrediction:
    return execute(variables, batch, policy)


def _final(
    functions: Mapping[Way, Callable[[], None]], pace: Way, passes: int, progress: Progress, settle: int
) -> dict[Way, np.ndarray]:
    """Times finalists in turns until they are told from the baseline, or time is up."""
    seconds = dict.fromkeys(functions, np.zeros(0))
    while len(seconds[pace]) < passes:
        count = 1 if progress.is_over else min(passes - len(seconds[pace]), _FEWEST_PASSES)
        more = interleaved_passes(functions, passes=count, warmup=0, settle=settle)
        seconds = {way: np.concatenate([seconds[way], more[way]]) for way in functions}
        progress.tell(f'final race: {len(seconds[pace])} of at most {passes} passes')
        ratios = [paired_ratio(seconds[way], seconds[pace]) for way in functions if way != pace]
        if progress.is_over or any(ratio.high < _CLEARLY_FASTER for ratio in ratios):
            break
    return seconds


def choose(raced: Sequence[Candidate], num_exits: int) -> Candidate:
    """Returns the fastest finalist that beats the baseline for certain; if none does, the best without branches.

    Where the network without branches answers otherwise and is no candidate, the fastest wins.
    """
    eligible = [candidate for candidate in raced if candidate.finalist and candidate.way.kind != 'baseline']
    certain = [candidate for candidate in eligible if candidate.slowdown.high < 1]
    without = [candidate for candidate in eligible if candidate.exits == (num_exits - 1,)]
    return min(certain or without or eligible, key=lambda candidate: candidate.slowdown.median)
