"""Is this checkout as fast as another one? Published networks, planned in both, timed in turns.

    git clone . /tmp/old && git -C /tmp/old checkout dde1a89
    TFDS_DATA_DIR=… python -m experiments.study.checkouts --other=/tmp/old --cells=b-lenet:1,b-lenet:256

Prints for each network and batch size the time of this checkout ÷ the time of the other: the median of paired passes
and its 95 % interval. A process for each checkout makes its own plan, then both run the same images in turns. About a
minute a cell on two cores, more for ResNet-110.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from branchy_jax.measure import paired_ratio

_ROOT = Path(__file__).parents[2]
_DATASETS = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}

_OTHER = flags.DEFINE_string('other', None, 'Folder of the other checkout.')
_CELLS = flags.DEFINE_list('cells', ['b-lenet:1', 'b-lenet:256', 'b-alexnet:1', 'b-alexnet:256'], 'Network:size.')
_IMAGES = flags.DEFINE_integer('images', 512, 'Test images of a pass.')
_PASSES = flags.DEFINE_integer('passes', 20, 'Timed passes of each checkout.')

_WORKER = """
import sys, time
import jax, numpy as np
import branchy_jax as bj

network, dataset, size, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
weights = bj.models.load_pretrained(network, dataset=dataset)
images = np.asarray(weights.normalize(bj.data.load_dataset(dataset).test.image[:count]))
planned = bj.inference.plan(weights.model, weights.variables, images, weights.operating_points[0], batch_size=size)
batches = [images[start : start + size] for start in range(0, count, size)]
planned.warm_up()
print('ready', planned.executor, flush=True)
for _ in sys.stdin:
    for _ in range(2):  # the first time reads memory that was idle during the other's turn
        start = time.perf_counter()
        for batch in batches:
            jax.block_until_ready(planned(batch))
        seconds = time.perf_counter() - start
    print(seconds, flush=True)
"""


def main(_: list[str]) -> None:
    """Times every cell."""
    print(f'{"network":14}{"batch":>6}  this ÷ other            executor here / there')
    for cell in _CELLS.value:
        network, size = cell.split(':')
        workers, names = [], []
        for folder in (_ROOT, Path(_OTHER.value)):  # one after the other: each measures its own plan
            workers.append(_start(folder, network, size))
            names.append(workers[-1].stdout.readline().strip().removeprefix('ready '))
        seconds = np.zeros((2, _PASSES.value))
        for number in range(-1, _PASSES.value):  # the first pass does not count
            for place in (0, 1) if number % 2 else (1, 0):
                workers[place].stdin.write('\n')
                workers[place].stdin.flush()
                seconds[place, number] = float(workers[place].stdout.readline())
        for worker in workers:
            worker.stdin.close()
            worker.wait()
        ratio = paired_ratio(*seconds)
        ms = np.median(seconds, axis=1) / _IMAGES.value * 1e3
        interval = f'{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]'
        print(f'{network:14}{size:>6}  {interval:24}{" / ".join(names)}  {ms[0]:.3f} / {ms[1]:.3f} ms', flush=True)
        time.sleep(1)


def _start(folder: Path, network: str, size: str) -> subprocess.Popen[str]:
    arguments = [network, _DATASETS[network], size, str(_IMAGES.value)]
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', _WORKER, *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == '__main__':
    flags.mark_flag_as_required('other')
    app.run(main)
