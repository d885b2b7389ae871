"""On how many devices a run runs, and in how many processes: flags alone tell, configs do not change.

--num_devices=8                     eight devices of this process; 0 is all of them
--distributed                       as many processes as a cluster (Slurm, TPU pod, …) starts, which it tells itself
--distributed --coordinator=HOST:PORT --num_processes=2 --process_id=0       the same without a cluster
"""

from __future__ import annotations

import jax
from absl import flags
from jax.sharding import Mesh

import branchy_jax as bj

_NUM_DEVICES = flags.DEFINE_integer(
    'num_devices', None, 'Devices that share every batch; 0 is all. By default 1, on a CPU what the config says.',
    lower_bound=0,
)  # fmt: skip
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Whether this is one of several processes; uses all devices.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, where no cluster tells it.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes in all, where no cluster tells it.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process from 0, where no cluster tells it.')

_DEAD_AFTER_SECONDS = 30
# Process 0 alone times and writes at the end; the others wait for it that long before they leave.
_LAST_WAIT_SECONDS = 3600


def mesh_from_flags(cpu_devices: int = 1) -> Mesh | None:
    """Joins the other processes, if there are any, and returns the mesh; ``None`` for a single device.

    Args:
        cpu_devices: how many a CPU uses where no flag tells.

    A process that dies takes the others down, with an error, after half a minute. Started again, on whatever devices,
    the run goes on from its checkpoint.

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
