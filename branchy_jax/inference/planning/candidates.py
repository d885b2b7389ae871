"""Who runs in the planner's race."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.dense import dense
from branchy_jax.inference.planning.forecast import Forecast
from branchy_jax.inference.sharded import on_mesh, sharded
from branchy_jax.inference.staged import sequential
from branchy_jax.inference.steps import Executor
from branchy_jax.measure import Ratio
from branchy_jax.models.branchy import BranchyNet, without_branches
from branchy_jax.sharding import replicate
from branchy_jax.types import Array, Variables

Network = tuple[BranchyNet, Variables]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a network, and what was found out about it: one line of a plan's table.

    Attributes:
        name: of the executor and its setting.
        exits: the exits that it asks.
        run: the executor.
        variables: its weights.
        is_baseline: the plain jitted network without branches, which only sets the pace.
        predicted_ms: for a batch; NaN where nothing predicts it.
        measured_ms: for a batch; NaN before the race.
        slowdown: its time ÷ the plain baseline's, from paired passes.
        finalist: whether it came into the final race; else the figures are of the few passes of the heat.
    """

    name: str
    exits: tuple[int, ...]
    run: Executor | None = dataclasses.field(repr=False, compare=False)
    variables: Variables = dataclasses.field(repr=False, compare=False)
    is_baseline: bool = False
    predicted_ms: float = float('nan')
    measured_ms: float = float('nan')
    slowdown: Ratio | None = None
    finalist: bool = False


def build_candidates(
    plain: Network, fast: Network, forecasts: Sequence[Forecast], batch_size: int, *, skip: bool
) -> list[Candidate]:
    """Returns the plain jitted network without branches, then everything that might beat it.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        forecasts: exits and chunk sizes to race with.
        batch_size: B.
        skip: whether heads may be left out, so that the network without branches is a choice.
    """
    (network, weights), (fast_network, fast_weights) = plain, fast
    last = (network.num_exits - 1,)
    baseline = jax.jit(without_branches(network).apply)

    def pace(variables: Variables, images: Array, _: Any) -> Any:
        return baseline(variables, images)

    found = [Candidate('baseline', last, pace, weights, is_baseline=True)]

    def add(name: str, run: Executor, exits: tuple[int, ...], forecast: Forecast | None = None) -> None:
        predicted = float('nan') if forecast is None else forecast.ms
        found.append(Candidate(name, exits, run, fast_weights, predicted_ms=predicted))

    if skip:
        found.append(Candidate('last exit', last, dense(network, exits=last), weights))
        add('last exit, optimized', dense(fast_network, exits=last), last)
    else:
        add('dense', dense(fast_network), tuple(range(network.num_exits)))
    for forecast in forecasts:
        if batch_size == 1:
            if len(forecast.exits) > 1:
                add('staged', sequential(fast_network, exits=forecast.exits), forecast.exits, forecast)
            continue
        add('sequential', sequential(fast_network, exits=forecast.exits), forecast.exits)
        chunks = {'chunk_size': forecast.chunk_sizes, 'exits': forecast.exits}
        sizes = '/'.join(map(str, forecast.chunk_sizes))
        add(f'compacted, loop of {sizes}', compacted(fast_network, on_host=False, **chunks), forecast.exits, forecast)
        if jax.default_backend() == 'cpu':
            for workers in (1, 2):
                run = compacted(fast_network, on_host=True, workers=workers, **chunks)
                add(f'compacted, host × {workers}, {sizes}', run, forecast.exits, forecast)
    return found


def build_candidates_on_mesh(
    plain: Network, fast: Network, forecasts: Sequence[Forecast], mesh: Mesh, *, skip: bool
) -> list[Candidate]:
    """Returns what `build_candidates` does, for devices that share every batch.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        forecasts: exits and chunk sizes of one device to race with.
        mesh: the devices.
        skip: whether heads may be left out, so that the network without branches is a choice.
    """
    (network, weights), (fast_network, fast_weights) = ((model, replicate(mesh, v)) for model, v in (plain, fast))
    last, everyone = (network.num_exits - 1,), tuple(range(network.num_exits))
    baseline = jax.jit(without_branches(network).apply)

    def pace(variables: Variables, images: Array, _: Any) -> Any:
        return baseline(variables, images)

    found = [Candidate('baseline', last, on_mesh(pace, mesh), weights, is_baseline=True)]
    if skip:
        found.append(Candidate('last exit', last, on_mesh(dense(network, exits=last), mesh), weights))
    exits = last if skip else everyone
    name = 'last exit, optimized' if skip else 'dense'
    found.append(Candidate(name, exits, on_mesh(dense(fast_network, exits=exits), mesh), fast_weights))
    for forecast in forecasts:
        run = sharded(fast_network, mesh=mesh, chunk_size=forecast.chunk_sizes, exits=forecast.exits)
        name = f'sharded × {mesh.size}, {"/".join(map(str, forecast.chunk_sizes))}'
        found.append(Candidate(name, forecast.exits, run, fast_weights, predicted_ms=forecast.ms))
    return found
