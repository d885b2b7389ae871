"""Running a network with exits: the dense oracle, and executors that agree with it while doing less."""

from branchy_jax.inference.dense import dense as dense
from branchy_jax.inference.exit_outputs import ExitOutputs as ExitOutputs
from branchy_jax.inference.exit_outputs import exit_outputs as exit_outputs
from branchy_jax.inference.optimize import optimize as optimize
from branchy_jax.inference.staged import staged as staged

__all__ = ['ExitOutputs', 'dense', 'exit_outputs', 'optimize', 'staged']
