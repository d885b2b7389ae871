"""Trains a baseline and a branchy network, picks thresholds on validation data, evaluates once on test data.

    python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k

The same command resumes a run that was interrupted. Flags set the number of devices, which may differ between starts;
configs do not change:

    --num_devices=8                     eight devices of this process; 0 is all of them
    --distributed                       as many processes as a cluster (Slurm, TPU pod, …) starts
    --distributed --coordinator=HOST:PORT --num_processes=2 --process_id=0       the same without a cluster

With ``--static`` the controls of the finished run follow: does early exit beat shrinking? For every side exit its
stages and its head alone are trained from scratch as a network of their own, as long as the baseline was, and timed
beside it; ``static.json`` holds them.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

import branchy_jax as bj
from experiments.configs import common
from experiments.run import job
from experiments.run.networks import read_run
from experiments.run.processes import start_again_on_cpu
from experiments.study import static

# The only command with flags of absl, which is what ml_collections reads configs by.
_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the run.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, weights and the report.')
_STATIC = flags.DEFINE_bool('static', False, 'Train and time the static controls, too.')
_NUM_DEVICES = flags.DEFINE_integer(
    'num_devices',
    None,
    'Devices that share every batch; 0 is all. By default 1, on a CPU what the config says.',
    lower_bound=0,
)
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Whether this is one of several processes; uses all devices.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, without a cluster.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes in all, without a cluster.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process from 0, without a cluster.')

_DEAD_AFTER_SECONDS = 30
# Process 0 alone times and writes at the end; the others wait for it that long before they leave.
_LAST_WAIT_SECONDS = 3600


def main(arguments: list[str]) -> None:
    """Hands the parsed flags to the job."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)  # orbax would log a dozen lines a checkpoint over the progress bar
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    if _STATIC.value and _DISTRIBUTED.value:
        raise ValueError('static: the controls train in one process; give the command again without --distributed')
    if not _DISTRIBUTED.value:  # which backend there is may be asked only once the processes have found each other
        start_again_on_cpu(config.cpu_devices)
    mesh = _mesh(config.cpu_devices)
    if not (_STATIC.value and (workdir / 'report.json').exists()):
        job.run(config, workdir, mesh=mesh)
    if _STATIC.value:
        if (workdir / 'config.json').exists():  # a stored report of published weights has none
            job.claim(workdir, config)
        static.run(read_run(workdir), mesh=mesh)


def _mesh(cpu_devices: int) -> Mesh | None:
    """Joins the other processes, if there are any, and returns the mesh; ``None`` for a single device.

    A process that dies takes the others down, with an error, after half a minute. Started again, on whatever devices,
    the run goes on from its checkpoint.

    Args:
        cpu_devices: how many a CPU uses without a flag.

    Raises:
        ValueError: flags that contradict each other, or more devices than there are.
    """
    named = [flag.name for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if flag.value is not None]
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
    jax.distributed.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        heartbeat_timeout_seconds=_DEAD_AFTER_SECONDS,
        shutdown_timeout_seconds=_LAST_WAIT_SECONDS,
    )
    return bj.sharding.data_mesh()


def _parse(arguments: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(arguments)
    except AttributeError as error:  # what ml_collections raises, with a suggestion, for a field that is not there
        raise ValueError(f'config: no field {error}; choose from {", ".join(common.get_config())}') from error


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main, flags_parser=_parse)
