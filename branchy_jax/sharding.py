"""Many devices as one: a mesh with a single axis, and the two ways in which arrays lie on it.

Parameters are replicated, batches are sharded. Everything else follows from that: `jax.jit` sees where its arguments
lie and computes each device's share, with losses and BatchNorm statistics of the whole batch.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from branchy_jax.types import Array

AXIS = 'batch'
"""The one axis of the mesh."""

Tree = TypeVar('Tree')


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh over devices, for batches.

    Args:
        num_devices: how many of them; by default all, those of other processes included.

    Raises:
        ValueError: more devices than there are, or, with several processes, not all of them.

    Example:
        >>> dict(data_mesh(1).shape)
        {'batch': 1}
    """
    # By process, so that a process's share of a batch is one run of rows.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f'num_devices: got {count}, but there are {len(devices)} devices ({devices[0].platform}); on a CPU, '
            'XLA_FLAGS=--xla_force_host_platform_device_count=N before jax starts makes N'
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f'num_devices: got {count}; {jax.process_count()} processes use all their {len(devices)} devices'
        )
    return Mesh(np.array(devices[:count]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that lays an array on every device whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives each device its share of the rows."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Lays every array on every device whole. Arrays that lie so already are kept, all others are copied.

    Args:
        mesh: from `data_mesh`.
        tree: pytree of arrays, the same in every process: a `TrainState`, variables, a data set.

    Example:
        >>> import jax.numpy as jnp
        >>> replicate(data_mesh(1), jnp.ones(3)).sharding.is_fully_replicated
        True
    """
    target = replicated(mesh)

    def put(value: Array) -> Array:
        if isinstance(value, jax.Array) and value.sharding == target:
            return value
        # A copy: training donates its state, and whoever gave the arrays keeps them.
        return jax.device_put(value, target, may_alias=False)

    return jax.tree.map(put, tree)


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Spreads the rows of every array over the devices.

    Args:
        mesh: from `data_mesh`.
        tree: pytree of arrays ``[B, …]``, the same in every process; B a multiple of the number of devices.

    Raises:
        ValueError: rows that the devices cannot share evenly.

    Example:
        >>> import jax.numpy as jnp
        >>> tuple(shard(data_mesh(1), jnp.ones((4, 2))).sharding.spec)
        ('batch',)
    """
    target = by_rows(mesh)

    def put(value: Array) -> Array:
        if isinstance(value, jax.Array) and value.sharding == target:
            return value
        check_divisible('tree', len(value), mesh)
        if target.is_fully_addressable:
            return jax.device_put(value, target)
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, target, lambda index: whole[index])

    return jax.tree.map(put, tree)


def shard_local(mesh: Mesh, tree: Tree) -> Tree:
    """Makes global arrays of what each process has read of them, without any process holding the whole.

    Args:
        mesh: from `data_mesh`.
        tree: pytree of arrays ``[B ÷ processes, …]``: the rows of this process, the first process's first.
    """
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(by_rows(mesh), value), tree)


def constrain(mesh: Mesh | None, tree: Tree) -> Tree:
    """Inside jit: tells the compiler to spread rows over the devices. Without a mesh it does nothing."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda value: jax.lax.with_sharding_constraint(value, by_rows(mesh)), tree)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh that the arrays of a pytree lie on; ``None`` if they lie on a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and AXIS in sharding.mesh.shape:
            return sharding.mesh
    return None


def check_divisible(argument: str, size: int, mesh: Mesh) -> None:
    """Refuses a number of rows that the devices cannot share evenly.

    Args:
        argument: its name in the message.
        size: rows.
        mesh: of the devices.

    Raises:
        ValueError: not a multiple of the number of devices.
    """
    if size % mesh.size:
        near = max(mesh.size, round(size / mesh.size) * mesh.size)
        raise ValueError(
            f'{argument}: got {size} rows for {mesh.size} devices, which cannot share them evenly; give a multiple of '
            f'{mesh.size}, such as {near}'
        )
