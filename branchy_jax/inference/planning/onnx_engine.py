"""ONNX Runtime as an engine of plans: whether it may run here, and sessions, which plans own."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from branchy_jax.inference.onnx_program import ANSWER
from branchy_jax.types import ExitPolicy


def check_onnxruntime(mesh: Mesh | None) -> None:
    """Raises ValueError with the reason if a plan cannot use ONNX Runtime here."""
    if importlib.util.find_spec('onnxruntime') is None:
        raise ValueError("engine: onnxruntime is not installed; pip install '.[onnx]' in a clone")
    if jax.default_backend() != 'cpu' or mesh is not None:
        raise ValueError('engine: plans use ONNX Runtime on a CPU alone, and not on a mesh')


def open_session(content: bytes, policy: ExitPolicy, inputs: Any, *, threads: int) -> Callable[..., list[np.ndarray]]:
    """Returns ``(inputs, policy, count) → arrays of an ExitPrediction``, whose session is freed with the function.

    Several threads may call the function at the same time.

    Args:
        content: of a file of `onnx_program`.
        policy: its thresholds replace those of the file; later policies are ignored.
        inputs: shapes of the inputs.
        threads: that share each operation.
    """
    import onnx
    import onnxruntime

    file, thresholds = onnx.load_from_string(content), np.asarray(policy.thresholds)
    for array in file.graph.initializer:
        if array.name.startswith('threshold_'):
            value = thresholds[int(array.name.removeprefix('threshold_'))]
            array.CopyFrom(onnx.numpy_helper.from_array(value, array.name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # 3 is errors alone
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=['CPUExecutionProvider'])
    names, dtypes = [each.name for each in session.get_inputs()], [spec.dtype for spec in jax.tree.leaves(inputs)]

    def answer(inputs: Any, policy: ExitPolicy, count: int) -> list[np.ndarray]:
        arrays = map(np.asarray, jax.tree.leaves(inputs), dtypes)
        answers: list[np.ndarray] = session.run(ANSWER, dict(zip(names, arrays, strict=True)))
        return answers

    return answer
