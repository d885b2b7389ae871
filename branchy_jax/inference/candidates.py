"""Who runs in the planner's race."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from branchy_jax.criteria import Criterion
from branchy_jax.inference.checks import Executor
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.dense import dense
from branchy_jax.inference.prediction import Forecast
from branchy_jax.inference.staged import sequential
from branchy_jax.models.branchy import BranchyNet, without_branches
from branchy_jax.types import Variables

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
