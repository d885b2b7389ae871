"""One step of early-exit inference: run on to the next exit, and see who leaves there. What all executors do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from branchy_jax.criteria import Carry, Criterion, is_confident
from branchy_jax.models.branchy import BranchyNet, check_exits
from branchy_jax.models.compose import Hidden
from branchy_jax.types import Array, ExitPrediction, Variables


@struct.dataclass
class Step:
    """Where a batch stands after an exit.

    Attributes:
        hidden: what the next stage takes; ``()`` after the last exit.
        carry: what the criterion remembers; ``()`` after the last exit.
        prediction: of this exit for the whole batch.
        confident: ``[B]`` who leaves here; after the last exit all do.
    """

    hidden: Hidden
    carry: Carry
    prediction: ExitPrediction
    confident: Array


StepFunction = Callable[[Variables, Hidden, Carry, Array], Step]
"""``(variables, hidden, carry, thresholds [N - 1]) → Step``; ``carry`` is ignored by the first step."""


def build_steps(model: BranchyNet, criterion: Criterion, exits: Sequence[int] | None = None) -> list[StepFunction]:
    """Builds one step for each exit that is asked.

    Args:
        model: a network with N exits.
        criterion: how unsure an exit is.
        exits: the exits to ask, ascending, the last one among them; ``None`` asks all. A head that is not asked is not
            computed, as if its threshold were −inf.

    Raises:
        ValueError: ``exits`` is not ascending, out of range or leaves out the last; when first run, if exits are left
            out though the criterion remembers them.
    """
    asked = tuple(range(model.num_exits)) if exits is None else check_exits('exits', exits, model.num_exits)
    starts = [0, *(n + 1 for n in asked[:-1])]
    return [_build_step(model, criterion, range(start, n + 1), asked) for start, n in zip(starts, asked, strict=True)]


def _build_step(model: BranchyNet, criterion: Criterion, stages: range, asked: tuple[int, ...]) -> StepFunction:
    n, last = stages[-1], stages[-1] == model.num_exits - 1

    def step(variables: Variables, hidden: Hidden, carry: Carry, thresholds: Array) -> Step:
        for stage in stages:
            hidden = model.apply(variables, hidden, stage, method='run_stage')
        logits = model.apply(variables, hidden, n, method='run_exit')
        carry = criterion.init(logits) if n == asked[0] else carry
        if len(asked) < model.num_exits and jax.tree.leaves(carry):
            raise ValueError(
                f'exits: criterion {criterion.name!r} remembers earlier exits, so leaving some out would change its '
                'answers; ask all of them'
            )
        answer, uncertainty, carry = criterion.update(logits, carry, n)
        prediction = answer_at(n, answer, uncertainty, criterion)
        if last:
            return Step(hidden=(), carry=(), prediction=prediction, confident=jnp.ones(uncertainty.shape, bool))
        return Step(hidden, carry, prediction, is_confident(uncertainty, thresholds[n]))

    return step


def run_steps(steps: Sequence[StepFunction], variables: Variables, images: Array, thresholds: Array) -> list[Step]:
    """Runs all steps on the whole batch, whoever is confident."""
    found = [steps[0](variables, images, (), thresholds)]
    for step in itertools.islice(steps, 1, None):
        found.append(step(variables, found[-1].hidden, found[-1].carry, thresholds))
    return found


def answer_at(n: int, logits: Array, uncertainty: Array, criterion: Criterion) -> ExitPrediction:
    """Returns the prediction of a batch that all leaves at exit ``n``."""
    return ExitPrediction(
        label=criterion.decide(logits),
        exit_index=jnp.full(uncertainty.shape, n, jnp.int32),
        logits=logits,
        uncertainty=uncertainty,
    )


def at_rows(tree: Any, rows: Any) -> Any:
    """Returns rows of every leaf."""
    return jax.tree.map(lambda values: values[rows], tree)
