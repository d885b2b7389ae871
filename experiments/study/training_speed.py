"""Milliseconds an image of a training step, as jax starts by itself and as the commands start it, in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from branchy_jax.report import markdown_table, write_json, write_text
from experiments.run.processes import settings_on_cpu

_WAYS = {
    # One device, the allocator as it is, whole batches: what a user gets who does nothing.
    'as jax starts': {'devices': 1, 'batch_size': {'b-resnet110': 64, 'b-alexnet': 128}},
    'as the commands start it': {'devices': 2, 'batch_size': {'b-resnet110': 16, 'b-alexnet': 64}},
}
_WARMUP, _STEPS = 2, {'as jax starts': 4, 'as the commands start it': 16}


@dataclasses.dataclass(frozen=True)
class Way:
    """Times of one setting of training.

    Attributes:
        network: which.
        way: its name.
        devices: host devices.
        batch_size: images in a step.
        ms_per_image: median over the steps of each round.
        peak_gb: of the process's memory, the most of all rounds.
    """

    network: str
    way: str
    devices: int
    batch_size: int
    ms_per_image: list[float]
    peak_gb: float


def compare(networks: tuple[str, ...] = ('b-resnet110', 'b-alexnet'), *, rounds: int) -> list[Way]:
    """Times both settings of both networks, each in a process of its own, in turns.

    Args:
        networks: names.
        rounds: processes of each setting.
    """
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for network in networks:
            for way in _WAYS:
                result = _in_a_process(network, way)
                found.setdefault((network, way), []).append(result)
                print(f'{network}, {way}: {result["ms_per_image"]:.1f} ms an image', flush=True)
    return [
        Way(
            network,
            way,
            _WAYS[way]['devices'],
            _WAYS[way]['batch_size'][network],
            [result['ms_per_image'] for result in results],
            max(result['peak_gb'] for result in results),
        )
        for (network, way), results in found.items()
    ]


def _in_a_process(network: str, way: str) -> dict[str, float]:
    devices = _WAYS[way]['devices']
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', **(settings_on_cpu(devices) if devices > 1 else {})}
    program = f'from experiments.study.training_speed import measure; measure({network!r}, {way!r})'
    options = {'cwd': Path(__file__).parents[2], 'env': environment, 'text': True}
    return json.loads(subprocess.check_output([sys.executable, '-c', program], **options).splitlines()[-1])


def measure(network: str, way: str) -> None:
    """Takes training steps in this process and prints their times as JSON."""
    import jax
    import jax.numpy as jnp
    import optax

    import branchy_jax as bj

    model, batch_size = bj.models.create(network), _WAYS[way]['batch_size'][network]
    images = jax.random.normal(jax.random.key(0), (batch_size, *model.image_shape))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = bj.training.create_train_state(model, variables, optax.sgd(0.01, momentum=0.9, nesterov=True))
    batch = bj.Batch(images, jnp.arange(batch_size) % 10)
    if len(jax.devices()) > 1:
        mesh = bj.sharding.data_mesh()
        state, batch = bj.sharding.replicate(mesh, state), bj.sharding.shard(mesh, batch)
    weights = jnp.ones(len(jax.eval_shape(model.apply, variables, images)))
    seconds = []
    for _ in range(_WARMUP + _STEPS[way]):
        start = time.perf_counter()
        state, metrics = bj.training.train_step(state, batch, weights, jax.random.key(1))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    ms, peak = np.median(seconds[_WARMUP:]) / batch_size * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({'ms_per_image': float(ms), 'peak_gb': peak}))


def write(workdir: Path, provenance: dict[str, str], *, rounds: int) -> None:
    """Compares both settings and writes ``training.json`` and ``training.md``."""
    found = compare(rounds=rounds)
    write_json(workdir / 'training.json', {**provenance, 'ways': [dataclasses.asdict(way) for way in found]})
    write_text(workdir / 'training.md', page(found, **provenance))


def page(found: list[Way], *, device: str, command: str) -> str:
    """Returns the Markdown page of a comparison."""
    first = {way.network: np.array(way.ms_per_image) for way in found if way.way == next(iter(_WAYS))}
    rows = [
        [
            way.network,
            way.way,
            str(way.devices),
            str(way.batch_size),
            f'{np.median(way.ms_per_image):.1f}',
            f'{min(way.ms_per_image):.1f} to {max(way.ms_per_image):.1f}',
            f'{np.median(first[way.network] / np.array(way.ms_per_image)):.2f}',
            f'{way.peak_gb:.1f}',
        ]
        for way in found
    ]
    columns = ['network', 'way', 'devices', 'images a step', 'ms an image', 'rounds', 'times faster', 'peak GB']
    return f"""# A training step on a CPU

`{command}`

{device}. Processes in turns; the median of the steps of a round, and of the rounds. Images of 32 × 32, all exits.

{markdown_table(columns, rows)}
"""
