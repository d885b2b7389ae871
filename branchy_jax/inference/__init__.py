"""Running a network with exits: the dense oracle, and executors that agree with it while doing less."""

from branchy_jax.inference.compacted import compacted as compacted
from branchy_jax.inference.dense import dense as dense
from branchy_jax.inference.exit_outputs import ExitOutputs as ExitOutputs
from branchy_jax.inference.exit_outputs import ExitStatistics as ExitStatistics
from branchy_jax.inference.exit_outputs import exit_outputs as exit_outputs
from branchy_jax.inference.exit_outputs import exit_statistics as exit_statistics
from branchy_jax.inference.optimize import optimize as optimize
from branchy_jax.inference.pipeline import Answers as Answers
from branchy_jax.inference.plan import Plan as Plan
from branchy_jax.inference.plan import plan as plan
from branchy_jax.inference.segment_times import SegmentTimes as SegmentTimes
from branchy_jax.inference.segment_times import segment_times as segment_times
from branchy_jax.inference.sharded import Balance as Balance
from branchy_jax.inference.sharded import sharded as sharded
from branchy_jax.inference.staged import COMMAND_BUFFERS as COMMAND_BUFFERS
from branchy_jax.inference.staged import sequential as sequential
from branchy_jax.inference.staged import staged as staged
from branchy_jax.inference.stream import stream as stream

__all__ = [
    'Answers',
    'Balance',
    'COMMAND_BUFFERS',
    'ExitOutputs',
    'ExitStatistics',
    'Plan',
    'SegmentTimes',
    'compacted',
    'dense',
    'exit_outputs',
    'exit_statistics',
    'optimize',
    'plan',
    'segment_times',
    'sequential',
    'sharded',
    'staged',
    'stream',
]
