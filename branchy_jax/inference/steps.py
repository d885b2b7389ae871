"""What all executors share: input validation, and one step: run to the next exit and mark the rows that leave there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax import calling, program
from branchy_jax.criteria import is_confident
from branchy_jax.criteria.policy import as_policy, check_policy
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows, static

Exits = Sequence[int] | None
"""The exits to ask, ascending, the last among them; the other exits never answer. ``None`` asks all."""

Options = tuple[tuple[str, Any], ...]
"""Compiler options in the order of their names."""


@struct.dataclass
class Network:
    """A model and how an executor runs it.

    Attributes:
        model: the model, without weights.
        exits: to ask, ascending, the last among them; ``None`` asks all.
        compiler_options: for `jax.jit`.
        chunk_size: rows that a stage takes at once, where an executor gathers rows.
    """

    model: Any = static()
    exits: tuple[int, ...] | None = static()
    compiler_options: Options = static()
    chunk_size: int | tuple[int, ...] = static()

    def stages(self, variables: Variables, inputs: Any) -> program.Stages:
        """Returns the stages of the exits asked, for an executor that gathers rows.

        Raises:
            ValueError: the model runs at the batch size of the inputs alone.
        """
        stages = program.stages(self.model, variables, inputs, exits=self.exits)
        if stages.fixed_because:
            raise stages.refusal()
        return stages

    def sized_stages(self, variables: Variables, inputs: Any) -> program.Cut:
        """Returns the stages of the exits asked at the batch size of the inputs."""
        return program.stages(self.model, variables, inputs, exits=self.exits).at(variables, num_rows(inputs))

    def chunk_sizes(self, count: int) -> tuple[int, ...]:
        """Returns one chunk size for each of ``count`` exits asked; raises ValueError for another number of them."""
        sizes = self.chunk_size if isinstance(self.chunk_size, tuple) else (self.chunk_size,) * count
        if len(sizes) != count:
            several = f'{count} of them, one for each exit asked'
            raise ValueError(f'chunk_size: got {self.chunk_size}; give one integer, or {several}')
        return tuple(map(int, sizes))


def network(
    model: Any, exits: Exits, compiler_options: Mapping[str, Any] | None, chunk_size: int | Sequence[int] = 1
) -> Network:
    """Checks what an executor is built from.

    Raises:
        ValueError: not a model, exits that are not ascending numbers, or chunk sizes that are not positive integers.
    """
    calling.check_model(model)
    chosen = None if exits is None else calling.check_exits('exits', exits)
    sizes: Any = tuple(chunk_size) if isinstance(chunk_size, (list, tuple)) else chunk_size
    each = sizes if isinstance(sizes, tuple) else (sizes,)
    if not each or any(not isinstance(size, (int, np.integer)) or size < 1 for size in each):
        raise ValueError(f'chunk_size: got {chunk_size!r}; give one positive integer, or one for each exit asked')
    return Network(calling.without_weights(model), chosen, tuple(sorted((compiler_options or {}).items())), sizes)


def arrays_of(prediction: ExitPrediction) -> tuple[Array, ...]:
    """Takes a prediction apart: `jax.jit` returns a tuple of arrays faster than a prediction."""
    return prediction.label, prediction.exit_index, prediction.logits, prediction.uncertainty


def _program(executor: Any, *arguments: Any) -> Any:
    return executor.program(*arguments)


_jitted = jax.jit(_program)


def run(executor: Any, *arguments: Any) -> Any:
    """Runs the program of an executor under `jax.jit`, whose cache compiles once for equal executors.

    Args:
        executor: a static pytree with ``network`` and ``program``.
        *arguments: of the program: variables, inputs and a validated policy, say.
    """
    options = executor.network.compiler_options
    jitted = jax.jit(_program, compiler_options=dict(options)) if options else _jitted
    return jitted(executor, *arguments)


def run_batch(executor: Any, variables: Variables, inputs: Any, policy: Any, *others: Any) -> Any:
    """Validates a policy and runs an executor of batches, except on an empty batch: many layers have no shape for it.

    Args:
        executor: as for `run`.
        variables: of the model.
        inputs: of the model.
        policy: of the caller.
        *others: further arguments of the program.
    """
    policy = as_policy(policy)
    if num_rows(inputs):
        return run(executor, variables, inputs, policy, *others)
    answer = jax.eval_shape(executor.program, variables, calling.with_batch(inputs, 1), policy, *others)
    return jax.tree.map(lambda spec: jnp.zeros((0, *spec.shape[1:]), spec.dtype), answer)


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


def take_step(stages: program.Cut, n: int, hidden: Any, carry: Any, policy: ExitPolicy) -> Step:
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
    exit_number, criterion = stages.exits[n], policy.criterion
    # Profiles and ONNX files show these names.
    with jax.named_scope(f'stage_{exit_number}'):
        hidden = stages.run_stage(n, hidden)
    with jax.named_scope(f'exit_{exit_number}'):
        logits = stages.run_exit(n, hidden)
    with jax.named_scope(f'criterion_{exit_number}'):
        answer, uncertainty, carry = criterion(logits, carry, exit_number)
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


def kind_of(batch: Any, first: Any = None) -> Any:
    """Returns row shape and dtype of every leaf; raises ValueError if those of the ``first`` batch differ."""
    kind = jax.tree.map(lambda leaf: (np.shape(leaf)[1:], str(leaf.dtype)), batch)
    if first not in (None, kind):
        raise ValueError(f'images: all batches are to be alike; the first held {first}, another one {kind}')
    return kind


def at_rows(tree: Any, rows: Any) -> Any:
    """Returns rows of every leaf."""
    return jax.tree.map(lambda values: values[rows], tree)


def select_rows(mask: Array, yes: Any, no: Any) -> Any:
    """Returns rows of ``yes`` where ``mask [B]`` holds, of ``no`` elsewhere, in every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(mask, range(1, a.ndim)), a, b), yes, no)


def are_traced(*trees: Any) -> bool:
    """Whether a leaf of pytrees is a tracer of JAX."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
