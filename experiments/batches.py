"""Times a finished run on batches, through the planner, against the plain and the rewritten baseline.

    python -m experiments.batches --workdir=runs/resnet110_cifar10 --batches=256,10000

Writes ``batches.json`` into the folder. Batches are of test images, so that exits are taken in their true shares.
"""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import branchy_jax as bj
from experiments.finished import FinishedRun, read_run
from experiments.records import describe_device


def main(arguments: list[str]) -> None:
    """Measures the run in ``--workdir``."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)
    finished = read_run(_WORKDIR.value)
    test = finished.dataset().test
    images = np.asarray(finished.normalization(test.image))
    records = []
    for batch in (int(size) for size in _BATCHES.value if int(size) <= len(images)):
        for name, thresholds in finished.thresholds.items():
            found = time_batch(finished, images, test.label, thresholds, batch=batch, passes=_PASSES.value)
            records.append({'operating_point': name, **found})
            print(_line(finished, records[-1]), flush=True)
    record = {
        'network': finished.config.network,
        'placement': finished.config.placement,
        'dataset': finished.config.dataset,
        'device': describe_device(),
        'command': shlex.join(['python', '-m', 'experiments.batches', *sys.argv[1:]]),
        'passes': _PASSES.value,
        'batches': records,
    }
    bj.report.write_json(Path(_WORKDIR.value) / 'batches.json', record)


def time_batch(
    finished: FinishedRun, images: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, *, batch: int, passes: int
) -> dict[str, Any]:
    """Plans for a batch size, and times the plan beside both baselines on the same images.

    Args:
        finished: the networks.
        images: ``[M, H, W, C]`` normalised; the first whole batches of them are used.
        labels: ``[M]``.
        thresholds: ``[N - 1]``.
        batch: images in a call.
        passes: interleaved pairs.

    Returns:
        ``batch``, ``latency_ms`` per image, ``gain`` over the fastest form of the baseline and ``gain_plain`` over the
        plain one with their intervals, what the planner chose, and the accuracy and exits on these images.
    """
    count = max(1, min(len(images), 2048) // batch)
    images, labels = images[: count * batch], labels[: count * batch]
    planned = bj.inference.plan(finished.model, finished.variables, images, thresholds, batch_size=batch)
    plain = jax.jit(finished.baseline.apply)
    fast_model, fast_variables = bj.inference.optimize(finished.baseline, finished.baseline_variables)
    fast = jax.jit(fast_model.apply)
    # A small network may be fastest image by image, even in a batch: its baseline may run so too.
    one_by_one, nothing = bj.inference.sequential(fast_model), np.zeros(0, np.float32)
    executors = {
        'planned': planned,
        'plain': functools.partial(plain, finished.baseline_variables),
        'fast': functools.partial(fast, fast_variables),
        'one by one': lambda images: one_by_one(fast_variables, images, nothing),
    }
    inputs = [jax.block_until_ready(jnp.asarray(images[n * batch : (n + 1) * batch])) for n in range(count)]
    functions = {name: bj.measure.one_by_one(run, inputs) for name, run in executors.items()}
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    best_baseline = min(('plain', 'fast', 'one by one'), key=lambda name: np.median(seconds[name]))
    gain = bj.measure.paired_ratio(seconds[best_baseline], seconds['planned'])
    over_plain = bj.measure.paired_ratio(seconds['plain'], seconds['planned'])
    answers = [planned(part) for part in inputs]
    exits = np.concatenate([np.asarray(answer.exit_index) for answer in answers])
    right = np.concatenate([np.asarray(answer.label) for answer in answers]) == labels
    return {
        'batch': batch,
        'images': len(images),
        'executor': planned.executor,
        'latency_ms': float(np.median(seconds['planned'])) / len(images) * 1e3,
        'baseline_ms': float(np.median(seconds[best_baseline])) / len(images) * 1e3,
        'plain_baseline_ms': float(np.median(seconds['plain'])) / len(images) * 1e3,
        'baseline': best_baseline,
        'gain': gain.median,
        'gain_low': gain.low,
        'gain_high': gain.high,
        'gain_plain': over_plain.median,
        'thresholds': planned.thresholds.tolist(),
        'exit_fractions': (np.bincount(exits, minlength=len(thresholds) + 1) / len(exits)).tolist(),
        'accuracy_on_these': float(right.mean()),
        'plan': str(planned),
    }


def _line(finished: FinishedRun, found: dict[str, Any]) -> str:
    return (
        f'{finished.config.network} {found["operating_point"]}, batch {found["batch"]}: {found["latency_ms"]:.4f} ms '
        f'an image, gain {found["gain"]:.2f} over the fastest baseline, {found["gain_plain"]:.2f} over the plain one, '
        f'by {found["executor"]}'
    )


if __name__ == '__main__':  # flags here: several of these modules may be imported together
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished main job.')
    _BATCHES = flags.DEFINE_list('batches', ['256'], 'Batch sizes; those above the test images are left out.')
    _PASSES = flags.DEFINE_integer('passes', 20, 'Interleaved pairs.', lower_bound=1)
    flags.mark_flags_as_required(['workdir'])
    app.run(main)
