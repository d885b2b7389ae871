"""Functions that own their weights: the stages and heads of a network, each compiled and timed alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax import calling, program
from branchy_jax.criteria import Criterion, as_criterion, entropy
from branchy_jax.inference.planning.times import SegmentTimes
from branchy_jax.measure import interleaved_passes
from branchy_jax.types import Variables, num_rows

# On a CPU each argument of a compiled program costs about a microsecond, which batch 1 feels; compiling large constants
# costs memory and time.
_MOST_EMBEDDED_BYTES_ON_CPU = 2**24

CompilerOptions = Mapping[str, Any] | None
Network = tuple[Any, Variables]


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
        """Times all stages and heads, in turns."""
        seconds = interleaved_passes(self.functions(inputs), passes=passes, warmup=0, settle=1)
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
        passes: timed calls of each; their median counts.

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
    several = [Segments((model, variables), inputs, size, *settings) for size in sizes]
    return SegmentTimes.joined([segments.times(inputs, passes=passes) for segments in several])
