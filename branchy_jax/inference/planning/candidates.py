"""Candidates: executors with their settings. Forecasts propose them, and a trial eliminates all but the fastest."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from branchy_jax.inference.compiler_options import BY_NAME, may_use_all_cores, may_use_one_core, num_cores
from branchy_jax.inference.planning.times import Forecast, SegmentTimes, forecast
from branchy_jax.measure import Ratio, interleaved_passes, one_by_one, paired_ratio

# The second forecast is tried if it comes this close to the best, the network without branches if this close.
_CLOSE = 1.15
_NEARLY_AS_FAST = 1.25
# Of a piece of a batch that one worker answers: long beside starting it, short beside the whole batch.
_PIECE_MS = 2.0

_EXECUTORS = ('baseline', 'dense', 'sequential', 'compacted', 'sharded', 'onnx')

_FEW_PASSES = 3
# With fewer paired passes the range of all ratios holds their median in less than 95 % of cases.
_FEWEST_PASSES = 6
# Noise is short: where all functions together take longer, one pass tells which are clearly slower, and memory that was
# idle during the turns of others costs little.
_LONG_SECONDS = 0.3
_CLEARLY_SLOWER = 1.25
_CLEARLY_FASTER = 0.8  # than the baseline: no further passes and candidates are needed

_STEPS_TO_GO = 8  # of a plan, at any time


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An executor with its settings, and its measurements: one line of a plan's table.

    Attributes:
        name: in tables.
        executor: ``'dense'``, ``'sequential'``, ``'compacted'``, ``'sharded'``, ``'onnx'`` for ONNX Runtime, or
            ``'baseline'``, the plain jitted network without branches, which is never chosen.
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
) -> tuple[list[Candidate], list[Candidate]]:
    """Returns the candidates to try, the baseline first, and a reserve for when none of them is clearly faster.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` whether a side exit is confident of an input.
        batch_size: B.
        may_skip: whether heads may be left out, so that the network without branches is a candidate.
        mesh: the devices that share every batch.
    """
    last, share = len(confident), batch_size if mesh is None else -(-batch_size // mesh.size)
    best, *others = forecast(times, confident, share, may_skip=may_skip)
    close = [other for other in others[:1] if other[0] < _CLOSE * best[0] and not times.heavy]
    first = [Candidate('baseline', 'baseline', (last,), optimized=False)]
    if mesh is None and jax.default_backend() == 'cpu':
        first += _in_onnx_runtime(dict.fromkeys([best[1], (last,)] if may_skip else [best[1]]))
    for choice in (best, *close):
        all_options = batch_size == 1 or (choice is best and not times.heavy)
        for candidate in _executors(choice, batch_size, mesh, heavy=times.heavy):
            options = _with_compiler_options(candidate, batch_size, mesh)
            first += options if all_options else options[:1]
    rates = times.per_image(share)
    ms = share * float(rates.trunk if may_skip else rates.to_exit[-1])
    name, exits = ('last exit, optimized', (last,)) if may_skip else ('dense', tuple(range(last + 1)))
    reserve = _with_compiler_options(Candidate(name, 'dense', exits, predicted_ms=ms), batch_size, mesh)
    plain = [Candidate('last exit', 'dense', (last,), optimized=False)] if may_skip else []
    if ms < _NEARLY_AS_FAST * best[0]:
        return [*first, *reserve], plain
    return first, [*reserve, *plain]


def _in_onnx_runtime(choices: Iterable[tuple[int, ...]]) -> list[Candidate]:
    """Returns ONNX Runtime on all cores, and with one piece of the batch on each core, for several choices of exits."""
    names = {1: 'ONNX Runtime, all cores', num_cores(): f'ONNX Runtime × {num_cores()}'}
    return [Candidate(name, 'onnx', exits, workers=n) for exits in choices for n, name in names.items()]


def _with_compiler_options(candidate: Candidate, batch_size: int, mesh: Mesh | None) -> list[Candidate]:
    """Returns a candidate with each set of compiler options that may suit it, the most promising first."""
    alone, shared = batch_size == 1 or candidate.executor == 'sequential', candidate.workers > 1
    suits = {'one core': alone and may_use_one_core(), 'all cores': not (alone and shared) and may_use_all_cores()}
    options = [name for name, is_suitable in suits.items() if is_suitable and mesh is None]
    named = [dataclasses.replace(candidate, name=f'{candidate.name}, {o}', compiler_options=o) for o in options]
    return [*named, candidate]


def _executors(choice: Forecast, batch_size: int, mesh: Mesh | None, *, heavy: bool) -> Sequence[Candidate]:
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
    return [whole, hosted] if heavy else [loop, whole, hosted]  # a loop of a heavy network takes long to compile


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
        return time.monotonic() >= self._end

    def report(self, text: str, share: float | None = None) -> None:
        """Reports that a step begins; the share done is an estimate, since the number of steps is not known."""
        if self._report is not None:
            self._report(text, self._steps / (self._steps + _STEPS_TO_GO) if share is None else share)
        self._steps += 1


def try_candidates(
    candidates: Sequence[Candidate],
    reserve: Sequence[Candidate],
    build: Callable[[Candidate], Callable[[Any], Any]],
    batches: Sequence[Any],
    *,
    passes: int,
    progress: Progress,
) -> list[Candidate]:
    """Times candidates in turns, eliminates those that are clearly slower, and goes on until it is decided.

    Args:
        candidates: the baseline, then the others, the most promising first.
        reserve: tried likewise if none of these is clearly faster than the baseline.
        build: returns the function of a candidate, which takes a batch.
        batches: to time on.
        passes: of the candidates that are not eliminated, at most.
        progress: reports each step. Once its budget is spent, one candidate beside the baseline is tried.

    Returns:
        The candidates that were tried, with their measurements, the baseline first.
    """
    functions: dict[Candidate, Callable[[], None]] = {}
    for candidate in candidates:
        if len(functions) < 2 or not progress.is_over:
            progress.report(f'trying {candidate.name}')
            functions[candidate] = one_by_one(build(candidate), batches)
            functions[candidate]()  # compiles
    seconds = interleaved_passes(functions, passes=1, warmup=0)
    short = sum(values[0] for values in seconds.values()) < _LONG_SECONDS
    if short and not progress.is_over:
        seconds = interleaved_passes(functions, passes=min(_FEW_PASSES, passes), warmup=0, settle=1)
    baseline, remaining, fastest = candidates[0], list(functions), 1.0

    def ratio(candidate: Candidate) -> Ratio:
        return paired_ratio(seconds[candidate], seconds[baseline][: len(seconds[candidate])])

    def may_win(candidate: Candidate) -> bool:
        without_branches = candidate.executor == 'dense' and len(candidate.exits) == 1
        needed = candidate == baseline or (without_branches and fastest > _CLEARLY_FASTER)
        return needed or ratio(candidate).median <= _CLEARLY_SLOWER * fastest

    while len(remaining) > 1:
        fastest = min(ratio(candidate).median for candidate in remaining[1:])
        remaining, done = list(filter(may_win, remaining)), len(seconds[baseline])
        decided = done >= _FEWEST_PASSES and any(ratio(c).high < _CLEARLY_FASTER for c in remaining[1:])
        if decided or progress.is_over or done >= passes:
            break
        count = min(passes - done, _FEWEST_PASSES)
        progress.report(f'comparing {len(remaining)} candidates: {done + count} of at most {passes} passes')
        timed = {candidate: functions[candidate] for candidate in remaining}
        more = interleaved_passes(timed, passes=count, warmup=0, settle=int(short))
        seconds |= {candidate: np.concatenate([seconds[candidate], more[candidate]]) for candidate in remaining}

    def measured(candidate: Candidate) -> Candidate:
        ms, out = float(np.median(seconds[candidate])) / len(batches) * 1e3, candidate not in remaining
        return dataclasses.replace(candidate, measured_ms=ms, ratio=ratio(candidate), eliminated=out)

    results = [measured(candidate) for candidate in functions]
    if reserve and fastest > _CLEARLY_FASTER and not (progress.is_over and len(results) > 1):
        results += try_candidates([baseline, *reserve], (), build, batches, passes=passes, progress=progress)[1:]
    return results


def choose(tried: Sequence[Candidate], num_exits: int) -> Candidate:
    """Returns the fastest candidate that beats the baseline for certain; if none does, the best without branches.

    Where the network without branches answers otherwise and is no candidate, the fastest is returned.
    """
    eligible = [candidate for candidate in tried if not candidate.eliminated and candidate.executor != 'baseline']
    certain = [candidate for candidate in eligible if candidate.ratio[2] < 1]
    without = [candidate for candidate in eligible if candidate.exits == (num_exits - 1,)]
    return min(certain or without or eligible, key=lambda candidate: candidate.ratio)
