"""Networks that the host drives: rows wait before each stage, which runs whenever a chunk of them has come together.

`compacted` answers one batch so, `stream` batches that keep coming: survivors of several share the chunks of later
stages.
"""

import dataclasses
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import struct

from branchy_jax import calling
from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference.steps import Exits, Network, Step, at_rows, kind_of, network, run, take_step
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows, static

Steps = Sequence[Callable[..., Step]]
"""``(hidden, carry, policy) → Step`` of every exit asked, jitted."""
Policy = Callable[[], ExitPolicy]
"""Returns the policy of the next chunk."""
Submit = Callable[..., Callable[[], Any]]
"""``(function, *args)`` to a function that waits for the result and returns it."""


@struct.dataclass
class HostStep:
    """One step that the host starts.

    Attributes:
        network: a model and its exits.
        n: counts the exits asked.
        inputs: shapes of the model's inputs.
    """

    network: Network = static()
    n: int = static()
    inputs: Any = static()

    def program(self, variables: Variables, hidden: Any, carry: Any, policy: ExitPolicy) -> Step:
        """Runs the step; to be traced."""
        stages = self.network.stages(variables, self.inputs)
        return take_step(stages.at(variables, num_rows(hidden)), self.n, hidden, carry, policy)


def host_steps(network: Network, variables: Variables, inputs: Any, count: int) -> Steps:
    """Returns the steps that the host starts, ``(hidden, carry, policy) → Step``, the same ones for all chunk sizes.

    Args:
        network: a model and its exits.
        variables: of the model.
        inputs: an example.
        count: how many exits are asked.
    """
    asked, example = dataclasses.replace(network, chunk_size=1), calling.with_batch(inputs, 2)
    return [functools.partial(run, HostStep(asked, n, example), variables) for n in range(count)]


@struct.dataclass
class Rows:
    """Images on their way through the network.

    Attributes:
        ids: ``[M]`` which images these are.
        due: ``[M]`` from when on each of them waits for no others, in seconds of `time.monotonic`.
        values: pytree of NumPy arrays ``[M, …]``: hidden value and carry.
    """

    ids: np.ndarray
    due: np.ndarray
    values: Any


@dataclasses.dataclass(frozen=True)
class Answers:
    """Images that have left the network.

    Attributes:
        ids: ``[M]`` which images these are.
        prediction: of those.
    """

    ids: np.ndarray
    prediction: ExitPrediction


class Pipeline:
    """A network being run on images that come and go. Between runs fewer than a chunk of rows wait before each stage.

    Args:
        steps: of the exits asked.
        policy: when an image leaves.
        chunk_sizes: one per step.
        workers: how many chunks run at the same time, in threads if several.
    """

    def __init__(self, steps: Steps, policy: Policy, chunk_sizes: Sequence[int], *, workers: int) -> None:
        self._steps, self._policy, self._sizes = steps, policy, chunk_sizes
        self._waiting: list[list[Rows]] = [[] for _ in steps]  # before each stage, in the blocks in which they came
        self._workers, self._submit = workers, submitter(workers)
        self._running: deque[tuple[int, Rows, Callable[[], Step]]] = deque()

    def add(self, ids: np.ndarray, images: Any, due: Any = np.inf) -> None:
        """Lets images wait for the first stage, from ``due`` on, one time or one for each, for no others."""
        if len(ids):
            self._waiting[0].append(Rows(ids, np.broadcast_to(due, ids.shape), (images, None)))

    @property
    def due(self) -> float:
        """From when on a waiting image waits for no others; infinity if none waits."""
        return min(map(_due, self._waiting))

    def run(self, *, flush: bool = False) -> Iterator[Answers]:
        """Runs whole chunks, and what is due, until none is left; with ``flush`` whatever waits, too."""
        while True:
            while len(self._running) < self._workers and (n := self._next(flush=flush)) is not None:
                rows, size = self._take(n), self._sizes[n]
                values = rows.values
                if len(rows.ids) < size:  # the last row fills the chunk: any other filling might be slow, as NaN is
                    values = at_rows(values, np.minimum(np.arange(size), len(rows.ids) - 1))
                self._running.append((n, rows, self._submit(_finished, self._steps[n], *values, self._policy())))
            if not self._running:
                return
            n, rows, result = self._running.popleft()
            step = at_rows(result(), slice(len(rows.ids)))
            if not step.confident.all():  # never after the last stage
                remaining = dataclasses.replace(rows, values=(step.hidden, step.carry))
                self._waiting[n + 1].append(at_rows(remaining, ~step.confident))
            if step.confident.any():
                yield Answers(*at_rows((rows.ids, step.prediction), step.confident))

    def _next(self, *, flush: bool) -> int | None:
        """Returns the stage to run: one that is overdue, else the latest with a whole chunk: lines stay short."""
        first = min(range(len(self._steps)), key=lambda n: _due(self._waiting[n]))
        if _due(self._waiting[first]) <= time.monotonic():
            return first
        counts = [sum(len(block.ids) for block in blocks) for blocks in self._waiting]
        whole = [n for n, count in enumerate(counts) if count >= self._sizes[n]]
        if whole:
            return whole[-1]
        first_running = min((n for n, _, _ in self._running), default=len(self._steps))
        waiting = next((n for n, count in enumerate(counts) if count), None)
        # A chunk in an earlier stage may yet fill this waiting.
        return waiting if flush and waiting is not None and waiting <= first_running else None

    def _take(self, n: int) -> Rows:
        """Returns the next rows of a stage, at most a chunk."""
        first, *others = self._waiting[n]
        if others and len(first.ids) < self._sizes[n]:
            first, others = jax.tree.map(lambda *leaves: np.concatenate(leaves), first, *others), []
        rest = at_rows(first, slice(self._sizes[n], None))
        self._waiting[n] = [rest, *others] if len(rest.ids) else others
        return at_rows(first, slice(self._sizes[n]))


def _finished(step: Callable[..., Step], *arguments: Any) -> Step:
    """Runs a chunk and waits for it; on a CPU the NumPy arrays share its memory."""
    return jax.tree.map(np.asarray, jax.block_until_ready(step(*arguments)))


def _due(blocks: list[Rows]) -> float:
    return min((block.due.min() for block in blocks), default=float('inf'))


def submitter(workers: int) -> Submit:
    """Returns where chunks run: in the calling thread when asked for the result if one at a time, else in threads."""
    if workers == 1:
        return functools.partial
    pool = ThreadPoolExecutor(workers, thread_name_prefix='branchy_jax')
    return lambda *call: pool.submit(*call).result


def drive(
    steps: Steps, images: Any, policy: ExitPolicy, chunk_sizes: Sequence[int], *, workers: int, count: int | None = None
) -> ExitPrediction:
    """Answers the first ``count`` rows of a batch, by default all, with chunks that the host starts."""
    length = num_rows(images)
    present = length if count is None else int(count)
    pipeline = Pipeline(steps, lambda: policy, [min(size, length) for size in chunk_sizes], workers=workers)
    pipeline.add(np.arange(present), at_rows(jax.tree.map(np.asarray, images), slice(present)))
    parts = list(pipeline.run(flush=True))
    order = np.argsort(np.concatenate([part.ids for part in parts]))
    predictions = [part.prediction for part in parts]
    # jnp.asarray would compile at every new shape.
    return jax.tree.map(lambda *leaves: jax.device_put(np.concatenate(leaves)[order]), *predictions)


Arrival = Array | tuple[Array, Array] | tuple[Array, Array, Array]
"""``images [B, H, W, C]``, ``(ids [B], images)``, or ``(ids, images, due [B])``.

Inputs that are a tuple themselves come with ids: ``(ids, (a, b))``.
"""


@struct.dataclass
class Stream:
    """The executor that `stream` builds.

    Attributes:
        network: a model and its exits.
        deadline: seconds from which an image waits for no others.
        workers: chunks that run at the same time.
        ahead: batches to read ahead.
    """

    network: Network = static()
    deadline: float = static()
    workers: int = static()
    ahead: int = static()

    def __call__(self, variables: Variables, supply: Iterable[Arrival], policy: Any) -> Iterator[Answers]:
        """Answers every image of a supply; see `stream`."""
        fixed = None if callable(policy) else as_policy(policy)
        return self._answers(variables, supply, lambda: as_policy(policy()) if fixed is None else fixed)

    def _answers(self, variables: Variables, supply: Iterable[Arrival], policy: Policy) -> Iterator[Answers]:
        """Answers a supply, which a thread reads a few ahead; the first images say which programs are needed."""
        items: queue.Queue[Any] = queue.Queue(maxsize=self.ahead)
        stopped, pipeline, end = threading.Event(), None, None
        reading = supply, self.deadline, items, stopped
        threading.Thread(target=_read, args=reading, name='branchy_jax supply', daemon=True).start()
        try:
            while end is None:
                due = float('inf') if pipeline is None else pipeline.due
                # Every arrival so far, so that several chunks can run at the same time.
                for item in _arrived(items, due - time.monotonic()):
                    if isinstance(item, BaseException):
                        end = item
                        break
                    if pipeline is None:
                        count = len(self.network.stages(variables, item[1]).exits)
                        steps = host_steps(self.network, variables, item[1], count)
                        pipeline = Pipeline(steps, policy, self.network.chunk_sizes(count), workers=self.workers)
                    pipeline.add(*item)
                if pipeline is not None:
                    yield from pipeline.run(flush=end is not None)
        finally:
            stopped.set()
            while not items.empty():  # the thread may be waiting for a free place
                items.get_nowait()
        if not isinstance(end, StopIteration):
            raise end


def stream(
    model: Any,
    *,
    chunk_size: int | Sequence[int],
    deadline: float = float('inf'),
    exits: Exits = None,
    workers: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    ahead: int = 2,
) -> Stream:
    """Builds the executor for an endless supply of batches of any size.

    Before each stage images wait until a whole chunk of them has come together, from one batch or from many, so that
    every stage runs full. The supply is read in a thread of its own, ``ahead`` batches ahead at most; while the caller
    does not ask for answers, nothing more is read. In memory are at most twice those batches, one more in the reader's
    hand, and less than a chunk before each stage (in the host's memory, also on a GPU).

    Every image is answered exactly once, in no particular order. When the supply ends, whatever waits is answered.
    When it raises, so too, and then its exception is raised here; a batch of the wrong shape counts as that. When the
    caller stops early (``close()``, ``break``), reading stops.

    Args:
        model: a network with N exits.
        chunk_size: images that a stage takes at once; one number, or one for each exit that is asked.
        deadline: seconds after its arrival from which an image no longer waits for others: chunks are then padded.
            Kept while the caller asks for answers, up to the chunks that are running. A supply that yields ``due``
            says so of each image instead, in seconds of `time.monotonic`.
        exits: the exits to ask, ascending, the last among them; the other exits never answer.
        workers: chunks that run at the same time, in threads.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.
        ahead: batches to read ahead.

    Returns:
        ``(variables, supply, policy)`` to an iterator of `Answers`: ``ids [M]`` and their prediction. The
        supply yields ``images [B, H, W, C]``, whose ids count from 0 in order of arrival, ``(ids [B], images)``, or
        ``(ids [B], images, due [B])``; inputs that are a tuple themselves as ``(ids, (a, b))``. ``policy`` may be a
        function of no arguments that returns one: it is called for every chunk, so that thresholds can follow the
        load or a `branchy_jax.thresholds.Controller`.

    Raises:
        ValueError: a chunk size, deadline, ``workers`` or ``ahead`` out of range, or impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax
        >>> model, images = bj.models.create('b-lenet'), np.ones((3, 28, 28, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> answer = stream(model, chunk_size=2)
        >>> sorted(int(i) for found in answer(variables, [images, images], [1.0]) for i in found.ids)
        [0, 1, 2, 3, 4, 5]
    """
    if not deadline >= 0:
        raise ValueError(f'deadline: got {deadline}; give seconds, at least 0')
    if workers < 1 or ahead < 1:
        raise ValueError(f'workers and ahead: got {workers} and {ahead}; give at least 1')
    return Stream(network(model, exits, compiler_options, chunk_size), float(deadline), workers, ahead)


def _arrived(items: queue.Queue[Any], wait: float) -> Iterator[Any]:
    """Yields what has been read, as much as is read ahead; waits for the first. Nothing if none comes in time."""
    try:
        yield items.get(timeout=min(max(wait, 0.0), threading.TIMEOUT_MAX))
        for _ in range(items.maxsize - 1):
            yield items.get_nowait()
    except queue.Empty:
        return


def _read(supply: Iterable[Arrival], deadline: float, items: queue.Queue[Any], stopped: threading.Event) -> None:
    """Puts what a supply yields into a queue, and at the end what ended it: StopIteration, or the exception raised."""
    end: BaseException = StopIteration()
    count, first = 0, None
    try:
        for arrival in supply:
            ids, images, due = _check(arrival, count, time.monotonic() + deadline)
            first = kind_of(images, first)
            items.put((ids, images, due))
            if stopped.is_set():
                return
            count += len(ids)
    except BaseException as error:  # raised again where the answers are read
        end = error
    finally:
        if isinstance(supply, Generator):  # frames that JAX's traces keep may still refer to it
            supply.close()
    items.put(end)


def _check(arrival: Arrival, first_id: int, due: float) -> tuple[np.ndarray, Any, np.ndarray]:
    """Returns ids, a copy of the images, since a supply may fill its buffer again, and when each waits for no others.

    Ids count from ``first_id`` and all images are due at the same time, unless the arrival says otherwise.
    """
    parts: tuple[Any, ...] = arrival if isinstance(arrival, tuple) else (None, arrival)
    if len(parts) not in (2, 3):
        forms = 'images, (ids, images), or (ids, images, due); inputs that are a tuple themselves as (ids, (a, b))'
        raise ValueError(f'supply: got a tuple of {len(parts)}; yield {forms}')
    images = jax.tree.map(np.array, parts[1])
    count = num_rows(images, 'images')
    if isinstance(images, np.ndarray) and images.ndim < 2:
        raise ValueError(f'images: expected a batch [B, …], got shape {images.shape}')
    ids = np.arange(first_id, first_id + count) if parts[0] is None else np.array(parts[0])
    if ids.shape != (count,):
        raise ValueError(f'ids: got shape {ids.shape} for {count} images; give one id per image')
    times = np.array(parts[2], np.float64) if len(parts) == 3 else np.full(count, due)
    if times.shape != (count,) or np.isnan(times).any():
        raise ValueError(f'due: got shape {times.shape} for {count} images; give one time per image, not NaN')
    return ids, images, times
