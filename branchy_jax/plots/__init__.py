"""Pictures of what the library makes."""

from branchy_jax.plots.answers import images_by_exit as images_by_exit
from branchy_jax.plots.answers import masks as masks
from branchy_jax.plots.answers import reliability_diagrams as reliability_diagrams
from branchy_jax.plots.tradeoffs import accuracy_against_cost as accuracy_against_cost
from branchy_jax.plots.tradeoffs import tradeoff as tradeoff

__all__ = ['accuracy_against_cost', 'images_by_exit', 'masks', 'reliability_diagrams', 'tradeoff']
