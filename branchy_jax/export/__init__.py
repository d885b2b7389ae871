"""Networks as folders of StableHLO, which run with jax and numpy alone, or as one ONNX file, which runs without jax."""

from branchy_jax.export.folder import FORMAT as FORMAT
from branchy_jax.export.folder import save as save
from branchy_jax.export.onnx_file import save_onnx as save_onnx
from branchy_jax.export.programs import PLATFORMS as PLATFORMS

__all__ = ['FORMAT', 'PLATFORMS', 'save', 'save_onnx']
