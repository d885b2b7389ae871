"""Who runs in the planner's race."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
    plain: Network,
    fast: Network,
    forecasts: Sequence[Forecast],
    batch_size: int,
    *,
    skip: bool,
    mesh: Mesh | None = None,
) -> list[Candidate]:
    """Returns the plain jitted network without branches, then everything that might beat it.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        forecasts: exits and chunk sizes, of one device, to race with.
        batch_size: B.
        skip: whether heads may be left out, so that the network without branches is a choice.
        mesh: the devices that share every batch.
    """
    if mesh is not None:
        plain, fast = ((model, replicate(mesh, variables)) for model, variables in (plain, fast))
    (network, weights), (fast_network, fast_weights) = plain, fast
    last, everyone = (network.num_exits - 1,), tuple(range(network.num_exits))
    baseline = jax.jit(without_branches(network).apply)

    def pace(variables: Variables, images: Array, _: Any) -> Any:
        return baseline(variables, images)

    def spread(run: Executor) -> Executor:
        return run if mesh is None else on_mesh(run, mesh)

    found = [Candidate('baseline', last, spread(pace), weights, is_baseline=True)]
    if skip:
        found.append(Candidate('last exit', last, spread(dense(network, exits=last)), weights))
    name, exits = ('last exit, optimized', last) if skip else ('dense', everyone)
    found.append(Candidate(name, exits, spread(dense(fast_network, exits=exits)), fast_weights))
    for forecast in forecasts:
        for name, run, predicted in _ways(fast_network, forecast, batch_size, mesh):
            found.append(Candidate(name, forecast.exits, run, fast_weights, predicted_ms=predicted))
    return found


def _ways(
    network: BranchyNet, forecast: Forecast, batch_size: int, mesh: Mesh | None
) -> Iterator[tuple[str, Executor, float]]:
    """Yields the executors that a forecast is for: name, executor, and the time of a batch as far as it is known."""
    exits, sizes = forecast.exits, '/'.join(map(str, forecast.chunk_sizes))
    chunks = {'chunk_size': forecast.chunk_sizes, 'exits': exits}
    if mesh is not None:
        yield f'sharded × {mesh.size}, {sizes}', sharded(network, mesh=mesh, **chunks), forecast.ms
    elif batch_size > 1:
        yield 'sequential', sequential(network, exits=exits), float('nan')
        yield f'compacted, loop of {sizes}', compacted(network, on_host=False, **chunks), forecast.ms
        for workers in (1, 2) if jax.default_backend() == 'cpu' else ():
            run = compacted(network, on_host=True, workers=workers, **chunks)
            yield f'compacted, host × {workers}, {sizes}', run, forecast.ms
    elif len(exits) > 1:
        yield 'staged', sequential(network, exits=exits), forecast.ms
