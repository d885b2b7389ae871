"""Networks as one ONNX file."""

from pathlib import Path
from typing import Any

from branchy_jax.checkpoint import write_atomically
from branchy_jax.inference.onnx_program import onnx_program
from branchy_jax.types import Normalization, Variables


def save_onnx(
    path: Path | str,
    model: Any,
    variables: Variables,
    policy: Any,
    *,
    inputs: Any,
    normalization: Normalization | None = None,
    batch: bool = False,
    every_exit: bool = False,
) -> None:
    """Exports a trained network as one ONNX file whose conditionals skip the stages after a confident exit.

    The file takes ``image`` ``[1, H, W, C]``, a batch of one, and returns ``label`` ``[1]``, ``exit_index`` ``[1]``,
    ``logits`` ``[1, K]`` and ``uncertainty`` ``[1]``. Each stage after the first lies in the else branch of an ``If``
    on the exit before it, so that the stage does not run for an image that has left. Thresholds are the scalar
    initialisers ``threshold_0``, ``threshold_1``, …, which can be changed in the file without another export. All
    floats are float32. The file's metadata holds the criterion, the thresholds and the normalisation.

    The network is rewritten as `branchy_jax.inference.optimize` does, in forms that suit every platform, and then
    translated primitive by primitive. ``onnx.checker`` checks the file, shapes included, before the file is renamed to
    ``path``.

    Args:
        path: the file to write; its folder is made if missing.
        model: a network with N exits.
        variables: trained.
        policy: its criterion becomes part of the file; ``[N - 1]`` thresholds alone are of entropy.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`. Several arrays are called ``image_1``, ….
        normalization: becomes part of the file, which then takes stored pixels, uint8; with ``None`` the file takes
            what the network takes.
        batch: whether the file takes ``image`` ``[B, H, W, C]`` for any B instead. After each exit the rows that go on
            are gathered, and the next stage runs on those alone inside an ``If``, which is skipped when no row goes on.
            A NaN among the thresholds of the file means never, since ONNX has no assertion.
        every_exit: whether the file takes ``image`` ``[B, H, W, C]`` for any B instead, has no conditionals and no
            thresholds, and returns the logits of every exit, ``logits_0`` ``[B, K]``, ``logits_1``, ….

    Raises:
        ValueError: an argument does not fit the network; the path is a folder or cannot be written; the network
            computes something that has no ONNX form here (the message names the primitive and its place), or in
            another dtype than float32; ``batch`` or ``every_exit`` for a network that runs at one batch size alone, or
            both of them; the onnx package is missing.

    Example:
        >>> import tempfile, numpy as np, onnx, onnx.numpy_helper, branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> path = Path(tempfile.mkdtemp()) / 'digits.onnx'
        >>> save_onnx(path, weights.model, weights.variables, weights.operating_points[0], inputs=weights.inputs,
        ...           normalization=weights.normalization)
        >>> file = onnx.load(path)
        >>> [array] = [array for array in file.graph.initializer if array.name == 'threshold_0']
        >>> array.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5), 'threshold_0'))
        >>> onnx.save(file, path)
    """
    path = Path(path)
    if batch and every_exit:
        raise ValueError('every_exit: a file returns the logits of every exit or an answer of each row; leave out one')
    if path.is_dir():
        raise ValueError(f'path: {path} is a folder; give the name of a file, such as {path / "network.onnx"}')
    content = onnx_program(
        model, variables, policy, inputs, normalization=normalization, batch=batch, every_exit=every_exit
    )
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise ValueError(f'path: cannot write {path}: {error}; nothing was left there') from error
