"""Batches of any size from a few compiled ones: cut into pieces, filled up, answered, and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from branchy_jax.criteria import as_policy
from branchy_jax.inference.host.pipeline import inline, submitter
from branchy_jax.inference.steps import Executor, at_rows, guarded
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

Counted = Callable[[Variables, Array, ExitPolicy, np.int32], ExitPrediction]
"""``(variables, images [S, …], policy, count) → ExitPrediction``: answers the first ``count`` rows, the others are
filling; what it returns for those means nothing."""

# A size four times the next: at most four programs up to 64, and a piece is always more than half full.
_STEP = 4


@dataclasses.dataclass(frozen=True, eq=False)
class AnyBatch:
    """An executor that compiles at a few batch sizes and answers batches of any size with those.

    Attributes:
        sizes: that it compiles at, the largest first.
    """

    sizes: tuple[int, ...]
    _num_exits: int = dataclasses.field(repr=False)
    _answer: Executor = dataclasses.field(repr=False)

    def __call__(self, variables: Variables, images: Array, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]`` of any B."""
        return self._answer(variables, images, policy)

    def warm_up(self, variables: Variables, images: Array, policy: Any) -> None:
        """Compiles all that any batch will need.

        Args:
            variables: of the network.
            images: ``[M, …]`` at least one, like those to come: their shape and dtype count.
            policy: like the one to come: its criterion and dtypes count.
        """
        policy = as_policy(policy, self._num_exits)
        never = policy.replace(thresholds=np.full_like(np.asarray(policy.thresholds), -np.inf))  # reaches every stage
        for size in {1, *self.sizes}:
            rows = np.arange(size) % num_rows(images)
            jax.block_until_ready(self(variables, at_rows(jax.tree.map(np.asarray, images), rows), never))


def any_batch(
    run: Counted,
    plain: Executor,
    model: BranchyNet,
    sizes: Sequence[int],
    *,
    traceable: Executor | None = None,
    workers: int = 1,
) -> AnyBatch:
    """Builds an executor of batches of any size.

    Args:
        run: compiles at each of ``sizes``, or at 1 where ``count`` is 1, and at nothing else.
        plain: of the same results, for when it is traced: nothing is then filled up.
        model: whose input it is.
        sizes: descending; all batches are cut into pieces that fit one of them.
        traceable: of the same results, where ``plain`` is not.
        workers: pieces that run at the same time, in threads.
    """
    submit = submitter(workers)

    def answer_piece(variables: Variables, images: Array, policy: ExitPolicy, cut: tuple[int, int, int]) -> Any:
        found = run(variables, _filled(images, *cut), policy, np.int32(cut[1] - cut[0]))
        # What a thread has started but does not wait for, jax runs one after the other.
        return found if workers == 1 else jax.block_until_ready(found)

    def answer(variables: Variables, images: Array, policy: ExitPolicy) -> ExitPrediction:
        leaves, count = jax.tree.leaves(images), num_rows(images)
        if _are_traced(leaves) or _are_traced([policy.thresholds]):
            return plain(variables, images, policy)
        if count in sizes and all(map(_goes_as_it_is, leaves)):
            return run(variables, images, policy, np.int32(count))
        # What is traced can neither be put together in NumPy nor go to another thread.
        if _are_traced(jax.tree.leaves((variables, policy))):
            return plain(variables, images, policy)
        cuts = list(pieces(count, sizes))
        start = submit if len(cuts) > 1 else inline
        started = [start(answer_piece, variables, images, policy, cut) for cut in cuts]
        return _joined([piece.result() for piece in started], [stop - start for start, stop, _ in cuts])

    return AnyBatch(tuple(sizes), model.num_exits, guarded(answer, model, traceable=traceable or plain))


def _are_traced(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _goes_as_it_is(leaf: Any) -> bool:
    """Tells an array that `jax.jit` takes without compiling anew, as it would for one that is bound to a device."""
    return isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.Array) and not leaf.committed)


def sizes_up_to(max_batch: int) -> tuple[int, ...]:
    """Returns the sizes to compile at for batches of up to ``max_batch``: itself, a quarter of it, and so on down to 1.

    Raises:
        ValueError: no positive integer.

    Example:
        >>> sizes_up_to(64)
        (64, 16, 4, 1)
    """
    check_max_batch(max_batch)
    found = [int(max_batch)]
    while found[-1] > 1:
        found.append(max(1, found[-1] // _STEP))
    return tuple(found)


def check_max_batch(max_batch: Any) -> None:
    """Refuses what is no size of a batch.

    Raises:
        ValueError: no positive integer.
    """
    if not isinstance(max_batch, (int, np.integer)) or isinstance(max_batch, bool) or max_batch < 1:
        raise ValueError(f'max_batch: got {max_batch!r}; give a positive integer, or None to compile at every size')


def pieces(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts a batch: yields the first row of each piece, the row behind it, and the size that it is filled up to.

    A piece takes the largest size that it fills by more than half; only the smallest size is filled by less.

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


def _filled(images: Any, start: int, stop: int, size: int) -> Any:
    """Returns rows of a batch, the last one repeated up to a size: in NumPy, which compiles nothing.

    On a CPU NumPy shares the memory of jax's arrays.
    """

    def taken(leaf: Any) -> np.ndarray:
        values = np.asarray(leaf)[start:stop]
        missing = size - len(values)
        return values if not missing else np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])

    return jax.tree.map(taken, images)


def _joined(found: Sequence[ExitPrediction], counts: Sequence[int]) -> ExitPrediction:
    """Puts answers of pieces together, without those to what filled them up."""

    def join(*parts: Array) -> Array:
        rows = [np.asarray(part)[:count] for part, count in zip(parts, counts, strict=True)]
        return jax.device_put(np.concatenate(rows))  # jnp.asarray would compile at every new shape

    return jax.tree.map(join, *found)
