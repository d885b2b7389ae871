"""The compiled functions of one network, its weights bound, and batches of any size from a few compiled sizes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from branchy_jax import calling, program
from branchy_jax.criteria import Criterion
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.compiler_options import BY_NAME, num_cores
from branchy_jax.inference.host import HostStep, Submit, drive, submitter
from branchy_jax.inference.onnx_program import onnx_program
from branchy_jax.inference.optimize import optimize
from branchy_jax.inference.planning.candidates import Candidate
from branchy_jax.inference.planning.onnx_engine import open_session
from branchy_jax.inference.planning.times import CompilerOptions, Network, Segments, bind
from branchy_jax.inference.sharded import sharded, spread
from branchy_jax.inference.staged import dense, sequential
from branchy_jax.inference.steps import Step, are_traced, arrays_of, at_rows, network
from branchy_jax.sharding import replicate
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

# Each compiled size is four times the next one: at most four programs up to 64, and every piece of a batch fills more
# than half of its program.
_STEP = 4

_BUILDERS: dict[str, Any] = {'dense': dense, 'sequential': sequential, 'compacted': compacted, 'sharded': sharded}

Answer = Callable[..., Sequence[Array]]
"""``(inputs, policy, count) → arrays of an ExitPrediction``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """An executor bound to weights and a policy, which answers batches of any size from a few compiled sizes.

    Attributes:
        inputs: shapes of one input, every leaf ``[1, …]``.
        policy: when an input leaves.
        sizes: batch sizes to compile, descending.
        cut: cuts a batch of any size, as `pieces` does.
        together: ``(inputs, policy, count)`` answers the first ``count`` rows of a piece; the remaining rows are
            padding, and their values are unspecified.
        alone: ``(inputs, policy)`` answers one row, as `staged` does; ``None`` on a mesh.
        submit: where the pieces of a batch run.
    """

    inputs: Any
    policy: ExitPolicy
    sizes: tuple[int, ...]
    cut: Callable[[int], Iterable[tuple[int, int, int]]]
    together: Answer
    alone: Answer | None
    submit: Submit

    def __call__(self, inputs: Any, *, as_numpy: bool = False) -> ExitPrediction:
        """Answers inputs ``[B, …]`` of any B, in arrays of JAX or of NumPy."""
        if self._is_as_recorded(inputs):
            count = len(inputs)
        else:
            if are_traced(inputs):
                raise ValueError('plan: cannot run under jit, vmap or grad; trace an executor such as compacted')
            calling.check_inputs(inputs, self.inputs)
            inputs = jax.tree.map(lambda leaf: leaf if _is_uncommitted(leaf) else np.asarray(leaf), inputs)
            count = num_rows(inputs)
        if count == 1 and self.alone is not None:
            return self._prediction(self.alone(inputs, self.policy), as_numpy)
        cuts = list(self.cut(max(count, 1)))
        if cuts == [(0, count, count)]:
            return self._prediction(self.together(inputs, self.policy, count), as_numpy)
        inputs = jax.tree.map(np.asarray, inputs) if count else self._zeros(1)
        submit = self.submit if len(cuts) > 1 else functools.partial
        results = [submit(self._answer_piece, inputs, *cut) for cut in cuts]
        parts = [result() for result in results]
        return self._prediction([np.concatenate(rows)[:count] for rows in zip(*parts, strict=True)], as_numpy)

    def warm_up(self) -> None:
        """Compiles all that batches of any size need; no row leaves early, so that every stage runs."""
        never = self.policy.replace(thresholds=jnp.full_like(self.policy.thresholds, -jnp.inf))
        run = dataclasses.replace(self, policy=never)
        for size in {1, *self.sizes}:
            jax.block_until_ready(run(self._zeros(size)))

    def _is_as_recorded(self, inputs: Any) -> bool:
        """Whether inputs are one array of the recorded shape and dtype: such a call needs no further check."""
        spec = self.inputs
        if not (isinstance(spec, jax.ShapeDtypeStruct) and _is_uncommitted(inputs) and inputs.ndim):
            return False
        return inputs.dtype == spec.dtype and inputs.shape[1:] == spec.shape[1:]

    def _answer_piece(self, inputs: Any, start: int, stop: int, size: int) -> list[np.ndarray]:
        """Answers rows of a batch, padded with the last one: in NumPy, which compiles nothing."""
        present = stop - start
        if present == 1 and self.alone is not None:
            arrays = self.alone(at_rows(inputs, slice(start, stop)), self.policy)
        else:
            rows = slice(start, stop) if present == size else np.minimum(np.arange(start, start + size), stop - 1)
            arrays = self.together(at_rows(inputs, rows), self.policy, present)
        return [np.asarray(values)[:present] for values in arrays]

    def _prediction(self, arrays: Sequence[Array], as_numpy: bool) -> ExitPrediction:
        if as_numpy:
            return ExitPrediction(*map(np.asarray, arrays))
        if isinstance(arrays[0], np.ndarray):
            # A compiled function converts them in a third of device_put's time. JAX compiles it once for each size.
            as_jax = _identity if len(arrays[0]) in {1, *self.sizes} else jax.device_put
            arrays = as_jax(arrays)
        return ExitPrediction(*arrays)

    def _zeros(self, size: int) -> Any:
        return jax.tree.map(lambda spec: np.zeros((size, *spec.shape[1:]), spec.dtype), self.inputs)


@jax.jit
def _identity(arrays: Sequence[Array]) -> Sequence[Array]:
    return arrays


def _is_uncommitted(leaf: Any) -> bool:
    """Whether an array is bound to no device. For an array that is bound to one, JAX would compile another program."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and not leaf.committed
    return isinstance(leaf, np.ndarray)


def sizes_up_to(batch_size: int) -> tuple[int, ...]:
    """Returns the sizes to compile for batches up to ``batch_size``: itself, a quarter of it, and so on down to 1.

    Example:
        >>> sizes_up_to(64)
        (64, 16, 4, 1)
    """
    return (1,) if batch_size == 1 else (batch_size, *sizes_up_to(max(1, batch_size // _STEP)))


def pieces(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts a batch into pieces; yields the first row of each, the row behind it, and the size that it is padded to.

    A piece fills more than half of its size, except where no smaller size is compiled.

    Args:
        count: B.
        sizes: descending.

    Example:
        >>> list(pieces(37 + 9, (32, 8, 1)))
        [(0, 32, 32), (32, 40, 8), (40, 46, 8)]
    """
    start = 0
    for size in sizes:
        while start < count and (2 * (count - start) > size or size == sizes[-1]):
            stop = min(start + size, count)
            yield start, stop, size
            start = stop


def shares(count: int, workers: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a batch into a piece for each worker, or more of at most ``most`` rows; yields what `pieces` does.

    Example:
        >>> list(shares(5, workers=2, most=4))
        [(0, 3, 3), (3, 5, 2)]
    """
    size = min(most, -(-count // workers))
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, stop, stop - start


class Programs:
    """The compiled functions of one network. Plans of the network share them, and they are freed with the last plan.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        inputs: shapes of one input, every leaf ``[1, …]``.
        mesh: the devices that share every batch; ``None`` is one device.
    """

    def __init__(self, model: Any, variables: Variables, inputs: Any, mesh: Mesh | None) -> None:
        self.model, self.variables, self.inputs, self.mesh = model, variables, inputs, mesh
        self.stages = program.stages(model, variables, inputs)
        self._functions: dict[Any, Any] = {}

    @functools.cached_property
    def optimized(self) -> Network:
        """The rewritten network and its variables; of one that runs at some batch sizes alone, the network itself."""
        if self.stages.fixed_because:
            return self.model, self.variables
        return optimize(self.model, self.variables, inputs=self.inputs)

    def serve(self, other: 'Programs') -> bool:
        """Whether these programs answer what others would: of the same network, weights, inputs and devices."""
        ours, theirs = (list(map(id, jax.tree.leaves(programs.variables))) for programs in (self, other))
        same = ours == theirs and self.model == other.model
        return bool(same and self.inputs == other.inputs and self.mesh == other.mesh)

    def segments(self, size: int, criterion: Criterion, compiler_options: CompilerOptions) -> Segments:
        """Returns the stages and heads of the rewritten network at one batch size."""
        settings = size, criterion
        return self._once(settings, lambda: Segments(self.optimized, self.inputs, *settings, compiler_options))

    def runner(self, candidate: Candidate, policy: ExitPolicy, batch_size: int) -> Runner:
        """Builds a candidate.

        Args:
            candidate: the executor and its settings.
            policy: when an input leaves; arrays of JAX.
            batch_size: of the calls to come; larger batches are cut.
        """
        if candidate.executor == 'onnx':
            return self._onnx_runner(candidate, policy, batch_size)
        together, alone = self._together(candidate), None
        sizes: tuple[int, ...] = (batch_size,)
        if self.mesh is not None:
            sizes = (-(-batch_size // self.mesh.size) * self.mesh.size,)
        else:
            alone = self._together(dataclasses.replace(candidate, executor='sequential', on_host=False))
            if candidate.executor != 'compacted':  # there padding runs through no stage
                sizes = sizes_up_to(*(candidate.chunk_sizes or sizes))
        workers = candidate.workers if candidate.executor == 'sequential' else 1
        cut = functools.partial(pieces, sizes=sizes)
        return Runner(self.inputs, policy, sizes, cut, together, alone, submitter(workers))

    def _onnx_runner(self, candidate: Candidate, policy: ExitPolicy, batch_size: int) -> Runner:
        """Builds a runner that owns its session; plans of other thresholds share the content of the file."""
        key = 'onnx', candidate.exits, batch_size > 1, policy.criterion
        make = functools.partial(onnx_program, batch=batch_size > 1, exits=candidate.exits)
        content = self._once(key, lambda: make(self.model, self.variables, policy, self.inputs))
        together = open_session(content, policy, self.inputs, threads=num_cores() // candidate.workers)
        cut = functools.partial(shares, workers=candidate.workers, most=batch_size)
        return Runner(self.inputs, policy, (batch_size,), cut, together, None, submitter(candidate.workers))

    def _together(self, candidate: Candidate) -> Answer:
        settings = candidate.exits, candidate.optimized, candidate.compiler_options
        if candidate.on_host:
            steps = self._once(('steps', *settings), lambda: self._host_steps(candidate))
            sizes, workers = candidate.chunk_sizes, candidate.workers

            def answer(inputs: Any, policy: ExitPolicy, count: int) -> tuple[Array, ...]:
                return arrays_of(drive(steps, inputs, policy, sizes, workers=workers, count=count))

            return answer
        chunks = candidate.chunk_sizes if candidate.executor in ('compacted', 'sharded') else ()
        bound = self._once((candidate.executor, chunks, *settings), lambda: self._bind(candidate))
        mesh = self.mesh
        return bound if mesh is None else lambda inputs, *arguments: bound(spread(inputs, mesh), *arguments)

    def _bind(self, candidate: Candidate) -> Answer:
        """Compiles the program of an executor."""
        model, variables = self._network(candidate)
        chunks = {'chunk_size': candidate.chunk_sizes}
        options: Any = {'compacted': chunks, 'sharded': {**chunks, 'mesh': self.mesh}}.get(candidate.executor, {})
        executor = _BUILDERS[candidate.executor](model, exits=candidate.exits, **options)

        def answer(variables: Variables, inputs: Any, policy: ExitPolicy, count: Any = None) -> Any:
            result = executor.program(variables, inputs, policy, *([count] if options else []))
            return arrays_of(result[0] if candidate.executor == 'sharded' else result)

        return bind(answer, variables, BY_NAME[candidate.compiler_options], embed=self.mesh is None)

    def _host_steps(self, candidate: Candidate) -> list[Callable[..., Step]]:
        """Compiles the steps that the host starts, ``(hidden, carry, policy) → Step``."""
        model, variables = self._network(candidate)
        asked, options = network(model, candidate.exits, None), BY_NAME[candidate.compiler_options]
        steps = [HostStep(asked, n, self.inputs) for n in range(len(candidate.exits))]
        return [bind(step.program, variables, options) for step in steps]

    def _network(self, candidate: Candidate) -> Network:
        model, variables = self.optimized if candidate.optimized else (self.model, self.variables)
        return model, variables if self.mesh is None else replicate(self.mesh, variables)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._functions:
            self._functions[key] = make()
        return self._functions[key]
