"""Running a network with exits: the dense oracle, and executors that agree with it while doing less."""

from branchy_jax.inference.compacted import compacted as compacted
from branchy_jax.inference.compiler_options import ALL_CORES as ALL_CORES
from branchy_jax.inference.compiler_options import COMMAND_BUFFERS as COMMAND_BUFFERS
from branchy_jax.inference.compiler_options import ONE_CORE as ONE_CORE
from branchy_jax.inference.dense import ExitOutputs as ExitOutputs
from branchy_jax.inference.dense import dense as dense
from branchy_jax.inference.dense import exit_outputs as exit_outputs
from branchy_jax.inference.dense import exit_table as exit_table
from branchy_jax.inference.host.stream import stream as stream
from branchy_jax.inference.planning.plan import Plan as Plan
from branchy_jax.inference.planning.plan import plan as plan
from branchy_jax.inference.planning.segment_times import SegmentTimes as SegmentTimes
from branchy_jax.inference.planning.segment_times import segment_times as segment_times
from branchy_jax.inference.rewriting.optimize import optimize as optimize
from branchy_jax.inference.sharded import sharded as sharded
from branchy_jax.inference.staged import sequential as sequential
from branchy_jax.inference.staged import staged as staged

__all__ = [
    'ALL_CORES',
    'COMMAND_BUFFERS',
    'ONE_CORE',
    'ExitOutputs',
    'Plan',
    'SegmentTimes',
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
