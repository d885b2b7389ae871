"""The planner: measures, forecasts, lets the best candidates race, and explains its choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from branchy_jax.criteria import as_policy, is_confident
from branchy_jax.inference.compiler_options import ALL_CORES, may_use_all_cores
from branchy_jax.inference.dense import exit_outputs
from branchy_jax.inference.planning.candidates import Candidate, Way, baseline, ways_to_race
from branchy_jax.inference.planning.file import Kept, inputs_of, read_plan, write_plan
from branchy_jax.inference.planning.progress import OnProgress, Progress
from branchy_jax.inference.planning.race import Runner, choose, race
from branchy_jax.inference.planning.segment_times import (
    SegmentTimes,
    compile_segments,
    segment_times,
    segment_uncertainty,
)
from branchy_jax.inference.rewriting.optimize import optimize
from branchy_jax.inference.steps import at_rows
from branchy_jax.models.branchy import BranchyNet, check_model, naming_variables
from branchy_jax.sharding import replicate
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

_MOST_IMAGES_IN_A_RACE = 128
# Stages and heads are timed at the planned size and at those of these that are at most half of it.
_SMALLER_SIZES, _FIRST_SIZE = (64, 8, 1), 8
_PASSES, _FEW_PASSES = 5, 3

Network = tuple[BranchyNet, Variables]
CompilerOptions = Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The executor that was fastest here, bound to its weights and policy: call it with images.

    Batches of any size are answered, those above ``batch_size`` in pieces, and a single image as `staged` would; after
    `warm_up` none of them compiles anything. It may be driven by the host (its name then says so), and cannot be
    traced. Threads may share it.

    Attributes:
        way: the executor and its settings.
        policy: as it applies it: the threshold is −inf where a head is skipped because it costs more than it saves.
        batch_size: that it was planned for.
        candidates: what was tried, predicted and measured, fastest first.
        times: of stages and heads alone.
    """

    way: Way
    policy: ExitPolicy
    batch_size: int
    candidates: tuple[Candidate, ...]
    times: SegmentTimes
    _run: Any = dataclasses.field(repr=False)
    _variables: Variables = dataclasses.field(repr=False)
    _networks: tuple[Network, Network] = dataclasses.field(repr=False)
    _inputs: Any = dataclasses.field(repr=False)
    _devices: int = dataclasses.field(repr=False, default=1)

    @property
    def executor(self) -> str:
        """Its name."""
        return self.way.name

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits it asks."""
        return self.way.exits

    @property
    def thresholds(self) -> Array:
        """``[N - 1]`` of the policy."""
        return self.policy.thresholds

    def __call__(self, images: Array) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        return self._run(self._variables, images, self.policy)

    def warm_up(self) -> None:
        """Compiles all that batches of any size will need, of images of the dtype that it was planned on."""
        images = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), self._inputs)
        self._run.warm_up(self._variables, images, self.policy)

    def save(self, path: Path | str) -> None:
        """Writes the choice and the measurements as JSON, atomically: no weights and no code.

        Args:
            path: the file to write.

        Raises:
            ValueError: a criterion that holds a function which is not one of `branchy_jax.criteria`, or inputs whose
                structure nothing tells.
        """
        if self._networks[0][0].image_shape is None and not isinstance(self._inputs, jax.ShapeDtypeStruct):
            raise ValueError(
                'plan: its network takes several arrays and has no image_shape that tells which; give it one'
            )
        kept = Kept(
            self.way, self.policy, self.batch_size, tuple(jax.tree.leaves(self._inputs)), self.candidates, self.times
        )
        write_plan(path, kept, *self._networks[0], self._devices)

    @classmethod
    def load(cls, path: Path | str, model: BranchyNet, variables: Variables, *, mesh: Mesh | None = None) -> Plan:
        """Reads what `save` wrote, and builds the executor without measuring anything.

        Args:
            path: the file.
            model: the network that was planned for.
            variables: of ``model``; they may have been trained on since.
            mesh: the devices that share every batch, as many as it was planned for.

        Raises:
            ValueError: the file is missing or damaged, or its plan is of another device, other versions or another
                network; the message says which.
        """
        check_model(model)
        devices = 1 if mesh is None else mesh.size
        kept, plain = read_plan(path, model, variables, devices), (model, variables)
        networks = plain, _rewritten(plain) if kept.way.optimized else plain
        run, bound = _build(kept.way, networks, kept.batch_size, mesh)
        return cls(
            kept.way,
            kept.policy,
            kept.batch_size,
            kept.candidates,
            kept.times,
            _run=run,
            _variables=bound,
            _networks=networks,
            _inputs=inputs_of(model, kept.inputs),
            _devices=devices,
        )

    def __str__(self) -> str:
        lines = [f'{"":2}{"executor":44}{"exits asked":16}{"predicted ms":>14}{"measured ms":>14}   time ÷ baseline']
        for candidate in self.candidates:
            chosen = '> ' if candidate.way == self.way else '  '
            predicted = '' if np.isnan(candidate.predicted_ms) else f'{candidate.predicted_ms:.3f}'
            exits = ', '.join(str(n + 1) for n in candidate.exits)
            ratio = candidate.slowdown
            interval = f' [{ratio.low:.2f}, {ratio.high:.2f}]' if candidate.finalist else ', out in the heat'
            lines.append(
                f'{chosen}{candidate.name:44}{exits:16}{predicted:>14}{candidate.measured_ms:>14.3f}   '
                f'{ratio.median:.2f}{interval}'
            )
        return '\n'.join([f'batches of {self.batch_size}', *lines])


def plan(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    policy: Any,
    *,
    batch_size: int | None = None,
    skip_heads: bool = True,
    times: SegmentTimes | None = None,
    earlier: Plan | None = None,
    passes: int = 12,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
    budget_seconds: float | None = None,
) -> Plan:
    """Finds the fastest way to run a network under a policy on this device, by measuring.

    Rewrites the network (`optimize`), measures its stages and heads, and forecasts for every choice of exits and
    chunk sizes what a batch will cost; a head that costs more than it saves is skipped. The best forecast in each
    executor, and the second if it is close, then race on the images given, interleaved, against the plain jitted
    baseline; so does the network without branches, unless one of them is clearly faster (by a fifth). On a CPU
    of several cores all this is compiled with `branchy_jax.inference.ALL_CORES`, and the best also without. Where
    compiling takes long, only those race that have ever won there.
    The fastest of those that beat the plain jitted baseline for certain (95 %) is chosen; if none does, the network
    without branches in its faster form. So on images distributed like those given the plan is not slower than the
    baseline, but for noise.

    With a criterion that remembers earlier exits no head can be skipped, and the network without branches, which
    answers otherwise, is no choice.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]`` normalised, like those to come.
        policy: when an image leaves; a bare array of thresholds ``[N - 1]`` is one of entropy.
        batch_size: of the calls to come, at most M; all of ``images`` at once by default.
        skip_heads: whether heads may be left out; not where a guarantee holds for exactly these thresholds.
        times: of the same network from an earlier plan's ``times``, to save measuring.
        earlier: a plan of the same network and weights for other thresholds or another batch size: its rewriting, its
            times and whatever it compiled serve again.
        passes: of the final race, at most; fewer than 6 make "for certain" less than 95 %.
        mesh: the devices that share every batch (`branchy_jax.sharding.data_mesh`); one device by default. Chunk sizes
            are then of one device, and `sharded` runs in place of `compacted`.
        on_progress: called with what is being measured, and the share done, which is an estimate.
        budget_seconds: after which the best so far is taken. What cannot be left out is done still: rewriting, one
            measurement, and a short race of the best forecast against the baseline.

    Returns:
        A `Plan`: call it with images ``[B, H, W, C]``, print it for the table. It equals `dense` at its policy, up
        to the rounding of `optimize`.

    Raises:
        ValueError: a policy that does not fit, bad images, a batch size outside [1, M], no passes, or times or a plan
            of another network.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jax.random.normal(jax.random.key(1), (8, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> planned = plan(model, variables, images, [1.0], passes=1)
        >>> planned(images).label.shape
        (8,)
    """
    check_model(model)
    policy, plain = as_policy(policy, model.num_exits), (model, variables)
    images, count = jax.tree.map(np.asarray, images), num_rows(images)
    batch_size = count if batch_size is None else batch_size
    _check(plain, count, batch_size, times, earlier, passes)
    batch_size = int(batch_size)  # NumPy's could not be written to a file
    progress, share = Progress(on_progress, budget_seconds), batch_size if mesh is None else -(-batch_size // mesh.size)
    progress.tell('rewriting the network')
    networks = plain, _prepared(plain, images, batch_size, share, mesh) if earlier is None else earlier._networks[1]
    times = earlier.times if times is None and earlier is not None else times
    compiling = ALL_CORES if mesh is None and may_use_all_cores() else None
    times = _measured(networks[1], images, share, policy, progress, compiling) if times is None else times
    progress.tell('running all images')
    uncertainty, remembers = _uncertainty(networks[1], images, min(share, times.batch_sizes[-1]), policy, compiling)
    thresholds = np.asarray(policy.thresholds)
    confident = np.asarray(is_confident(uncertainty[:-1], thresholds[:, None]))
    skip = skip_heads and not remembers
    build = functools.cache(functools.partial(_build, networks=networks, batch_size=batch_size, mesh=mesh))
    raced = race(
        *ways_to_race(times, confident, batch_size, share, skip=skip, mesh=mesh),
        build,
        _batches(images, confident, batch_size),
        jax.tree.map(jnp.asarray, policy),
        passes=passes,
        progress=progress,
    )
    chosen = choose(raced, model.num_exits)
    progress.done(f'chosen: {chosen.name}')
    applied = np.where(np.isin(np.arange(model.num_exits - 1), chosen.exits), thresholds, -np.inf)
    run, bound = build(chosen.way)
    return Plan(
        way=chosen.way,
        policy=policy.replace(thresholds=jnp.asarray(applied, jnp.float32)),
        batch_size=batch_size,
        candidates=tuple(sorted(raced, key=lambda candidate: candidate.slowdown.median)),
        times=times,
        _run=run,
        _variables=bound,
        _networks=networks,
        _inputs=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), images),
        _devices=1 if mesh is None else mesh.size,
    )


def _check(
    plain: Network, count: int, batch_size: int, times: SegmentTimes | None, earlier: Plan | None, passes: int
) -> None:
    model, variables = plain
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= count:
        raise ValueError(f'batch_size: got {batch_size} with {count} images; give 1 to the number of images')
    if passes < 1:
        raise ValueError(f'passes: got {passes}; give at least 1')
    if times is not None and times.stages.shape[1] != model.num_exits:
        raise ValueError(f'times: are of a network with {times.stages.shape[1]} exits, this one has {model.num_exits}')
    if earlier is not None:
        theirs, weights = earlier._networks[0]
        structure: Any = jax.tree.structure(weights)
        same = structure == jax.tree.structure(variables) and all(
            a is b for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(variables), strict=True)
        )
        if theirs != model or not same:
            raise ValueError('earlier: is a plan of another network or other weights; leave it out')


def _rewritten(plain: Network, batch_sizes: tuple[int, int] | None = None) -> Network:
    return plain if plain[0].image_shape is None else optimize(*plain, batch_sizes=batch_sizes)


def _prepared(plain: Network, images: Any, batch_size: int, share: int, mesh: Mesh | None) -> Network:
    """Returns the rewritten network; meanwhile the baseline compiles, which leaves the interpreter free."""
    model, variables = plain
    with ThreadPoolExecutor(1) as pool, naming_variables(variables):
        if mesh is None:
            pool.submit(baseline(model).lower(variables, at_rows(images, slice(batch_size))).compile)
        return _rewritten(plain, (_FIRST_SIZE, share) if share > _FIRST_SIZE else None)


def _build(way: Way, networks: tuple[Network, Network], batch_size: int, mesh: Mesh | None) -> Runner:
    """Builds a way for one of the networks, plain and rewritten."""
    model, variables = networks[1 if way.optimized else 0]
    return way.build(model, batch_size, mesh), variables if mesh is None else replicate(mesh, variables)


def _measured(
    fast: Network, images: Any, share: int, policy: ExitPolicy, progress: Progress, compiling: CompilerOptions
) -> SegmentTimes:
    """Times stages and heads until time is up, first at the size that tells most at least cost, then the largest."""
    found: list[SegmentTimes] = []
    sizes = [share, *(size for size in _SMALLER_SIZES if 2 * size <= share)]
    sizes = sorted(sizes, key=lambda size: (size != _FIRST_SIZE, -size))
    if not progress.is_over:
        progress.tell('compiling stages and heads')
        # These are needed in any case.
        compile_segments(*fast, images, sizes[:2], criterion=policy.criterion, compiler_options=compiling)
    for size in sizes:
        heavy = bool(found) and found[0].heavy
        if found and (progress.is_over or (heavy and size == 1)):
            break
        progress.tell(f'stages and heads at {size} images')
        # Noise is short, and of a heavy network a pass is long.
        passes = _FEW_PASSES if heavy else _PASSES
        options: Any = {'criterion': policy.criterion, 'compiler_options': compiling, 'passes': passes}
        found.append(segment_times(*fast, images, batch_sizes=[size], **options))
    ascending = sorted(found, key=lambda times: times.batch_sizes[0])
    return jax.tree.map(lambda *parts: np.concatenate(parts), *ascending)


def _uncertainty(
    fast: Network, images: Any, size: int, policy: ExitPolicy, compiling: CompilerOptions
) -> tuple[np.ndarray, bool]:
    """Returns ``[N, M]`` how unsure exits are of the images, and whether the criterion remembers earlier exits."""
    found = segment_uncertainty(*fast, images, size, criterion=policy.criterion, compiler_options=compiling)
    if found is not None:
        return found, False
    outputs = exit_outputs(*fast, images, criterion=policy.criterion, batch_size=min(num_rows(images), 256))
    return outputs.uncertainty, True


def _batches(images: Any, confident: np.ndarray, batch_size: int) -> list[Array]:
    """Returns a few batches in which images leave at the exits in the shares of all images."""
    total = num_rows(images)
    if batch_size == total:
        return [jax.tree.map(jnp.asarray, images)]
    leaves = np.argmax(np.vstack([confident, np.ones(total, bool)]), axis=0)
    count = min(total, max(_MOST_IMAGES_IN_A_RACE, batch_size)) // batch_size
    spread = np.linspace(0, total - 1, count * batch_size).round().astype(int)
    rows = np.random.default_rng(0).permutation(np.argsort(leaves, kind='stable')[spread])
    return [
        jax.block_until_ready(jax.tree.map(jnp.asarray, at_rows(images, part)))
        for part in rows.reshape(count, batch_size)
    ]
