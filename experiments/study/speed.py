"""Speed of training steps under two settings of a CPU, and what the forms of a network for a CPU gain."""

import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax.inference.compiler_options import num_cores
from branchy_jax.types import Variables
from experiments.run.networks import count_exits, image_specs
from experiments.run.report import Row, of_ratio
from experiments.run.timing import on_device, one_core, own_process
from experiments.run.trainings import settings_on_cpu
from experiments.study.cells import images_needed

DATASETS = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}
"""The published networks, and the data sets of their weights."""

# First the default of jax: one device, its allocator, whole batches. Then the settings of the commands.
_TRAININGS: tuple[Row, ...] = (
    {'settings': 'as jax starts', 'devices': 1, 'network': 'b-resnet110', 'batch_size': 64, 'steps': 4},
    {'settings': 'as the commands start it', 'devices': 2, 'network': 'b-resnet110', 'batch_size': 16, 'steps': 16},
    {'settings': 'as jax starts', 'devices': 1, 'network': 'b-alexnet', 'batch_size': 128, 'steps': 4},
    {'settings': 'as the commands start it', 'devices': 2, 'network': 'b-alexnet', 'batch_size': 64, 'steps': 16},
)
_WARMUP = 2
_CHUNK = 64
# By name: whether products are banded, and compiler options. `bj.inference.optimize` does the second by default.
_FORMS = (
    ('none', False, None),
    ('banded', True, None),
    ('ALL_CORES', True, bj.inference.ALL_CORES),
    ('ONE_CORE', True, bj.inference.ONE_CORE),
)


def training_steps(*, rounds: int, trainings: Sequence[Row] = _TRAININGS) -> list[Row]:
    """Times training steps on a CPU, each setting in processes of its own, in turns.

    Args:
        rounds: processes of each setting.
        trainings: settings to compare; the first one of each network is the one to compare with.
    """
    rows = [{**training, 'ms_per_image': [], 'peak_gb': 0.0} for training in trainings]
    for _ in range(rounds):
        for row in rows:
            settings = settings_on_cpu(row['devices']) if row['devices'] > 1 else {}
            with own_process(settings) as process:
                timed = process.submit(train, row['network'], row['batch_size'], row['steps']).result()
            row['ms_per_image'].append(timed['ms_per_image'])
            row['peak_gb'] = max(row['peak_gb'], timed['peak_gb'])
    first = {row['network']: row for row in reversed(rows)}
    for row in rows:
        ms, others = np.array(row['ms_per_image']), np.array(first[row['network']]['ms_per_image'])
        row |= {'ms': float(np.median(ms)), 'low': float(ms.min()), 'high': float(ms.max())}
        row['times_faster'] = float(np.median(others / ms))
    return rows


def train(network: str, batch_size: int, steps: int) -> dict[str, float]:
    """Times steps in this process on all of its devices; returns the time and the peak of memory."""
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
    return {'ms_per_image': ms, 'peak_gb': peak_gb}


def forms(network: str, batch: int, *, passes: int) -> list[Row]:
    """Times executors of a published network with and without each of its forms for a CPU, in turns.

    Args:
        network: by name.
        batch: images in a call; at 1 the process keeps to one core.
        passes: interleaved passes over test images, at the first operating point.

    Returns:
        A row per executor and form: ``ms`` of an image with the form, and ``gain``, the time without ÷ the time with
        it, the median of paired passes with its 95 % interval.
    """
    if batch > 1:
        return _forms(network, batch, passes)
    with one_core() as process:
        return process.submit(_forms, network, batch, passes).result()


def _forms(network: str, batch: int, passes: int) -> list[Row]:
    weights = bj.models.load_pretrained(network, dataset=DATASETS[network])
    test = bj.data.load_dataset(DATASETS[network]).test.image[: images_needed(batch)]
    inputs, rows = on_device(np.asarray(weights.normalize(test)), batch), []
    optimize = functools.partial(bj.inference.optimize, weights.model, weights.variables, inputs=weights.inputs)
    networks = {banded: optimize(banded=banded) for banded in (False, True)}
    policy = weights.operating_points[0].policy

    def sequential(model: Any, variables: Variables, options: Any) -> Any:  # one program with its weights, as in a plan
        answer = functools.partial(bj.inference.sequential(model), variables, policy=policy)
        return jax.jit(answer, compiler_options=options)

    def compacted(model: Any, variables: Variables, options: Any) -> Any:
        run = bj.inference.compacted(model, chunk_size=_CHUNK, compiler_options=options)
        return functools.partial(run, variables, policy=policy)

    for build in (sequential, compacted) if batch > _CHUNK else (sequential,):
        runs = {
            form: bj.measure.one_by_one(build(*networks[banded], options), inputs) for form, banded, options in _FORMS
        }
        seconds = bj.measure.interleaved_passes(runs, passes=passes)
        for form in list(runs)[1:]:
            gain = bj.measure.paired_ratio(seconds['none' if form == 'banded' else 'banded'], seconds[form])
            row = {'network': network, 'batch': batch, 'cores': num_cores(), 'executor': build.__name__, 'form': form}
            rows.append({**row, 'ms': float(np.median(seconds[form])) / len(test) * 1e3, **of_ratio('gain', gain)})
    return rows
