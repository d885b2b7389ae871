"""Pictures of trade-offs and of answers."""

from branchy_jax.plots.answers import images_by_exit, masks, reliability_diagrams
from branchy_jax.plots.tradeoffs import accuracy_against_cost, tradeoff

__all__ = ['accuracy_against_cost', 'images_by_exit', 'masks', 'reliability_diagrams', 'tradeoff']
