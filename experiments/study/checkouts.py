"""A published network as planned in two checkouts of this repository, in turns; run as a file, one of the two."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj  # of the checkout that PYTHONPATH names

DATASETS = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}
"""The published networks, and the data sets of their weights."""

_ROOT = Path(__file__).parents[2]


def compare(other: Path, network: str, batch: int, *, images: int, passes: int) -> dict[str, Any]:
    """Times a published network, planned in this checkout and in another one.

    Args:
        other: folder of the other checkout.
        network: by name.
        batch: images in a call.
        images: test images of a pass.
        passes: timed passes of each checkout.

    Returns:
        A row with ``ratio``, the time of this checkout ÷ the time of the other: the median of paired passes with its
        95 % interval.

    Raises:
        ValueError: no checkout, or one that cannot plan (its own error is printed above), or no published network.
    """
    if not (other / 'branchy_jax').is_dir():
        raise ValueError(f'other: got {other}; give the folder of a checkout of this repository')
    if network not in DATASETS:
        raise ValueError(f'network: got {network!r}; published are {", ".join(DATASETS)}')
    workers, executors, seconds = [], [], np.zeros((2, passes))
    with contextlib.ExitStack() as stack:
        for folder in (_ROOT, other.resolve()):  # one after the other: each measures its own plan
            worker = subprocess.Popen(
                [sys.executable, '-W', 'ignore', __file__, network, str(batch), str(images)],
                cwd=folder,
                env={**os.environ, 'PYTHONPATH': str(folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            workers.append(stack.enter_context(worker))
            executors.append(worker.stdout.readline().strip())
            if not executors[-1]:
                raise ValueError(f'other: {folder} could not plan {network}; its error is above')
        for number in range(-1, passes):  # the first pass does not count
            for place in (0, 1) if number % 2 else (1, 0):
                workers[place].stdin.write('\n')
                workers[place].stdin.flush()
                seconds[place, number] = float(workers[place].stdout.readline())
    ratio = bj.measure.paired_ratio(*seconds)
    row = {'network': network, 'batch': batch, 'ratio': ratio.median, 'ratio_low': ratio.low, 'ratio_high': ratio.high}
    return {**row, 'executors': executors, 'ms': (np.median(seconds, axis=1) / images * 1e3).tolist()}


def _serve(network: str, batch: int, count: int) -> None:
    """Plans and prints the executor; then times a pass for each line that comes, and prints its seconds."""
    weights = bj.models.load_pretrained(network, dataset=DATASETS[network])
    images = np.asarray(weights.normalize(bj.data.load_dataset(DATASETS[network]).test.image[:count]))
    planned = bj.inference.plan(weights.model, weights.variables, images, weights.operating_points[0], batch_size=batch)
    planned.warm_up()
    print(planned.executor, flush=True)
    for _ in sys.stdin:
        for _ in range(2):  # the first time reads memory that was idle during the other's turn
            start = time.perf_counter()
            for first in range(0, count, batch):
                jax.block_until_ready(planned(images[first : first + batch]))
            seconds = time.perf_counter() - start
        print(seconds, flush=True)


if __name__ == '__main__':
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
