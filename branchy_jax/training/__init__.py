"""Joint training of all exits: a pure, jitted step, and a loop around it that resumes after a kill."""

from branchy_jax.training.fit import fit as fit
from branchy_jax.training.initialization import initialize_from_baseline as initialize_from_baseline
from branchy_jax.training.initialization import initialize_from_shallower as initialize_from_shallower
from branchy_jax.training.state import TrainState as TrainState
from branchy_jax.training.state import create_train_state as create_train_state
from branchy_jax.training.state import paper_adam as paper_adam
from branchy_jax.training.step import train_step as train_step
