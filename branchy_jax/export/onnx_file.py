"""Networks as one ONNX file: with a conditional at each early exit, or with the logits of every exit for batches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from branchy_jax import calling, program
from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria import Criterion, as_policy
from branchy_jax.export.programs import ANSWER, described
from branchy_jax.inference.rewriting.forms import Forms
from branchy_jax.inference.rewriting.optimize import optimize
from branchy_jax.jaxprs import Equation, Program
from branchy_jax.translate.onnx_graph import Graph, Value, computed, known
from branchy_jax.translate.onnx_translation import (
    UntranslatableError,
    Values,
    start,
    translate,
    translate_function,
    value_in,
)
from branchy_jax.types import Normalization, Variables

OPSET = 17
"""The version of ONNX's operators that files are written in."""

_IR_VERSION = 8  # of the time of opset 17, so that every reader of that opset reads the file
_MOST_BYTES = 2**31 - 2**20  # what a protobuf message holds, less what the nodes take


def save_onnx(
    path: Path | str,
    model: Any,
    variables: Variables,
    policy: Any,
    *,
    inputs: Any,
    normalization: Normalization | None = None,
    batch: bool = False,
) -> None:
    """Exports a trained network as one ONNX file whose conditionals skip the stages after a confident exit.

    The file takes ``image`` ``[1, H, W, C]``, a batch of one, and returns ``label`` ``[1]``, ``exit_index`` ``[1]``,
    ``logits`` ``[1, K]`` and ``uncertainty`` ``[1]``. Each stage after the first lies in the else branch of an ``If``
    on the exit before it, so that the stage does not run for an image that has left. Thresholds are the scalar
    initialisers ``threshold_1``, ``threshold_2``, …, which can be changed in the file without another export. All
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
        batch: whether the file takes ``image`` ``[B, H, W, C]`` for any B instead, has no conditionals and no
            thresholds, and returns the logits of every exit, ``logits_1`` ``[B, K]``, ``logits_2``, ….

    Raises:
        ValueError: an argument does not fit the network; the path is a folder or cannot be written; the network
            computes something that has no ONNX form here (the message names the primitive and its place), or in
            another dtype than float32; ``batch`` for a network that runs at one batch size alone; the onnx package is
            missing.

    Example:
        >>> import tempfile, onnx, onnx.numpy_helper, branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> path = Path(tempfile.mkdtemp()) / 'digits.onnx'
        >>> save_onnx(path, weights.model, weights.variables, weights.operating_points[0], inputs=weights.inputs,
        ...           normalization=weights.normalization)
        >>> file = onnx.load(path)
        >>> [array] = [array for array in file.graph.initializer if array.name == 'threshold_1']
        >>> array.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5), 'threshold_1'))
        >>> onnx.save(file, path)
    """
    path, size = Path(path), program.BATCH if batch else 1
    stages = program.stages(model, variables, inputs)
    policy = as_policy(policy, stages.num_exits)
    if batch and stages.fixed_because:
        raise stages.refusal()
    specs = calling.with_batch(inputs, size)
    _check(path, variables, jax.tree.leaves(specs), normalization)
    fast_model, fast_variables = optimize(model, variables, inputs=inputs, forms=Forms())
    weights = jax.tree.leaves(fast_variables)
    cut = program.cut(program.trace(fast_model, fast_variables, specs), len(weights), stages.exits)
    network = _Network(program.trace(model, variables, specs), cut, policy.criterion)
    graph = Graph()
    file_inputs, images = _add_inputs(graph, specs, normalization)
    values = start(cut.program, [*map(known, weights), *images])
    metadata = {'normalization': 'none: the file takes what the network takes'}
    if normalization is not None:
        metadata['normalization'] = json.dumps(described(normalization))
    try:
        if batch:
            graph.outputs = [(f'logits_{n + 1}', network.exit(graph, n, values)) for n in range(stages.num_exits)]
        else:
            network.from_exit(graph, 0, values, None)
    except UntranslatableError as error:
        raise network.refusal(error) from error
    if not batch:
        thresholds = np.asarray(policy.thresholds)
        graph.arrays.update({f'threshold_{n + 1}': np.array(x, np.float32) for n, x in enumerate(thresholds)})
        metadata['criterion'] = policy.criterion.name
        metadata['thresholds'] = json.dumps([str(value) for value in thresholds.tolist()])
    _write(path, graph, file_inputs, metadata)


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network to translate.

    Attributes:
        original: the program of the network before rewriting, at the batch size of the file.
        cut: that of the rewritten network.
        criterion: of the policy.
    """

    original: Program
    cut: program.Cut
    criterion: Criterion

    def exit(self, graph: Graph, n: int, values: Values) -> Value:
        """Adds stage and head n, and returns the logits."""
        for kind, numbers in (('stage', self.cut.stages[n]), ('exit', self.cut.heads[n])):
            graph.prefix = f'{kind}_{n + 1}/'
            translate(graph, self.cut.program, numbers, values)
        return value_in(values, self.cut.outputs[n])

    def from_exit(self, graph: Graph, n: int, values: Values, carry: Any) -> None:
        """Adds exit n and the conditional with all that follows; the answer is the graph's output."""

        def judge(logits: Any, carry: Any) -> Any:
            answer, uncertainty, after = self.criterion(logits, carry, n)
            return self.criterion.decide(answer), answer, uncertainty, after

        logits = self.exit(graph, n, values)
        graph.prefix = f'criterion_{n + 1}/'
        label, answer, uncertainty, carry = translate_function(graph, judge, logits, carry)
        answers = [label, known(np.array([n], np.int32)), answer, uncertainty]
        graph.outputs = list(zip(ANSWER, answers, strict=True))
        if n == len(self.cut.outputs) - 1:
            return
        confident = graph.node('Less', graph.read(uncertainty), f'threshold_{n + 1}')  # strict, and false for NaN
        leaves, goes_on = Graph(graph), Graph(graph)
        leaves.outputs = graph.outputs
        self.from_exit(goes_on, n + 1, values, carry)
        graph.prefix = f'exit_{n + 1}/'
        names = [graph.fresh(name) for name in ANSWER]
        branches = {
            'then_branch': leaves.finish(f'{graph.prefix}leaves'),
            'else_branch': goes_on.finish(f'{graph.prefix}goes_on'),
        }
        graph.node('If', confident, outputs=names, **branches)
        made = [computed(name, value.shape, value.dtype) for name, value in zip(names, answers, strict=True)]
        graph.outputs = list(zip(ANSWER, made, strict=True))

    def refusal(self, error: UntranslatableError) -> ValueError:
        """Returns the error that names the part, and where the network before rewriting computes the same."""

        def kind_of(equation: Equation) -> tuple[str, Any]:
            return equation.primitive.name, equation.outvars[0].aval.dtype

        part, place, kind = error.part.strip('/').replace('_', ' '), error.place, kind_of(error.equation)
        if part.startswith('criterion'):
            part = f'criterion {self.criterion.name!r}'
        else:
            alike = (n for n, equation in enumerate(self.original.equations) if kind_of(equation) == kind)
            place = next(map(self.original.where, alike), place)
        return ValueError(f'model: {part} computes {kind[0]!r}, which has no ONNX form here: {error} (at {place})')


def _check(path: Path, variables: Variables, specs: list[Any], normalization: Normalization | None) -> None:
    try:
        import onnx  # noqa: F401 - what the file is written with
    except ImportError as error:
        raise ValueError('save_onnx needs the onnx package; pip install branchy-jax[onnx]') from error
    if path.is_dir():
        raise ValueError(f'path: {path} is a folder; give the name of a file, such as {path / "network.onnx"}')
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if total > _MOST_BYTES:
        raise ValueError(f'variables: {total:,} bytes of weights do not fit into one ONNX file, which holds 2 GiB')
    if normalization is None:
        return
    channels = np.shape(normalization.mean)[-1:]
    if len(specs) != 1 or len(specs[0].shape) != 4 or channels not in ((1,), (), specs[0].shape[-1:]):
        arrived = ', '.join(str(list(spec.shape[1:])) for spec in specs)
        raise ValueError(
            f'normalization: is for images of {channels} channels, but an input of the network is {arrived}'
        )


def _add_inputs(graph: Graph, specs: Any, normalization: Normalization | None) -> tuple[list[Value], list[Value]]:
    """Returns the file's inputs, and what the network takes."""
    leaves = jax.tree.leaves(specs)
    names = ['image'] if len(leaves) == 1 else [f'image_{n + 1}' for n in range(len(leaves))]
    dtypes = [spec.dtype if normalization is None else np.uint8 for spec in leaves]
    inputs = [computed(name, spec.shape, dtype) for name, spec, dtype in zip(names, leaves, dtypes, strict=True)]
    graph.batch_of = names[0]
    if normalization is None:
        return inputs, inputs
    graph.prefix = 'normalization/'
    order = (0, 3, 1, 2)  # one value per channel broadcasts faster when channels do not lie last
    pixels = dataclasses.replace(inputs[0], name=graph.read(inputs[0], order), order=order)
    mean, deviation = (np.asarray(value, np.float64) for value in (normalization.mean, normalization.deviation))
    scale, shift = (np.float32(x).reshape(1, 1, 1, -1) for x in (1 / 255 / deviation, -mean / deviation))
    return inputs, [translate_function(graph, lambda images: images.astype(np.float32) * scale + shift, pixels)]


def _write(path: Path, graph: Graph, inputs: list[Value], metadata: dict[str, str]) -> None:
    """Checks the file's content and writes it."""
    import onnx
    from onnx import helper

    content = helper.make_model(
        graph.finish('network', inputs),
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=_IR_VERSION,
        producer_name='branchy_jax',
    )
    helper.set_model_props(content, metadata)
    onnx.checker.check_model(content, full_check=True)
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content.SerializeToString()))
    except OSError as error:
        raise ValueError(f'path: cannot write {path}: {error}; nothing was left there') from error
