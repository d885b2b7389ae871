"""Networks with exits as ONNX programs: one input, batches whose rows leave one by one, or the logits of every exit."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from branchy_jax import calling, program
from branchy_jax.criteria import Criterion
from branchy_jax.criteria.policy import as_policy
from branchy_jax.inference.optimize import optimize
from branchy_jax.inference.staged import sequential
from branchy_jax.inference.steps import Step, arrays_of, take_step
from branchy_jax.jaxprs import Program
from branchy_jax.translate.onnx_graph import Graph, Value, computed
from branchy_jax.translate.onnx_translation import UntranslatableError, translate
from branchy_jax.types import Array, ExitPolicy, Normalization, Variables

OPSET = 17
"""The version of ONNX's operators that files are written in."""

ANSWER = ('label', 'exit_index', 'logits', 'uncertainty')
"""The names of the results of whole networks."""

_IR_VERSION = 8  # of the time of opset 17, so that every reader of that opset reads the file
_MOST_BYTES = 2**31 - 2**20  # what a protobuf message holds, less what the nodes take


def onnx_program(
    model: Any,
    variables: Variables,
    policy: Any,
    inputs: Any,
    *,
    normalization: Normalization | None = None,
    batch: bool = False,
    every_exit: bool = False,
    exits: Sequence[int] | None = None,
) -> bytes:
    """Returns the content of the file that `branchy_jax.export.save_onnx` writes; see there for the other arguments.

    ``exits`` are the exits to ask, the last among them; no weights of the heads of other exits are in the file.
    """
    stages = program.stages(model, variables, inputs)
    policy = as_policy(policy, stages.num_exits)
    if (batch or every_exit) and stages.fixed_because:
        raise stages.refusal()
    specs = calling.with_batch(inputs, program.BATCH if batch or every_exit else 1)
    check_onnx(variables, jax.tree.leaves(specs), normalization)
    network, graph = optimize(model, variables, inputs=inputs, banded=False), Graph()
    file_inputs, images = _add_inputs(graph, specs, normalization)
    metadata = {'normalization': 'none: the file takes what the network takes'}
    if normalization is not None:
        metadata['normalization'] = json.dumps(described(normalization))
    with untranslatable_named(model, variables, specs, policy.criterion):
        if every_exit:
            names = [f'logits_{n}' for n in range(stages.num_exits)]
            results = translate(graph, functools.partial(calling.apply, *network), images)
        else:
            names, values = list(ANSWER), np.asarray(policy.thresholds, np.float32)
            initial = {f'threshold_{n}': np.array(value) for n, value in enumerate(values)}
            graph.arrays.update(initial)
            thresholds = [computed(name, (), np.float32) for name in initial]
            metadata['criterion'] = policy.criterion.name
            metadata['thresholds'] = json.dumps([str(value) for value in values.tolist()])
            if batch:
                parts = program.stages(*network, inputs, exits=exits).at(network[1], program.BATCH)
                steps = [functools.partial(_step, parts, policy, n) for n in range(len(parts.exits))]
                results = _answer_rows(graph, steps, thresholds, images)
            else:
                executor = sequential(network[0], exits=exits)
                answer = functools.partial(_answer, executor, network[1], policy)
                results = translate(graph, answer, images, thresholds)
    return _content(graph, dict(zip(names, results, strict=True)), file_inputs, metadata)


def onnx_part(
    function: Callable[..., Any], inputs: dict[str, Any], outputs: Sequence[str]
) -> tuple[bytes, list[Value]]:
    """Returns the content of the file of one function, and the values that the file returns.

    Args:
        function: of arrays; returns a tuple of arrays.
        inputs: shapes and dtypes by name; the first axis of the first one is the batch.
        outputs: the names of the results.
    """
    graph = Graph()
    given = [computed(name, spec.shape, spec.dtype) for name, spec in inputs.items()]
    graph.batch_of = given[0].name
    results = list(translate(graph, function, *given))
    return _content(graph, dict(zip(outputs, results, strict=True)), given, {}), results


@contextlib.contextmanager
def untranslatable_named(model: Any, variables: Variables, inputs: Any, criterion: Criterion) -> Iterator[None]:
    """Raises ValueError with the part and the place of an equation of a model that has no ONNX form here."""
    try:
        yield
    except UntranslatableError as error:
        raise _refusal(error, program.trace(model, variables, inputs), criterion) from error


def _answer(
    executor: Any, variables: Variables, policy: ExitPolicy, images: Any, thresholds: list[Array]
) -> tuple[Array, ...]:
    """Answers a batch of one; to be traced."""
    return arrays_of(executor.program(variables, images, policy.replace(thresholds=jnp.array(thresholds))))


def _step(parts: program.Cut, policy: ExitPolicy, n: int, hidden: Any, carry: Any, thresholds: list[Array]) -> Step:
    """Runs exit n on a batch of any size; to be traced."""
    return take_step(parts, n, hidden, carry, policy.replace(thresholds=jnp.array(thresholds)))


def _answer_rows(
    graph: Graph, steps: Sequence[Callable[..., Step]], thresholds: list[Value], hidden: Any, carry: Any = None
) -> list[Value]:
    """Adds an exit for all rows, and a conditional with all later exits for the rows that go on, if there are any."""
    result = translate(graph, steps[0], hidden, carry, thresholds)
    predicted: Any = arrays_of(result.prediction)  # values in place of arrays
    answers = [graph.full(value) for value in predicted]
    if len(steps) == 1:
        return answers
    where = graph.node('NonZero', graph.node('Not', graph.read(result.confident)))  # [1, rows that go on]
    rows, indices = graph.node('Squeeze', where, graph.integers([0])), graph.node('Transpose', where, perm=[1, 0])
    some = graph.node('Greater', graph.node('Size', rows), graph.constant(np.int64(0)))
    later, done = Graph(graph), Graph(graph)
    later.batch_of = rows
    hidden, carry = jax.tree.map(lambda value: later.rows(value, rows), (result.hidden, result.carry))
    later_answers = _answer_rows(later, steps[1:], thresholds, hidden, carry)
    scattered = [
        before.made(later.node('ScatterND', later.read(before), indices, later.read(later.full(after))))
        for before, after in zip(answers, later_answers, strict=True)
    ]
    names = [graph.fresh('If') for _ in answers]
    bodies = {
        'then_branch': later.finish(graph.fresh('goes_on'), dict(zip(names, scattered, strict=True))),
        'else_branch': done.finish(graph.fresh('done'), dict(zip(names, answers, strict=True))),
    }
    graph.node('If', some, outputs=names, **bodies)
    return [computed(name, value.shape, value.dtype) for name, value in zip(names, answers, strict=True)]


def _refusal(error: UntranslatableError, network: Program, criterion: Criterion) -> ValueError:
    """Returns the error that names the part, and where the network before rewriting computes the same."""
    primitive, dtype = error.equation.primitive, error.equation.outvars[0].aval.dtype
    part, place = error.part.strip('/').replace('_', ' '), error.place
    if part.startswith('criterion'):
        part = f'criterion {criterion.name!r}'
    else:
        equations = enumerate(network.equations)
        alike = (n for n, e in equations if e.primitive is primitive and e.outvars[0].aval.dtype == dtype)
        place = next(map(network.where, alike), place)
    return ValueError(f'model: {part} computes {primitive.name!r}, which has no ONNX form here: {error} (at {place})')


def check_onnx(variables: Variables, specs: list[Any], normalization: Normalization | None) -> None:
    """Raises ValueError where no file can be written, or a normalisation does not fit the inputs."""
    try:
        import onnx  # noqa: F401 - what the file is written with
    except ImportError as error:
        raise ValueError("ONNX files need the onnx package; pip install '.[onnx]' in a clone") from error
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


def _add_inputs(graph: Graph, specs: Any, normalization: Normalization | None) -> tuple[list[Value], Any]:
    """Returns the file's inputs, and what the network takes."""
    leaves, structure = jax.tree.flatten(specs)
    names = ['image'] if len(leaves) == 1 else [f'image_{n + 1}' for n in range(len(leaves))]
    dtypes = [spec.dtype if normalization is None else np.uint8 for spec in leaves]
    inputs = [computed(name, spec.shape, dtype) for name, spec, dtype in zip(names, leaves, dtypes, strict=True)]
    graph.batch_of = names[0]
    if normalization is None:
        return inputs, jax.tree.unflatten(structure, inputs)
    order = (0, 3, 1, 2)  # one value per channel broadcasts faster when channels do not lie last
    pixels = dataclasses.replace(inputs[0], name=graph.read(inputs[0], order), order=order)
    mean, deviation = (np.asarray(value, np.float64) for value in (normalization.mean, normalization.deviation))
    scale, shift = (np.float32(x).reshape(1, 1, 1, -1) for x in (1 / 255 / deviation, -mean / deviation))
    normalized = translate(graph, lambda images: images.astype(np.float32) * scale + shift, pixels)
    return inputs, jax.tree.unflatten(structure, [normalized])


def _content(graph: Graph, results: dict[str, Value], inputs: list[Value], metadata: dict[str, str]) -> bytes:
    """Returns a checked file's content."""
    import onnx
    from onnx import helper

    content = helper.make_model(
        graph.finish('network', results, inputs),
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=_IR_VERSION,
        producer_name='branchy_jax',
    )
    helper.set_model_props(content, metadata)
    onnx.checker.check_model(content, full_check=True)
    return content.SerializeToString()


def described(normalization: Normalization) -> dict[str, Any]:
    """Returns a normalisation as JSON can hold it."""
    mean, deviation = (np.asarray(value).tolist() for value in (normalization.mean, normalization.deviation))
    return {'formula': '(pixels / 255 - mean) / deviation', 'mean': mean, 'deviation': deviation}
