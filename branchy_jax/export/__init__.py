"""Networks as folders of StableHLO, which run with jax and numpy alone, or as one ONNX file, which runs without jax."""

from branchy_jax.export.folder import save
from branchy_jax.export.onnx_file import save_onnx

__all__ = ['save', 'save_onnx']
