"""Choosing thresholds from cached exits: one table in, operating points and policies out, never a model.

An `ExitTable` holds what is known of M inputs at N exits: uncertainty ``[N, M]``, statistics ``[N, M, S]``, costs, the
criterion and the name of the data. Every operating point chosen on a table carries its criterion and data name.
"""

from branchy_jax.thresholds.control import Controller, Monitor
from branchy_jax.thresholds.guarantees import Guarantee, conformal_risk_control, learn_then_test, losses_against_full
from branchy_jax.thresholds.screen import Screen
from branchy_jax.thresholds.statistics import accuracy_statistics, iou_statistics, mean_iou
from branchy_jax.thresholds.table import ExitTable

__all__ = ['Controller', 'ExitTable', 'Guarantee', 'Monitor', 'Screen', 'accuracy_statistics', 'conformal_risk_control']
__all__ += ['iou_statistics', 'learn_then_test', 'losses_against_full', 'mean_iou']
