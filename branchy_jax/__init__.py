"""BranchyNet in JAX and Flax: networks whose easy inputs leave early."""

from branchy_jax import checkpoint as checkpoint
from branchy_jax import costs as costs
from branchy_jax import criteria as criteria
from branchy_jax import data as data
from branchy_jax import export as export
from branchy_jax import inference as inference
from branchy_jax import losses as losses
from branchy_jax import measure as measure
from branchy_jax import models as models
from branchy_jax import plots as plots
from branchy_jax import report as report
from branchy_jax import sharding as sharding
from branchy_jax import thresholds as thresholds
from branchy_jax import training as training
from branchy_jax.models.branchy import BranchyNet as BranchyNet
from branchy_jax.types import Batch as Batch
from branchy_jax.types import ExitPolicy as ExitPolicy
from branchy_jax.types import ExitPrediction as ExitPrediction
from branchy_jax.types import Normalization as Normalization
from branchy_jax.types import OperatingPoint as OperatingPoint

__version__ = '0.2.0'

__all__ = [
    'Batch',
    'BranchyNet',
    'ExitPolicy',
    'ExitPrediction',
    'Normalization',
    'OperatingPoint',
    'checkpoint',
    'costs',
    'criteria',
    'data',
    'export',
    'inference',
    'losses',
    'measure',
    'models',
    'plots',
    'report',
    'sharding',
    'thresholds',
    'training',
]
