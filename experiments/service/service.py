"""Answers images from any thread: a bounded queue, and a stream whose thresholds follow the waiting time.

The more images wait, the earlier they leave, as far as a floor of accuracy on validation data allows (after Apparate:
Dai et al., Apparate: Rethinking Early Exits to Tame Latency-Throughput Tensions in ML Serving, 2024). An image that
does not fit into the queue is refused at once, and may be sent again. So memory is bounded, and no accepted image is
lost.
"""

import collections
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.models import Pretrained
from branchy_jax.thresholds import Controller

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 0.005  # after which an image waits for no others
_RECENT = 64


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one image.

    Attributes:
        number: of the image, in order of arrival.
        label: its class.
        exit: the exit that answered, from 0.
        waited_ms: from its arrival to its answer.
        in_time: whether that was before its deadline.
    """

    number: int
    label: int
    exit: int
    waited_ms: float
    in_time: bool


class Service:
    """Answers images one by one, while its thread runs the network on whole chunks of them.

    Args:
        weights: the network.
        controller: of the waiting time in milliseconds; its path ends where accuracy would fall under the floor.
        capacity: images that may wait for the network; more are refused.
        chunk_size: images that a stage takes at once.
        deadline: seconds after which an answer counts as late.
    """

    def __init__(
        self,
        weights: Pretrained,
        controller: Controller,
        *,
        capacity: int = 256,
        chunk_size: int = 16,
        deadline: float = 0.25,
    ) -> None:
        self.weights, self.controller, self.capacity = weights, controller, capacity
        self.counts = dict.fromkeys(('taken', 'refused', 'answered', 'failed', 'missed'), 0)
        self.exits = [0] * (1 + controller.path.shape[1])
        self.recent: collections.deque[tuple[Answer, np.ndarray]] = collections.deque(maxlen=_RECENT)
        self.failure: BaseException | None = None
        self._policy, self._chunk_size = controller.policy, chunk_size
        self._deadline = deadline
        self._waiting: queue.Queue[tuple[int, np.ndarray, float]] = queue.Queue(capacity)
        self._pending: dict[int, tuple[Future[Answer], float, np.ndarray]] = {}
        self._numbers, self._lock, self._closed = itertools.count(), threading.Lock(), threading.Event()
        self._update, self.stream = jax.jit(_updated), bj.inference.stream(weights.model, chunk_size=chunk_size)
        self._thread = threading.Thread(target=self._serve, name='branchy_jax service', daemon=True)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)`` of an image."""
        return tuple(self.weights.inputs.shape[1:])

    def start(self) -> 'Service':
        """Compiles the network and starts the thread."""
        nothing = np.zeros((1, *self.image_shape), np.uint8)
        # Never leaving, so that every stage compiles before the first image comes.
        never = self._policy.replace(thresholds=np.full(np.shape(self._policy.thresholds), -np.inf, np.float32))
        for _ in self.stream(self.weights.variables, [np.asarray(self.weights.normalize(nothing))], never):
            pass
        self._update(self.controller, np.full(self._chunk_size, np.nan, np.float32))
        self._thread.start()
        return self

    def submit(self, image: np.ndarray) -> Future[Answer]:
        """Takes one image, uint8 as stored, and returns a future of its answer.

        Raises:
            ValueError: an image of another shape or type.
            queue.Full: too many wait already; nothing was taken.
            RuntimeError: the service has ended.
        """
        if image.shape != self.image_shape or image.dtype != np.uint8:
            raise ValueError(f'image: expected uint8 {self.image_shape}, got {image.dtype} {image.shape}')
        if self._closed.is_set() or self.failure is not None:
            raise RuntimeError('the service has ended')
        future: Future[Answer] = Future()
        arrived = time.monotonic()
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = future, arrived, image
            try:
                self._waiting.put_nowait((number, image, arrived))
            except queue.Full:
                del self._pending[number]
                self.counts['refused'] += 1
                raise
            self.counts['taken'] += 1
        return future

    def close(self) -> None:
        """Answers the images that were accepted, and ends."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Returns counts, the length of the queue, and the thresholds."""
        return {
            **self.counts,
            'exits': list(self.exits),
            'waiting': self._waiting.qsize(),
            'capacity': self.capacity,
            'position': float(self.controller.position),
            'thresholds': [float(x) for x in np.asarray(self._policy.thresholds)],
            'recent_ms': [answer.waited_ms for answer, _ in list(self.recent)],
        }

    def _supply(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        while True:
            taken = []
            try:
                taken.append(self._waiting.get(timeout=_POLL_SECONDS))
                while len(taken) < self._chunk_size:
                    taken.append(self._waiting.get_nowait())
            except queue.Empty:
                if not taken and self._closed.is_set():
                    return
            if taken:
                numbers, images, arrived = zip(*taken, strict=True)
                normalized = np.asarray(self.weights.normalize(np.stack(images)))
                yield np.array(numbers), normalized, np.array(arrived) + _PATIENCE_SECONDS

    def _serve(self) -> None:
        try:
            for answers in self.stream(self.weights.variables, self._supply(), lambda: self._policy):
                waited = self._answer(answers)
                observed = np.full(self._chunk_size, np.nan, np.float32)
                observed[: len(waited)] = waited
                self.controller, self._policy = self._update(self.controller, observed)
        except BaseException as error:  # raised by every pending future
            self.failure = error
        with self._lock:
            left, self._pending = self._pending, {}
        for future, _, _ in left.values():
            self.counts['failed'] += 1
            future.set_exception(RuntimeError(f'the service has ended: {self.failure}'))

    def _answer(self, answers: Any) -> list[float]:
        now, waited = time.monotonic(), []
        labels, exits = np.asarray(answers.prediction.label), np.asarray(answers.prediction.exit_index)
        for number, label, leaves in zip(answers.ids.tolist(), labels.tolist(), exits.tolist(), strict=True):
            with self._lock:
                future, arrived, image = self._pending.pop(number)
            waited.append(1e3 * (now - arrived))
            answer = Answer(number, label, leaves, waited[-1], now - arrived <= self._deadline)
            self.counts['answered'] += 1
            self.counts['missed'] += not answer.in_time
            self.exits[leaves] += 1
            self.recent.append((answer, image))
            if future.set_running_or_notify_cancel():
                future.set_result(answer)
        return waited


def _updated(controller: Controller, observed: Any) -> tuple[Controller, bj.ExitPolicy]:
    after = controller.update(observed)
    return after, after.policy
