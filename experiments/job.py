"""The main job, step by step: data, two trainings, thresholds, one look at the test data, clocks, report."""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.inference import ExitOutputs
from branchy_jax.types import Variables
from experiments import paper
from experiments.progress import training_progress
from experiments.timing import Timed, time_networks

_CHOICES = {
    'placement': ('text', 'released'),
    'dtype': ('float32', 'bfloat16'),
    'optimizer': ('adam', 'adamw', 'sgd'),
    'schedule': ('cosine', 'constant'),
    'regime': ('baseline', 'joint', 'frozen'),
    'choose': ('accuracy', 'knee'),
}


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes the whole job and writes ``report.json``, ``report.md``, ``tradeoff.png`` and weights.

    Args:
        config: as in ``experiments/configs``.
        workdir: where everything goes.

    Returns:
        The report.

    Raises:
        ValueError: a setting that does not exist or a folder of another run, before any work.
    """
    _check(config)
    model = bj.models.create(config.network, **_options(config))
    _claim(workdir, config)
    dataset = bj.data.load_dataset(config.dataset, validation_fraction=config.validation_fraction, seed=config.seed)
    model = bj.models.create(
        config.network, num_classes=dataset.num_classes, image_shape=dataset.image_shape, **_options(config)
    )
    baseline = bj.models.without_branches(model)

    baseline_variables, variables = _train_both(model, baseline, config, dataset, workdir)
    screened, point, costs = _choose(model, variables, baseline, baseline_variables, config, dataset)

    # The one look at the test data: everything above is settled.
    outputs = _outputs(model, variables, dataset, dataset.test)
    baseline_outputs = _outputs(baseline, baseline_variables, dataset, dataset.test)
    timed = time_networks(
        (model, variables), (baseline, baseline_variables), dataset, point.thresholds,
        images=config.latency_images, passes=config.latency_passes,
    )  # fmt: skip
    report = _report(config, dataset, screened, point, costs, outputs, baseline_outputs, timed)
    _write(workdir, report, config, dataset, {config.network: variables, config.network[2:]: baseline_variables})
    return report


def _check(config: ConfigDict) -> None:
    for field, choices in _CHOICES.items():
        if config[field] not in choices:
            raise ValueError(f'config.{field}: got {config[field]!r}; choose from {", ".join(choices)}')
    if not config.network.startswith('b-'):
        raise ValueError(f'config.network: got {config.network!r}; give the branchy network, its baseline is trained too')
    model = bj.models.create(config.network)
    if len(config.exit_weights) != model.num_exits:
        raise ValueError(
            f'config.exit_weights: {config.network} has {model.num_exits} exits, got {len(config.exit_weights)} weights'
        )


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Refuses to mix two runs in one folder."""
    path, settings = workdir / 'config.json', json.loads(config.to_json())
    if path.exists():
        found = bj.report.read_json(path)
        changed = sorted(key for key in {*settings, *found} if settings.get(key) != found.get(key))
        if changed:
            raise ValueError(
                f'workdir: {workdir} holds a run with other settings ({", ".join(changed)}); '
                'choose another folder, or delete this one'
            )
    bj.report.write_json(path, settings)


def _options(config: ConfigDict) -> dict[str, Any]:
    options = {'placement': config.placement, 'dtype': jnp.dtype(config.dtype)}
    return {**options, 'convolution': bj.models.banded_convolution} if config.banded else options


def _prepare(key: jax.Array, images: jax.Array, *, normalize: Any, crop_padding: int, flip: bool) -> jax.Array:
    return normalize(bj.data.augment(key, images, crop_padding=crop_padding, flip=flip))


def _train_both(
    model: bj.BranchyNet, baseline: bj.BranchyNet, config: ConfigDict, dataset: bj.data.Dataset, workdir: Path
) -> tuple[Variables, Variables]:
    keys = jax.random.split(jax.random.key(config.seed), 4)
    example = jnp.zeros((1, *dataset.image_shape), jnp.float32)
    train = functools.partial(_train, config=config, dataset=dataset, workdir=workdir)
    baseline_variables = train(
        baseline, jax.jit(baseline.init)(keys[0], example), keys[1], [1.0],
        name=config.network[2:], epochs=config.epochs_baseline,
    )  # fmt: skip
    start = jax.jit(model.init)(keys[2], example)
    if config.regime != 'joint':
        start, taken = bj.training.initialize_from_baseline(start, baseline_variables)
        print(f'{config.network}: took {len(taken.taken)} arrays from the baseline, {len(taken.fresh)} start fresh')
    variables = train(
        model, start, keys[3], config.exit_weights,
        name=config.network, epochs=config.epochs, frozen_trunk=config.regime == 'frozen',
    )  # fmt: skip
    return baseline_variables, variables


def _train(
    model: bj.BranchyNet,
    variables: Variables,
    key: jax.Array,
    exit_weights: Any,
    *,
    name: str,
    epochs: int,
    config: ConfigDict,
    dataset: bj.data.Dataset,
    workdir: Path,
    frozen_trunk: bool = False,
) -> Variables:
    optimizer = _optimizer(config, steps=epochs * (len(dataset.train) // config.batch_size))
    state = bj.training.create_train_state(model, variables, optimizer, frozen_trunk=frozen_trunk)
    directory = workdir / 'checkpoints' / name
    found = bj.checkpoint.restore(directory, state)
    prepare = functools.partial(
        _prepare, normalize=dataset.normalization, crop_padding=config.crop_padding, flip=config.flip
    )
    with training_progress(name, epochs=epochs, done=found[0] if found else 0) as on_step:
        state = bj.training.fit(
            state, jax.tree.map(jnp.asarray, dataset.train), jnp.array(exit_weights), key, epochs=epochs,
            directory=directory, batch_size=config.batch_size, prepare=prepare, scan=config.scan_epoch,
            on_step=on_step,
        )  # fmt: skip
    return state.variables


def _optimizer(config: ConfigDict, *, steps: int) -> optax.GradientTransformation:
    rate = config.learning_rate
    if config.schedule == 'cosine':
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=max(1, steps // 20), decay_steps=max(2, steps))
    weight_decay = config.get('weight_decay', 0.0)
    if config.optimizer == 'adam':
        return bj.training.paper_adam(rate)
    if config.optimizer == 'adamw':
        return optax.adamw(rate, weight_decay=weight_decay)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True))


def _outputs(model: bj.BranchyNet, variables: Variables, dataset: bj.data.Dataset, split: bj.Batch) -> ExitOutputs:
    return bj.inference.exit_outputs(model, variables, split.image, prepare=dataset.normalization)


def _choose(
    model: bj.BranchyNet,
    variables: Variables,
    baseline: bj.BranchyNet,
    baseline_variables: Variables,
    config: ConfigDict,
    dataset: bj.data.Dataset,
) -> tuple[bj.thresholds.Screen, bj.OperatingPoint, bj.costs.StageCosts]:
    plain = bj.models.create(config.network, **{**_shape(dataset), 'placement': config.placement})
    costs = bj.costs.count_macs(plain, dataset.image_shape)  # of the convolutions themselves, not of their bands
    labels = dataset.validation.label
    outputs = _outputs(model, variables, dataset, dataset.validation)
    statistics = bj.thresholds.accuracy_statistics(outputs.logits, labels)
    screened = bj.thresholds.screen(outputs.uncertainty, statistics, costs)
    if config.choose == 'knee':
        return screened, bj.thresholds.knee(screened), costs
    target = _outputs(baseline, baseline_variables, dataset, dataset.validation)
    accuracy = bj.thresholds.accuracy_statistics(target.logits, labels).mean()
    at_least = min(accuracy - config.tolerance, screened.accuracy.max())
    return screened, bj.thresholds.for_accuracy(screened, at_least), costs


def _shape(dataset: bj.data.Dataset) -> dict[str, Any]:
    return {'num_classes': dataset.num_classes, 'image_shape': dataset.image_shape}


def _report(
    config: ConfigDict,
    dataset: bj.data.Dataset,
    screened: bj.thresholds.Screen,
    point: bj.OperatingPoint,
    costs: bj.costs.StageCosts,
    outputs: ExitOutputs,
    baseline_outputs: ExitOutputs,
    timed: Timed,
) -> dict[str, Any]:
    labels = dataset.test.label
    statistics = bj.thresholds.accuracy_statistics(outputs.logits, labels)
    baseline_accuracy = float(bj.thresholds.accuracy_statistics(baseline_outputs.logits, labels).mean())
    chosen = bj.thresholds.evaluate(outputs.uncertainty, statistics, costs, point.thresholds[None]).point(0)
    frontier = bj.thresholds.pareto_frontier(screened)
    frontier_on_test = bj.thresholds.evaluate(outputs.uncertainty, statistics, costs, frontier.thresholds)
    knee = bj.thresholds.knee(screened)
    rows = [
        {
            'network': config.network[2:],
            'test_accuracy': baseline_accuracy,
            'exit_accuracy': [baseline_accuracy],
            'thresholds': [],
            'exit_fractions': [1.0],
            **timed.baseline,
            'macs': costs.trunk,
            'mac_gain': 1.0,
        },
        {
            'network': config.network,
            'test_accuracy': chosen.accuracy,
            'exit_accuracy': statistics.mean(axis=(1, 2)).tolist(),
            'thresholds': chosen.thresholds.tolist(),
            'exit_fractions': chosen.exit_fractions.tolist(),
            **timed.branchy,
            'macs': chosen.cost,
            'mac_gain': costs.trunk / chosen.cost,
            'validation_accuracy': point.accuracy,
            'validation_exit_fractions': point.exit_fractions.tolist(),
        },
    ]
    points = [
        {
            'thresholds': frontier.thresholds[n].tolist(),
            'validation_accuracy': float(frontier.accuracy[n]),
            'test_accuracy': float(frontier_on_test.accuracy[n]),
            'exit_fractions': frontier_on_test.exit_fractions[n].tolist(),
            'macs': float(frontier_on_test.cost[n]),
            'latency_ms': float(frontier_on_test.exit_fractions[n] @ np.array(timed.exit_latency_ms)),
            'knee': bool(np.array_equal(frontier.thresholds[n], knee.thresholds)),
        }
        for n in range(len(frontier))
    ]
    return {
        'dataset': config.dataset,
        'device': describe_device(),
        'criterion': point.criterion,
        'rows': rows,
        'frontier': points,
        'exit_latency_ms': timed.exit_latency_ms,
        'stage_macs': costs.stages.tolist(),
        'exit_macs': costs.exits.tolist(),
        'paper': paper.rows_beside(config.network),
    }


def describe_device() -> str:
    """Names the device and the versions that a measurement was made with."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != 'cpu' else f'{platform.machine()} CPU, {_cores()} cores'
    return f'{kind}, jax {jax.__version__}, Python {platform.python_version()}'


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _write(
    workdir: Path, report: dict[str, Any], config: ConfigDict, dataset: bj.data.Dataset, trained: dict[str, Variables]
) -> None:
    for name, variables in trained.items():
        bj.checkpoint.save_weights(
            workdir / f'{name}.safetensors',
            {**variables, 'normalization': {
                'mean': dataset.normalization.mean, 'deviation': dataset.normalization.deviation,
            }},
            metadata={'network': name, 'dataset': config.dataset, 'placement': config.placement},
        )  # fmt: skip
    bj.report.write_json(workdir / 'report.json', report)
    baseline, branchy = report['rows']
    note = '\n\nThis CIFAR-10 is a copy re-encoded as JPEG (quality 75).' if config.dataset == 'cifar10' else ''
    text = f"""# {config.network} on {config.dataset}

Device: {report['device']}. Batch 1, mean over {config.latency_images} test images, end to end; `gain` compares like
with like (both networks rewritten by `optimize`), 95 % interval {branchy['gain_low']:.2f} to {branchy['gain_high']:.2f}.

{bj.report.table_of_networks([baseline, branchy, *report['paper']])}

Thresholds were picked on validation data ({config.choose}); the test data was used once. The paper's times count trunk
segments only.{note}

![accuracy against time](tradeoff.png)
"""
    bj.report.write_text(workdir / 'report.md', text)
    knee = next((point for point in report['frontier'] if point['knee']), None)
    bj.plots.tradeoff(
        workdir / 'tradeoff.png', report['frontier'], baseline, branchy, knee=knee,
        title=f'{config.network} on {config.dataset}: accuracy against time as the threshold varies',
    )  # fmt: skip
    print(f'\n{bj.report.table_of_networks([baseline, branchy, *report["paper"]])}\n\nWritten to {workdir}/report.md')
