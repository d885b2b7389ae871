"""The planner: measures a network, forecasts, tries the best candidates, and binds the fastest.

A plan is stored as JSON: the choice and the measurements, without weights or code.
"""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from branchy_jax import calling, program
from branchy_jax.checkpoint import write_atomically
from branchy_jax.costs import warn_if_nothing_is_saved
from branchy_jax.criteria import entropy, is_confident
from branchy_jax.criteria.policy import as_policy, decode_policy, encode_policy
from branchy_jax.inference.compiler_options import BY_NAME, num_cores, usable_options
from branchy_jax.inference.planning.candidates import Candidate, Progress, candidates_to_try, choose, try_candidates
from branchy_jax.inference.planning.onnx_engine import check_onnxruntime
from branchy_jax.inference.planning.programs import Programs, Runner
from branchy_jax.inference.planning.times import SegmentTimes
from branchy_jax.inference.steps import at_rows
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

_MOST_INPUTS_IN_A_TRIAL = 128
_PASSES = 5  # of stages and heads
_RUNS_TO_MEASURE = 3  # at least: to compile, and to time
_FORMAT = 4  # of a stored plan


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The executor that was fastest on this device, bound to weights and policy: call it with inputs.

    A plan answers batches of any size, those above ``batch_size`` in pieces, and a single input as `staged` would;
    after `warm_up` nothing compiles. It cannot be traced. Threads may share it. Deleting it frees its weights and
    compiled programs.

    Attributes:
        chosen: the executor and its settings.
        policy: as the plan applies it: the threshold is −inf where a head is skipped because it costs more than it
            saves.
        batch_size: that was planned for.
        candidates: those that were tried, fastest first.
        times: of stages and heads alone.
        remark: why no candidate runs in ONNX Runtime, where one might.
    """

    chosen: Candidate
    policy: ExitPolicy
    batch_size: int
    candidates: tuple[Candidate, ...]
    times: SegmentTimes
    remark: str
    _programs: Programs = dataclasses.field(repr=False)
    _run: Runner = dataclasses.field(repr=False)

    @property
    def executor(self) -> str:
        """The name of the executor."""
        return self.chosen.name

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits that are asked."""
        return self.chosen.exits

    @property
    def thresholds(self) -> Array:
        """``[N - 1]`` of the policy."""
        return self.policy.thresholds

    def __call__(self, images: Any, *, as_numpy: bool = False) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``, or other inputs like those that were planned on.

        Args:
            images: arrays of NumPy or JAX.
            as_numpy: whether the answer is in arrays of NumPy. With ONNX Runtime this saves handing it to JAX, which
                takes longer than a small network on one image.
        """
        return self._run(images, as_numpy=as_numpy)

    def warm_up(self) -> None:
        """Compiles all programs that batches of any size need."""
        self._run.warm_up()

    def save(self, path: Path | str) -> None:
        """Writes the choice and the measurements as JSON, atomically: no weights and no code.

        Args:
            path: the file to write.

        Raises:
            ValueError: a criterion with a function that is not one of `branchy_jax.criteria`.
        """
        record = {
            'format': _FORMAT,
            'made_with': _surroundings(self._programs.mesh, self.chosen),
            'network': _identity(self._programs.model, self._programs.variables, self._programs.inputs),
            'chosen': self.candidates.index(self.chosen),
            'batch_size': self.batch_size,
            'policy': encode_policy(self.policy),
            'remark': self.remark,
            'inputs': _encode_inputs(self._programs.inputs),
            'times': {name: values.tolist() for name, values in vars(self.times).items()},
            'candidates': [dataclasses.asdict(candidate) for candidate in self.candidates],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))

    @classmethod
    def load(
        cls,
        path: Path | str,
        model: Any,
        variables: Variables,
        *,
        earlier: 'Plan | None' = None,
        mesh: Mesh | None = None,
    ) -> 'Plan':
        """Reads what `save` wrote, and builds the executor without measuring.

        Args:
            path: the file.
            model: the network that was planned for.
            variables: of ``model``; they may have been trained on since.
            earlier: a plan of the same network and weights, whose rewriting and compiled programs are used again.
            mesh: the devices that share every batch, as many as were planned for.

        Raises:
            ValueError: the file is missing, damaged or of version 0.2, its plan is of another device, of other versions
                or of another network, or runs in ONNX Runtime, which is missing here; the message says which. Or
                ``earlier`` is of another network, other weights, inputs or devices.
        """
        calling.check_model(model)
        fields, inputs = _read(path, model, variables, mesh)
        programs = _programs_of(earlier, Programs(model, variables, inputs, mesh))
        run = programs.runner(fields['chosen'], fields['policy'], fields['batch_size'])
        return cls(**fields, _programs=programs, _run=run)

    def __str__(self) -> str:
        lines = [f'{"":2}{"executor":44}{"exits asked":16}{"predicted ms":>14}{"measured ms":>14}   time ÷ baseline']
        for candidate in self.candidates:
            mark = '> ' if candidate == self.chosen else '  '
            predicted = '' if candidate.predicted_ms is None else f'{candidate.predicted_ms:.3f}'
            exits = ', '.join(map(str, candidate.exits))
            median, low, high = candidate.ratio
            interval = ', eliminated' if candidate.eliminated else f' [{low:.2f}, {high:.2f}]'
            times = f'{predicted:>14}{candidate.measured_ms:>14.3f}   {median:.2f}{interval}'
            lines.append(f'{mark}{candidate.name:44}{exits:16}{times}')
        return '\n'.join([f'batches of {self.batch_size}', *lines, *([self.remark] if self.remark else [])])


def plan(
    model: Any,
    variables: Variables,
    images: Any,
    policy: Any,
    *,
    batch_size: int | None = None,
    engine: str | None = None,
    skip_heads: bool = True,
    times: SegmentTimes | None = None,
    earlier: Plan | None = None,
    passes: int = 12,
    mesh: Mesh | None = None,
    on_progress: Callable[[str, float], None] | None = None,
    budget_seconds: float | None = None,
) -> Plan:
    """Finds the fastest executor of a network under a policy on this device, by measuring.

    `plan` rewrites the network (`optimize`), measures its stages and heads, and forecasts the time of a batch for each
    choice of exits and chunk sizes; a head that costs more than it saves is skipped. The best forecast in each executor
    is then tried on the given images, in turns with the baseline, which is the network without branches as it was
    given, and with its rewritten form. On a CPU where ``onnxruntime`` is installed, the best forecast and the network
    without branches are also tried in ONNX Runtime, on all cores together and with one piece of the batch on each core;
    no batch is padded there. On a CPU all answer in arrays of NumPy, and all are compiled with each of the compiler
    options that may help, such as `branchy_jax.inference.ALL_CORES`, and without. No further candidate is compiled once
    the trial has taken 20 seconds, and none whose forecast is four times the time of one already tried. Where a pass of
    all takes 0.3 seconds, a baseline that takes four times as long as the best candidate is timed once.

    The fastest of those that beat the baseline for certain (95 %) is chosen; if none does, the network without branches
    in its fastest form. So on images distributed like those given, the plan is not slower than the baseline, but for
    noise. With a criterion that uses earlier exits no head is skipped, and the network without branches, which would
    answer otherwise, is not chosen.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]`` normalised, like those to come; or other inputs of the network.
        policy: when an image leaves; a bare array of thresholds ``[N - 1]`` is one of entropy.
        batch_size: of the calls to come, at most M; all of ``images`` at once by default.
        engine: ``'xla'`` or ``'onnxruntime'``; the faster of both by default. Where a network has no ONNX form, or
            ``onnxruntime`` is not installed, the default is XLA, and the printed table says why. For
            ``'onnxruntime'``, XLA's stages are measured at one batch size, which forecasts the exits to ask.
        skip_heads: whether heads may be left out; not where a guarantee holds for exactly these thresholds.
        times: from `segment_times` or another plan's ``times`` of the same network, which saves measuring.
        earlier: a plan of the same network and weights for other thresholds or another batch size, whose rewriting,
            times and compiled programs are used again.
        passes: timed passes of the candidates that are not eliminated, at most; with fewer than 6 "for certain" is less
            than 95 %.
        mesh: the devices that share every batch (`branchy_jax.sharding.data_mesh`); one device by default. Chunk sizes
            are then of one device, and `sharded` runs in place of `compacted`.
        on_progress: called with what is being measured, and the share done, which is an estimate.
        budget_seconds: after which the best so far is taken. The rewriting, one measurement and a short trial of the
            best forecast are always done.

    Returns:
        A `Plan`: call it with images ``[B, H, W, C]``, print it for the table. Its answers equal those of `dense` at
        its policy, up to the rounding of `optimize`.

    Raises:
        ValueError: a policy that does not fit, bad images, a batch size outside [1, M], no passes, times or a plan
            of another network, or an engine that is unknown, is missing here or cannot run the network.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet', image_shape=(8, 8, 1)), jnp.ones((8, 8, 8, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> planned = plan(model, variables, images, [1.0], passes=1)
        >>> planned(images).label.shape
        (8,)
    """
    images, count = jax.tree.map(np.asarray, images), num_rows(images, 'images')
    batch_size = count if batch_size is None else batch_size
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= count:
        raise ValueError(f'batch_size: got {batch_size} with {count} images; give 1 to the number of images')
    if passes < 1:
        raise ValueError(f'passes: got {passes}; give at least 1')
    if engine not in (None, 'xla', 'onnxruntime'):
        raise ValueError(f"engine: got {engine!r}; give 'xla', 'onnxruntime' or None, which takes the faster one")
    if engine == 'onnxruntime':
        check_onnxruntime(mesh)
    batch_size, share = int(batch_size), -(-int(batch_size) // (1 if mesh is None else mesh.size))
    shapes = calling.with_batch(images, 1)
    programs = Programs(model, variables, shapes, mesh)
    program.check_rows_by_trial(model, variables, shapes, lambda: at_rows(images, np.arange(7) % count))
    num_exits = programs.stages.num_exits
    policy = jax.tree.map(jnp.asarray, as_policy(policy, num_exits))
    if times is not None and times.stages.shape[1] != num_exits:
        raise ValueError(f'times: are of {times.stages.shape[1]} exits, this network has {num_exits}')
    programs = _programs_of(earlier, programs)
    if earlier is not None and times is None:
        times = earlier.times
    progress = Progress(on_progress, budget_seconds)
    progress.report('rewriting the network')
    warn_if_nothing_is_saved(programs.stages.macs)
    options = 'all cores' if mesh is None and 'all cores' in usable_options() else ''
    segments = functools.partial(programs.segments, criterion=policy.criterion, compiler_options=BY_NAME[options])
    sizes = [min(8, share)] if engine == 'onnxruntime' else _sizes_to_measure(share)
    times = _measured(segments, images, sizes, progress) if times is None else times
    progress.report('running all images')
    uncertainty, looks_back = segments(min(share, int(times.batch_sizes[-1]))).uncertainty(images)
    thresholds = np.asarray(policy.thresholds)
    confident = np.asarray(is_confident(uncertainty[:-1], thresholds[:, None]))
    may_skip = skip_heads and not looks_back
    candidates = candidates_to_try(times, confident, batch_size, may_skip=may_skip, mesh=mesh)
    if programs.stages.fixed_because:  # its rows cannot be gathered
        candidates = [candidate for candidate in candidates if candidate.executor not in ('compacted', 'sharded')]
    batches = _batches(images, confident, batch_size)

    def build(candidate: Candidate, policy: ExitPolicy = policy) -> Runner:
        # The baseline is only timed where the criterion uses earlier exits; another criterion answers then.
        is_reference = looks_back and len(candidate.exits) < num_exits
        return programs.runner(candidate, policy.replace(criterion=entropy) if is_reference else policy, batch_size)

    candidates, remark = _of_engine(engine, candidates, build)
    to_try = functools.partial(_to_try, build, mesh)
    tried = try_candidates(candidates, to_try, batches, passes=passes, progress=progress)
    chosen = choose(tried if may_skip and engine != 'onnxruntime' else tried[1:])
    applied = np.where(np.isin(np.arange(num_exits - 1), chosen.exits), thresholds, -np.inf)
    policy = ExitPolicy(policy.criterion, jnp.asarray(applied, jnp.float32))
    progress.report(f'chosen: {chosen.name}', 1.0)
    table = tuple(sorted(tried, key=lambda candidate: (candidate.eliminated, candidate.ratio)))
    return Plan(chosen, policy, batch_size, table, times, remark, programs, build(chosen, policy=policy))


def _programs_of(earlier: Plan | None, programs: Programs) -> Programs:
    """Returns the programs of an earlier plan in place of new ones, if there is one."""
    if earlier is None:
        return programs
    if not earlier._programs.serve(programs):
        raise ValueError('earlier: is a plan of another network, other weights, inputs or devices; leave it out')
    return earlier._programs


def _of_engine(
    engine: str | None, candidates: list[Candidate], build: Callable[[Candidate], Any]
) -> tuple[list[Candidate], str]:
    """Returns the baseline and the candidates of an engine, and why none is in ONNX Runtime where one might be."""
    onnx = [candidate for candidate in candidates if candidate.executor == 'onnx']
    others = [candidate for candidate in candidates if candidate not in onnx]
    if engine == 'xla' or not onnx:
        return others, ''
    try:
        check_onnxruntime(None)
        build(onnx[0])  # the others ask no more exits
    except Exception as error:  # onnx's checker and ONNX Runtime have classes of their own
        if engine is not None:
            raise
        return others, f'XLA alone ({error})'
    return candidates if engine is None else [others[0], *onnx], ''


def _to_try(build: Callable[[Candidate], Runner], mesh: Mesh | None, candidate: Candidate) -> Callable[[Any], Any]:
    """Returns the runner of a candidate; on a CPU answers are used by the host."""
    return functools.partial(build(candidate), as_numpy=mesh is None and jax.default_backend() == 'cpu')


def _sizes_to_measure(share: int) -> list[int]:
    """Returns the planned size and sizes that are at most half of it; the first takes little time."""
    return list(dict.fromkeys(size for size in (8, share, 64, 1) if size == share or 2 * size <= share))


def _measured(segments: Any, images: Any, sizes: Sequence[int], progress: Progress) -> SegmentTimes:
    """Times stages and heads at the first size, and at the other sizes as the budget allows."""

    def measure(size: int) -> SegmentTimes:
        progress.report(f'stages and heads at {size} images')
        return segments(size).times(images, passes=_PASSES)

    start = time.monotonic()
    first, *more = sizes
    results = [measure(first)]
    seconds = time.monotonic() - start
    per_input = float(results[0].stages.sum() + results[0].exits.sum()) / first / 1e3
    for size in more:
        if progress.allows(seconds + _RUNS_TO_MEASURE * per_input * size):
            results.append(measure(size))
    return SegmentTimes.joined(results)


def _batches(images: Any, confident: np.ndarray, batch_size: int) -> Sequence[Any]:
    """Returns a few batches in which images leave at the exits in the shares of all images."""
    total = num_rows(images)
    rows = np.arange(total)
    if batch_size < total:
        leaves = np.argmax(np.vstack([confident, np.ones(total, bool)]), axis=0)
        count = min(total, max(_MOST_INPUTS_IN_A_TRIAL, batch_size)) // batch_size
        spread = np.linspace(0, total - 1, count * batch_size).round().astype(int)
        rows = np.random.default_rng(0).permutation(np.argsort(leaves, kind='stable')[spread])
    parts = rows.reshape(-1, batch_size)
    return [jax.block_until_ready(jax.tree.map(jnp.asarray, at_rows(images, part))) for part in parts]


def _read(path: Path | str, model: Any, variables: Variables, mesh: Mesh | None) -> tuple[dict[str, Any], Any]:
    """Returns the fields of a `Plan` that `Plan.save` wrote, and the shapes of its inputs.

    Raises:
        ValueError: as `Plan.load`.
    """
    try:
        record = json.loads(Path(path).read_text(encoding='utf-8'))
        written = record['format']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'path: cannot read a plan from {path} ({type(error).__name__}: {error})') from error
    if written != _FORMAT:
        formats = f'format {written}; this version reads format {_FORMAT}, and version 0.2 wrote 1 to 3'
        raise ValueError(f'path: the plan in {path} has {formats}; plan again')
    try:
        fields, inputs = _decode(record), _decode_inputs(record['inputs'])
        there, network = dict(record['made_with']), record['network']
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'path: the plan in {path} is damaged ({type(error).__name__}: {error}); plan again'
        ) from error
    if fields['chosen'].executor == 'onnx':
        check_onnxruntime(mesh)
    here = _surroundings(mesh, fields['chosen'])
    other = [f'{name} {there.get(name)} there, {here[name]} here' for name in here if there.get(name) != here[name]]
    if other:
        raise ValueError(f'path: the plan in {path} is of other devices or versions ({"; ".join(other)}); plan again')
    if network != _identity(model, variables, inputs):
        differs = 'names, shapes or dtypes of its variables, or the multiply-accumulates of its stages, differ'
        raise ValueError(f'path: the plan in {path} is of another network: {differs}; plan again')
    return fields, inputs


def _identity(model: Any, variables: Variables, inputs: Any) -> dict[str, Any]:
    """Returns paths, shapes and dtypes of all variables, and the multiply-accumulates of stages and heads."""
    leaves = jax.tree.leaves_with_path(variables)
    names = [[jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves]
    try:
        macs = program.stages(model, variables, inputs).macs
    except Exception as error:  # a network may raise anything at the variables or inputs of another one
        return {'error': str(error)}
    return {'leaves': names, 'macs': [macs.stages.tolist(), macs.exits.tolist()]}


def _surroundings(mesh: Mesh | None, chosen: Candidate) -> dict[str, Any]:
    """Returns everything that a measurement depends on beside the network."""
    device = jax.devices()[0]
    return {
        **versions('jax', 'jaxlib', 'branchy-jax', *(['onnxruntime'] if chosen.executor == 'onnx' else [])),
        'platform': device.platform,
        'device': device.device_kind,
        'processor': _processor(),
        'cores': num_cores(),
        'devices': 1 if mesh is None else mesh.size,
    }


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package; ``'unknown'`` for one that runs from its source folder."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = 'unknown'
    return installed


def _processor() -> str:
    """Returns the processor's name; JAX calls every one of them ``cpu``."""
    cpuinfo = Path('/proc/cpuinfo')  # of Linux
    match = re.search(r'model name\s*:\s*(.+)', cpuinfo.read_text(encoding='utf-8') if cpuinfo.exists() else '')
    return match.group(1) if match else platform.processor() or platform.machine()


def _encode_inputs(inputs: Any) -> Any:
    """Returns shapes as text in the tuples (JSON's lists) and dictionaries that hold them."""
    record = jax.tree.map(lambda spec: f'{spec.dtype}{list(spec.shape)}', inputs)
    structure: Any = jax.tree.structure(inputs)
    if structure != jax.tree.structure(_decode_inputs(record)):
        raise ValueError('inputs: a file of a plan holds an array, tuples and dictionaries with names as keys')
    return record


def _decode_inputs(record: Any) -> Any:
    def decoded(text: str) -> jax.ShapeDtypeStruct:
        dtype, shape = text[:-1].split('[')
        return jax.ShapeDtypeStruct(tuple(map(int, shape.split(','))), jnp.dtype(dtype))

    return jax.tree.map(decoded, _with_tuples(record))


def _with_tuples(record: Any) -> Any:
    """Returns a record with tuples in place of JSON's lists."""
    if isinstance(record, dict):
        return {name: _with_tuples(value) for name, value in record.items()}
    return tuple(map(_with_tuples, record)) if isinstance(record, list | tuple) else record


def _decode(record: Mapping[str, Any]) -> dict[str, Any]:
    candidates = tuple(Candidate(**fields) for fields in _with_tuples(record['candidates']))
    return {
        'chosen': candidates[record['chosen']],
        'policy': as_policy(decode_policy(record['policy'])),  # refuses NaN
        'remark': str(record['remark']),
        'batch_size': int(record['batch_size']),
        'candidates': candidates,
        'times': SegmentTimes(**{name: np.array(values) for name, values in record['times'].items()}),
    }
