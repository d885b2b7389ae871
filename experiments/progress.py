"""A progress bar with the loss of every exit and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from branchy_jax.training import Metrics

_REFRESH_SECONDS = 0.5


@contextmanager
def training_progress(name: str, *, epochs: float) -> Iterator[Callable[[int, int, int, Metrics], None]]:
    """Shows a bar while training; yields the ``on_step`` callback of `branchy_jax.training.train_epoch`.

    Reading a metric waits for the device, so within an epoch it is read at most every half second.
    """
    columns = (
        TextColumn('[bold]{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('epochs, loss per exit {task.fields[losses]}'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=jax.process_index() > 0) as progress:
        task = progress.add_task(name, total=epochs, losses='–')
        shown_at = 0.0

        def on_step(epoch: int, step: int, steps: int, metrics: Metrics) -> None:
            nonlocal shown_at
            if step == steps or time.monotonic() - shown_at > _REFRESH_SECONDS:
                losses = ' '.join(f'{loss:.4f}' for loss in np.asarray(metrics['exit_loss']))
                progress.update(task, completed=epoch + step / steps, losses=losses)
                shown_at = time.monotonic()

        yield on_step
