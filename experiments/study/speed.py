"""Speed of a training step under two settings of a CPU: processes in turns."""

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
