"""Choosing thresholds from cached outputs: arrays in, operating points out, never a model."""

from branchy_jax.thresholds.choice import for_accuracy as for_accuracy
from branchy_jax.thresholds.choice import for_cost as for_cost
from branchy_jax.thresholds.choice import knee as knee
from branchy_jax.thresholds.choice import pareto_frontier as pareto_frontier
from branchy_jax.thresholds.screening import Screen as Screen
from branchy_jax.thresholds.screening import accuracy_statistics as accuracy_statistics
from branchy_jax.thresholds.screening import evaluate as evaluate
from branchy_jax.thresholds.screening import mean_of_statistic as mean_of_statistic
from branchy_jax.thresholds.screening import quantile_grid as quantile_grid
from branchy_jax.thresholds.screening import screen as screen

__all__ = [
    'Screen',
    'accuracy_statistics',
    'evaluate',
    'for_accuracy',
    'for_cost',
    'knee',
    'mean_of_statistic',
    'pareto_frontier',
    'quantile_grid',
    'screen',
]
