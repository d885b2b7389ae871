"""Criteria measure the uncertainty of an exit; `is_confident` is the one comparison that decides whether it answers."""

from branchy_jax.criteria.criterion import Criterion as Criterion
from branchy_jax.criteria.criterion import as_criterion as as_criterion
from branchy_jax.criteria.criterion import ensemble as ensemble
from branchy_jax.criteria.criterion import entropy as entropy
from branchy_jax.criteria.criterion import is_confident as is_confident
from branchy_jax.criteria.criterion import margin as margin
from branchy_jax.criteria.criterion import max_probability as max_probability
from branchy_jax.criteria.criterion import patience as patience
from branchy_jax.criteria.criterion import pixelwise as pixelwise
from branchy_jax.criteria.criterion import replay as replay
from branchy_jax.criteria.criterion import with_temperatures as with_temperatures
from branchy_jax.criteria.learned import brier_score as brier_score
from branchy_jax.criteria.learned import fit_learned as fit_learned
from branchy_jax.criteria.learned import fit_temperatures as fit_temperatures
from branchy_jax.criteria.learned import reliability as reliability
from branchy_jax.criteria.policy import load_policy as load_policy
from branchy_jax.criteria.policy import save_policy as save_policy
