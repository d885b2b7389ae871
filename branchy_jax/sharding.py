"""Several devices: a mesh with a single axis, on which parameters are replicated and batches are sharded by rows.

`jax.jit` reads the sharding of its arguments and computes the share of each device. Losses and BatchNorm statistics are
those of the whole batch.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from branchy_jax.types import Array

__all__ = ['data_mesh', 'replicate', 'shard']

AXIS = 'batch'
"""The one axis of the mesh."""

Tree = TypeVar('Tree')


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh over devices, for batches.

    Args:
        num_devices: how many devices; by default all, those of other processes included.

    Raises:
        ValueError: if there are fewer devices, or several processes do not use all of them.

    Example:
        >>> dict(data_mesh(1).shape)
        {'batch': 1}
    """
    # Sorted by process, so that the rows of each process are contiguous.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        advice = 'on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N before jax starts makes N'
        raise ValueError(f'num_devices: got {count} of {len(devices)} devices ({devices[0].platform}); {advice}')
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f'num_devices: got {count}; several processes use all {len(devices)} devices')
    return Mesh(np.array(devices[:count]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives each device its share of the rows."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Copies every array to every device. Arrays that are replicated already are returned without a copy.

    Args:
        mesh: from `data_mesh`.
        tree: pytree of arrays, equal in every process: a `TrainState`, variables, a data set.

    Example:
        >>> import jax.numpy as jnp
        >>> replicate(data_mesh(1), jnp.ones(3)).sharding.is_fully_replicated
        True
    """
    target = replicated(mesh)
    # Copies: training donates its state, and the caller's arrays must stay.
    return jax.tree.map(lambda x: x if _is_on(x, target) else jax.device_put(x, target, may_alias=False), tree)


def _is_on(value: Array, target: NamedSharding) -> bool:
    return isinstance(value, jax.Array) and value.sharding == target


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Splits the rows of every array among the devices.

    Args:
        mesh: from `data_mesh`.
        tree: pytree of arrays ``[B, …]``, equal in every process; B a multiple of the number of devices.

    Raises:
        ValueError: if B is not a multiple of the number of devices.

    Example:
        >>> import jax.numpy as jnp
        >>> tuple(shard(data_mesh(1), jnp.ones((4, 2))).sharding.spec)
        ('batch',)
    """
    target = by_rows(mesh)

    def put(value: Array) -> Array:
        if _is_on(value, target):
            return value
        check_divisible('tree', len(value), mesh)
        return jax.make_array_from_process_local_data(target, value, value.shape)

    return jax.tree.map(put, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of the arrays of a pytree, or ``None`` if they are on a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and AXIS in sharding.mesh.shape:
            return sharding.mesh
    return None


def check_divisible(argument: str, size: int, mesh: Mesh) -> None:
    """Raises ValueError, which names the argument, if a number of rows is no multiple of the number of devices."""
    if size % mesh.size:
        near = max(mesh.size, round(size / mesh.size) * mesh.size)
        raise ValueError(f'{argument}: got {size} rows for {mesh.size} devices; give a multiple, such as {near}')
