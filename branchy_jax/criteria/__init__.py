"""Criteria measure the uncertainty of an exit; `is_confident` is the one comparison that decides whether it answers."""

from branchy_jax.criteria.criterion import (
    Criterion,
    as_criterion,
    ensemble,
    entropy,
    is_confident,
    margin,
    max_probability,
    patience,
    pixelwise,
    replay,
    with_temperatures,
)
from branchy_jax.criteria.learned import brier_score, fit_learned, fit_temperatures, reliability
from branchy_jax.criteria.policy import as_policy, check_policy, decode_policy, encode_policy, load_policy, save_policy  # noqa: F401

__all__ = [
    'Criterion',
    'as_criterion',
    'brier_score',
    'ensemble',
    'entropy',
    'fit_learned',
    'fit_temperatures',
    'is_confident',
    'load_policy',
    'margin',
    'max_probability',
    'patience',
    'pixelwise',
    'reliability',
    'replay',
    'save_policy',
    'with_temperatures',
]
