"""The planner: measures, forecasts, lets the best candidates race, and explains its choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from branchy_jax.criteria import as_policy, is_confident
from branchy_jax.inference.dense import exit_outputs
from branchy_jax.inference.planning.candidates import Candidate, build_candidates
from branchy_jax.inference.planning.forecast import forecast
from branchy_jax.inference.planning.segment_times import SegmentTimes, segment_times
from branchy_jax.inference.rewriting.optimize import optimize
from branchy_jax.inference.steps import Executor, at_rows
from branchy_jax.measure import interleaved_passes, one_by_one, paired_ratio
from branchy_jax.models.branchy import BranchyNet, check_model
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

_MOST_IMAGES_IN_A_RACE = 128
_HEAT_PASSES = 3
_OUT_OF_THE_RACE = 1.25
_CLEARLY_FASTER = 0.8
_WORTH_A_RACE = 1.15


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The executor that was fastest here, bound to its weights and policy: call it with images.

    It may be driven by the host (its name then says so), and cannot be traced.

    Attributes:
        executor: its name.
        policy: as it applies it: the threshold is −inf where a head is skipped because it costs more than it saves.
        exits: the exits it asks.
        batch_size: that it was planned for; others work too.
        candidates: what was tried, predicted and measured, fastest first.
        times: of stages and heads alone.
    """

    executor: str
    policy: ExitPolicy
    exits: tuple[int, ...]
    batch_size: int
    candidates: tuple[Candidate, ...]
    times: SegmentTimes
    _run: Executor = dataclasses.field(repr=False)
    _variables: Variables = dataclasses.field(repr=False)

    @property
    def thresholds(self) -> Array:
        """``[N - 1]`` of the policy."""
        return self.policy.thresholds

    def __call__(self, images: Array) -> ExitPrediction:
        """Answers ``images [B, H, W, C]``."""
        return self._run(self._variables, images, self.policy)

    def __str__(self) -> str:
        lines = [f'{"":2}{"executor":34}{"exits asked":16}{"predicted ms":>14}{"measured ms":>14}   time ÷ baseline']
        for candidate in self.candidates:
            chosen = '> ' if (candidate.name, candidate.exits) == (self.executor, self.exits) else '  '
            predicted = '' if np.isnan(candidate.predicted_ms) else f'{candidate.predicted_ms:.3f}'
            exits = ', '.join(str(n + 1) for n in candidate.exits)
            ratio = candidate.slowdown
            interval = f' [{ratio.low:.2f}, {ratio.high:.2f}]' if candidate.finalist else ', out in the heat'
            lines.append(
                f'{chosen}{candidate.name:34}{exits:16}{predicted:>14}{candidate.measured_ms:>14.3f}   '
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
    passes: int = 12,
    mesh: Mesh | None = None,
) -> Plan:
    """Finds the fastest way to run a network under a policy on this device, by measuring.

    Rewrites the network (`optimize`), measures its stages and heads, and forecasts for every choice of exits and
    chunk sizes what a batch will cost; a head that costs more than it saves is skipped. The best forecast in each
    executor, the second if it is close, and the network without branches then race on the images given, interleaved.
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
        passes: of the final race; fewer than 6 make "for certain" less than 95 %.
        mesh: the devices that share every batch (`branchy_jax.sharding.data_mesh`); one device by default. Chunk sizes
            are then of one device, and `sharded` runs in place of `compacted`.

    Returns:
        A `Plan`: call it with images ``[B, H, W, C]``, print it for the table. It equals `dense` at its policy, up
        to the rounding of `optimize`.

    Raises:
        ValueError: a policy that does not fit, bad images, a batch size outside [1, M], no passes, or times of another
            network.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jax.random.normal(jax.random.key(1), (8, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> planned = plan(model, variables, images, [1.0], passes=1)
        >>> planned(images).label.shape
        (8,)
    """
    check_model(model)
    policy = as_policy(policy, model.num_exits)
    criterion, thresholds = policy.criterion, np.asarray(policy.thresholds)
    images, count = jax.tree.map(np.asarray, images), num_rows(images)
    batch_size = count if batch_size is None else batch_size
    _check(model, count, batch_size, times, passes)
    share = batch_size if mesh is None else -(-batch_size // mesh.size)  # of one device, survivors being dealt evenly
    fast = (model, variables) if model.image_shape is None else optimize(model, variables)
    outputs = exit_outputs(*fast, images, criterion=criterion, batch_size=min(count, 256))
    confident = is_confident(outputs.uncertainty[:-1], thresholds[:, None])
    remembered = criterion.init(jnp.asarray(outputs.logits[0, :1]))
    skip = skip_heads and not jax.tree.leaves(remembered)
    if times is None:
        sizes = [max(1, share // 4**power) for power in range(4)]
        times = segment_times(*fast, images, batch_sizes=sizes, criterion=criterion)
    best, *others = forecast(times, confident, share, may_skip=skip)
    forecasts = [best, *(other for other in others[:1] if other.ms < _WORTH_A_RACE * best.ms)]
    candidates = build_candidates((model, variables), fast, forecasts, batch_size, skip=skip, mesh=mesh)
    raced = _race(candidates, _batches(images, confident, batch_size), policy, passes)
    chosen = _choice(raced, model.num_exits)
    applied = np.where(np.isin(np.arange(model.num_exits - 1), chosen.exits), thresholds, -np.inf)
    in_order = sorted(raced, key=lambda candidate: candidate.slowdown.median)
    return Plan(
        executor=chosen.name,
        policy=policy.replace(thresholds=jnp.asarray(applied, jnp.float32)),
        exits=chosen.exits,
        batch_size=batch_size,
        # Without what would keep the programs of the losers in memory.
        candidates=tuple(dataclasses.replace(candidate, run=None, variables=None) for candidate in in_order),
        times=times,
        _run=chosen.run,
        _variables=chosen.variables,
    )


def _check(model: BranchyNet, count: int, batch_size: int, times: SegmentTimes | None, passes: int) -> None:
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= count:
        raise ValueError(f'batch_size: got {batch_size} with {count} images; give 1 to the number of images')
    if passes < 1:
        raise ValueError(f'passes: got {passes}; give at least 1')
    if times is not None and times.stages.shape[1] != model.num_exits:
        raise ValueError(f'times: are of a network with {times.stages.shape[1]} exits, this one has {model.num_exits}')


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


def _race(
    candidates: Sequence[Candidate], batches: Sequence[Array], policy: ExitPolicy, passes: int
) -> list[Candidate]:
    """Times all candidates a little, the promising ones and the baseline well."""
    policy = jax.tree.map(jnp.asarray, policy)

    def answer(candidate: Candidate, batch: Array) -> ExitPrediction:
        return candidate.run(candidate.variables, batch, policy)

    functions = {n: one_by_one(functools.partial(answer, way), batches) for n, way in enumerate(candidates)}
    (baseline,) = (n for n, candidate in enumerate(candidates) if candidate.is_baseline)
    heat = interleaved_passes(functions, passes=_HEAT_PASSES, warmup=1)
    fastest = min(np.median(heat[n]) for n in heat if n != baseline)
    promising = {n for n in heat if n == baseline or np.median(heat[n]) < _OUT_OF_THE_RACE * fastest}
    # The network without branches comes along where it may yet be needed, because nothing clearly beats the baseline.
    close = fastest > _CLEARLY_FASTER * np.median(heat[baseline])
    finalists = promising | {n for n, candidate in enumerate(candidates) if close and len(candidate.exits) == 1}
    final = interleaved_passes({n: functions[n] for n in finalists}, passes=passes, warmup=0)
    found = []
    for n, candidate in enumerate(candidates):
        seconds = final if n in finalists else heat
        ms, slowdown = float(np.median(seconds[n])) / len(batches) * 1e3, paired_ratio(seconds[n], seconds[baseline])
        found.append(dataclasses.replace(candidate, measured_ms=ms, slowdown=slowdown, finalist=n in finalists))
    return found


def _choice(raced: Sequence[Candidate], num_exits: int) -> Candidate:
    """Returns the fastest finalist that beats the baseline for certain; if none does, the best without branches.

    Where the network without branches answers otherwise and is no candidate, the fastest wins.
    """
    eligible = [candidate for candidate in raced if candidate.finalist and not candidate.is_baseline]
    certain = [candidate for candidate in eligible if candidate.slowdown.high < 1]
    without = [candidate for candidate in eligible if candidate.exits == (num_exits - 1,)]
    return min(certain or without or eligible, key=lambda candidate: candidate.slowdown.median)
