"""Networks as folders of StableHLO, as one ONNX file, or as a file for each stage and head, for several machines."""

from branchy_jax.export.folder import save, save_stages
from branchy_jax.export.onnx_file import save_onnx

__all__ = ['save', 'save_onnx', 'save_stages']
