"""Every step of the library on every network of `structures`: its answer is right, or it is refused in clear words."""

import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments import run_exported
from experiments.run.report import Row, provenance
from experiments.study.structures import ROWS, STRUCTURES, Structure

WORKS, NOT_RUN = 'works', '–'
_CHUNK = 4  # rows: every batch has several chunks
_GAP = 1e-4  # least distance of an uncertainty from a threshold: rounding decides nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with exits, and what it must answer.

    Attributes:
        structure: that it was made of.
        macs: of the network without exits, for one input.
        model: the network with exits.
        variables: of the model.
        logits: of every exit, float64.
        thresholds: by which a third of the rows leaves at each exit.
        label: of each row.
        exit_index: of each row.
    """

    structure: Structure
    macs: int
    model: Any
    variables: Variables
    logits: list[np.ndarray]
    thresholds: np.ndarray
    label: np.ndarray
    exit_index: np.ndarray

    @property
    def inputs(self) -> Any:
        """The inputs of the network."""
        return self.structure.inputs

    def check(self, answer: Any) -> None:
        """Compares labels, exits and logits with those expected.

        Args:
            answer: a `branchy_jax.ExitPrediction`, or its arrays by name.
        """
        found = answer if isinstance(answer, Mapping) else vars(answer)
        np.testing.assert_array_equal(found['exit_index'], self.exit_index, 'exits')
        np.testing.assert_array_equal(found['label'], self.label, 'labels')
        logits = np.stack(self.logits)[self.exit_index, np.arange(ROWS)]
        np.testing.assert_allclose(found['logits'], logits, atol=1e-4, rtol=1e-4, err_msg='logits')


def attach(structure: Structure) -> Case:
    """Puts exits on a network. The last exit must be the network's own result.

    What is expected follows from the model's logits, by NumPy in float64.
    """
    network, inputs = structure.network(), structure.inputs
    model = bj.models.attach(network, structure.exits, inputs=inputs)
    variables = _drawn(jax.jit(model.init)(jax.random.key(0), inputs))
    logits = [np.asarray(z, np.float64) for z in jax.jit(model.apply)(variables, inputs)]
    alone = _alone(structure, network, model.trained(variables))
    np.testing.assert_allclose(logits[-1], jax.jit(alone)(inputs), atol=1e-5, rtol=1e-5)
    entropies = np.stack([_entropy(z) for z in logits])
    thresholds = _thresholds(entropies)
    confident = np.concatenate([entropies[:-1] < thresholds[:, None], np.ones((1, ROWS), bool)])
    exits = confident.argmax(0)
    labels = np.stack(logits)[exits, np.arange(ROWS)].argmax(-1)
    macs = _macs(jax.make_jaxpr(alone)(jax.tree.map(lambda x: x[:1], inputs)).jaxpr)
    return Case(structure, macs, model, variables, logits, thresholds.astype(np.float32), labels, exits)


def _drawn(variables: Variables) -> Variables:
    """Returns variables that are neither 0 nor 1: some networks start with zeros in their last layer."""
    numbers = np.random.default_rng(0)

    def moved(path: Any, leaf: jax.Array) -> jax.Array:
        change = 0.3 * numbers.normal(size=leaf.shape).astype(np.float32)
        return leaf + (change if path[0].key == 'params' else abs(change))  # variances stay positive

    return jax.tree.map_with_path(moved, variables)


def _alone(structure: Structure, network: Any, variables: Any) -> Callable[[Any], jax.Array]:
    """Returns the network without exits, called as its author calls it: a function from inputs to logits."""
    if isinstance(network, nn.Module):
        call = functools.partial(network.apply, variables)
    else:
        nnx.update(network, variables)
        network.eval()
        call = network

    def logits(inputs: Any) -> jax.Array:
        by_name = inputs if isinstance(inputs, Mapping) else {}
        in_order = () if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
        result = call(*in_order, **by_name, **structure.options)
        return structure.exits[''](result) if '' in structure.exits else result

    return logits


def _entropy(logits: np.ndarray) -> np.ndarray:
    """Returns the mean entropy over positions ``[B]`` of logits ``[B, …, K]``."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1).reshape(len(logits), -1).mean(1)


def _thresholds(entropies: np.ndarray) -> np.ndarray:
    """Returns the thresholds by which a third of the rows leaves at each of three exits."""
    thresholds, waiting, count = [], np.arange(ROWS), ROWS // 3
    for exit_entropies in entropies[:-1]:
        below, above = np.sort(exit_entropies[waiting])[count - 1 : count + 1]
        assert above - below > 2 * _GAP, f'uncertainties {below} and {above} are a tie'
        thresholds.append((below + above) / 2)
        waiting = waiting[exit_entropies[waiting] >= thresholds[-1]]
    return np.array(thresholds)


def _macs(jaxpr: Any) -> int:
    """Returns the multiply-accumulates of a jaxpr's products and convolutions."""
    total = 0
    for equation in jaxpr.eqns:
        left, right = [*equation.invars, None, None][:2]
        size = int(np.prod(equation.outvars[0].aval.shape))
        if equation.primitive.name == 'dot_general':
            (axes, _), _ = equation.params['dimension_numbers']
            total += size * int(np.prod([left.aval.shape[axis] for axis in axes]))
        elif equation.primitive.name == 'conv_general_dilated':
            shape = right.aval.shape
            total += size * int(np.prod(shape)) // shape[equation.params['dimension_numbers'].rhs_spec[0]]
        inner = [getattr(value, 'jaxpr', value) for value in equation.params.values()]
        times = equation.params['length'] if equation.primitive.name == 'scan' else 1
        total += times * sum(_macs(value) for value in inner if hasattr(value, 'eqns'))
    return total


def train(case: Case) -> None:
    """Takes a step. The loss of the same batch with the same key must be lower after it."""
    state = bj.training.create_train_state(case.model, case.variables, optax.sgd(0.02))
    batch, weights = bj.Batch(case.inputs, jnp.asarray(case.structure.labels)), jnp.ones(len(case.logits))
    losses = []
    for _ in range(2):
        state, metrics = bj.training.train_step(state, batch, weights, jax.random.key(1))
        losses.append(float(metrics['loss']))
    assert losses[1] < losses[0], f'loss {losses[0]}, then {losses[1]}'


def execute(case: Case) -> None:
    """Runs every executor on the whole batch, `staged` row by row."""
    build, mesh = bj.inference, bj.sharding.data_mesh(jax.device_count())
    executors = [
        build.dense(case.model),
        build.sequential(case.model),
        build.compacted(case.model, chunk_size=_CHUNK, on_host=False),
        build.compacted(case.model, chunk_size=_CHUNK, on_host=True),
        build.sharded(case.model, chunk_size=_CHUNK, mesh=mesh),
    ]
    for executor in executors:
        case.check(executor(case.variables, case.inputs, case.thresholds))
    case.check(_row_by_row(case, lambda row: vars(build.staged(case.model)(case.variables, row, case.thresholds))))


def _row_by_row(case: Case, answer: Callable[[Any], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    answers = [answer(jax.tree.map(lambda x, n=n: x[n], case.inputs)) for n in range(ROWS)]
    return {name: np.stack([row[name] for row in answers]) for name in ('label', 'exit_index', 'logits')}


def plan(case: Case) -> None:
    """Plans in the shortest time. The plan must answer as `dense` does at the plan's policy."""
    given = case.model, case.variables, case.inputs
    planned = bj.inference.plan(*given, case.thresholds, passes=1, budget_seconds=0)
    expected, answer = bj.inference.dense(case.model)(*given[1:], planned.policy), planned(case.inputs)
    np.testing.assert_array_equal(answer.exit_index, expected.exit_index)
    np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-4, rtol=1e-4)


def optimize(case: Case) -> None:
    """Rewrites the network. The logits of every exit must stay as they were."""
    model, variables = bj.inference.optimize(case.model, case.variables, inputs=case.inputs)
    for logits, expected in zip(jax.jit(model.apply)(variables, case.inputs), case.logits, strict=True):
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def export_onnx(case: Case) -> None:
    """Runs a file for batches and one for single inputs in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        for batch in (True, False):
            path = Path(folder) / f'{batch}.onnx'
            bj.export.save_onnx(path, case.model, case.variables, case.thresholds, inputs=case.inputs, batch=batch)
            answer = functools.partial(_run_file, run_exported.open_file(path))
            case.check(answer(case.inputs) if batch else _row_by_row(case, functools.partial(_run_row, answer)))


def _run_file(session: Any, inputs: Any) -> dict[str, np.ndarray]:
    names, results = ([value.name for value in values()] for values in (session.get_inputs, session.get_outputs))
    arrays = session.run(None, dict(zip(names, jax.tree.leaves(inputs), strict=True)))
    return dict(zip(results, arrays, strict=True))


def _run_row(answer: Callable[[Any], Mapping[str, Any]], row: Any) -> dict[str, np.ndarray]:
    return {name: values[0] for name, values in answer(jax.tree.map(lambda x: x[None], row)).items()}


def export_stablehlo(case: Case) -> None:
    """Writes a folder, and runs its programs by `experiments.run_exported`, which does not import the library."""
    backend = jax.default_backend()
    options = {'inputs': case.inputs, 'batch_size': ROWS, 'platforms': ['cuda' if backend == 'gpu' else backend]}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / 'programs'
        bj.export.save(folder, case.model, case.variables, case.thresholds, **options)
        programs = run_exported.load(folder, ['staged', 'batch']).programs
        case.check(programs['batch'](*jax.tree.leaves(case.inputs), case.thresholds))
        case.check(_row_by_row(case, lambda row: programs['staged'](*jax.tree.leaves(row), case.thresholds)))


def count_macs(case: Case) -> None:
    """Counts multiply-accumulates. Stages must have as many as the network without exits."""
    costs = bj.costs.count_macs(case.model, inputs=case.inputs)
    assert (costs.stages.sum(), costs.exits[-1]) == (case.macs, 0), f'{costs}, without exits {case.macs}'


def save(case: Case) -> None:
    """Writes and reads a checkpoint of the training's state, and the weights alone."""
    state = bj.training.create_train_state(case.model, case.variables)
    with tempfile.TemporaryDirectory() as folder:
        bj.checkpoint.save(Path(folder) / 'state', 1, state)
        restored = bj.checkpoint.restore(Path(folder) / 'state', jax.tree.map(jnp.zeros_like, state))
        bj.checkpoint.save_weights(Path(folder) / 'weights', case.variables)
        weights, _ = bj.checkpoint.load_weights(Path(folder) / 'weights')
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, (restored[1], weights), (state, case.variables))


STEPS: dict[str, Callable[[Case], None]] = {
    'train': train,
    'executors': execute,
    'plan': plan,
    'optimize': optimize,
    'ONNX': export_onnx,
    'StableHLO': export_stablehlo,
    'MACs': count_macs,
    'save': save,
}
"""The columns behind ``attach``."""


def check(name: str, steps: Iterable[str] = STEPS) -> dict[str, str]:
    """Runs the steps on a structure.

    Returns:
        For each step ``'works'``, the library's refusal, or a text that begins with ``'fault'``.
    """
    attached, case = _outcome(functools.partial(attach, STRUCTURES[name]))
    outcomes = {step: NOT_RUN if case is None else _outcome(functools.partial(STEPS[step], case))[0] for step in steps}
    return {'attach': attached, **outcomes}


def _outcome(step: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return WORKS, step()
    except Exception as error:
        text = ' '.join(str(error).split())
        if isinstance(error, ValueError) and re.match(r'\w+(\[.*?\])?: ', text):
            return re.split(r'(?<=[^.]\.) (?=[A-Z])', text)[0], None
        return f'fault: {type(error).__name__}: {text[:300]}', None


def run(workdir: Path) -> str:
    """Checks every structure that the record lacks, writes record and page after each, and returns the page.

    Raises:
        ValueError: the folder holds rows of another device or other versions.
    """
    ours, path = {**provenance('claims'), 'devices': jax.device_count()}, workdir / 'compatibility.json'
    record = bj.report.read_json(path) if path.exists() else {**ours, 'rows': []}
    if any(record[name] != ours[name] for name in ('device', 'devices')):
        raise ValueError(f'workdir: {path} holds rows of another device or other versions; choose another folder')
    rows = record['rows']
    for name in STRUCTURES:
        if any(row['structure'] == name for row in rows):
            continue
        start = time.monotonic()
        rows.append({'structure': name, **check(name), 'seconds': round(time.monotonic() - start, 1)})
        print(rows[-1], flush=True)
        bj.report.write_json(path, record)
        bj.report.write_text(path.with_suffix('.md'), page(record))
    return page(record)


def page(record: Row) -> str:
    """Lays out the record in Markdown: a table, and the refusals below it."""
    refusals: list[str] = []

    def cell(text: str) -> str:
        if text in (WORKS, NOT_RUN):
            return text
        refusals.append(text)
        return f'{text.split(":")[0] if text.startswith("fault") else "refused"} ({len(refusals)})'

    columns = ['attach', *STEPS]
    cells = [[row['structure'], *(cell(row[name]) for name in columns)] for row in record['rows']]
    listed = '\n'.join(f'{n}. {text}' for n, text in enumerate(refusals, 1))
    return f"""# Structures that exits were put on

`{record['command']}`

{record['device']}, {record['devices']} devices.

{bj.report.markdown_table(['structure', *columns], cells)}

{listed}
"""
