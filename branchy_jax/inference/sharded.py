"""Batches over many devices: each stage runs on survivors only, dealt out anew so that no device waits for another."""

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

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.checks import Executor, guarded
from branchy_jax.inference.compacted import check_chunk_sizes
from branchy_jax.inference.exchange import Route, collect, deal, route
from branchy_jax.inference.loops import Queue, run_chunks
from branchy_jax.inference.steps import StepFunction, at_rows, build_steps
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.sharding import AXIS, shard
from branchy_jax.types import Array, ExitPrediction, Variables


@struct.dataclass
class Balance:
    """How many images waited on each of D devices, for each exit asked.

    Attributes:
        found: ``[steps, D]`` images waiting for the stage where the exit before left them.
        dealt: ``[steps, D]`` the same after they were dealt out: from the second exit on counts differ by at most one.
            Before the first, images lie as they came, the last devices with the rows that fill up the batch.
    """

    found: np.ndarray
    dealt: np.ndarray

    def __str__(self) -> str:
        lines = [f'{"exit asked":12}{"waiting":>9}   most on one device: before, after   shares per device after']
        for n, (found, dealt) in enumerate(zip(self.found, self.dealt, strict=True)):
            total = max(1, found.sum())
            shares = ' '.join(f'{100 * count / total:.1f}' for count in dealt)
            most = f'{100 * found.max() / total:8.1f} % {100 * dealt.max() / total:8.1f} %'
            lines.append(f'{n + 1:<12}{found.sum():>9}   {most:32}   {shares} %')
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Sharded:
    """An executor over many devices, which can tell how well it used them."""

    _run: Executor = dataclasses.field(repr=False)
    _with_balance: Callable[[Variables, Array, Array], tuple[ExitPrediction, Balance]] = dataclasses.field(repr=False)

    def __call__(self, variables: Variables, images: Array, thresholds: Array) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``, as `dense` would."""
        return self._run(variables, images, thresholds)

    def balance(self, variables: Variables, images: Array, thresholds: Array) -> Balance:
        """Runs the same program and reports where survivors were found, and how they were dealt out."""
        return jax.tree.map(np.asarray, self._with_balance(variables, images, np.asarray(thresholds, np.float32))[1])


def sharded(
    model: BranchyNet,
    *,
    mesh: Mesh,
    chunk_size: int | Sequence[int],
    criterion: Criterion = entropy,
    exits: Sequence[int] | None = None,
) -> Sharded:
    """Builds the batch executor for many devices: `compacted` on each, with survivors dealt out anew before each stage.

    Hard images come in runs: were survivors to stay where they are, one device would work while the others wait. Before
    each stage they are dealt round, so that counts differ by at most one; what they turn out to be is sent back the
    same way. One program, in which every device loops over its own chunks.

    Args:
        model: a network with N exits.
        mesh: from `branchy_jax.sharding.data_mesh`.
        chunk_size: images that a stage takes at once on one device; one number, or one for each exit asked.
        criterion: how unsure an exit is.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf.

    Returns:
        ``(variables, images [B, H, W, C], thresholds [N - 1]) → ExitPrediction`` in the order of the images, whose
        rows lie spread over the devices. B need not be a multiple of their number. Works under `jax.jit`. Raises
        ValueError on the wrong number of thresholds, NaN, or bad images. Its ``balance``, called alike, returns a
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
        >>> run.balance(variables, images, [float('-inf')]).dealt.tolist()
        [[5], [5]]
    """
    run = _build(model, mesh, chunk_size, criterion, exits)
    return Sharded(guarded(lambda *arguments: run(*arguments)[0], model), run)


def on_mesh(run: Executor, mesh: Mesh) -> Executor:
    """Spreads the images over the devices and lets them run an executor such as `dense`, each on its share.

    Args:
        run: an executor that works row by row.
        mesh: from `branchy_jax.sharding.data_mesh`.
    """

    def execute(variables: Variables, images: Array, thresholds: Array) -> Any:
        found = run(variables, spread(images, mesh), thresholds)
        return at_rows(found, slice(len(images)))

    return execute


def spread(images: Array, mesh: Mesh) -> Array:
    """Lays rows over the devices, the last one repeated until they share evenly."""
    missing = -len(images) % mesh.size
    if isinstance(images, jax.core.Tracer):
        return jnp.concatenate([images, jnp.repeat(images[-1:], missing, axis=0)]) if missing else images
    if missing:
        images = np.concatenate([images, np.repeat(np.asarray(images[-1:]), missing, axis=0)])
    return shard(mesh, images)


def _build(
    model: BranchyNet,
    mesh: Mesh,
    chunk_size: int | Sequence[int],
    criterion: Criterion,
    exits: Sequence[int] | None,
) -> Callable[[Variables, Array, Array], tuple[ExitPrediction, Balance]]:
    steps = build_steps(model, criterion, exits)
    chunk_sizes = check_chunk_sizes(chunk_size, len(steps))

    def on_each_device(
        variables: Variables, images: Array, thresholds: Array, count: Array
    ) -> tuple[ExitPrediction, Balance]:
        rows = lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
        return _answer(steps, chunk_sizes, variables, images, (), rows < count, thresholds)

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

    def run(variables: Variables, images: Array, thresholds: Array) -> tuple[ExitPrediction, Balance]:
        prediction, balance = spmd(variables, spread(images, mesh), thresholds, np.int32(len(images)))
        return at_rows(prediction, slice(len(images))), balance

    return run


def _answer(
    steps: Sequence[StepFunction],
    chunk_sizes: Sequence[int],
    variables: Variables,
    hidden: Any,
    carry: Any,
    waiting: Array,
    thresholds: Array,
    sent: Route | None = None,
) -> tuple[ExitPrediction, Balance]:
    """Answers the waiting rows of this device, with the help of the others; what other rows get is of no meaning."""
    rows, count = jnp.argsort(~waiting, stable=True), waiting.sum()
    size = min(chunk_sizes[0], len(waiting))
    fill = -len(rows) % size
    queue = Queue(hidden=hidden, carry=carry, rows=jnp.pad(rows, (0, fill)), ids=jnp.pad(rows, (0, fill)), count=count)
    done = at_rows(run_chunks(steps[0], variables, queue, thresholds, size), slice(len(rows)))
    found = count if sent is None else sent.count
    here = Balance(found=found[None, None], dealt=count[None, None])
    prediction = done.prediction
    if len(steps) > 1:
        stays = (jnp.arange(len(rows)) < count) & ~done.confident
        onward = route(stays)
        hidden, carry = deal(onward, (done.hidden, done.carry))
        later, rest = _answer(
            steps[1:], chunk_sizes[1:], variables, hidden, carry, deal(onward, stays, fill=False), thresholds, onward
        )
        prediction = collect(onward, later, prediction)
        here = jax.tree.map(lambda *parts: jnp.concatenate(parts), here, rest)
    places = jnp.argsort(rows)
    return at_rows(prediction, places), here
