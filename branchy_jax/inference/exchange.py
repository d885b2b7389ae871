"""Rows dealt out evenly among the devices of a mesh, and their answers sent back; runs inside `jax.shard_map`.

Each device sends as many rows to every other as an even deal can ask for, whether they are in use or not: shapes are
fixed, and nothing but the rows themselves crosses between devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from branchy_jax.sharding import AXIS
from branchy_jax.types import Array


@struct.dataclass
class Route:
    """Where the rows of this device go.

    Attributes:
        sent: ``[D · slots]`` the row that goes into each slot, the first device's slots first; M for an empty slot.
        slot: ``[M]`` the slot of each row.
        goes: ``[M]`` whether a row is sent at all.
        count: how many of this device's rows are sent.
    """

    sent: Array
    slot: Array
    goes: Array
    count: Array


def route(goes: Array) -> Route:
    """Deals rows round the devices, as one deals cards: each gets the same number, give or take one.

    Args:
        goes: ``[M]`` which rows of this device are dealt. M is the same on every device.
    """
    length, devices = len(goes), lax.axis_size(AXIS)
    slots = -(-length // devices)
    counts = lax.all_gather(goes.sum(), AXIS)
    before = jnp.where(jnp.arange(devices) < lax.axis_index(AXIS), counts, 0).sum()
    ordinal = jnp.cumsum(goes) - 1
    slot = (before + ordinal) % devices * slots + ordinal // devices
    nowhere = devices * slots
    sent = jnp.full(nowhere, length).at[jnp.where(goes, slot, nowhere)].set(jnp.arange(length), mode='drop')
    return Route(sent=sent, slot=jnp.where(goes, slot, 0), goes=goes, count=goes.sum())


def deal(path: Route, tree: Any, *, fill: Any = None) -> Any:
    """Sends rows to where they are dealt.

    Args:
        path: from `route`.
        tree: pytree of arrays ``[M, …]``.
        fill: what is in empty slots; by default some row.

    Returns:
        The same with ``[D · slots, …]``, D · slots being M rounded up to a multiple of D.
    """

    def send(values: Array) -> Array:
        rows = jnp.minimum(path.sent, len(values) - 1)
        chosen = values[rows]
        if fill is not None:
            chosen = jnp.where(path.sent < len(values), chosen, fill)
        return _exchange(chosen)

    return jax.tree.map(send, tree)


def collect(path: Route, answers: Any, otherwise: Any) -> Any:
    """Sends answers back to where the rows came from.

    Args:
        path: from `route`.
        answers: pytree of arrays ``[D · slots, …]``, in the order in which `deal` delivered the rows.
        otherwise: pytree of arrays ``[M, …]``, for rows that were not sent.

    Returns:
        Pytree of arrays ``[M, …]``.
    """

    def fetch(values: Array, own: Array) -> Array:
        goes = path.goes.reshape(path.goes.shape + (1,) * (own.ndim - 1))
        return jnp.where(goes, _exchange(values)[path.slot], own)

    return jax.tree.map(fetch, answers, otherwise)


def _exchange(values: Array) -> Array:
    """Swaps blocks: block d of this device goes to device d, whose block of this device's number comes back."""
    return lax.all_to_all(values, AXIS, split_axis=0, concat_axis=0, tiled=True)
