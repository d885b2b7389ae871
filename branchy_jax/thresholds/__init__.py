"""Choosing thresholds from cached exits: one table in, operating points and policies out, never a model.

An `ExitTable` holds what is known of M inputs at N exits: uncertainty ``[N, M]``, statistics ``[N, M, S]``, costs, the
criterion and the name of the data. Every operating point chosen on a table carries its criterion and data name.
"""

from branchy_jax.thresholds.control import Controller as Controller
from branchy_jax.thresholds.control import Monitor as Monitor
from branchy_jax.thresholds.guarantees import Guarantee as Guarantee
from branchy_jax.thresholds.guarantees import conformal_risk_control as conformal_risk_control
from branchy_jax.thresholds.guarantees import learn_then_test as learn_then_test
from branchy_jax.thresholds.guarantees import losses_against_full as losses_against_full
from branchy_jax.thresholds.screen import Screen as Screen
from branchy_jax.thresholds.statistics import accuracy_statistics as accuracy_statistics
from branchy_jax.thresholds.statistics import iou_statistics as iou_statistics
from branchy_jax.thresholds.statistics import mean_iou as mean_iou
from branchy_jax.thresholds.table import ExitTable as ExitTable
