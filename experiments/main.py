"""The main job: trains a baseline and a branchy network, picks thresholds on validation data, reports on test data.

    python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k

It reports what exits give a network: accuracy, the share that leaves at each exit, and measured speed beside the same
trunk without branches. Minutes on 2 cores for LeNet, two hours for ResNet-110; the header of each config says what to
expect. The folder then holds ``report.json``, ``report.md``, ``tradeoff.png`` and the weights of both networks.

The same command resumes a run that was interrupted. Flags set the number of devices, which may differ between starts;
configs do not change:

    --num_devices=8                     eight devices of this process; 0 is all of them
    --distributed                       as many processes as a cluster (Slurm, TPU pod, …) starts
    --distributed --coordinator=HOST:PORT --num_processes=2 --process_id=0       the same without a cluster
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

import branchy_jax as bj
from branchy_jax.thresholds import ExitTable, Screen
from experiments.configs import common
from experiments.run import finetuning, report, timing
from experiments.run import networks as setup
from experiments.run.networks import TASKS, Networks, Task, criteria_of
from experiments.run.trainings import Trainer, start_again_on_cpu

TABLE = 'table'
"""The name of the operating point that stands in the table."""

# The only command with flags of absl, which is what ml_collections reads configs by.
_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the run.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, weights and the report.')
_NUM_DEVICES = flags.DEFINE_integer(
    'num_devices', None, 'Devices that share every batch; 0: all. By default 1, on a CPU what the config says.', 0
)
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Whether this is one of several processes; uses all devices.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, without a cluster.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes in all, without a cluster.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process from 0, without a cluster.')

_FIGURE_4_POINTS = 41
_DEAD_AFTER_SECONDS = 30
# Process 0 alone times and writes at the end; the others wait for it that long before they leave.
_LAST_WAIT_SECONDS = 3600


def run(config: ConfigDict, workdir: Path, *, mesh: Mesh | None = None) -> dict[str, Any] | None:
    """Runs or resumes the whole job and writes ``report.json``, ``report.md``, ``tradeoff.png`` and weights.

    Args:
        config: as in ``experiments/configs``.
        workdir: where everything goes; the same for all processes, where there are several.
        mesh: the devices that share training and evaluation.

    Returns:
        What ``report.json`` holds; ``None`` in processes other than the first, which alone times and writes.

    Raises:
        ValueError: a setting that does not exist, a data set that is not at hand, or a folder of another run; all
            before any work.
    """
    # Load.
    setup.check(config, mesh)
    dataset, task = setup.load(config), TASKS[config.task]
    fewest = min(len(dataset.validation), len(dataset.test), config.latency_images)
    if config.latency_batch > fewest:
        raise ValueError(f'config.latency_batch: got {config.latency_batch}, but there are {fewest} images; give fewer')
    options = setup.network_options(config, dataset.num_classes, dataset.image_shape)
    trainer = Trainer(config, options, dataset, workdir, mesh)
    setup.claim(workdir, config)

    # Train the baseline, then the network with exits.
    finetunes = config.regime == 'finetune'
    baseline_variables, variables = finetuning.finetune_both(trainer) if finetunes else trainer.train_both()
    both = Networks(config.network, options, variables, baseline_variables, dataset.normalization)
    costs = bj.costs.count_macs(both.model, inputs=both.inputs)
    look = functools.partial(
        bj.inference.exit_table,
        statistics=task.statistics,
        metric=task.of_sums,
        preprocess=dataset.normalization,
        mesh=mesh,
    )

    # Choose on validation data.
    model = trainer.build()  # in its form for training, which a CPU also evaluates fastest
    baseline_model = bj.models.without_branches(model)
    screened, points, tried = choose(
        config,
        task,
        functools.partial(look, model, both.variables, dataset.validation, costs=costs),
        functools.partial(look, baseline_model, both.baseline_variables, dataset.validation),
    )

    # Evaluate: the one look at the test data.
    look = functools.partial(look, criterion=screened.criterion, split='test')
    branchy = look(model, both.variables, dataset.test, costs=costs)
    baseline = look(baseline_model, both.baseline_variables, dataset.test)
    if jax.process_index() > 0:
        return None

    # Time.
    clocks = timing.time_run(
        both,
        np.asarray(dataset.normalization(dataset.validation.image[: max(100, 8 * config.latency_batch)])),
        np.asarray(dataset.normalization(dataset.test.image[: config.latency_images])),
        {name: point.policy for name, point in points.items()},
        batch=config.latency_batch,
        passes=config.latency_passes,
    )

    # Report.
    record = {'dataset': config.dataset, 'task': config.task, **report.provenance('main')}
    record |= {'num_classes': dataset.num_classes, 'image_shape': list(dataset.image_shape)}
    record |= {'criterion': screened.criterion.name, 'criteria_tried': tried}
    record['paper'] = report.paper('Table I', branchy=config.network)
    record |= assemble(config, screened, points, branchy, baseline, clocks)
    setup.save_weights(workdir, config, both)
    report.write(workdir, record, config)
    return record


def choose(
    config: ConfigDict, task: Task, look: Callable[..., ExitTable], look_at_baseline: Callable[..., ExitTable]
) -> tuple[Screen, dict[str, bj.OperatingPoint], list[dict[str, Any]]]:
    """Screens the thresholds of each criterion on validation data; picks the table's setting and other useful ones.

    With ``choose = 'accuracy'``: the cheapest that is at most one standard error (or as many as the settings say)
    below the best setting (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), and reaches the
    baseline if any does. Reaching the baseline alone, as ``choose = 'baseline'`` does, is less: of many settings the
    cheapest that just reaches a bar owes that partly to luck, and falls short of it on other data.

    Returns:
        Every setting of the criterion whose table's setting is cheapest; its points by name, the first the table's; and
        a row for every criterion that was tried.
    """
    criteria = criteria_of(config)
    alone = look_at_baseline(criterion=criteria[0])  # with one exit all criteria agree
    baseline, choices, tried = float(alone.anytime().accuracy[-1]), [], []
    for criterion in criteria:
        table = look(criterion=criterion)
        screened = table.screen()
        points = _points(config, table, screened, baseline)
        choices.append((screened, points))
        point = points[TABLE]
        row = {'criterion': criterion.name, f'validation_{task.metric}': float(point.accuracy)}
        tried.append({**row, 'mac_gain': float(table.costs.trunk / point.cost)})
    screened, points = min(choices, key=lambda choice: choice[1][TABLE].cost)
    return screened, points, tried


def _points(config: ConfigDict, table: ExitTable, screened: Screen, baseline: float) -> dict[str, bj.OperatingPoint]:
    best = screened.point(int(screened.accuracy.argmax()))
    standard_error = table.standard_error(best)
    wanted = baseline if config.choose == 'baseline' else best.accuracy - config.standard_errors * standard_error
    if baseline <= best.accuracy:
        wanted = max(wanted, baseline)
    knee = at_table = screened.knee()
    if config.choose != 'knee':
        at_table = screened.for_accuracy(min(wanted - config.tolerance, best.accuracy))
    # One standard error dearer than asked, so that on other data too it is within one point.
    within = screened.for_accuracy(min(best.accuracy, baseline - 0.01 + standard_error))
    points: dict[str, bj.OperatingPoint] = {}
    for name, point in {TABLE: at_table, 'within 1 point': within, 'knee': knee}.items():
        if not any(np.array_equal(point.thresholds, other.thresholds) for other in points.values()):
            points[name] = point
    return points


def assemble(
    config: ConfigDict,
    screened: Screen,
    points: dict[str, bj.OperatingPoint],
    branchy: ExitTable,
    baseline: ExitTable,
    clocks: dict[str, Any],
) -> dict[str, Any]:
    """Puts the figures of both networks into rows.

    Args:
        config: settings of the run.
        screened: the settings that were tried on validation data.
        points: those chosen, by name, the table's first.
        branchy: every exit of the branchy network on test data.
        baseline: the one exit of its baseline, likewise.
        clocks: of `experiments.run.timing.time_run`.
    """
    costs, metric = branchy.costs, TASKS[config.task].metric
    alone = [table.anytime().accuracy.tolist() for table in (baseline, branchy)]
    chosen = {name: _point(point, branchy, clocks, name, metric) for name, point in points.items()}
    first = {'network': config.network[2:], f'exit_{metric}': alone[0], 'thresholds': [], 'exit_fractions': [1.0]}
    first |= {f'test_{metric}': alone[0][-1], **clocks['baseline'], 'macs': float(costs.trunk), 'mac_gain': 1.0}
    second = {'network': config.network, f'exit_{metric}': alone[1], **chosen[TABLE]}
    frontier, knee = screened.frontier(), screened.knee().thresholds.tolist()
    latencies = np.array(clocks['exit_latency_ms'])  # of images that leave at each exit
    return {
        'rows': [first, second],
        'operating_points': [{'name': name, **row} for name, row in chosen.items()],
        'frontier': [
            {
                **row,
                f'validation_{metric}': float(accuracy),
                'latency_ms': float(row['exit_fractions'] @ latencies),
                'knee': row['thresholds'] == knee,
            }
            for row, accuracy in zip(_rows(branchy.evaluate(frontier), metric), frontier.accuracy, strict=True)
        ],
        'first_and_last': _first_and_last(branchy, metric),
        **{name: clocks[name] for name in ('exit_latency_ms', 'trunk_only_ms')},
        'stage_macs': costs.stages.tolist(),
        'exit_macs': costs.exits.tolist(),
    }


def _rows(screen: Screen, metric: str) -> list[dict[str, Any]]:
    """Returns settings evaluated on test data, as rows."""
    fields = (screen.thresholds, screen.accuracy, screen.exit_fractions, screen.cost)
    names = ('thresholds', f'test_{metric}', 'exit_fractions', 'macs')
    return [
        dict(zip(names, values, strict=True))
        for values in zip(*(np.asarray(field).tolist() for field in fields), strict=True)
    ]


def _point(
    chosen: bj.OperatingPoint, table: ExitTable, clocks: dict[str, Any], name: str, metric: str
) -> dict[str, Any]:
    """Returns the row of an operating point; the paper's protocol times neither side heads nor their softmax."""
    (row,) = _rows(table.evaluate(chosen), metric)
    reaching = 1 - np.append(0, np.cumsum(row['exit_fractions'])[:-1])
    trunk = np.array(clocks['trunk_only_ms'])
    trunk_only = float(np.append(reaching, reaching[-1]) @ trunk)
    return {
        **row,
        **clocks['points'][name],
        'trunk_only_ms': trunk_only,
        'trunk_only_gain': float(trunk.sum()) / trunk_only,
        'mac_gain': float(table.costs.trunk / row['macs']),
        f'validation_{metric}': float(chosen.accuracy),
        'validation_exit_fractions': np.asarray(chosen.exit_fractions).tolist(),
    }


def _first_and_last(table: ExitTable, metric: str) -> list[dict[str, float]]:
    """Returns the metric against the share of the first exit, without the exits between (the paper's Figure 4)."""
    first = np.sort(np.asarray(table.uncertainty)[0])
    places = np.linspace(0, len(first), _FIGURE_4_POINTS).round().astype(int)
    settings = np.full((len(places), table.num_exits - 1), -np.inf)
    settings[:, 0] = np.append(first, np.inf)[places]  # strictly below: as many as asked leave
    key = f'test_{metric}'
    return [
        {'share': row['exit_fractions'][0], key: row[key], 'threshold': row['thresholds'][0]}
        for row in _rows(table.evaluate(settings), metric)
    ]


def main(arguments: list[str]) -> None:
    """Runs the job with the parsed flags."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)  # orbax would log a dozen lines a checkpoint over the progress bar
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    if not _DISTRIBUTED.value:  # which backend there is may be asked only once the processes have found each other
        start_again_on_cpu(config.cpu_devices)
    run(config, workdir, mesh=_mesh(config.cpu_devices))


def _mesh(cpu_devices: int) -> Mesh | None:
    """Joins the other processes, if there are any, and returns the mesh; ``None`` for a single device.

    A process that dies takes the others down, with an error, after half a minute. Started again, on whatever devices,
    the run goes on from its checkpoint.

    Args:
        cpu_devices: how many a CPU uses without a flag.

    Raises:
        ValueError: flags that contradict each other, or more devices than there are.
    """
    cluster = _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID
    named = [flag.name for flag in cluster if flag.value is not None]
    if not _DISTRIBUTED.value:
        if named:
            raise ValueError(f'{named[0]}: is for several processes; give --distributed, too')
        count = _NUM_DEVICES.value
        if count is None:
            count = min(cpu_devices, len(jax.devices())) if jax.default_backend() == 'cpu' else 1
        return bj.sharding.data_mesh(count or None) if count != 1 else None
    if 0 < len(named) < 3:
        raise ValueError(f'{named[0]}: coordinator, num_processes and process_id go together; got {", ".join(named)}')
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    timeouts = {'heartbeat_timeout_seconds': _DEAD_AFTER_SECONDS, 'shutdown_timeout_seconds': _LAST_WAIT_SECONDS}
    jax.distributed.initialize(*(flag.value for flag in cluster), **timeouts)
    return bj.sharding.data_mesh()


def _parse(arguments: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(arguments)
    except AttributeError as error:  # what ml_collections raises, with a suggestion, for a field that is not there
        raise ValueError(f'config: no field {error}; choose from {", ".join(common.get_config())}') from error


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main, flags_parser=_parse)
