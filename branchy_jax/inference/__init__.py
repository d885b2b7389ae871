"""Running a network with exits: the dense oracle, and executors that agree with it while doing less."""

from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.compiler_options import ALL_CORES, COMMAND_BUFFERS, ONE_CORE
from branchy_jax.inference.dense import dense
from branchy_jax.inference.outputs import exit_outputs, exit_table
from branchy_jax.inference.planning.plan import Plan, plan
from branchy_jax.inference.planning.segments import segment_times
from branchy_jax.inference.rewriting.optimize import optimize
from branchy_jax.inference.sharded import sharded
from branchy_jax.inference.staged import sequential, staged
from branchy_jax.inference.stream import stream

__all__ = [
    'ALL_CORES',
    'COMMAND_BUFFERS',
    'ONE_CORE',
    'Plan',
    'compacted',
    'dense',
    'exit_outputs',
    'exit_table',
    'optimize',
    'plan',
    'segment_times',
    'sequential',
    'sharded',
    'staged',
    'stream',
]
