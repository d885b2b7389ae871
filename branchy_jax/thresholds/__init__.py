"""Choosing thresholds from cached exits: one table in, operating points and policies out, never a model.

`ExitTable` holds together what is known of M inputs at N exits: uncertainty ``[N, M]``, statistics ``[N, M, S]``,
costs, whose uncertainties they are and of which data. Everything that is chosen with it carries that along.
"""

from branchy_jax.thresholds.control import Controller as Controller
from branchy_jax.thresholds.control import Monitor as Monitor
from branchy_jax.thresholds.control import create_controller as create_controller
from branchy_jax.thresholds.control import create_monitor as create_monitor
from branchy_jax.thresholds.control import path_by_shares as path_by_shares
from branchy_jax.thresholds.guarantees import Guarantee as Guarantee
from branchy_jax.thresholds.guarantees import conformal_risk_control as conformal_risk_control
from branchy_jax.thresholds.guarantees import learn_then_test as learn_then_test
from branchy_jax.thresholds.guarantees import losses_against_full as losses_against_full
from branchy_jax.thresholds.guarantees import losses_along as losses_along
from branchy_jax.thresholds.guarantees import threshold_path as threshold_path
from branchy_jax.thresholds.screen import Screen as Screen
from branchy_jax.thresholds.screen import answering_exits as answering_exits
from branchy_jax.thresholds.screen import quantile_grid as quantile_grid
from branchy_jax.thresholds.statistics import accuracy_statistics as accuracy_statistics
from branchy_jax.thresholds.statistics import confusion as confusion
from branchy_jax.thresholds.statistics import iou_per_class as iou_per_class
from branchy_jax.thresholds.statistics import iou_statistics as iou_statistics
from branchy_jax.thresholds.statistics import mean_iou as mean_iou
from branchy_jax.thresholds.statistics import mean_of_statistic as mean_of_statistic
from branchy_jax.thresholds.statistics import standard_error as standard_error
from branchy_jax.thresholds.table import ExitTable as ExitTable

__all__ = [
    'accuracy_statistics',
    'answering_exits',
    'conformal_risk_control',
    'confusion',
    'Controller',
    'create_controller',
    'create_monitor',
    'ExitTable',
    'Guarantee',
    'iou_per_class',
    'iou_statistics',
    'learn_then_test',
    'losses_against_full',
    'losses_along',
    'mean_iou',
    'mean_of_statistic',
    'Monitor',
    'path_by_shares',
    'quantile_grid',
    'Screen',
    'standard_error',
    'threshold_path',
]
