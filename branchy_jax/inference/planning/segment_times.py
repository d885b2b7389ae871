"""What each stage and each head costs on this device, measured alone at several batch sizes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import struct

from branchy_jax.costs import StageCosts
from branchy_jax.criteria import entropy
from branchy_jax.criteria.criterion import Criterion
from branchy_jax.inference.compiler_options import Options, in_order, jit_with
from branchy_jax.inference.steps import compiled_once
from branchy_jax.measure import interleaved_passes
from branchy_jax.models.branchy import BranchyNet, run_segment
from branchy_jax.models.compose import Hidden
from branchy_jax.types import Array, Variables, num_rows

_HEAVY_MS = 25.0  # of eight images
# What of their time a heavy network is supposed to need for fewer images than were measured, too; not measured, since
# such networks take long to compile.
_FIXED_SHARE = 0.25


@struct.dataclass
class SegmentTimes:
    """Milliseconds of stages and heads for whole batches.

    Attributes:
        batch_sizes: ``[S]`` ascending.
        stages: ``[S, N]`` ms of trunk stage n for that many images.
        exits: ``[S, N]`` ms of head n and its uncertainty.
    """

    batch_sizes: np.ndarray
    stages: np.ndarray
    exits: np.ndarray

    def per_image(self, batch_size: int) -> StageCosts:
        """Returns ms per image at any batch size, interpolated between the measured ones on a logarithmic axis.

        Above the largest that of the largest counts. Fewer images than the smallest are taken to need as long as these;
        of a heavy network, a quarter of that and their share of the rest.
        """
        at = functools.partial(np.interp, np.log(batch_size), np.log(self.batch_sizes))
        fixed = _FIXED_SHARE if self.heavy else 1.0
        padding = 1 + fixed * max(0.0, self.batch_sizes[0] / batch_size - 1)
        rates = [values / self.batch_sizes[:, None] * padding for values in (self.stages, self.exits)]
        return StageCosts(*(np.array([at(rate) for rate in rates_of.T]) for rates_of in rates))

    @property
    def heavy(self) -> bool:
        """Tells a network of which eight images take so long that starting a chunk costs nothing in comparison."""
        rows = int(np.abs(self.batch_sizes - 8).argmin())
        ms = (self.stages[rows] + self.exits[rows]).sum() / self.batch_sizes[rows] * 8
        return bool(ms > _HEAVY_MS)

    @property
    def best_sizes(self) -> np.ndarray:
        """``[N]`` the batch size at which a stage with its head takes least per image."""
        return self.batch_sizes[self._best_rows]

    @property
    def _best_rows(self) -> np.ndarray:
        return np.argmin((self.stages + self.exits) / self.batch_sizes[:, None], axis=0)

    def best(self) -> StageCosts:
        """Returns ms per image of every stage with its head at the batch size that suits the two of them best.

        ``branchy_jax.costs.expected_cost(times.best(), exit_fractions)`` is the *time limit* of an operating point:
        what an executor without any overhead would need.
        """
        rows, exit_numbers = self._best_rows, np.arange(self.stages.shape[1])
        return StageCosts(*(values[rows, exit_numbers] / self.best_sizes for values in (self.stages, self.exits)))


def segment_functions(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    batch_size: int,
    *,
    criterion: Criterion = entropy,
    compiler_options: Mapping[str, Any] | None = None,
) -> dict[tuple[str, int, int], Callable[[], Any]]:
    """Returns functions that run one stage or one head on the real input it has for the first images.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]``, repeated where ``batch_size`` asks for more.
        batch_size: of every call.
        criterion: how unsure an exit is; its time counts as the head's.
        compiler_options: for `jax.jit`.

    Returns:
        ``('stage' or 'exit', n, batch_size)`` to a function of no arguments.
    """
    rows = np.arange(batch_size) % num_rows(images)
    functions: dict[tuple[str, int, int], Callable[[], Any]] = {}
    hidden = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[rows]), images)
    for n in range(model.num_exits):
        stage, head = (_segment(model, kind, n, in_order(compiler_options)) for kind in ('stage', 'exit'))
        functions['stage', n, batch_size] = functools.partial(stage, variables, hidden)
        hidden = stage(variables, hidden)
        functions['exit', n, batch_size] = functools.partial(head, variables, hidden, criterion)
    return functions


def compile_segments(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    batch_sizes: Sequence[int],
    *,
    criterion: Criterion,
    compiler_options: Mapping[str, Any] | None = None,
) -> None:
    """Compiles all stages and heads, each while the next is traced: tracing holds the interpreter, XLA does not.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: whose shape and dtype count.
        batch_sizes: to compile at.
        criterion: how unsure an exit is.
        compiler_options: for `jax.jit`.
    """
    options = in_order(compiler_options)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = []
        for size in batch_sizes:
            hidden = jax.tree.map(functools.partial(_spec, size), images)
            for n in range(model.num_exits):
                stage = _segment(model, 'stage', n, options).lower(variables, hidden)
                hidden = stage.out_info
                head = _segment(model, 'exit', n, options).lower(variables, hidden, criterion)
                compiling += [pool.submit(stage.compile), pool.submit(head.compile)]
        for one in compiling:
            one.result()


def _spec(size: int, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))


def segment_uncertainty(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    batch_size: int,
    *,
    criterion: Criterion,
    compiler_options: Mapping[str, Any] | None = None,
) -> np.ndarray | None:
    """Runs stages and heads over images with the programs that `segment_functions` times: nothing more is compiled.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, …]``.
        batch_size: of every call.
        criterion: how unsure an exit is.
        compiler_options: for `jax.jit`.

    Returns:
        ``[N, M]``, or ``None`` if the criterion remembers earlier exits, of which these programs know nothing.
    """
    found, count, options = [], num_rows(images), in_order(compiler_options)
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        hidden, of_exits = jax.tree.map(lambda leaf, rows=rows: jax.device_put(np.asarray(leaf)[rows]), images), []
        for n in range(model.num_exits):
            hidden = _segment(model, 'stage', n, options)(variables, hidden)
            _, uncertainty, carry = _segment(model, 'exit', n, options)(variables, hidden, criterion)
            if jax.tree.leaves(carry):
                return None
            of_exits.append(uncertainty)
        found.append(np.stack([np.asarray(one) for one in of_exits]))
    return np.concatenate(found, axis=1)[:, :count]


@compiled_once
def _segment(model: BranchyNet, kind: str, n: int, options: Options) -> Callable[..., Any]:
    @jit_with(options)
    def run(variables: Variables, hidden: Hidden, criterion: Criterion | None = None) -> Any:
        found = run_segment(model, kind, n, variables, hidden)
        return found if criterion is None else criterion.update(found, criterion.init(found), n)

    return run


def segment_times(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    *,
    batch_sizes: Sequence[int],
    criterion: Criterion = entropy,
    compiler_options: Mapping[str, Any] | None = None,
    passes: int = 5,
) -> SegmentTimes:
    """Measures every stage and every head alone, at several batch sizes, in turns.

    Args:
        model: a network with N exits, as it will run (`optimize` it first).
        variables: of ``model``.
        images: ``[M, H, W, C]`` normalised.
        batch_sizes: to measure at.
        criterion: how unsure an exit is; its time counts as the head's.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.
        passes: how often each is timed; medians count.

    Raises:
        ValueError: no images, or a batch size below 1.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), np.ones((2, 28, 28, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> segment_times(model, variables, images, batch_sizes=[1, 2], passes=1).stages.shape
        (2, 2)
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1 or num_rows(images) == 0:
        raise ValueError(f'batch_sizes: got {list(batch_sizes)} for {num_rows(images)} images; give sizes and images')
    compiling: dict[str, Any] = {'criterion': criterion, 'compiler_options': compiler_options}
    compile_segments(model, variables, images, sizes, **compiling)
    functions = {}
    for size in sizes:
        functions.update(segment_functions(model, variables, images, size, **compiling))
    seconds = interleaved_passes(functions, passes=passes, warmup=0, settle=1)
    stages, heads = (
        np.array([[np.median(seconds[kind, n, size]) * 1e3 for n in range(model.num_exits)] for size in sizes])
        for kind in ('stage', 'exit')
    )
    return SegmentTimes(batch_sizes=np.array(sizes), stages=stages, exits=heads)
