"""Networks as folders of StableHLO: they run with jax and numpy alone, or wherever StableHLO runs."""

from branchy_jax.export.folder import FORMAT as FORMAT
from branchy_jax.export.folder import save as save
from branchy_jax.export.programs import PLATFORMS as PLATFORMS

__all__ = ['FORMAT', 'PLATFORMS', 'save']
