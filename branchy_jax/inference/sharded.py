"""Batches over many devices: each stage runs on survivors only, redistributed so that no device waits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from branchy_jax.inference.compacted import Combine, answer_in_chunks
from branchy_jax.inference.steps import Network, are_traced, at_rows, network, run_batch, select_rows
from branchy_jax.sharding import AXIS, shard
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows, static


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
            lines.append(f'{n:<12}{waiting.sum():>9}   {most:32}   {shares} %')
        return '\n'.join(lines)


Answer = tuple[ExitPrediction, Balance]


@struct.dataclass
class Sharded:
    """The executor that `sharded` builds.

    Attributes:
        network: a model and its exits.
        mesh: the devices.
    """

    network: Network = static()
    mesh: Mesh = static()

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``, as `dense` would."""
        count = num_rows(images)
        answer, _ = run_batch(self, variables, spread(images, self.mesh), policy, count)
        return at_rows(answer, slice(count))

    def balance(self, variables: Variables, images: Any, policy: Any) -> Balance:
        """Runs the same program and reports on which devices rows waited, and how they were dispatched.

        Raises:
            ValueError: no images, or what the executor itself refuses.
        """
        count = num_rows(images)
        if count == 0:
            raise ValueError('images: got none, which no device waits for; at least one is needed')
        _, balance = run_batch(self, variables, spread(images, self.mesh), policy, count)
        return jax.tree.map(np.asarray, balance)

    def program(self, variables: Variables, images: Any, policy: ExitPolicy, count: Any) -> Answer:
        """Answers the first ``count`` rows of a batch that the devices share evenly; to be traced."""
        images = spread(images, self.mesh)

        def on_each_device(variables: Variables, images: Any, policy: ExitPolicy, count: Array) -> Answer:
            share = num_rows(images)
            waiting = lax.axis_index(AXIS) * share + jnp.arange(share) < count
            counts = [(waiting.sum(), waiting.sum())]

            def dispatch(stays: Array, tree: Any) -> tuple[Any, Array, Combine]:
                tree, arrived, combine = _dispatch(stays, tree)
                counts.append((stays.sum(), arrived.sum()))
                return tree, arrived, combine

            answer = answer_in_chunks(self, variables, images, policy, waiting, dispatch)
            return answer, Balance(*jnp.array(counts).T[:, :, None])

        everywhere, by_row, by_device = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
        return jax.shard_map(
            on_each_device,
            mesh=self.mesh,
            in_specs=(everywhere, by_row, everywhere, everywhere),
            out_specs=(by_row, by_device),
            check_vma=False,  # each device loops as often as it has chunks
        )(variables, images, policy, count)


def sharded(model: Any, *, mesh: Mesh, chunk_size: int | Sequence[int], exits: Sequence[int] | None = None) -> Sharded:
    """Builds the batch executor for many devices: `compacted` on each, survivors redistributed before each stage.

    Hard images come in runs: were survivors to stay where they are, one device would work while the others wait. Before
    each stage they are dispatched in turns, so that counts differ by at most one; what they turn out to be is sent back
    the same way. One program, in which every device loops over its own chunks.

    Args:
        model: a network with N exits.
        mesh: from `branchy_jax.sharding.data_mesh`.
        chunk_size: images that a stage takes at once on one device; one number, or one for each exit asked.
        exits: the exits to ask, ascending, the last among them; the other exits never answer.

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
    return Sharded(network(model, exits, None, chunk_size), mesh)


def spread(images: Array, mesh: Mesh) -> Array:
    """Lays rows over the devices, the last one repeated until they share evenly."""
    missing, traced = -num_rows(images) % mesh.size, are_traced(images)
    if missing:
        xp: Any = jnp if traced else np
        images = jax.tree.map(lambda x: xp.concatenate([x, xp.repeat(x[-1:], missing, axis=0)]), images)
    return images if traced else shard(mesh, images)


def _dispatch(goes: Array, tree: Any) -> tuple[Any, Array, Combine]:
    """Sends rows to all devices in turns, so that each gets the same number, give or take one.

    Each device sends as many rows to every other as an even dispatch can ask for, whether they are in use or not:
    shapes are fixed, and nothing but the rows themselves crosses between devices. Used inside `jax.shard_map`.

    Args:
        goes: ``[M]`` which rows of this device are sent. M is the same on every device.
        tree: pytree of arrays ``[≥ M, …]``.

    Returns:
        The tree with ``[D · slots, …]``, M rounded up to a multiple of D, in which a row is in use or empty; which of
        these rows are in use; and `Combine`.
    """
    length, devices = len(goes), lax.axis_size(AXIS)
    slots = -(-length // devices)
    counts = lax.all_gather(goes.sum(), AXIS)
    before = jnp.where(jnp.arange(devices) < lax.axis_index(AXIS), counts, 0).sum()
    ordinal = jnp.cumsum(goes) - 1
    slot = (before + ordinal) % devices * slots + ordinal // devices
    nowhere = devices * slots
    target = jnp.where(goes, slot, nowhere)
    # The row that goes into each slot, the first device's slots first; M for an empty slot.
    sent = jnp.full(nowhere + 1, length).at[target].set(jnp.arange(length), mode='promise_in_bounds')[:-1]

    def combine(answers: Any, others: Any) -> Any:
        back = jax.tree.map(lambda values: _exchange(values)[jnp.where(goes, slot, 0)], answers)
        return select_rows(goes, back, others)

    arrived = jax.tree.map(lambda values: _exchange(values[jnp.minimum(sent, length - 1)]), tree)
    return arrived, _exchange(sent < length), combine


def _exchange(values: Array) -> Array:
    """Swaps blocks: block d of this device goes to device d, whose block of this device's number comes back."""
    return lax.all_to_all(values, AXIS, split_axis=0, concat_axis=0, tiled=True)
