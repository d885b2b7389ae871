"""What all executors share: input validation, and one step: run to the next exit and mark the rows that leave there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax import calling, program
from branchy_jax.criteria import as_policy, check_policy, is_confident
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

Kind = TypeVar('Kind')

Options = tuple[tuple[str, Any], ...]
"""Compiler options in the order of their names."""


@dataclass_transform(frozen_default=True)
def static(kind: type[Kind]) -> type[Kind]:
    """Makes a class a frozen dataclass and a pytree without leaves, whose fields JAX compares as static metadata."""
    kind = dataclasses.dataclass(frozen=True)(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(kind, data_fields=[], meta_fields=names)


@static
class Network:
    """A model and the exits that an executor asks.

    Attributes:
        model: the model, without weights.
        exits: ascending, the last among them; ``None`` asks all.
        compiler_options: for `jax.jit`.
    """

    model: Any
    exits: tuple[int, ...] | None
    compiler_options: Options

    def stages(self, variables: Variables, inputs: Any) -> program.Stages:
        """Returns the stages of the exits asked."""
        return program.stages(self.model, variables, inputs, exits=self.exits)

    def sized_stages(self, variables: Variables, inputs: Any) -> program.SizedStages:
        """Returns the stages of the exits asked at the batch size of the inputs."""
        return self.stages(variables, inputs).at(variables, num_rows(inputs))


def network(model: Any, exits: Sequence[int] | None, compiler_options: Mapping[str, Any] | None) -> Network:
    """Checks what an executor is built from.

    Raises:
        ValueError: not a model, or exits that are not ascending numbers.
    """
    calling.check_model(model)
    if exits is not None:
        exits = calling.check_exits('exits', exits, exits[-1] + 1 if len(exits) else 0)
    return Network(calling.without_weights(model), exits, tuple(sorted((compiler_options or {}).items())))


def jit_with(options: Options, function: Callable[..., Any]) -> Any:
    """Returns `jax.jit` of a module-level function with compiler options; JAX's cache serves equal options."""
    return jax.jit(function, compiler_options=dict(options) or None)


def arrays_of(prediction: ExitPrediction) -> tuple[Array, ...]:
    """Takes a prediction apart: `jax.jit` returns a tuple of arrays faster than a prediction."""
    return prediction.label, prediction.exit_index, prediction.logits, prediction.uncertainty


def _program(executor: Any, variables: Variables, inputs: Any, policy: ExitPolicy) -> tuple[Array, ...]:
    return arrays_of(executor.program(variables, inputs, policy))


_jitted = jax.jit(_program)


def run(executor: Any, variables: Variables, inputs: Any, policy: ExitPolicy) -> ExitPrediction:
    """Runs an executor's program under `jax.jit`, whose cache compiles once for equal executors.

    Args:
        executor: a static pytree with ``network`` and ``program(variables, inputs, policy)``.
        variables: of the model.
        inputs: of the model.
        policy: validated.
    """
    options = executor.network.compiler_options
    jitted = jit_with(options, _program) if options else _jitted
    return ExitPrediction(*jitted(executor, variables, inputs, policy))


def run_batch(executor: Any, variables: Variables, inputs: Any, policy: Any) -> ExitPrediction:
    """Validates a policy, answers an empty batch at once, and runs an executor of batches."""
    policy = as_policy(policy)
    if num_rows(inputs) == 0:
        return no_rows(executor.program, variables, inputs, policy)
    return run(executor, variables, inputs, policy)


def no_rows(
    function: Callable[..., ExitPrediction], variables: Variables, inputs: Any, policy: ExitPolicy
) -> ExitPrediction:
    """Answers an empty batch: for no rows many layers have no shape."""
    answer = jax.eval_shape(function, variables, calling.with_batch(inputs, 1), policy)
    return jax.tree.map(lambda spec: jnp.zeros((0, *spec.shape[1:]), spec.dtype), answer)


def check_chunk_sizes(chunk_size: int | Sequence[int]) -> int | tuple[int, ...]:
    """Returns chunk sizes as an integer or a tuple.

    Raises:
        ValueError: not positive integers.
    """
    sizes: tuple[Any, ...] = tuple(chunk_size) if isinstance(chunk_size, (list, tuple)) else (chunk_size,)
    if not sizes or any(not isinstance(size, (int, np.integer)) or size < 1 for size in sizes):
        raise ValueError(f'chunk_size: got {chunk_size!r}; give one positive integer, or one for each exit asked')
    return tuple(int(size) for size in sizes) if isinstance(chunk_size, (list, tuple)) else int(sizes[0])


def chunk_sizes_of(chunk_size: int | tuple[int, ...], stages: program.Stages) -> tuple[int, ...]:
    """Returns one chunk size per exit asked.

    Raises:
        ValueError: another number of them, or a model whose rows cannot be gathered.
    """
    if stages.fixed_because:
        raise stages.refusal()
    return chunk_size_of_each(chunk_size, len(stages.exits))


def chunk_size_of_each(chunk_size: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Returns one chunk size for each of ``count`` exits asked; raises ValueError for another number of them."""
    sizes = chunk_size if isinstance(chunk_size, tuple) else (chunk_size,) * count
    if len(sizes) != count:
        raise ValueError(f'chunk_size: got {chunk_size}; give one integer, or {count} of them, one for each exit asked')
    return sizes


@struct.dataclass
class Step:
    """Where a batch stands after an exit.

    Attributes:
        hidden: what the next stage takes; ``()`` after the last exit.
        carry: what the criterion hands on; ``()`` after the last exit.
        prediction: of this exit for the whole batch.
        confident: ``[B]`` the rows that leave here; all of them after the last exit.
    """

    hidden: Any
    carry: Any
    prediction: ExitPrediction
    confident: Array


def take_step(stages: program.SizedStages, n: int, hidden: Any, carry: Any, policy: ExitPolicy) -> Step:
    """Runs the stage and the head of the n-th exit asked.

    Args:
        stages: of the exits asked, at the batch size of ``hidden``.
        n: counts the exits asked.
        hidden: the inputs, or what the step before handed on.
        carry: what the criterion handed on; ``None`` before the first exit.
        policy: when a row leaves.

    Raises:
        ValueError: a policy of another network; exits left out though the criterion uses earlier ones.
    """
    check_policy(policy, stages.num_exits)
    hidden = stages.run_stage(n, hidden)
    exit_number, criterion = stages.exits[n], policy.criterion
    answer, uncertainty, carry = criterion(stages.run_exit(n, hidden), carry, exit_number)
    if len(stages.exits) < stages.num_exits and jax.tree.leaves(carry):
        raise ValueError(
            f'exits: criterion {criterion.name!r} uses earlier exits, so leaving some out would change its answers; '
            'ask all of them'
        )
    index = jnp.full(uncertainty.shape, exit_number, jnp.int32)
    prediction = ExitPrediction(criterion.decide(answer), index, logits=answer, uncertainty=uncertainty)
    if n == len(stages.exits) - 1:
        return Step(hidden=(), carry=(), prediction=prediction, confident=jnp.ones(uncertainty.shape, bool))
    return Step(hidden, carry, prediction, is_confident(uncertainty, policy.thresholds[exit_number]))


def at_rows(tree: Any, rows: Any) -> Any:
    """Returns rows of every leaf."""
    return jax.tree.map(lambda values: values[rows], tree)


def zeros(like: Any, length: int) -> Any:
    """Returns arrays of zeros with another number of rows."""
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), like)


def are_traced(*trees: Any) -> bool:
    """Whether a leaf of pytrees is a tracer of JAX."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
