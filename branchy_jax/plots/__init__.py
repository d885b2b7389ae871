"""Pictures."""

from branchy_jax.plots.confidence import contact_sheet as contact_sheet
from branchy_jax.plots.confidence import curves as curves
from branchy_jax.plots.confidence import held as held
from branchy_jax.plots.confidence import reliability_diagrams as reliability_diagrams
from branchy_jax.plots.dense import masks as masks
from branchy_jax.plots.reproduction import beside as beside
from branchy_jax.plots.reproduction import gradient_norms as gradient_norms
from branchy_jax.plots.speed import cost_against_batch as cost_against_batch
from branchy_jax.plots.speed import gain_against_batch as gain_against_batch
from branchy_jax.plots.speed import time_against_macs as time_against_macs
from branchy_jax.plots.speed import tradeoff as tradeoff

__all__ = [
    'beside',
    'contact_sheet',
    'cost_against_batch',
    'curves',
    'gain_against_batch',
    'gradient_norms',
    'held',
    'masks',
    'reliability_diagrams',
    'time_against_macs',
    'tradeoff',
]
