"""How unsure an exit is, and the one comparison that decides whether it answers."""

from branchy_jax.criteria.criterion import Criterion as Criterion
from branchy_jax.criteria.criterion import EveryOther as EveryOther
from branchy_jax.criteria.criterion import QuantileOverPatches as QuantileOverPatches
from branchy_jax.criteria.criterion import QuantileOverPixels as QuantileOverPixels
from branchy_jax.criteria.criterion import from_logits as from_logits
from branchy_jax.criteria.criterion import is_confident as is_confident
from branchy_jax.criteria.criterion import mean_over_pixels as mean_over_pixels
from branchy_jax.criteria.criterion import replay as replay
from branchy_jax.criteria.learned import brier_score as brier_score
from branchy_jax.criteria.learned import fit_learned as fit_learned
from branchy_jax.criteria.learned import fit_temperatures as fit_temperatures
from branchy_jax.criteria.learned import reliability as reliability
from branchy_jax.criteria.named import ensemble as ensemble
from branchy_jax.criteria.named import entropy as entropy
from branchy_jax.criteria.named import entropy_of_logits as entropy_of_logits
from branchy_jax.criteria.named import margin as margin
from branchy_jax.criteria.named import margin_of_logits as margin_of_logits
from branchy_jax.criteria.named import max_probability as max_probability
from branchy_jax.criteria.named import max_probability_of_logits as max_probability_of_logits
from branchy_jax.criteria.named import patience as patience
from branchy_jax.criteria.named import pixel_exits as pixel_exits
from branchy_jax.criteria.named import pixelwise as pixelwise
from branchy_jax.criteria.named import with_temperatures as with_temperatures
from branchy_jax.criteria.policy import as_policy as as_policy
from branchy_jax.criteria.policy import load_policy as load_policy
from branchy_jax.criteria.policy import save_policy as save_policy

__all__ = [
    'Criterion',
    'EveryOther',
    'QuantileOverPatches',
    'QuantileOverPixels',
    'as_policy',
    'brier_score',
    'ensemble',
    'entropy',
    'entropy_of_logits',
    'fit_learned',
    'fit_temperatures',
    'from_logits',
    'is_confident',
    'load_policy',
    'margin',
    'margin_of_logits',
    'max_probability',
    'max_probability_of_logits',
    'mean_over_pixels',
    'patience',
    'pixel_exits',
    'pixelwise',
    'reliability',
    'replay',
    'save_policy',
    'with_temperatures',
]
