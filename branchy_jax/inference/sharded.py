"""Batches over many devices: each stage runs on survivors only, dispatched anew so that no device waits for another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from branchy_jax import program
from branchy_jax.criteria import as_policy
from branchy_jax.inference.compacted import run_chunks
from branchy_jax.inference.steps import (
    Network,
    are_traced,
    arrays_of,
    at_rows,
    check_chunk_sizes,
    chunk_sizes_of,
    network,
    no_rows,
    static,
    take_step,
)
from branchy_jax.sharding import AXIS, shard
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows


@struct.dataclass
class Balance:
    """How many images waited on each of D devices, for each exit asked.

    Attributes:
        waiting: ``[steps, D]`` images waiting for the stage where the exit before left them.
        dispatched: ``[steps, D]`` the same once dispatched: from the second exit on counts differ by at most one.
            Before the first, images lie as they came, the last devices with the rows that fill up the batch.
    """

    waiting: Array
    dispatched: Array

    def __str__(self) -> str:
        lines = [f'{"exit asked":12}{"waiting":>9}   most on one device: before, after   shares per device after']
        for n, (waiting, dispatched) in enumerate(zip(self.waiting, self.dispatched, strict=True)):
            total = max(1, waiting.sum())
            shares = ' '.join(f'{100 * count / total:.1f}' for count in dispatched)
            most = f'{100 * waiting.max() / total:8.1f} % {100 * dispatched.max() / total:8.1f} %'
            lines.append(f'{n + 1:<12}{waiting.sum():>9}   {most:32}   {shares} %')
        return '\n'.join(lines)


@static
class Sharded:
    """The executor that `sharded` builds.

    Attributes:
        network: a model and its exits.
        mesh: the devices.
        chunk_size: rows that a stage takes at once on one device.
    """

    network: Network
    mesh: Mesh
    chunk_size: int | tuple[int, ...]

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``, as `dense` would."""
        policy = as_policy(policy)
        if num_rows(images) == 0:
            return no_rows(lambda v, x, p: self.program(v, x, p, 1)[0], variables, images, policy)
        arrays, _ = _run(self, variables, spread(images, self.mesh), policy, np.int32(num_rows(images)))
        return at_rows(ExitPrediction(*arrays), slice(num_rows(images)))

    def balance(self, variables: Variables, images: Any, policy: Any) -> Balance:
        """Runs the same program and reports on which devices rows waited, and how they were dispatched.

        Raises:
            ValueError: no images, or what the executor itself refuses.
        """
        if num_rows(images) == 0:
            raise ValueError('images: got none, which no device waits for; at least one is needed')
        count = np.int32(num_rows(images))
        _, balance = _run(self, variables, spread(images, self.mesh), as_policy(policy), count)
        return jax.tree.map(np.asarray, balance)

    def program(
        self, variables: Variables, images: Any, policy: ExitPolicy, count: Any
    ) -> tuple[ExitPrediction, Balance]:
        """Answers the first ``count`` rows of a batch that the devices share evenly; to be traced."""
        stages, size = self.network.stages(variables, images), self.mesh.size
        chunk_sizes = chunk_sizes_of(self.chunk_size, stages)

        def on_each_device(
            variables: Variables, images: Any, policy: ExitPolicy, count: Array
        ) -> tuple[ExitPrediction, Balance]:
            share = num_rows(images)
            rows = lax.axis_index(AXIS) * share + jnp.arange(share)
            run = _Run(stages, chunk_sizes, variables, policy)
            return _answer(run, 0, images, None, rows < count)

        if num_rows(images) % size:
            images = spread(images, self.mesh)
        everywhere, by_row, by_device = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
        return jax.shard_map(
            on_each_device,
            mesh=self.mesh,
            in_specs=(everywhere, by_row, everywhere, everywhere),
            out_specs=(by_row, by_device),
            check_vma=False,  # each device loops as often as it has chunks
        )(variables, images, policy, count)


@jax.jit
def _run(
    executor: Sharded, variables: Variables, images: Any, policy: ExitPolicy, count: Array
) -> tuple[tuple[Array, ...], Balance]:
    prediction, balance = executor.program(variables, images, policy, count)
    return arrays_of(prediction), balance


@struct.dataclass
class _Run:
    """What all steps on one device share."""

    stages: program.Stages
    chunk_sizes: tuple[int, ...]
    variables: Variables
    policy: ExitPolicy


def sharded(model: Any, *, mesh: Mesh, chunk_size: int | Sequence[int], exits: Sequence[int] | None = None) -> Sharded:
    """Builds the batch executor for many devices: `compacted` on each, survivors dispatched anew before each stage.

    Hard images come in runs: were survivors to stay where they are, one device would work while the others wait. Before
    each stage they are dispatched in turns, so that counts differ by at most one; what they turn out to be is sent back
    the same way. One program, in which every device loops over its own chunks.

    Args:
        model: a network with N exits.
        mesh: from `branchy_jax.sharding.data_mesh`.
        chunk_size: images that a stage takes at once on one device; one number, or one for each exit asked.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction`` in the order of the images, whose rows lie spread
        over the devices. B need not be a multiple of their number. Works under `jax.jit`. Raises ValueError on a
        policy that does not fit, NaN, or bad images. Its ``balance``, called alike, returns a
        `Balance`.

    Raises:
        ValueError: a chunk size below 1, not one chunk size per exit asked, or impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> run = sharded(model, mesh=bj.sharding.data_mesh(1), chunk_size=2)
        >>> run(variables, images, [float('-inf')]).exit_index.tolist()
        [1, 1, 1, 1, 1]
        >>> run.balance(variables, images, [float('-inf')]).dispatched.tolist()
        [[5], [5]]
    """
    return Sharded(network(model, exits, None), mesh, check_chunk_sizes(chunk_size))


def spread(images: Array, mesh: Mesh) -> Array:
    """Lays rows over the devices, the last one repeated until they share evenly."""
    missing = -num_rows(images) % mesh.size

    def filled(values: Array) -> Array:
        if not missing:
            return values
        if isinstance(values, jax.core.Tracer):
            return jnp.concatenate([values, jnp.repeat(values[-1:], missing, axis=0)])
        return np.concatenate([values, np.repeat(np.asarray(values[-1:]), missing, axis=0)])

    images = jax.tree.map(filled, images)
    return images if are_traced(images) else shard(mesh, images)


def _answer(
    run: _Run, n: int, hidden: Any, carry: Any, waiting: Array, sent: Dispatch | None = None
) -> tuple[ExitPrediction, Balance]:
    """Answers the waiting rows of this device, with the help of the others; values of other rows are unspecified."""
    rows, count = jnp.argsort(~waiting, stable=True), waiting.sum()
    size = min(run.chunk_sizes[n], len(waiting))
    sized, padded = run.stages.at(run.variables, size), jnp.pad(rows, (0, -len(rows) % size))
    step = functools.partial(take_step, sized, n, policy=run.policy)
    chunks = run_chunks(step, (hidden, carry), padded, count, size)
    done = at_rows(chunks, slice(len(rows)))
    arrived = count if sent is None else sent.count
    here: Any = Balance(waiting=arrived[None, None], dispatched=count[None, None])
    prediction = done.prediction
    if n + 1 < len(run.chunk_sizes):
        stays = (jnp.arange(len(rows)) < count) & ~done.confident
        onward = Dispatch.of(stays)
        hidden, carry = onward.send((done.hidden, done.carry))
        later, rest = _answer(run, n + 1, hidden, carry, onward.send(stays, fill=False), onward)
        prediction = onward.combine(later, prediction)
        here = jax.tree.map(lambda *parts: jnp.concatenate(parts), here, rest)
    places = jnp.argsort(rows)
    return at_rows(prediction, places), here


@struct.dataclass
class Dispatch:
    """Where the rows of this device go; used inside `jax.shard_map`.

    Rows are dispatched evenly among the devices of a mesh, and their answers combined where the rows came from. Each
    device sends as many rows to every other as an even dispatch can ask for, whether they are in use or not: shapes
    are fixed, and nothing but the rows themselves crosses between devices.

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

    @classmethod
    def of(cls, goes: Array) -> Dispatch:
        """Dispatches rows in turns: each device gets the same number, give or take one.

        Args:
            goes: ``[M]`` which rows of this device are dispatched. M is the same on every device.
        """
        length, devices = len(goes), lax.axis_size(AXIS)
        slots = -(-length // devices)
        counts = lax.all_gather(goes.sum(), AXIS)
        before = jnp.where(jnp.arange(devices) < lax.axis_index(AXIS), counts, 0).sum()
        ordinal = jnp.cumsum(goes) - 1
        slot = (before + ordinal) % devices * slots + ordinal // devices
        nowhere = devices * slots
        target = jnp.where(goes, slot, nowhere)
        sent = jnp.full(nowhere + 1, length).at[target].set(jnp.arange(length), mode='promise_in_bounds')
        return cls(sent=sent[:nowhere], slot=jnp.where(goes, slot, 0), goes=goes, count=goes.sum())

    def send(self, tree: Any, *, fill: Any = None) -> Any:
        """Sends rows to where they are dispatched.

        Args:
            tree: pytree of arrays ``[M, …]``.
            fill: what is in empty slots; by default some row.

        Returns:
            The same with ``[D · slots, …]``, D · slots being M rounded up to a multiple of D.
        """

        def send(values: Array) -> Array:
            chosen = values[jnp.minimum(self.sent, len(values) - 1)]
            if fill is not None:
                chosen = jnp.where(self.sent < len(values), chosen, fill)
            return _exchange(chosen)

        return jax.tree.map(send, tree)

    def combine(self, answers: Any, otherwise: Any) -> Any:
        """Sends answers back to where the rows came from.

        Args:
            answers: pytree of arrays ``[D · slots, …]``, in the order in which `send` delivered the rows.
            otherwise: pytree of arrays ``[M, …]``, for rows that were not sent.

        Returns:
            Pytree of arrays ``[M, …]``.
        """

        def fetch(values: Array, own: Array) -> Array:
            goes = self.goes.reshape(self.goes.shape + (1,) * (own.ndim - 1))
            return jnp.where(goes, _exchange(values)[self.slot], own)

        return jax.tree.map(fetch, answers, otherwise)


def _exchange(values: Array) -> Array:
    """Swaps blocks: block d of this device goes to device d, whose block of this device's number comes back."""
    return lax.all_to_all(values, AXIS, split_axis=0, concat_axis=0, tiled=True)
