"""Choosing thresholds from cached outputs: arrays in, operating points out, never a model."""

from branchy_jax.thresholds.choice import for_accuracy as for_accuracy
from branchy_jax.thresholds.choice import for_cost as for_cost
from branchy_jax.thresholds.choice import knee as knee
from branchy_jax.thresholds.choice import pareto_frontier as pareto_frontier
from branchy_jax.thresholds.guarantees import Guarantee as Guarantee
from branchy_jax.thresholds.guarantees import conformal_risk_control as conformal_risk_control
from branchy_jax.thresholds.guarantees import learn_then_test as learn_then_test
from branchy_jax.thresholds.guarantees import losses_against_full as losses_against_full
from branchy_jax.thresholds.guarantees import losses_along as losses_along
from branchy_jax.thresholds.guarantees import threshold_path as threshold_path
from branchy_jax.thresholds.protocols import Curve as Curve
from branchy_jax.thresholds.protocols import anytime as anytime
from branchy_jax.thresholds.protocols import budgeted as budgeted
from branchy_jax.thresholds.protocols import confusion as confusion
from branchy_jax.thresholds.screening import Screen as Screen
from branchy_jax.thresholds.screening import answering_exits as answering_exits
from branchy_jax.thresholds.screening import evaluate as evaluate
from branchy_jax.thresholds.screening import quantile_grid as quantile_grid
from branchy_jax.thresholds.screening import screen as screen
from branchy_jax.thresholds.search import coordinate_descent as coordinate_descent
from branchy_jax.thresholds.search import exact as exact
from branchy_jax.thresholds.search import for_budget as for_budget
from branchy_jax.thresholds.search import for_shares as for_shares
from branchy_jax.thresholds.statistics import Metric as Metric
from branchy_jax.thresholds.statistics import Statistics as Statistics
from branchy_jax.thresholds.statistics import accuracy_statistics as accuracy_statistics
from branchy_jax.thresholds.statistics import iou_per_class as iou_per_class
from branchy_jax.thresholds.statistics import iou_statistics as iou_statistics
from branchy_jax.thresholds.statistics import mean_iou as mean_iou
from branchy_jax.thresholds.statistics import mean_of_statistic as mean_of_statistic
from branchy_jax.thresholds.statistics import standard_error as standard_error

__all__ = [
    'accuracy_statistics',
    'answering_exits',
    'anytime',
    'budgeted',
    'conformal_risk_control',
    'confusion',
    'coordinate_descent',
    'Curve',
    'evaluate',
    'exact',
    'for_accuracy',
    'for_budget',
    'for_cost',
    'for_shares',
    'Guarantee',
    'iou_per_class',
    'iou_statistics',
    'knee',
    'learn_then_test',
    'losses_against_full',
    'losses_along',
    'mean_iou',
    'mean_of_statistic',
    'pareto_frontier',
    'quantile_grid',
    'Screen',
    'screen',
    'standard_error',
    'threshold_path',
]
