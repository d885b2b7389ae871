"""Who runs in the planner's race."""

from __future__ import annotations

import dataclasses

import jax

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.checks import Executor
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.dense import dense
from branchy_jax.inference.prediction import Forecast
from branchy_jax.inference.staged import sequential
from branchy_jax.models.branchy import BranchyNet
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
        follows_forecast: whether it does what the forecast adds up.
        answers: whether it may be chosen; the plain baseline may not where its answers differ.
    """

    name: str
    run: Executor
    variables: Variables
    exits: tuple[int, ...]
    follows_forecast: bool = False
    answers: bool = True


def build_candidates(
    plain: Network, fast: Network, best: Forecast, batch_size: int, criterion: Criterion, *, may_skip: bool
) -> list[Candidate]:
    """Returns the plain jitted network without branches, then everything that might beat it.

    Args:
        plain: the network as it is.
        fast: the network as rewritten.
        best: exits and chunk sizes to use.
        batch_size: B.
        criterion: how unsure an exit is.
        may_skip: whether the network without branches is a choice.
    """
    network, weights = plain
    last = (network.num_exits - 1,)
    # A criterion that remembers has no say in the network without branches: any other times it as well.
    bare = dense(network, criterion=criterion if may_skip else entropy, exits=last)
    found = [Candidate('baseline', bare, weights, last, answers=may_skip)]
    fast_model, variables = fast

    def add(name: str, run: Executor, exits: tuple[int, ...], *, follows_forecast: bool = False) -> None:
        found.append(Candidate(name, run, variables, exits, follows_forecast))

    if may_skip:
        add('baseline, optimized', dense(fast_model, criterion=criterion, exits=last), last)
    if batch_size == 1:
        if best.exits != last:
            run = sequential(fast_model, criterion=criterion, exits=best.exits)
            add('staged', run, best.exits, follows_forecast=True)
        return found
    options = {'criterion': criterion, 'exits': best.exits}
    chunks = {'chunk_size': best.chunk_sizes, **options}
    sizes = '/'.join(map(str, best.chunk_sizes))
    add('sequential', sequential(fast_model, **options), best.exits)
    loop = compacted(fast_model, on_host=False, **chunks)
    add(f'compacted, loop of {sizes}', loop, best.exits, follows_forecast=True)
    if jax.default_backend() == 'cpu':
        for workers in (1, 2):
            host = compacted(fast_model, on_host=True, workers=workers, **chunks)
            add(f'compacted, host × {workers}, {sizes}', host, best.exits, follows_forecast=True)
    return found
