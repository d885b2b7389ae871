"""Executors beside the plain jitted baseline, a row each, within a budget: for a device that is at hand for minutes."""

import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from experiments.run.networks import Networks
from experiments.run.report import Row, of_ratio
from experiments.run.timing import on_device
from experiments.study.cells import SHARES, images_needed, random_networks, table_of
from experiments.study.flags import shares

NETWORKS, BATCHES = 'b-resnet110,b-alexnet,b-lenet', (1024, 4096, 64, 1)

_SMALL_BATCH = 64  # up to it executors of single images are measured, too
_PASS_SECONDS, _FEWEST_PASSES = 2.0, 6  # of timed passes together; fewer have no interval of 95 %
_PLAN_SECONDS = 40.0
_MORE = 1.05  # rows in a chunk than are forced to reach its stage: rounding moves a few, above all in bfloat16

_PLAIN, _LIMIT, _PLAN, _STREAM, _HOSTED = 'plain baseline', 'time limit', 'plan', 'stream', 'compacted, host'
_IN_CHUNKS = {
    'compacted, loops': functools.partial(bj.inference.compacted, on_host=False),
    _HOSTED: functools.partial(bj.inference.compacted, on_host=True),
    _STREAM: bj.inference.stream,
}
_WHOLE = {'dense': bj.inference.dense, 'staged': bj.inference.staged, 'sequential': bj.inference.sequential}
_RECORDED = {f'{name}, command buffers': _WHOLE[name] for name in ('staged', 'sequential')}
_EXECUTORS = {**_IN_CHUNKS, **_WHOLE, **_RECORDED}

Pass = Callable[[], Any]
"""Answers all images of a cell, and returns the answers."""


class Cell(NamedTuple):
    """A network at a batch size, computed in a dtype."""

    network: str
    batch: int
    dtype: str


def work(networks: Sequence[str], batches: Sequence[int]) -> list[tuple[Cell, str]]:
    """Returns cells and what to measure in each, the most valuable first."""
    cells = [Cell(name, batch, 'float32') for batch in batches for name in networks]
    units, on_gpu = [], jax.default_backend() == 'gpu'  # other compilers refuse the options of command buffers
    for cell in [*cells, *(Cell(name, batches[0], 'bfloat16') for name in networks[:2])]:
        forms = [_PLAIN, 'dense', 'compacted, loops', _HOSTED, _LIMIT]
        if cell.batch == 1:
            forms = [_PLAIN, 'dense', 'staged', 'staged, command buffers', _LIMIT]
        forms += ['sequential', 'sequential, command buffers', _STREAM] if cell.batch <= _SMALL_BATCH else []
        forms += [_PLAN] if cell.batch == batches[0] else []
        units += [(cell, form) for form in forms if on_gpu or form not in _RECORDED]
    return units


class Bench:
    """Measures a cell: a network and its baseline with random weights, images, and thresholds at which these leave.

    Args:
        cell: the cell.
        networks: of an earlier cell of the same network and dtype.
    """

    def __init__(self, cell: Cell, networks: Networks | None) -> None:
        self.cell, self.rows, self.best = cell, list[Row](), None
        count = max(images_needed(cell.batch), min(4 * cell.batch, 4 * _SMALL_BATCH))
        shape = count, *bj.models.create(cell.network).image_shape
        self.images = np.random.default_rng(0).standard_normal(shape, np.float32)
        self.networks = networks or random_networks(cell.network, self.images, dtype=jnp.dtype(cell.dtype))
        model, variables = self.networks.model, self.networks.variables
        outputs = bj.inference.exit_outputs(model, variables, self.images, batch_size=min(_SMALL_BATCH, count))
        (forced,) = shares(SHARES[len(outputs.uncertainty)].split(',')[0]).values()
        self.policy = table_of(outputs.uncertainty).for_shares(forced)
        self.reaching = 1 - np.append(0, np.cumsum(forced)[:-1])
        self.inputs = on_device(self.images, cell.batch)
        baseline = functools.partial(jax.jit(self.networks.baseline.apply), self.networks.baseline_variables)
        self.plain = _over(baseline, self.inputs)

    def add(self, form: str, passes: int) -> None:
        """Adds a row of a form; or the time limit, measured by stages and heads alone, to all rows."""
        if form == _LIMIT:
            sizes = [self.cell.batch]
            self.best = bj.inference.segment_times(*self.networks.fast, self.images, batch_sizes=sizes).best()
        else:
            self.rows.append(self._row(form, passes))
        for row in self.rows[1:]:
            costs = bj.costs.count_macs(self.networks.model, inputs=self.networks.inputs)
            row['mac_limit'] = float(bj.costs.mac_limit(costs, row['exit_fractions']))
            if self.best is not None and not row.get('choice', '').startswith('ONNX'):  # the limit is XLA's
                row['time_limit_ms'] = float(bj.costs.expected_cost(self.best, row['exit_fractions']))
                row['realised'] = row['time_limit_ms'] / row['ms']

    def _row(self, form: str, passes: int) -> Row:
        start, row = time.perf_counter(), {**self.cell._asdict(), 'executor': form}
        run = self.plain if form == _PLAIN else self._pass(form, row)
        answers, _ = run(), self.plain()
        row['start_s'] = (started := time.perf_counter()) - start
        jax.block_until_ready((run(), self.plain()))
        passes = max(_FEWEST_PASSES, min(passes, int(_PASS_SECONDS / (time.perf_counter() - started))))
        taken = bj.measure.interleaved_passes({'plain': self.plain, 'form': run}, passes=passes, warmup=0)
        row['ms'] = float(np.median(taken['form'])) / len(self.images) * 1e3
        if form != _PLAIN:
            exits = np.concatenate([np.ravel(answer.exit_index) for answer in answers])
            row['exit_fractions'] = (np.bincount(exits, minlength=len(self.reaching)) / len(exits)).tolist()
        return {**row, **of_ratio('gain', bj.measure.paired_ratio(taken['plain'], taken['form']))}

    def _pass(self, form: str, row: Row) -> Pass:
        """Returns a pass by a form, and adds what is known of the form to its row."""
        model, variables, inputs = self.networks.model, self.networks.variables, self.inputs
        if form == _PLAN:
            options = {'batch_size': self.cell.batch, 'budget_seconds': _PLAN_SECONDS}
            planned = bj.inference.plan(model, variables, self.images, self.policy, **options)
            row['choice'] = planned.executor
            return _over(planned, inputs)
        model, variables = self.networks.fast
        most = max(self.cell.batch, _SMALL_BATCH)  # a stream collects images of several batches
        sizes = np.minimum(np.ceil(_MORE * most * self.reaching), most).astype(int).tolist()
        chunks = {'chunk_size': sizes} if form in _IN_CHUNKS else {}
        run = functools.partial(_EXECUTORS[form](model, **chunks), policy=self.policy)
        if form == _STREAM:
            return lambda: [part.prediction for part in run(variables, np.split(self.images, len(inputs)))]
        if form == _HOSTED:
            return _over(functools.partial(run, variables), inputs)
        if self.cell.batch == 1 and form != 'dense':  # images without a batch axis, or all of them in one program
            inputs = list(jnp.asarray(self.images)) if 'staged' in form else [jnp.asarray(self.images)]
        options = bj.inference.COMMAND_BUFFERS if form in _RECORDED else None
        program = jax.jit(run, compiler_options=options).lower(variables, inputs[0]).compile()
        if options is None:  # what command buffers record, the text does not show
            row['host_waits'] = host_waits(program.as_text())
        return _over(functools.partial(program, variables), inputs)


def _over(run: Callable[[Any], Any], inputs: Sequence[Any]) -> Pass:
    return lambda: [jax.block_until_ready(run(value)) for value in inputs]


def host_waits(text: str) -> int:
    """Counts conditionals and loops whose condition a GPU hands to the host, unless command buffers record them."""
    lines = [line for line in text.splitlines() if re.search(r' (conditional|while)\(', line)]
    return sum('known_trip_count' not in line for line in lines)


def measure_within(
    seconds: float, units: Sequence[tuple[Cell, str]], write: Callable[..., Any], *, passes: int
) -> None:
    """Measures unit after unit until the time is over; compiling counts.

    A unit is left out if an earlier one of the same network took longer than what is left of the time; plans, which
    take longest, count among themselves.

    Args:
        seconds: for everything.
        units: of `work`.
        write: called as ``write(rows, not_reached=[…])`` after every unit, so that nothing measured is lost.
        passes: interleaved with the plain baseline, at most; fewer of long ones.
    """
    end, missing = time.monotonic() + seconds, []
    benches: dict[Cell, Bench] = {}
    longest: dict[tuple[str, bool], float] = {}
    names = [f'{form}: {cell.network} at {cell.batch} in {cell.dtype}' for cell, form in units]
    for number, (cell, form) in enumerate(units):
        left, kind = end - time.monotonic(), (cell.network, form == _PLAN)
        before = longest.get(kind, _PLAN_SECONDS * kind[1])
        if left <= before:
            missing.append(names[number])
            continue
        try:
            alike = [bench.networks for other, bench in benches.items() if other[::2] == cell[::2]]
            benches[cell] = benches.get(cell) or Bench(cell, alike[0] if alike else None)
            benches[cell].add(form, passes)
        except Exception as error:  # of any compiler or driver: other forms are measured all the same
            missing.append(f'{names[number]}: {type(error).__name__}: {error}'[:300])
        longest[kind] = max(before, left - (end - time.monotonic()))
        rows = [row for bench in benches.values() for row in bench.rows]
        write(rows, not_reached=[*missing, *names[number + 1 :]])
        print(f'{names[number]}: {end - time.monotonic():.0f} s left', flush=True)
