"""Running a network with exits: the dense oracle, and executors that agree with it while doing less."""

from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.compiler_options import ALL_CORES, COMMAND_BUFFERS, ONE_CORE
from branchy_jax.inference.host import stream
from branchy_jax.inference.optimize import optimize
from branchy_jax.inference.outputs import exit_outputs, exit_table
from branchy_jax.inference.planning.plan import Plan, plan
from branchy_jax.inference.planning.times import segment_times
from branchy_jax.inference.sharded import sharded
from branchy_jax.inference.staged import dense, sequential, staged

__all__ = ['ALL_CORES', 'COMMAND_BUFFERS', 'ONE_CORE', 'Plan', 'compacted', 'dense', 'exit_outputs', 'exit_table']
__all__ += ['optimize', 'plan', 'segment_times', 'sequential', 'sharded', 'staged', 'stream']
