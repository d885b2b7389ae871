"""Candidates: executors with their settings. Forecasts propose them, and a trial eliminates all but the fastest."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from branchy_jax.inference.compiler_options import BY_NAME, num_cores, usable_options
from branchy_jax.inference.planning.times import Forecast, SegmentTimes, forecast
from branchy_jax.measure import Ratio, interleaved_passes, one_by_one, paired_ratio

# Of a piece of a batch that one worker answers: long beside starting it, short beside the whole batch.
_PIECE_MS = 2.0

_EXECUTORS = ('dense', 'sequential', 'compacted', 'sharded', 'onnx')

_FEW_PASSES = 3
# With fewer paired passes the range of all ratios holds their median in less than 95 % of cases.
_FEWEST_PASSES = 6
# Noise is short: where all functions together take longer, one pass tells which are clearly slower, and memory that was
# idle during the turns of others costs little.
_LONG_SECONDS = 0.3
_SHORTEST_PASS = 0.02  # seconds; shorter ones are repeated, since noise would decide between them
_CLEARLY_SLOWER = 1.25
_CLEARLY_FASTER = 0.8  # than the baseline: no further passes are needed
_FAR_SLOWER = 4.0  # neither noise nor an error of a forecast is as large

# Then no further candidates are compiled: those that come late in the list seldom win.
_MOST_SECONDS_OF_COMPILING = 20.0

_STEPS_TO_GO = 8  # of a plan, at any time


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An executor with its settings, and its measurements: one line of a plan's table.

    Attributes:
        name: in tables.
        executor: ``'dense'``, ``'sequential'``, ``'compacted'``, ``'sharded'``, or ``'onnx'`` for ONNX Runtime.
        exits: the exits that it asks.
        optimized: whether it runs the network as `optimize` rewrites it.
        chunk_sizes: of `compacted` and `sharded`, one for each exit asked; of the workers of `sequential`, one.
        on_host: of `compacted`.
        workers: of `compacted`, `sequential` and ``'onnx'``, whose workers share the cores evenly.
        compiler_options: ``'all cores'`` for `branchy_jax.inference.ALL_CORES`, ``'one core'`` for
            `branchy_jax.inference.ONE_CORE`, or ``''``.
        predicted_ms: of a batch, where forecast; times of XLA forecast nothing of ONNX Runtime.
        measured_ms: of a batch, once tried.
        ratio: time ÷ the baseline's from paired passes, once tried: median, and both ends of its 95 % interval.
        eliminated: whether it was clearly slower than others after a few passes.
    """

    name: str
    executor: str
    exits: tuple[int, ...]
    optimized: bool = True
    chunk_sizes: tuple[int, ...] = ()
    on_host: bool = False
    workers: int = 1
    compiler_options: str = ''
    predicted_ms: float | None = None
    measured_ms: float = 0.0
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)
    eliminated: bool = False

    def __post_init__(self) -> None:
        if self.executor not in _EXECUTORS or self.compiler_options not in BY_NAME:
            raise ValueError(f'executor: got {self.executor!r} compiled for {self.compiler_options!r}')


def candidates_to_try(
    times: SegmentTimes, confident: np.ndarray, batch_size: int, *, may_skip: bool, mesh: Mesh | None = None
) -> list[Candidate]:
    """Returns the candidates to try: the baseline, then the others, the most promising first.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` whether a side exit is confident of an input.
        batch_size: B.
        may_skip: whether heads may be left out, so that the network without branches is a candidate.
        mesh: the devices that share every batch.
    """
    last, share = len(confident), batch_size if mesh is None else -(-batch_size // mesh.size)
    best = forecast(times, confident, share, may_skip=may_skip)[0]
    rates = times.per_image(share)
    ms = share * float(rates.trunk if may_skip else rates.to_exit[-1])
    name, exits = ('last exit, optimized', (last,)) if may_skip else ('dense', tuple(range(last + 1)))
    executors = [*_executors(best, batch_size, mesh), Candidate(name, 'dense', exits, predicted_ms=ms)]
    candidates = [Candidate('baseline', 'dense', (last,), optimized=False)]
    if mesh is None and jax.default_backend() == 'cpu':
        candidates += _in_onnx_runtime(dict.fromkeys([best[1], (last,)] if may_skip else [best[1]]))
    several = [_with_compiler_options(executor, batch_size, mesh) for executor in executors]
    candidates += [options[0] for options in several]
    return candidates + [candidate for options in several for candidate in options[1:]]


def _in_onnx_runtime(choices: Iterable[tuple[int, ...]]) -> list[Candidate]:
    """Returns ONNX Runtime on all cores, and with one piece of the batch on each core, for several choices of exits."""
    names = {1: 'ONNX Runtime, all cores', num_cores(): f'ONNX Runtime × {num_cores()}'}
    return [Candidate(name, 'onnx', exits, workers=n) for exits in choices for n, name in names.items()]


def _with_compiler_options(candidate: Candidate, batch_size: int, mesh: Mesh | None) -> list[Candidate]:
    """Returns a candidate with each set of compiler options that may suit it, the most promising first."""
    alone, shared = batch_size == 1 or candidate.executor == 'sequential', candidate.workers > 1
    suits = {'one core': alone, 'all cores': not (alone and shared)}
    options = [name for name in usable_options() if suits[name] and mesh is None]
    named = [dataclasses.replace(candidate, name=f'{candidate.name}, {o}', compiler_options=o) for o in options]
    return [*named, candidate]


def _executors(choice: Forecast, batch_size: int, mesh: Mesh | None) -> list[Candidate]:
    """Returns the executors for a forecast, the most promising first."""
    ms, exits, chunk_sizes = choice
    sizes, workers = '/'.join(map(str, chunk_sizes)), num_cores() if ms > num_cores() * _PIECE_MS else 1
    whole = Candidate('sequential', 'sequential', exits, predicted_ms=ms)
    loop = Candidate(f'compacted, loop of {sizes}', 'compacted', exits, chunk_sizes=chunk_sizes, predicted_ms=ms)
    if mesh is not None:
        return [dataclasses.replace(loop, name=f'sharded × {mesh.size}, {sizes}', executor='sharded')]
    if batch_size == 1:
        return [dataclasses.replace(whole, name='staged')] if len(exits) > 1 else []
    if jax.default_backend() != 'cpu':
        return [loop, whole]
    on_host = min(workers, 2)  # each chunk may use several cores
    hosted = dataclasses.replace(loop, name=f'compacted, host × {on_host}, {sizes}', on_host=True, workers=on_host)
    if workers > 1:
        piece = -(-batch_size // (workers * round(ms / (workers * _PIECE_MS))))
        name = f'sequential × {workers}, {piece}'
        whole = dataclasses.replace(whole, name=name, chunk_sizes=(piece,), workers=workers)
    return [whole, hosted, loop]


class Progress:
    """Reports the steps of a plan, and watches its budget.

    Args:
        report: called with text and the share done as each step begins.
        budget_seconds: from now on; ``None`` has no end.
    """

    def __init__(self, report: Callable[[str, float], None] | None, budget_seconds: float | None) -> None:
        self._report, self._steps = report, 0
        self._end = np.inf if budget_seconds is None else time.monotonic() + budget_seconds

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return not self.allows(0.0)

    def allows(self, seconds: float) -> bool:
        """Whether more than this is left of the budget."""
        return time.monotonic() + seconds < self._end

    def report(self, text: str, share: float | None = None) -> None:
        """Reports that a step begins; the share done is an estimate, since the number of steps is not known."""
        if self._report is not None:
            self._report(text, self._steps / (self._steps + _STEPS_TO_GO) if share is None else share)
        self._steps += 1


def try_candidates(
    candidates: Sequence[Candidate],
    build: Callable[[Candidate], Callable[[Any], Any]],
    batches: Sequence[Any],
    *,
    passes: int,
    progress: Progress,
) -> list[Candidate]:
    """Times candidates in turns, eliminates those that are clearly slower, and goes on until it is decided.

    Args:
        candidates: the baseline, then the others, the most promising first.
        build: returns the function of a candidate, which takes a batch.
        batches: to time on.
        passes: of the candidates that are not eliminated, at most.
        progress: reports each step. Once its budget is spent, one candidate beside the baseline is tried.

    Returns:
        The candidates that were tried, with their measurements, the baseline first.
    """
    functions = _compiled(candidates, build, batches, progress)
    seconds = interleaved_passes(functions, passes=1, warmup=0)
    short = sum(values[0] for values in seconds.values()) < _LONG_SECONDS
    repeats = math.ceil(_SHORTEST_PASS / min(values[0] for values in seconds.values())) if short else 1
    settle = int(short and repeats == 1)
    functions = {candidate: functools.partial(_repeat, run, repeats) for candidate, run in functions.items()}
    if short and not progress.is_over:
        seconds = interleaved_passes(functions, passes=min(_FEW_PASSES, passes), warmup=0, settle=settle)
    baseline, *others = functions
    ratios: dict[Candidate, Ratio] = {}
    while True:
        done = len(seconds[others[0]])
        paired = {candidate: seconds[candidate] for candidate in (baseline, *others)}
        paired[baseline] = np.resize(seconds[baseline], done)  # the same passes again, where there are fewer
        ratios |= {candidate: paired_ratio(values, paired[baseline]) for candidate, values in paired.items()}
        fastest = min(ratios[candidate].median for candidate in others)
        others = [candidate for candidate in others if ratios[candidate].median <= _CLEARLY_SLOWER * fastest]
        is_clear = any(ratios[candidate].high < _CLEARLY_FASTER for candidate in others)
        decided = is_clear and done >= _FEWEST_PASSES and (len(others) == 1 or not short)
        if decided or progress.is_over or done >= passes:
            break
        count = min(passes - done, _FEWEST_PASSES)
        progress.report(f'comparing {1 + len(others)} candidates: {done + count} of at most {passes} passes')
        is_far = not short and fastest < 1 / _FAR_SLOWER
        timed = {candidate: functions[candidate] for candidate in ([] if is_far else [baseline]) + others}
        more = interleaved_passes(timed, passes=count, warmup=0, settle=settle)
        seconds |= {candidate: np.concatenate([seconds[candidate], more[candidate]]) for candidate in timed}

    def measured(candidate: Candidate) -> Candidate:
        ms = float(np.median(seconds[candidate])) / (repeats * len(batches)) * 1e3
        out = candidate not in (baseline, *others)
        return dataclasses.replace(candidate, measured_ms=ms, ratio=ratios[candidate], eliminated=out)

    return list(map(measured, functions))


def _compiled(
    candidates: Sequence[Candidate],
    build: Callable[[Candidate], Callable[[Any], Any]],
    batches: Sequence[Any],
    progress: Progress,
) -> dict[Candidate, Callable[[], None]]:
    """Compiles the passes of the first two candidates, and of the others while time is left, unless one is far slower.

    A first call also compiles, so that its time is an upper bound of a pass.
    """
    functions: dict[Candidate, Callable[[], None]] = {}
    start, least = time.monotonic(), np.inf
    for candidate in candidates:
        is_late = progress.is_over or time.monotonic() - start > _MOST_SECONDS_OF_COMPILING
        is_slow = (candidate.predicted_ms or 0.0) * len(batches) / 1e3 > _FAR_SLOWER * least
        if len(functions) < 2 or not (is_late or is_slow):
            progress.report(f'trying {candidate.name}')
            functions[candidate] = one_by_one(build(candidate), batches)
            began = time.monotonic()
            functions[candidate]()
            least = min(least, time.monotonic() - began)
    return functions


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def choose(tried: Sequence[Candidate]) -> Candidate:
    """Returns the fastest candidate that beats the baseline for certain; if none does, the best without branches.

    Where the network without branches answers otherwise and is no candidate, the fastest is returned.
    """
    remaining = [candidate for candidate in tried if not candidate.eliminated]
    certain = [candidate for candidate in remaining if candidate.ratio[2] < 1]
    without = [candidate for candidate in remaining if len(candidate.exits) == 1]
    return min(certain or without or remaining, key=lambda candidate: candidate.ratio)
