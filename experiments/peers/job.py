"""The job of a contender, and its calls in its own process. This file needs NumPy alone."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_TRIAL_PASSES, _TRIAL_SECONDS = 3, 0.1

# The contender of this process.
_ready: 'Ready'


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A network, the images of a pass, and when they leave.

    Attributes:
        network: its name.
        variables: Flax's, as NumPy arrays.
        images: ``[M, H, W, C]`` float32, of all batches of a pass.
        batch: images in a call; M is a multiple of it.
        thresholds: ``[N - 1]`` of the entropy.
        cores: that every contender uses.
    """

    network: str
    variables: Any
    images: np.ndarray
    batch: int
    thresholds: tuple[float, ...]
    cores: int

    @property
    def batches(self) -> list[np.ndarray]:
        """The images of each call."""
        return [self.images[start : start + self.batch] for start in range(0, len(self.images), self.batch)]

    @property
    def channels_first(self) -> list[np.ndarray]:
        """The images of each call as ``[B, C, H, W]``."""
        return [np.ascontiguousarray(images.transpose(0, 3, 1, 2)) for images in self.batches]


Answer = Callable[[np.ndarray], tuple[np.ndarray, Any]]
"""Maps a batch in host memory to labels ``[B]`` in host memory, and to exits ``[B]`` in any form, or ``None``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """A contender that is ready to be called.

    Attributes:
        answer: answers a batch.
        batches: in the layout that the runtime prefers.
        settings: that it runs with.
        within: a context that passes run in.
    """

    answer: Answer
    batches: Sequence[np.ndarray]
    settings: str = ''
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def run(self, passes: int) -> float:
        """Returns the seconds that passes over all batches take."""
        with self.within():
            start = time.perf_counter()
            for _ in range(passes):
                for images in self.batches:
                    self.answer(images)
            return time.perf_counter() - start

    def passes_of(self, seconds: float) -> int:
        """Returns how many passes last at least that long, after one more pass, which may compile."""
        self.run(1)
        return max(1, math.ceil(seconds / self.run(1)))

    def answers(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns labels and exits ``[M]`` of all images; ``None`` where there are no exits but the last."""
        with self.within():
            labels, exits = zip(*map(self.answer, self.batches), strict=True)
        has_exits = exits[0] is not None
        return np.concatenate(labels), np.concatenate([np.asarray(left) for left in exits]) if has_exits else None


def fastest(options: Mapping[str, Ready]) -> Ready:
    """Times equivalent contenders in turns. Returns the fastest, with its name among its settings."""
    passes = {name: ready.passes_of(_TRIAL_SECONDS) for name, ready in options.items()}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(_TRIAL_PASSES):
        for name, ready in options.items():
            ready.run(1)  # as before a turn
            seconds[name].append(ready.run(passes[name]) / passes[name])
    best = min(options, key=lambda name: np.median(seconds[name]))
    return dataclasses.replace(options[best], settings=', '.join(filter(None, (best, options[best].settings))))


Opened = tuple[np.ndarray, np.ndarray | None, str, int]
"""Labels and exits as of `Ready.answers`, the settings, and how many passes last as long as a turn should."""


def open_contender(contender: Callable[[Job], Ready], job: Job, seconds: float) -> Opened | str:
    """Makes a contender ready in this process for turns of a given length, or returns the reason why it cannot."""
    global _ready
    if job.cores == 1 and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        _ready = contender(job)
        return *_ready.answers(), _ready.settings, _ready.passes_of(seconds)
    except Exception as error:  # of whatever runtime, whose own classes of errors need not be known elsewhere
        return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def take_turn(passes: int) -> float:
    """Returns the seconds of a pass of the contender that is ready in this process."""
    _ready.run(1)  # memory that nothing has touched for a while is slow to touch again
    return _ready.run(passes) / passes
