"""Joint training of all exits: a pure, jitted step, and loops around it that survive being killed."""

from branchy_jax.losses import Loss as Loss
from branchy_jax.training.fit import Prepare as Prepare
from branchy_jax.training.fit import Stream as Stream
from branchy_jax.training.fit import epoch_order as epoch_order
from branchy_jax.training.fit import fit as fit
from branchy_jax.training.fit import train_epoch as train_epoch
from branchy_jax.training.initialization import Initialization as Initialization
from branchy_jax.training.initialization import initialize_from_baseline as initialize_from_baseline
from branchy_jax.training.initialization import initialize_from_shallower as initialize_from_shallower
from branchy_jax.training.state import TrainState as TrainState
from branchy_jax.training.state import create_train_state as create_train_state
from branchy_jax.training.state import paper_adam as paper_adam
from branchy_jax.training.step import Metrics as Metrics
from branchy_jax.training.step import train_step as train_step

__all__ = [
    'Initialization',
    'Loss',
    'Metrics',
    'Prepare',
    'Stream',
    'TrainState',
    'create_train_state',
    'epoch_order',
    'fit',
    'initialize_from_baseline',
    'initialize_from_shallower',
    'paper_adam',
    'train_epoch',
    'train_step',
]
