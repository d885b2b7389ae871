"""What all executors share: the door that refuses bad input, and one step, to the next exit and out for who is sure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.criteria import as_policy, is_confident
from branchy_jax.criteria.criterion import Carry
from branchy_jax.inference.compiler_options import Options, jit_with
from branchy_jax.models.branchy import BranchyNet, check_exits, check_model, run_segment
from branchy_jax.models.compose import Hidden
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, check_inputs, num_rows

Executor = Callable[[Variables, Array, Any], ExitPrediction]
"""``(variables, images, policy) → ExitPrediction``; see `branchy_jax.criteria.as_policy` for what goes as a policy."""

_MOST_BUILT = 128


def compiled_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a builder of compiled functions: equal arguments give the function that is there.

    What was built for arguments that cannot be hashed is not kept, nor more than 128 builds: these keep their networks,
    and what the functions in them close over, until others take their places or the builder's ``cache_clear`` is
    called.
    """
    kept = functools.lru_cache(maxsize=_MOST_BUILT)(build)

    @functools.wraps(build)
    def built(*arguments: Any) -> Any:
        return kept(*arguments) if _is_hashable(arguments) else build(*arguments)

    built.cache_clear = kept.cache_clear  # type: ignore[attr-defined]  # as functools has it
    return built


def _is_hashable(value: Any) -> bool:
    # Flax's own answer for a network that is not costs more than many a build: it prints all arrays of the network.
    if isinstance(value, tuple):
        return all(map(_is_hashable, value))
    if isinstance(value, nn.Module):
        return all(_is_hashable(getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare)
    try:
        hash(value)
    except TypeError:
        return False
    return True


def policy_checker(
    num_exits: int, prepare: Callable[[ExitPolicy], Any] = lambda policy: policy
) -> Callable[[Any], Any]:
    """Returns `as_policy` for one network, which remembers the last policy that passed.

    At batch 1 the check costs as much as a small stage, and serving code gives the same policy again and again. Arrays
    of jax cannot change, so the same object need not be looked at twice; anything else is, a list of them included, and
    what was made under `jax.jit`, which is of no use outside. What is returned, and remembered, is what ``prepare``
    makes of the policy.
    """
    passed: tuple[Any, Any] = (None, None)

    def check(given: Any) -> Any:
        nonlocal passed
        last, prepared = passed
        policy = getattr(given, 'policy', given)
        if policy is last and prepared is not None:
            return prepared
        prepared = prepare(as_policy(policy, num_exits))
        parts = [getattr(policy, 'thresholds', policy), *jax.tree.leaves(policy)]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((policy, prepared)))
        if all(isinstance(part, jax.Array) for part in parts) and not traced:
            passed = policy, prepared
        return prepared

    return check


def guarded(run: Executor, model: BranchyNet, *, traceable: Executor | None = None) -> Executor:
    """Puts the door before an executor of batches: input is checked, an empty batch is answered at once.

    Args:
        run: ``(variables, images [B, …], policy) → ExitPrediction``.
        model: whose input it is.
        traceable: of the same results, where ``run`` is not.
    """
    check, image_shape = policy_checker(model.num_exits), model.image_shape

    def execute(variables: Variables, images: Array, policy: Any) -> ExitPrediction:
        policy = check(policy)
        if image_shape is not None:
            check_inputs(images, image_shape)
        if num_rows(images) == 0:  # for no images many layers have no shape
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), images)
            answer = jax.eval_shape(traceable or run, variables, one, policy)
            return jax.tree.map(lambda spec: jnp.zeros((0, *spec.shape[1:]), spec.dtype), answer)
        return run(variables, images, policy)

    return execute


def jit_predicting(options: Options) -> Callable[[Callable[..., ExitPrediction]], Callable[..., ExitPrediction]]:
    """Returns `jax.jit` with compiler options for functions that return an `ExitPrediction`.

    The program returns its four arrays, of which the prediction is made outside: `jax.jit` takes longer to make one
    than a small network to its first exit.
    """

    def decorate(function: Callable[..., ExitPrediction]) -> Callable[..., ExitPrediction]:
        @jit_with(options)
        def parts(*arguments: Any) -> tuple[Array, ...]:
            found = function(*arguments)
            return found.label, found.exit_index, found.logits, found.uncertainty

        return lambda *arguments: ExitPrediction(*parts(*arguments))

    return decorate


def check_chunk_sizes(chunk_size: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Returns one chunk size per step, or says what is wrong with them."""
    sizes: tuple[Any, ...] = tuple(chunk_size) if isinstance(chunk_size, (list, tuple)) else (chunk_size,) * count
    if len(sizes) != count or any(not isinstance(size, (int, np.integer)) or size < 1 for size in sizes):
        raise ValueError(
            f'chunk_size: got {chunk_size!r}; give one positive integer, or {count} of them, one for each exit asked'
        )
    return tuple(int(size) for size in sizes)


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


StepFunction = Callable[[Variables, Hidden, Carry, ExitPolicy], Step]
"""``(variables, hidden, carry, policy) → Step``; ``carry`` is ignored by the first step."""


def asked_exits(model: BranchyNet, exits: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the exits that an executor asks: all of them for ``None``.

    Raises:
        ValueError: ``exits`` is not ascending, out of range or leaves out the last; or no network.
    """
    check_model(model)
    return tuple(range(model.num_exits)) if exits is None else check_exits('exits', exits, model.num_exits)


def build_steps(model: BranchyNet, asked: tuple[int, ...]) -> list[StepFunction]:
    """Builds one step for each exit that is asked.

    A head that is not asked is not computed, as if its threshold were −inf.

    Args:
        model: a network with N exits.
        asked: from `asked_exits`.

    Raises:
        ValueError: when first run, if exits are left out though the criterion remembers them.
    """
    starts = [0, *(n + 1 for n in asked[:-1])]
    return [_build_step(model, range(start, n + 1), asked) for start, n in zip(starts, asked, strict=True)]


def _build_step(model: BranchyNet, stages: range, asked: tuple[int, ...]) -> StepFunction:
    n, last = stages[-1], stages[-1] == model.num_exits - 1

    def step(variables: Variables, hidden: Hidden, carry: Carry, policy: ExitPolicy) -> Step:
        for stage in stages:
            hidden = run_segment(model, 'stage', stage, variables, hidden)
        logits, criterion = run_segment(model, 'exit', n, variables, hidden), policy.criterion
        carry = criterion.init(logits) if n == asked[0] else carry
        if len(asked) < model.num_exits and jax.tree.leaves(carry):
            raise ValueError(
                f'exits: criterion {criterion.name!r} remembers earlier exits, so leaving some out would change its '
                'answers; ask all of them'
            )
        answer, uncertainty, carry = criterion.update(logits, carry, n)
        here = jnp.full(uncertainty.shape, n, jnp.int32)
        prediction = ExitPrediction(criterion.decide(answer), here, logits=answer, uncertainty=uncertainty)
        if last:
            return Step(hidden=(), carry=(), prediction=prediction, confident=jnp.ones(uncertainty.shape, bool))
        return Step(hidden, carry, prediction, is_confident(uncertainty, policy.thresholds[n]))

    return step


def run_steps(steps: Sequence[StepFunction], variables: Variables, images: Array, policy: ExitPolicy) -> list[Step]:
    """Runs all steps on the whole batch, whoever is confident."""
    found = [steps[0](variables, images, (), policy)]
    for step in steps[1:]:
        found.append(step(variables, found[-1].hidden, found[-1].carry, policy))
    return found


def at_rows(tree: Any, rows: Any) -> Any:
    """Returns rows of every leaf."""
    return jax.tree.map(lambda values: values[rows], tree)


def zeros(like: Any, length: int) -> Any:
    """Returns arrays like these, of zeros, with so many rows."""
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), like)
