"""Who runs in the planner's race."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from branchy_jax.criteria import Criterion
from branchy_jax.inference.checks import Executor
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.dense import dense
from branchy_jax.inference.prediction import Forecast
from branchy_jax.inference.sharded import on_mesh, sharded
from branchy_jax.inference.staged import sequential
from branchy_jax.models.branchy import BranchyNet, without_branches
from branchy_jax.sharding import replicate
from branchy_jax.types import Array, Variables

Network = tuple[BranchyNet, Variables]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An executor with the weights it runs on.

    Attributes:
        name: of the executor and its setting.
        run: the executor.
        variables: its weights.
        exits: that it asks.
        forecast: of its time, where there is one.
        may_win: whether it answers as `dense` does; the plain jitted baseline only sets the pace.
    """

    name: str
    run: Executor
    variables: Variables
    exits: tuple[int, ...]
    forecast: Forecast | None = None
    may_win: bool = True


def build_candidates(
    plain: Network, fast: Network, forecasts: Sequence[Forecast], batch_size: int, criterion: Criterion, *, skip: bool
) -> list[Candidate]:
    """Returns the plain jitted network without branches, then everything that might beat it.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        forecasts: exits and chunk sizes to race with.
        batch_size: B.
        criterion: how unsure an exit is.
        skip: whether heads may be left out, so that the network without branches is a choice.
    """
    (network, weights), (fast_network, fast_weights) = plain, fast
    last = (network.num_exits - 1,)
    baseline = jax.jit(without_branches(network).apply)
    found = [
        Candidate('baseline', lambda variables, images, _: baseline(variables, images), weights, last, may_win=False)
    ]

    def add(name: str, run: Executor, exits: tuple[int, ...], forecast: Forecast | None = None) -> None:
        found.append(Candidate(name, run, fast_weights, exits, forecast))

    if skip:
        found.append(Candidate('last exit', dense(network, criterion=criterion, exits=last), weights, last))
        add('last exit, optimized', dense(fast_network, criterion=criterion, exits=last), last)
    else:
        everyone = tuple(range(network.num_exits))
        add('dense', dense(fast_network, criterion=criterion), everyone)
    for forecast in forecasts:
        options = {'criterion': criterion, 'exits': forecast.exits}
        if batch_size == 1:
            if len(forecast.exits) > 1:
                add('staged', sequential(fast_network, **options), forecast.exits, forecast)
            continue
        add('sequential', sequential(fast_network, **options), forecast.exits)
        chunks = {'chunk_size': forecast.chunk_sizes, **options}
        sizes = '/'.join(map(str, forecast.chunk_sizes))
        add(f'compacted, loop of {sizes}', compacted(fast_network, on_host=False, **chunks), forecast.exits, forecast)
        if jax.default_backend() == 'cpu':
            for workers in (1, 2):
                run = compacted(fast_network, on_host=True, workers=workers, **chunks)
                add(f'compacted, host × {workers}, {sizes}', run, forecast.exits, forecast)
    return found


def build_candidates_on_mesh(
    plain: Network, fast: Network, forecasts: Sequence[Forecast], mesh: Mesh, criterion: Criterion, *, skip: bool
) -> list[Candidate]:
    """Returns what `build_candidates` does, for devices that share every batch.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        forecasts: exits and chunk sizes of one device to race with.
        mesh: the devices.
        criterion: how unsure an exit is.
        skip: whether heads may be left out, so that the network without branches is a choice.
    """
    (network, weights), (fast_network, fast_weights) = ((model, replicate(mesh, v)) for model, v in (plain, fast))
    last, everyone = (network.num_exits - 1,), tuple(range(network.num_exits))
    baseline = jax.jit(without_branches(network).apply)

    def pace(variables: Variables, images: Array, _: Array) -> Any:
        return baseline(variables, images)

    found = [Candidate('baseline', on_mesh(pace, mesh), weights, last, may_win=False)]
    if skip:
        run = on_mesh(dense(network, criterion=criterion, exits=last), mesh)
        found.append(Candidate('last exit', run, weights, last))
    exits = last if skip else everyone
    run = on_mesh(dense(fast_network, criterion=criterion, exits=exits), mesh)
    found.append(Candidate('last exit, optimized' if skip else 'dense', run, fast_weights, exits))
    for forecast in forecasts:
        run = sharded(
            fast_network, mesh=mesh, chunk_size=forecast.chunk_sizes, criterion=criterion, exits=forecast.exits
        )
        name = f'sharded × {mesh.size}, {"/".join(map(str, forecast.chunk_sizes))}'
        found.append(Candidate(name, run, fast_weights, forecast.exits, forecast))
    return found
