"""Speed of a training step under two settings, and of two checkouts of this repository: processes in turns."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax.measure import paired_ratio
from experiments.run.networks import count_exits, image_specs
from experiments.run.trainings import settings_on_cpu

Row = dict[str, Any]
# One device, the allocator as it is, whole batches: what a user gets who does nothing. Then as the commands start.
_TRAININGS: tuple[Row, ...] = (
    {'settings': 'as jax starts', 'devices': 1, 'network': 'b-resnet110', 'batch_size': 64, 'steps': 4},
    {'settings': 'as the commands start it', 'devices': 2, 'network': 'b-resnet110', 'batch_size': 16, 'steps': 16},
    {'settings': 'as jax starts', 'devices': 1, 'network': 'b-alexnet', 'batch_size': 128, 'steps': 4},
    {'settings': 'as the commands start it', 'devices': 2, 'network': 'b-alexnet', 'batch_size': 64, 'steps': 16},
)
_WARMUP = 2
_DATASETS = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}
_ROOT = Path(__file__).parents[2]


def training_steps(*, rounds: int, trainings: Sequence[Row] = _TRAININGS) -> list[Row]:
    """Times training steps on a CPU, each setting in processes of its own, in turns.

    Args:
        rounds: processes of each setting.
        trainings: what to compare: for each network the setting to compare with first.
    """
    rows = [{**training, 'ms_per_image': [], 'peak_gb': 0.0} for training in trainings]
    for _ in range(rounds):
        for row in rows:
            arguments = [row['network'], row['batch_size'], row['steps']]
            program = f'from experiments.study.speed import train; train(*{arguments!r})'
            environment = {**os.environ, **(settings_on_cpu(row['devices']) if row['devices'] > 1 else {})}
            done = subprocess.run(
                [sys.executable, '-c', program], cwd=_ROOT, env=environment, check=True, capture_output=True, text=True
            )
            timed = json.loads(done.stdout.splitlines()[-1])
            row['ms_per_image'].append(timed['ms_per_image'])
            row['peak_gb'] = max(row['peak_gb'], timed['peak_gb'])
    first = {row['network']: row for row in reversed(rows)}
    for row in rows:
        ms, others = np.array(row['ms_per_image']), np.array(first[row['network']]['ms_per_image'])
        row |= {'ms': float(np.median(ms)), 'low': float(ms.min()), 'high': float(ms.max())}
        row['times_faster'] = float(np.median(others / ms))
    return rows


def train(network: str, batch_size: int, steps: int) -> None:
    """Times steps in this process, on all of its devices, and prints a line of JSON."""
    model = bj.models.create(network)
    images = jax.random.normal(jax.random.key(0), (batch_size, *model.image_shape))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = bj.training.create_train_state(model, variables, optax.sgd(0.01, momentum=0.9, nesterov=True))
    batch = bj.Batch(images, jnp.arange(batch_size) % 10)
    if len(jax.devices()) > 1:
        mesh = bj.sharding.data_mesh()
        state, batch = bj.sharding.replicate(mesh, state), bj.sharding.shard(mesh, batch)
    weights, seconds = jnp.ones(count_exits(model, image_specs(model.image_shape))), []
    for _ in range(_WARMUP + steps):
        start = time.perf_counter()
        state, metrics = bj.training.train_step(state, batch, weights, jax.random.key(1))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    ms = float(np.median(seconds[_WARMUP:])) / batch_size * 1e3
    unit = 1 if sys.platform == 'darwin' else 1024
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print(json.dumps({'ms_per_image': ms, 'peak_gb': peak_gb}))


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


def compare_checkouts(other: Path, network: str, batch: int, *, images: int, passes: int) -> Row:
    """Times a published network, planned in this checkout and in another one.

    Args:
        other: folder of the other checkout.
        network: by name.
        batch: images in a call.
        images: test images of a pass.
        passes: timed passes of each checkout.

    Returns:
        The time of this checkout ÷ the time of the other, the median of paired passes with its 95 % interval.
    """
    arguments = [network, _DATASETS[network], str(batch), str(images)]
    workers, executors = [], []
    for folder in (_ROOT, other):  # one after the other: each measures its own plan
        worker = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', _WORKER, *arguments],
            cwd=folder,
            env={**os.environ, 'PYTHONPATH': str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        executors.append(worker.stdout.readline().strip().removeprefix('ready '))
        workers.append(worker)
    seconds = np.zeros((2, passes))
    for number in range(-1, passes):  # the first pass does not count
        for place in (0, 1) if number % 2 else (1, 0):
            workers[place].stdin.write('\n')
            workers[place].stdin.flush()
            seconds[place, number] = float(workers[place].stdout.readline())
    for worker in workers:
        worker.communicate()
    ratio = paired_ratio(*seconds)
    row = {'network': network, 'batch': batch, 'ratio': ratio.median, 'low': ratio.low, 'high': ratio.high}
    return {**row, 'executors': executors, 'ms': (np.median(seconds, axis=1) / images * 1e3).tolist()}
