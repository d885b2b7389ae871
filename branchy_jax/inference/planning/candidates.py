"""Ways to run a network, and what the planner found out about them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from branchy_jax.inference.any_batch import AnyBatch, any_batch, sizes_up_to
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.compiler_options import (
    BY_NAME,
    Options,
    in_order,
    may_use_all_cores,
    may_use_one_core,
    num_cores,
)
from branchy_jax.inference.dense import dense, dense_program
from branchy_jax.inference.planning.forecast import Forecast, forecast
from branchy_jax.inference.planning.segment_times import SegmentTimes
from branchy_jax.inference.sharded import on_mesh, sharded
from branchy_jax.inference.staged import sequential, sequential_program
from branchy_jax.inference.steps import Executor, compiled_once
from branchy_jax.measure import Ratio
from branchy_jax.models.branchy import BranchyNet, without_branches
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, num_rows

# The second forecast races if it comes as close to the best, the network without branches if this close.
_WORTH_A_RACE = 1.15
_NEARLY_AS_FAST = 1.25
_UNKNOWN = Ratio(float('nan'), float('nan'), float('nan'))
# Of a piece of a batch that a worker answers by itself: long beside starting it, short beside the whole batch.
_PIECE_MS = 2.0

_KINDS = ('baseline', 'dense', 'sequential', 'compacted', 'sharded')


@dataclasses.dataclass(frozen=True)
class Way:
    """An executor and its settings: the choice that a plan makes, and keeps in a file.

    Attributes:
        name: what tables call it.
        kind: ``'dense'``, ``'sequential'``, ``'compacted'``, ``'sharded'``, or ``'baseline'``, the plain jitted network
            without branches, which only sets the pace.
        exits: the exits that it asks.
        optimized: whether it runs the network as `optimize` rewrites it.
        chunk_sizes: of `compacted` and `sharded`, one for each exit asked; of the workers of `sequential`, one.
        on_host: of `compacted`.
        workers: of `compacted` and `sequential`.
        compiled: with which options: ``'all cores'`` for `branchy_jax.inference.ALL_CORES`, ``'one core'`` for
            `branchy_jax.inference.ONE_CORE`, or ``''``.
    """

    name: str
    kind: str
    exits: tuple[int, ...]
    optimized: bool = True
    chunk_sizes: tuple[int, ...] = ()
    on_host: bool = False
    workers: int = 1
    compiled: str = ''

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f'kind: got {self.kind!r}; known are {", ".join(_KINDS)}')
        if self.compiled not in BY_NAME:
            raise ValueError(f'compiled: got {self.compiled!r}; known are {", ".join(map(repr, BY_NAME))}')

    def build(self, network: BranchyNet, batch_size: int, mesh: Mesh | None = None) -> AnyBatch | Executor:
        """Builds the executor for batches of any size, in pieces of ``batch_size`` where they are larger.

        Args:
            network: plain or rewritten, as ``optimized`` says.
            batch_size: that it is planned for.
            mesh: the devices that share every batch.
        """
        if mesh is not None:
            return self._build_on(mesh, network, batch_size)
        compiler_options = BY_NAME[self.compiled]
        options: dict[str, Any] = {'exits': self.exits, 'compiler_options': compiler_options, 'max_batch': batch_size}
        if self.kind == 'baseline':
            return _pace(network)
        if self.kind == 'sequential':
            (piece,) = self.chunk_sizes or (batch_size,)
            return sequential(network, **{**options, 'max_batch': piece}, workers=self.workers)
        if self.kind == 'compacted':
            return compacted(
                network, chunk_size=self.chunk_sizes, on_host=self.on_host, workers=self.workers, **options
            )
        return _dense_but_for_single_images(network, self.exits, in_order(compiler_options), batch_size)

    def _build_on(self, mesh: Mesh, network: BranchyNet, batch_size: int) -> AnyBatch | Executor:
        if self.kind == 'baseline':
            return on_mesh(_pace(network), mesh)
        size = -(-batch_size // mesh.size) * mesh.size
        if self.kind == 'sharded':
            counted: Any = sharded(network, mesh=mesh, chunk_size=self.chunk_sizes, exits=self.exits).counted
            return any_batch(counted, counted, network, (size,))
        run: Any = on_mesh(dense(network, exits=self.exits), mesh)
        return any_batch(lambda variables, images, policy, _: run(variables, images, policy), run, network, (size,))


Prediction = tuple[Way, float]
"""A way, and the milliseconds predicted for a batch; NaN where nothing predicts them."""


@compiled_once
def baseline(network: BranchyNet) -> Callable[[Variables, Array], Any]:
    """Returns the plain jitted network without branches, which every plan is compared with."""
    return jax.jit(without_branches(network).apply)


def _pace(network: BranchyNet) -> Executor:
    run = baseline(network)
    return lambda variables, images, _: run(variables, images)


def _dense_but_for_single_images(
    network: BranchyNet, exits: tuple[int, ...], options: Options, batch_size: int
) -> AnyBatch:
    """Builds `dense` that runs single images as `staged` does: an exit that does not pay in a batch may pay for one."""
    together, alone = dense_program(network, exits, options), sequential_program(network, exits, options)

    def run(variables: Variables, images: Array, policy: ExitPolicy, _: np.int32) -> ExitPrediction:
        return (alone if num_rows(images) == 1 else together)(variables, images, policy)

    return any_batch(run, together, network, sizes_up_to(batch_size))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a network, and what was found out about it: one line of a plan's table.

    Attributes:
        way: the executor and its setting.
        predicted_ms: for a batch; NaN where nothing predicts it.
        measured_ms: for a batch; NaN before the race.
        slowdown: its time ÷ the plain baseline's, from paired passes; NaN before the race.
        finalist: whether it came into the final race; else the figures are of the few passes of the heat.
    """

    way: Way
    predicted_ms: float = float('nan')
    measured_ms: float = float('nan')
    slowdown: Ratio = _UNKNOWN
    finalist: bool = False

    @property
    def name(self) -> str:
        """Of the executor and its setting."""
        return self.way.name

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits that it asks."""
        return self.way.exits


def ways_to_race(
    times: SegmentTimes, confident: np.ndarray, batch_size: int, share: int, *, skip: bool, mesh: Mesh | None = None
) -> tuple[list[Prediction], list[Prediction]]:
    """Returns what is to race, the baseline first, and what else if nothing of it is clearly faster than that.

    Args:
        times: of stages and heads.
        confident: ``[N - 1, M]`` which side exit is sure of which image.
        batch_size: B.
        share: of one device.
        skip: whether heads may be left out, so that the network without branches is a choice.
        mesh: the devices that share every batch.
    """
    num_exits, heavy = len(confident) + 1, times.heavy
    last, everyone, rates = (num_exits - 1,), tuple(range(num_exits)), times.per_image(share)
    best, *others = forecast(times, confident, share, may_skip=skip)
    close = [other for other in others[:1] if other.ms < _WORTH_A_RACE * best.ms and not heavy]
    compiled = functools.partial(_compiled, batch_size=batch_size, on_cpu=mesh is None)
    found = [(Way('baseline', 'baseline', last, optimized=False), float('nan'))]
    found += [
        (way, option.ms)
        for option in (best, *close)
        for plain in _ways(option, batch_size, mesh, heavy=heavy)
        for way in compiled(plain, all_ways=option is best and not heavy)
    ]
    if skip:
        ms = float(rates.trunk) * share
        otherwise = [(way, ms) for way in compiled(Way('last exit, optimized', 'dense', last))]
        plain = [(Way('last exit', 'dense', last, optimized=False), float('nan'))]
    else:
        ms, plain = float(rates.stages.sum() + rates.exits.sum()) * share, []
        otherwise = [(way, ms) for way in compiled(Way('dense', 'dense', everyone))]
    if ms < _NEARLY_AS_FAST * best.ms:
        return [*found, *otherwise], plain
    return found, [*otherwise, *plain]


def _compiled(way: Way, *, batch_size: int, on_cpu: bool, all_ways: bool = True) -> Iterator[Way]:
    """Yields a way as it may be compiled, the likeliest first; one of them unless all are asked for."""
    several = on_cpu and may_use_all_cores()
    one_by_one = on_cpu and (batch_size == 1 or way.kind == 'sequential')
    labels = ['one core'] * (one_by_one and may_use_one_core()) + ['all cores'] * several + ['']
    if way.workers > 1 and way.kind == 'sequential':
        labels = [label for label in labels if label != 'all cores']
    for label in labels if all_ways or batch_size == 1 else labels[:1]:
        name = f'{way.name}, {label}' if label else way.name
        yield dataclasses.replace(way, name=name, compiled=label)


def _ways(forecast: Forecast, batch_size: int, mesh: Mesh | None, *, heavy: bool) -> Iterator[Way]:
    """Yields the executors that a forecast is for, the likeliest first."""
    exits, sizes = forecast.exits, '/'.join(map(str, forecast.chunk_sizes))
    on_cpu = jax.default_backend() == 'cpu'
    if mesh is not None:
        yield Way(f'sharded × {mesh.size}, {sizes}', 'sharded', exits, chunk_sizes=forecast.chunk_sizes)
    elif batch_size == 1:
        if len(exits) > 1:
            yield Way('staged', 'sequential', exits)
    else:
        if on_cpu and (cores := num_cores()) > 1:
            turns = max(1, round(forecast.ms / (cores * _PIECE_MS)))
            piece = -(-batch_size // (cores * turns))
            yield Way(f'sequential × {cores}, {piece}', 'sequential', exits, chunk_sizes=(piece,), workers=cores)
        elif on_cpu and heavy:
            yield Way('sequential', 'sequential', exits)
        for workers in (1, 2) if on_cpu else ():
            yield Way(
                f'compacted, host × {workers}, {sizes}',
                'compacted',
                exits,
                chunk_sizes=forecast.chunk_sizes,
                on_host=True,
                workers=workers,
            )
        # On several cores none of these wins with a heavy network, and such networks take longest to compile.
        if not (on_cpu and heavy):
            yield Way(f'compacted, loop of {sizes}', 'compacted', exits, chunk_sizes=forecast.chunk_sizes)
            yield Way('sequential', 'sequential', exits)
