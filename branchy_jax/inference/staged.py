"""Executors that gather no rows: every exit computed, or one image at a time.

`dense` computes every exit and selects the first confident one. It saves nothing and is the oracle of all executors.
`staged` nests `lax.cond`, so that later stages run only where no exit before was confident.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct
from jax import lax

from branchy_jax import program
from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference.steps import Exits, Network, at_rows, network, run, run_batch, select_rows, take_step
from branchy_jax.types import ExitPolicy, ExitPrediction, Variables, check_byte_order, num_rows, static


@struct.dataclass
class Whole:
    """The executor of whole batches that `dense` and `sequential` build.

    Attributes:
        network: a model and its exits.
        answer: ``(network, variables, images, policy) → ExitPrediction``, to be traced.
    """

    network: Network = static()
    answer: Callable[[Network, Variables, Any, ExitPolicy], ExitPrediction] = static()

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        return run_batch(self, variables, images, policy)

    def program(self, variables: Variables, images: Any, policy: ExitPolicy) -> ExitPrediction:
        """Answers a batch; to be traced."""
        return self.answer(self.network, variables, images, policy)


def _select(network: Network, variables: Variables, images: Any, policy: ExitPolicy) -> ExitPrediction:
    """Computes every exit of every image and selects the first confident one."""
    stages, steps = network.sized_stages(variables, images), []
    hidden, carry = images, None
    for n in range(len(stages.exits)):
        steps.append(take_step(stages, n, hidden, carry, policy))
        hidden, carry = steps[-1].hidden, steps[-1].carry
    chosen = steps[-1].prediction
    for step in reversed(steps[:-1]):
        chosen = select_rows(step.confident, step.prediction, chosen)
    return chosen


def dense(model: Any, *, exits: Exits = None, compiler_options: Mapping[str, Any] | None = None) -> Whole:
    """Builds the oracle executor: runs all stages and heads on the whole batch and selects the first confident exit.

    For finite images all executors agree with it on label and exit, except ties within rounding. Where NaN reaches the
    logits of every exit, the last one answers and its uncertainty is NaN, in all executors. But a layer may drop NaN,
    as XLA's max pooling does on a CPU, and ``optimize`` may then keep it: refuse images that are not finite before they
    get here.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the other exits never answer. With
            ``[N - 1]`` this is the network without its branches.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction``; a bare array of thresholds ``[N - 1]`` is a
        policy of entropy. Works under `jax.jit` and `jax.vmap` (over policies, say). Raises ValueError on a policy
        that does not fit, NaN, or bad images.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax, jax.numpy as jnp
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> dense(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0]

    References:
        BranchyNet, 2016, Figure 2.
    """
    return Whole(network(model, exits, compiler_options), _select)


@struct.dataclass
class Staged:
    """The executor that `staged` builds."""

    network: Network = static()

    def __call__(self, variables: Variables, image: Any, policy: Any) -> ExitPrediction:
        """Answers one ``image [H, W, C]``."""
        check_byte_order(image)
        return run(self, variables, image, as_policy(policy))

    def program(self, variables: Variables, image: Any, policy: ExitPolicy) -> ExitPrediction:
        """Answers one image; to be traced."""
        alone = jax.tree.map(lambda leaf: leaf[None], image)
        return at_rows(_answer(self.network.sized_stages(variables, alone), alone, policy), 0)


def staged(model: Any, *, exits: Exits = None, compiler_options: Mapping[str, Any] | None = None) -> Staged:
    """Builds the batch-1 executor: each stage after the first sits inside the `lax.cond` of the exit before it.

    One dispatch per image; what an exit makes superfluous is not executed. `jax.vmap` turns the conditionals into
    selects, which run everything: for batches use `branchy_jax.inference.compacted` or `sequential`.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the other exits never answer.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.COMMAND_BUFFERS` on a GPU, or
            `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, image [H, W, C], policy) → ExitPrediction`` without the batch axis; a bare array of thresholds
        ``[N - 1]`` is a policy of entropy. Raises ValueError on a policy that does not fit, NaN, or a bad image.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, image = bj.models.create('b-lenet'), jnp.ones((28, 28, 1))
        >>> variables = model.init(jax.random.key(0), image[None])
        >>> staged(model)(variables, image, [float('-inf')]).exit_index.item()
        1

    References:
        BranchyNet, 2016, Figure 2.
    """
    return Staged(network(model, exits, compiler_options))


def _one_by_one(network: Network, variables: Variables, images: Any, policy: ExitPolicy) -> ExitPrediction:
    """Answers one image after the other."""
    if num_rows(images) == 1:
        return _answer(network.sized_stages(variables, images), images, policy)
    one = Staged(network)
    return lax.map(lambda image: one.program(variables, image, policy), images)


def sequential(model: Any, *, exits: Exits = None, compiler_options: Mapping[str, Any] | None = None) -> Whole:
    """Builds the executor for a stream of single images in one program: a loop whose body is `staged`.

    Saves the dispatch of every image but the first, which is most of the time of a small network at batch 1. A batch of
    one image runs without a loop, as `staged` does.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the other exits never answer.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.COMMAND_BUFFERS` on a GPU, or
            `branchy_jax.inference.ALL_CORES` on a CPU.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction``. Raises ValueError on a policy that does not fit,
        NaN, or bad images.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((3, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> sequential(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0, 0]
    """
    return Whole(network(model, exits, compiler_options), _one_by_one)


def _answer(stages: program.Cut, hidden: Any, policy: ExitPolicy, n: int = 0, carry: Any = None) -> ExitPrediction:
    """Answers a batch of one with a conditional after each exit but the last; to be traced."""
    step = take_step(stages, n, hidden, carry, policy)
    if n == len(stages.exits) - 1:
        return step.prediction
    later = functools.partial(_answer, stages, step.hidden, policy, n + 1, step.carry)
    return lax.cond(step.confident[0], lambda: step.prediction, later)
