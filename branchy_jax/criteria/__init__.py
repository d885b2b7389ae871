"""How unsure an exit is, and the one comparison that decides whether it answers."""

from branchy_jax.criteria.criterion import Carry as Carry
from branchy_jax.criteria.criterion import Criterion as Criterion
from branchy_jax.criteria.criterion import check_exit_number as check_exit_number
from branchy_jax.criteria.criterion import from_logits as from_logits
from branchy_jax.criteria.criterion import is_confident as is_confident
from branchy_jax.criteria.criterion import most_likely_class as most_likely_class
from branchy_jax.criteria.criterion import replay as replay
from branchy_jax.criteria.measures import closeness_of_logits as closeness_of_logits
from branchy_jax.criteria.measures import doubt_of_logits as doubt_of_logits
from branchy_jax.criteria.measures import entropy_of_logits as entropy_of_logits
from branchy_jax.criteria.named import ensemble as ensemble
from branchy_jax.criteria.named import entropy as entropy
from branchy_jax.criteria.named import margin as margin
from branchy_jax.criteria.named import max_probability as max_probability
from branchy_jax.criteria.named import patience as patience
from branchy_jax.criteria.named import with_temperatures as with_temperatures
from branchy_jax.criteria.pixelwise import pixel_exits as pixel_exits
from branchy_jax.criteria.pixelwise import pixelwise as pixelwise
from branchy_jax.criteria.pooling import Pool as Pool
from branchy_jax.criteria.pooling import mean_over_pixels as mean_over_pixels
from branchy_jax.criteria.pooling import on_every as on_every
from branchy_jax.criteria.pooling import quantile_over_patches as quantile_over_patches
from branchy_jax.criteria.pooling import quantile_over_pixels as quantile_over_pixels

__all__ = [
    'Carry',
    'Criterion',
    'Pool',
    'check_exit_number',
    'closeness_of_logits',
    'doubt_of_logits',
    'ensemble',
    'entropy',
    'entropy_of_logits',
    'from_logits',
    'is_confident',
    'margin',
    'max_probability',
    'mean_over_pixels',
    'most_likely_class',
    'on_every',
    'patience',
    'pixel_exits',
    'pixelwise',
    'quantile_over_patches',
    'quantile_over_pixels',
    'replay',
    'with_temperatures',
]
