"""BranchyNet in JAX and Flax: networks whose easy inputs leave early."""

from branchy_jax import (
    checkpoint,
    costs,
    criteria,
    data,
    export,
    inference,
    losses,
    measure,
    models,
    plots,
    program,
    sharding,
    thresholds,
    training,
)
from branchy_jax import report as report
from branchy_jax.types import Batch, ExitPolicy, ExitPrediction, Normalization, OperatingPoint

__version__ = '0.3.0.dev0'

__all__ = ['Batch', 'ExitPolicy', 'ExitPrediction', 'Normalization', 'OperatingPoint']
__all__ += ['checkpoint', 'costs', 'criteria', 'data', 'export', 'inference', 'losses', 'measure', 'models', 'plots']
__all__ += ['program', 'sharding', 'thresholds', 'training']
