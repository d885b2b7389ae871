"""Networks as one ONNX file: a conditional for each side exit, or every exit's logits for batches."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from branchy_jax.checkpoint import write_atomically
from branchy_jax.criteria import as_policy
from branchy_jax.criteria.criterion import Criterion
from branchy_jax.export.onnx_graph import AnySize, Names, Scope, Spec, Value, known
from branchy_jax.export.onnx_translation import TRACED_BATCH, Unsupported, translate
from branchy_jax.inference.rewriting.forms import Forms
from branchy_jax.inference.rewriting.optimize import optimize
from branchy_jax.models.attached.program import trace
from branchy_jax.models.branchy import BranchyNet, run_segment
from branchy_jax.types import ExitPolicy, Normalization, Variables, input_specs

OPSET = 17
"""The version of ONNX's operators that files are written in."""

_IR_VERSION = 8  # the one of opset 17's time: any reader of that opset reads it
_MOST_BYTES = 2**31 - 2**20  # what a protobuf message holds, less what the nodes take
_ANSWER = ('label', 'exit_index', 'logits', 'uncertainty')


def save_onnx(
    path: Path | str,
    model: BranchyNet,
    variables: Variables,
    *,
    thresholds: Any,
    normalization: Normalization | None = None,
    batch: bool = False,
) -> None:
    """Exports a trained network as one ONNX file whose conditionals skip what an exit makes superfluous.

    The file takes ``image`` ``[1, H, W, C]``, a batch of one, and returns ``label`` ``[1]``, ``exit_index`` ``[1]``,
    ``logits`` ``[1, K]`` and ``uncertainty`` ``[1]``. Each stage after the first lies in the else branch of an ``If``
    on the exit before it, so that it does not run for an image that has left. Thresholds are the scalar initialisers
    ``threshold_1``, ``threshold_2``, …: change them in the file, and nothing need be exported again. All numbers are
    float32. The file's metadata tells the criterion, the thresholds and the
    normalisation.

    The network is rewritten as `branchy_jax.inference.optimize` does, in the portable forms, and then translated
    primitive by primitive. The file is checked by ``onnx.checker``, with the shapes of everything inferred, before it
    takes its name.

    Args:
        path: the file to write; its folder is made if missing.
        model: a network with an ``image_shape``. Where one input is several arrays they are ``image_1``, ….
        variables: trained.
        thresholds: a policy, whose criterion becomes part of the file, or ``[N - 1]`` thresholds of entropy.
        normalization: makes it part of the file, which then takes stored pixels, uint8; ``None``: the file takes
            what the network takes.
        batch: instead takes ``image`` ``[B, H, W, C]`` for any B, has no conditionals and no thresholds, and returns
            the logits of every exit, ``logits_1`` ``[B, K]``, ``logits_2``, ….

    Raises:
        ValueError: an argument does not fit the network; the path is a folder or cannot be written; the network
            computes something that has no ONNX form here (the message names the primitive and where it is), or in
            another type than float32; the onnx package is missing.

    Example:
        >>> import tempfile, onnx, onnx.numpy_helper, branchy_jax as bj
        >>> weights = bj.models.load_pretrained('b-lenet', dataset='mnist')
        >>> path = Path(tempfile.mkdtemp()) / 'digits.onnx'
        >>> save_onnx(path, weights.model, weights.variables, thresholds=weights.operating_points[0],
        ...           normalization=weights.normalization)
        >>> file = onnx.load(path)
        >>> [array] = [array for array in file.graph.initializer if array.name == 'threshold_1']
        >>> array.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5), 'threshold_1'))
        >>> onnx.save(file, path)
    """
    path, policy = Path(path), as_policy(thresholds, model.num_exits)
    _check(path, model, variables, normalization)
    network = optimize(model, variables, forms=Forms(), embed=False)
    network = network[0], jax.tree.map(np.asarray, network[1])
    graph = Scope(Names(), any_size=_input_names(model)[0] if batch else '')
    inputs, hidden = _add_inputs(graph, model, normalization, AnySize() if batch else 1)
    steps = _Steps(model, variables, network, policy.criterion)
    if batch:
        steps.every_exit(graph, hidden)
    else:
        for n, threshold in enumerate(np.asarray(policy.thresholds)):
            graph.arrays[f'threshold_{n + 1}'] = np.array(threshold, np.float32)
        steps.from_exit(graph, 0, hidden, ())
    told = {} if batch else {'criterion': policy.criterion.name, 'thresholds': _texts(policy)}
    _write(path, graph, inputs, {**told, 'normalization': _told(normalization)})


class _Steps:
    """Translates a network's stages, heads and criterion one after the other."""

    def __init__(
        self, model: BranchyNet, variables: Variables, network: tuple[BranchyNet, Variables], criterion: Criterion
    ) -> None:
        self._original, self._network, self._criterion = (model, variables), network, criterion
        self._count = model.num_exits

    def every_exit(self, graph: Scope, hidden: Any) -> None:
        """Adds all stages and heads; the logits of each are an output."""
        for n in range(self._count):
            hidden = self._segment(graph, 'stage', n, hidden)
            logits = self._segment(graph, 'exit', n, hidden)
            graph.outputs.append((f'logits_{n + 1}', logits))

    def from_exit(self, graph: Scope, n: int, hidden: Any, carry: Any) -> None:
        """Adds stage n, its exit, and the conditional with all that follows; the answer is the graph's output."""
        hidden = self._segment(graph, 'stage', n, hidden)
        logits = self._segment(graph, 'exit', n, hidden)
        criterion = self._criterion

        def ask(logits: Any, carry: Any) -> Any:
            answer, uncertainty, after = criterion.update(logits, criterion.init(logits) if n == 0 else carry, n)
            return criterion.decide(answer), answer, uncertainty, after

        graph.prefix = f'criterion_{n + 1}/'
        label, answer, uncertainty, carry = self._add(graph, f'criterion {criterion.name!r}', ask, (), logits, carry)
        found = [label, known(np.array([n], np.int32)), answer, uncertainty]
        if n == self._count - 1:
            graph.outputs = list(zip(_ANSWER, found, strict=True))
            return
        confident = graph.node('Less', graph.read(uncertainty), f'threshold_{n + 1}')
        leaves, goes_on = Scope(graph.names, graph), Scope(graph.names, graph)
        leaves.outputs = list(zip(_ANSWER, found, strict=True))
        self.from_exit(goes_on, n + 1, hidden, carry)
        names = [graph.names.fresh(f'exit_{n + 1}/', name) for name in _ANSWER]
        graph.node('If', confident, outputs=names, then_branch=leaves, else_branch=goes_on)
        graph.outputs = [
            (name, graph.plain(made, value.shape, value.dtype))
            for name, made, value in zip(_ANSWER, names, found, strict=True)
        ]

    def _segment(self, graph: Scope, kind: str, n: int, hidden: Any) -> Any:
        model, variables = self._network
        own = {'params': {f'{kind}{n + 1}': variables['params'].get(f'{kind}{n + 1}', {})}} if variables else {}
        graph.prefix = f'{kind}_{n + 1}/'
        try:
            return self._add(graph, f'{kind} {n + 1}', functools.partial(run_segment, model, kind, n), own, hidden)
        except Unsupported as error:
            layer = _layer_of(error.primitive, *self._original, kind, n)
            raise ValueError(f'{error}{layer}') from error

    def _add(self, graph: Scope, place: str, function: Callable[..., Any], own: Any, *arguments: Any) -> Any:
        """Traces ``function(own, *arguments)``, or without ``own`` if that is ``()``, and translates it."""

        def flat(weights: Any, arguments: Any) -> Any:
            return function(*arguments) if own == () else function(weights, *arguments)

        def traced(size: int) -> Any:
            return trace(flat, *jax.tree.map(lambda value: _sized(value, size), (own, arguments)))

        jaxpr, structure = traced(TRACED_BATCH)
        larger = traced(TRACED_BATCH + 1)[0] if graph.any_size else None
        values = [v if isinstance(v, Value) else known(v) for v in jax.tree.leaves((own, arguments))]
        try:
            return jax.tree.unflatten(structure, translate(graph, jaxpr, values, larger))
        except Unsupported as error:
            raise Unsupported(
                error.primitive, f'model: {place} computes {error.primitive!r}, which has no ONNX form here: {error}'
            ) from error


def _sized(value: Any, batch: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a value for some number of images."""
    shape = [size.times * batch if isinstance(size, AnySize) else size for size in value.shape]
    return jax.ShapeDtypeStruct(shape, value.dtype)


def _check(path: Path, model: BranchyNet, variables: Variables, normalization: Normalization | None) -> None:
    try:
        import onnx  # noqa: F401 - what the file is written with
    except ImportError as error:
        raise ValueError('save_onnx needs the onnx package; pip install branchy-jax[onnx]') from error
    if path.is_dir():
        raise ValueError(f'path: {path} is a folder; give the name of a file, such as {path / "network.onnx"}')
    if model.image_shape is None:
        raise ValueError('model: has no image_shape, which the file needs; build it with image_shape=…')
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if total > _MOST_BYTES:
        raise ValueError(f'variables: {total:,} bytes of weights do not fit into one ONNX file, which holds 2 GiB')
    specs = jax.tree.leaves(input_specs(model.image_shape, 1))
    if normalization is None:
        return
    channels = np.shape(normalization.mean)[-1:]
    if len(specs) != 1 or len(specs[0].shape) != 4 or channels not in ((1,), (), specs[0].shape[-1:]):
        found = ', '.join(str(list(spec.shape[1:])) for spec in specs)
        raise ValueError(f'normalization: is for images of {channels} channels, but an input of the network is {found}')


def _input_names(model: BranchyNet) -> list[str]:
    count = len(jax.tree.leaves(input_specs(model.image_shape, 1)))
    return ['image'] if count == 1 else [f'image_{n + 1}' for n in range(count)]


def _add_inputs(
    graph: Scope, model: BranchyNet, normalization: Normalization | None, size: Any
) -> tuple[list[Value], Any]:
    """Returns the file's inputs, and what the first stage takes."""
    specs, structure = jax.tree.flatten(input_specs(model.image_shape, 1))
    specs = [Spec((size, *spec.shape[1:]), spec.dtype) for spec in specs]
    dtypes = [spec.dtype if normalization is None else np.uint8 for spec in specs]
    names = _input_names(model)
    inputs = [graph.plain(name, spec.shape, dtype) for name, spec, dtype in zip(names, specs, dtypes, strict=True)]
    if normalization is None:
        return inputs, jax.tree.unflatten(structure, inputs)
    graph.prefix = 'normalization/'
    mean, deviation = (np.asarray(value, np.float64) for value in (normalization.mean, normalization.deviation))
    # Channels first, since a value per channel that lies last is slow to broadcast.
    order = (0, 3, 1, 2)
    hidden = dataclasses.replace(inputs[0], name=graph.read(inputs[0], order), order=order, dtype=np.dtype(np.float32))
    name = graph.node('Cast', hidden.name, to=hidden.dtype)
    for op, values in (('Mul', 1 / (255 * deviation)), ('Add', -mean / deviation)):
        values = np.asarray(values, np.float32)
        name = graph.node(op, name, graph.constant(values.reshape(-1, 1, 1) if values.size > 1 else values.reshape(())))
    return inputs, jax.tree.unflatten(structure, [dataclasses.replace(hidden, name=name)])


def _layer_of(primitive: str, model: BranchyNet, variables: Variables, kind: str, n: int) -> str:
    """Returns where in the network's modules a primitive is, if that can be told."""
    hidden = input_specs(model.image_shape, 1)
    for m in range(n + (kind == 'exit')):
        hidden = jax.eval_shape(functools.partial(run_segment, model, 'stage', m), variables, hidden)
    closed = jax.make_jaxpr(functools.partial(run_segment, model, kind, n))(variables, hidden)
    for place, equation in _equations(closed.jaxpr, ''):
        if equation.primitive.name == primitive and place:
            return f' (in {place})'
    return ''


def _equations(jaxpr: jax_core.Jaxpr, outside: str) -> Any:
    for equation in jaxpr.eqns:
        place = '/'.join(filter(None, [outside, str(equation.source_info.name_stack)]))
        yield place, equation
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, 'jaxpr', value)
            if isinstance(inner, jax_core.Jaxpr):
                yield from _equations(inner, place)


def _texts(policy: ExitPolicy) -> str:
    return json.dumps([str(value) for value in np.asarray(policy.thresholds).tolist()])


def _told(normalization: Normalization | None) -> str:
    if normalization is None:
        return 'none: the file takes what the network takes'
    mean, deviation = (np.asarray(value).tolist() for value in (normalization.mean, normalization.deviation))
    return json.dumps({'formula': '(pixels / 255 - mean) / deviation', 'mean': mean, 'deviation': deviation})


def _write(path: Path, graph: Scope, inputs: list[Value], metadata: dict[str, str]) -> None:
    """Makes the file's content of a graph, checks it and writes it."""
    import onnx
    from onnx import helper

    content = helper.make_model(
        _graph(graph, 'network', inputs),
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


def _graph(scope: Scope, name: str, inputs: list[Value]) -> Any:
    """Returns a graph as onnx holds it."""
    from onnx import helper, numpy_helper

    outputs = []
    for output, value in scope.outputs:
        inner = scope.outer is not None
        unique = scope.names.fresh(f'{name}/', output) if inner else output
        scope.prefix = f'{name}/'
        scope.node('Identity', scope.read(scope.full(value)), outputs=[unique])
        outputs.append(_array(unique, value))
    nodes = []
    for node in scope.nodes:
        attributes = {key: _attribute(value, f'{node.name}/{key}') for key, value in node.attributes.items()}
        nodes.append(helper.make_node(node.op, node.inputs, node.outputs, name=node.name, **attributes))
    arrays = [numpy_helper.from_array(array, name) for name, array in scope.arrays.items()]
    return helper.make_graph(nodes, name, [_array(value.name, value) for value in inputs], outputs, arrays)


def _attribute(value: Any, name: str) -> Any:
    from onnx import helper

    if isinstance(value, Scope):
        return _graph(value, name, [])
    if isinstance(value, np.dtype):
        return helper.np_dtype_to_tensor_dtype(value)
    return int(value) if isinstance(value, (int, np.integer)) else [int(number) for number in value]


def _array(name: str, value: Value) -> Any:
    from onnx import helper

    shape = [int(size) if isinstance(size, (int, np.integer)) else 'batch' for size in value.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), shape)
