"""Times of stages and heads, each compiled and timed alone, and what they forecast for every choice of exits."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax import calling, program
from branchy_jax.criteria import Criterion, as_criterion, entropy
from branchy_jax.measure import interleaved_passes
from branchy_jax.types import StageCosts, Variables, num_rows

_RESAMPLED_BATCHES = 32
_MOST_SIDE_EXITS = 10
_ENOUGH_SECONDS = 3.0  # of timing: noise is short beside them
_MOST_PARTS = 64

Forecast = tuple[float, tuple[int, ...], tuple[int, ...]]
"""Milliseconds of a batch, the exits asked, and the chunk size of each."""


# On a CPU each argument of a compiled program costs about a microsecond, which batch 1 feels; compiling large constants
# costs memory and time.
_MOST_EMBEDDED_BYTES_ON_CPU = 2**24

CompilerOptions = Mapping[str, Any] | None
Network = tuple[Any, Variables]


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentTimes:
    """Milliseconds of stages and heads for whole batches.

    Attributes:
        batch_sizes: ``[S]`` ascending.
        stages: ``[S, N]`` ms of stage n for a batch of that size.
        exits: ``[S, N]`` ms of head n and its uncertainty.
    """

    batch_sizes: np.ndarray
    stages: np.ndarray
    exits: np.ndarray

    def per_image(self, batch_size: int) -> StageCosts:
        """Returns ms per input at any batch size, interpolated between measured sizes on a logarithmic axis.

        Above the largest size its rate holds. A batch below the smallest size takes as long as one of that size.
        """
        at = functools.partial(np.interp, np.log(batch_size), np.log(self.batch_sizes))
        padding = max(1.0, self.batch_sizes[0] / batch_size)

        def rates(ms: np.ndarray) -> np.ndarray:
            return np.array([at(rate) for rate in (ms / self.batch_sizes[:, None] * padding).T])

        return StageCosts(rates(self.stages), rates(self.exits))

    def best(self) -> StageCosts:
        """Returns ms per input of every stage with its head at the batch size that suits both best.

        ``branchy_jax.costs.expected_cost(times.best(), exit_fractions)`` is the *time limit* of an operating point:
        the time of an executor without overhead.
        """
        stages, exits = self.stages / self.batch_sizes[:, None], self.exits / self.batch_sizes[:, None]
        fastest = np.argmin(stages + exits, axis=0), np.arange(stages.shape[1])
        return StageCosts(stages[fastest], exits[fastest])

    @classmethod
    def joined(cls, several: Sequence['SegmentTimes']) -> 'SegmentTimes':
        """Returns times at several batch sizes, ascending."""
        ordered = sorted(several, key=lambda times: times.batch_sizes[0])
        return cls(*map(np.concatenate, zip(*(vars(times).values() for times in ordered), strict=True)))


def bind(
    function: Callable[..., Any], variables: Variables, compiler_options: CompilerOptions, *, embed: bool = True
) -> Callable[..., Any]:
    """Compiles ``function(variables, …)`` with its variables; on a CPU up to 16 MiB of them become constants.

    The jitted function is a new one, so that its compiled programs and the variables are freed with it.

    Args:
        function: to compile.
        variables: its first argument.
        compiler_options: for `jax.jit`.
        embed: whether variables may become constants.
    """
    options = None if compiler_options is None else dict(compiler_options)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if embed and jax.default_backend() == 'cpu' and total <= _MOST_EMBEDDED_BYTES_ON_CPU:
        return jax.jit(lambda *arguments: function(variables, *arguments), compiler_options=options)
    return functools.partial(jax.jit(lambda *arguments: function(*arguments), compiler_options=options), variables)


class Segments:
    """The stages and heads of a network at one batch size, each compiled alone.

    Args:
        network: a model with N exits, and its variables.
        inputs: an example, or shapes.
        size: the batch size.
        criterion: its time counts as the head's.
        compiler_options: for `jax.jit`.
    """

    def __init__(
        self, network: Network, inputs: Any, size: int, criterion: Criterion, compiler_options: CompilerOptions = None
    ) -> None:
        stages = program.stages(*network, calling.with_batch(inputs, size))

        def head(n: int, variables: Variables, hidden: Any, carry: Any) -> Any:
            return criterion(stages.run_exit(n, variables, hidden), carry, n)[1:]

        def bound(function: Callable[..., Any], n: int) -> Callable[..., Any]:
            return bind(functools.partial(function, n), network[1], compiler_options)

        self.size, self._parts = size, [(bound(stages.run_stage, n), bound(head, n)) for n in stages.exits]

    def functions(self, inputs: Any, start: int = 0) -> dict[Any, Callable[[], Any]]:
        """Runs rows of the inputs through all stages and heads, and returns functions that run each of them again.

        Args:
            inputs: ``[M, …]``.
            start: the first of the rows, which are as many as the batch size; after the last comes row 0 again.

        Returns:
            ``('stage' or 'exit', n)`` to a function without arguments; a head's returns uncertainty and carry.
        """
        rows = np.arange(start, start + self.size) % num_rows(inputs)
        hidden, carry = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[rows]), inputs), None
        functions: dict[Any, Callable[[], Any]] = {}
        for n, (stage, head) in enumerate(self._parts):
            functions['stage', n] = functools.partial(stage, hidden)
            hidden = stage(hidden)
            functions['exit', n] = functools.partial(head, hidden, carry)
            carry = head(hidden, carry)[1]
        return functions

    def uncertainty(self, inputs: Any) -> tuple[np.ndarray, bool]:
        """Returns the uncertainty ``[N, M]`` of every exit, and whether the criterion uses earlier exits."""
        count, batches, looks_back = num_rows(inputs), [], False
        for start in range(0, count, self.size):
            functions = self.functions(inputs, start)
            results = [functions['exit', n]() for n in range(len(self._parts))]
            batches.append(np.stack([np.asarray(uncertainty) for uncertainty, _ in results]))
            looks_back = bool(jax.tree.leaves([carry for _, carry in results]))
        return np.concatenate(batches, axis=1)[:, :count], looks_back

    def times(self, inputs: Any, *, passes: int) -> SegmentTimes:
        """Times all stages and heads, in turns: once, and again as often as given or as 3 seconds allow."""
        functions = self.functions(inputs)
        seconds = interleaved_passes(functions, passes=1, warmup=0)
        took = float(sum(values[0] for values in seconds.values()))
        most = int(_ENOUGH_SECONDS / took)
        if most > 1:
            settle = int(2 * passes <= most)
            seconds = interleaved_passes(functions, passes=min(passes, most), warmup=0, settle=settle)
        ms = {part: float(np.median(values)) * 1e3 for part, values in seconds.items()}
        stages, exits = ([[ms[kind, n] for n in range(len(self._parts))]] for kind in ('stage', 'exit'))
        return SegmentTimes(np.array([self.size]), np.array(stages), np.array(exits))


def segment_times(
    model: Any,
    variables: Variables,
    inputs: Any,
    *,
    batch_sizes: Sequence[int],
    criterion: Any = entropy,
    compiler_options: Mapping[str, Any] | None = None,
    passes: int = 5,
) -> SegmentTimes:
    """Measures every stage and every head alone, in turns, at several batch sizes.

    Args:
        model: a network with N exits, in the form in which it runs (`optimize` it first).
        variables: of ``model``.
        inputs: ``[M, …]`` normalised.
        batch_sizes: to measure at.
        criterion: its time counts as the head's.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.
        passes: timed calls of each, at most; fewer of networks for which they would take longer than 3 seconds. Their
            median counts.

    Returns:
        Milliseconds ``.stages [S, N]`` and ``.exits [S, N]`` at ``.batch_sizes [S]``. ``.per_image(size)`` interpolates
        and ``.best()`` takes the best size of each; both return ``StageCosts``.

    Raises:
        ValueError: no inputs, or a batch size below 1.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), np.ones((2, 28, 28, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> segment_times(model, variables, images, batch_sizes=[1, 2], passes=1).stages.shape
        (2, 2)
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1 or num_rows(inputs) == 0:
        raise ValueError(f'batch_sizes: got {list(batch_sizes)} for {num_rows(inputs)} inputs; give sizes and inputs')
    settings = as_criterion(criterion), compiler_options
    several = (Segments((model, variables), inputs, size, *settings) for size in sizes)
    return SegmentTimes.joined([segments.times(inputs, passes=passes) for segments in several])


def forecast(times: SegmentTimes, confident: np.ndarray, batch_size: int, *, may_skip: bool = True) -> list[Forecast]:
    """Computes for every choice of exits the best chunk sizes and the time of a batch, fastest first.

    Batches are drawn from the given inputs, so that the remainders of chunks count as they will occur. A head that is
    confident of no input is in no choice; of more than ten side exits, only the ten that are most often confident are.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` whether a side exit is confident of an input.
        batch_size: B.
        may_skip: whether exits may be left out.
    """
    last, count = confident.shape
    rows = np.random.default_rng(0).integers(count, size=(_RESAMPLED_BATCHES, batch_size))
    often = np.argsort(-confident.sum(axis=1), kind='stable')[:_MOST_SIDE_EXITS]
    side = [n for n in range(last) if n in often and confident[n].any()]
    choices: list[tuple[int, ...]] = [tuple(range(last))]
    if may_skip:
        choices = [chosen for size in range(len(side) + 1) for chosen in itertools.combinations(side, size)]
    return sorted(_forecast(times, confident[:, rows], (*exits, last)) for exits in choices)


def _forecast(times: SegmentTimes, confident: np.ndarray, exits: tuple[int, ...]) -> Forecast:
    """Computes the time for one choice of exits, from batches ``confident [N - 1, R, B]``."""
    waiting, total, start = np.ones(confident.shape[1:], bool), 0.0, 0
    chunk_sizes: list[int] = []
    for n in exits:
        counts = waiting.sum(axis=1)
        options = []
        for size in _sizes(times, counts, confident.shape[2]):
            rates = times.per_image(size)
            ms = rates.stages[start : n + 1].sum() + rates.exits[n]
            options.append((float(np.mean(np.ceil(counts / size)) * size * ms), size))
        ms, size = min(options)
        total, start = total + ms, n + 1
        chunk_sizes.append(size)
        waiting &= ~confident[n] if n < len(confident) else True
    return total, exits, tuple(chunk_sizes)


def _sizes(times: SegmentTimes, counts: np.ndarray, batch_size: int) -> list[int]:
    """Returns the chunk sizes to consider: the measured ones, and those that split the usual count evenly."""
    usual = max(1, round(float(np.median(counts))))
    even = {-(-usual // parts) for parts in range(1, _MOST_PARTS + 1)}
    return sorted(size for size in {*times.batch_sizes.tolist(), *even, batch_size} if size <= batch_size)
