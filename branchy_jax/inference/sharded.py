"""Batches over many devices: each stage runs on survivors only, dispatched anew so that no device waits for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from branchy_jax.inference.any_batch import Counted
from branchy_jax.inference.compacted import Queue, run_chunks
from branchy_jax.inference.steps import (
    Executor,
    StepFunction,
    asked_exits,
    at_rows,
    build_steps,
    check_chunk_sizes,
    compiled_once,
    guarded,
    policy_checker,
)
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.sharding import AXIS, shard
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows


@struct.dataclass
class Balance:
    """How many images waited on each of D devices, for each exit asked.

    Attributes:
        found: ``[steps, D]`` images waiting for the stage where the exit before left them.
        dispatched: ``[steps, D]`` the same once dispatched: from the second exit on counts differ by at most one.
            Before the first, images lie as they came, the last devices with the rows that fill up the batch.
    """

    found: Array
    dispatched: Array

    def __str__(self) -> str:
        lines = [f'{"exit asked":12}{"waiting":>9}   most on one device: before, after   shares per device after']
        for n, (found, dispatched) in enumerate(zip(self.found, self.dispatched, strict=True)):
            total = max(1, found.sum())
            shares = ' '.join(f'{100 * count / total:.1f}' for count in dispatched)
            most = f'{100 * found.max() / total:8.1f} % {100 * dispatched.max() / total:8.1f} %'
            lines.append(f'{n + 1:<12}{found.sum():>9}   {most:32}   {shares} %')
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Sharded:
    """An executor over many devices, which can tell how well it used them.

    Attributes:
        counted: the same without a door, for batches of which only the first rows are images.
    """

    _run: Executor = dataclasses.field(repr=False)
    _with_balance: Callable[..., tuple[ExitPrediction, Balance]] = dataclasses.field(repr=False)
    _check: Callable[[Any], ExitPolicy] = dataclasses.field(repr=False)
    counted: Counted = dataclasses.field(repr=False)

    def __call__(self, variables: Variables, images: Array, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``, as `dense` would."""
        return self._run(variables, images, policy)

    def balance(self, variables: Variables, images: Array, policy: Any) -> Balance:
        """Runs the same program and reports where survivors were found, and how they were dispatched.

        Raises:
            ValueError: no images, or what the executor itself refuses.
        """
        return jax.tree.map(np.asarray, self._with_balance(variables, images, self._check(policy))[1])


def sharded(
    model: BranchyNet, *, mesh: Mesh, chunk_size: int | Sequence[int], exits: Sequence[int] | None = None
) -> Sharded:
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
    asked = asked_exits(model, exits)
    return _sharded(model, mesh, asked, check_chunk_sizes(chunk_size, len(asked)))


def on_mesh(run: Executor, mesh: Mesh) -> Executor:
    """Spreads the images over the devices and lets them run an executor such as `dense`, each on its share.

    Args:
        run: an executor that works row by row.
        mesh: from `branchy_jax.sharding.data_mesh`.
    """

    def execute(variables: Variables, images: Array, policy: Any) -> Any:
        return at_rows(run(variables, spread(images, mesh), policy), slice(num_rows(images)))

    return execute


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
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(images))
    return images if traced else shard(mesh, images)


@compiled_once
def _sharded(model: BranchyNet, mesh: Mesh, asked: tuple[int, ...], chunk_sizes: tuple[int, ...]) -> Sharded:
    steps = build_steps(model, asked)

    def on_each_device(
        variables: Variables, images: Array, policy: ExitPolicy, count: Array
    ) -> tuple[ExitPrediction, Balance]:
        share = num_rows(images)
        rows = lax.axis_index(AXIS) * share + jnp.arange(share)
        return _answer(steps, chunk_sizes, variables, images, (), rows < count, policy)

    everywhere, by_row, by_device = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    spmd = jax.jit(
        jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(everywhere, by_row, everywhere, everywhere),
            out_specs=(by_row, by_device),
            check_vma=False,  # each device loops as often as it has chunks
        )
    )

    def run(
        variables: Variables, images: Array, policy: ExitPolicy, count: np.int32 | None = None
    ) -> tuple[ExitPrediction, Balance]:
        length = num_rows(images)
        prediction, balance = spmd(
            variables, spread(images, mesh), policy, np.int32(length if count is None else count)
        )
        return at_rows(prediction, slice(length)), balance

    def answer(*arguments: Any) -> ExitPrediction:
        return run(*arguments)[0]

    def with_balance(variables: Variables, images: Array, policy: ExitPolicy) -> tuple[ExitPrediction, Balance]:
        if num_rows(images) == 0:
            raise ValueError('images: got none, which no device waits for; at least one is needed')
        return run(variables, images, policy)

    return Sharded(guarded(answer, model), with_balance, policy_checker(model.num_exits), answer)


def _answer(
    steps: Sequence[StepFunction],
    chunk_sizes: Sequence[int],
    variables: Variables,
    hidden: Any,
    carry: Any,
    waiting: Array,
    policy: ExitPolicy,
    sent: Dispatch | None = None,
) -> tuple[ExitPrediction, Balance]:
    """Answers the waiting rows of this device, with the help of the others; what other rows get is of no meaning."""
    rows, count = jnp.argsort(~waiting, stable=True), waiting.sum()
    size = min(chunk_sizes[0], len(waiting))
    fill = -len(rows) % size
    queue = Queue(hidden=hidden, carry=carry, rows=jnp.pad(rows, (0, fill)), ids=jnp.pad(rows, (0, fill)), count=count)
    done = at_rows(run_chunks(steps[0], variables, queue, policy, size), slice(len(rows)))
    found = count if sent is None else sent.count
    here: Any = Balance(found=found[None, None], dispatched=count[None, None])
    prediction = done.prediction
    if len(steps) > 1:
        stays = (jnp.arange(len(rows)) < count) & ~done.confident
        onward = Dispatch.of(stays)
        hidden, carry = onward.send((done.hidden, done.carry))
        later, rest = _answer(
            steps[1:], chunk_sizes[1:], variables, hidden, carry, onward.send(stays, fill=False), policy, onward
        )
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
        sent = (
            jnp.full(nowhere + 1, length)
            .at[jnp.where(goes, slot, nowhere)]
            .set(jnp.arange(length), mode='promise_in_bounds')
        )
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
