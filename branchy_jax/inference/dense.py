"""Every exit computed and the first confident one selected: the oracle of all executors, which saves nothing."""

from collections.abc import Mapping
from typing import Any

from flax import struct

from branchy_jax.inference.steps import Exits, Network, network, run_batch, select_rows, take_step
from branchy_jax.types import ExitPolicy, ExitPrediction, Variables, static


@struct.dataclass
class Dense:
    """The executor that `dense` builds."""

    network: Network = static()

    def __call__(self, variables: Variables, images: Any, policy: Any) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        return run_batch(self, variables, images, policy)

    def program(self, variables: Variables, images: Any, policy: ExitPolicy) -> ExitPrediction:
        """Answers a batch; to be traced."""
        stages, steps = self.network.sized_stages(variables, images), []
        hidden, carry = images, None
        for n in range(len(stages.exits)):
            steps.append(take_step(stages, n, hidden, carry, policy))
            hidden, carry = steps[-1].hidden, steps[-1].carry
        chosen = steps[-1].prediction
        for step in reversed(steps[:-1]):
            chosen = select_rows(step.confident, step.prediction, chosen)
        return chosen


def dense(model: Any, *, exits: Exits = None, compiler_options: Mapping[str, Any] | None = None) -> Dense:
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
    return Dense(network(model, exits, compiler_options))
