"""The folder of a run with all that commands have added to it, each file as one typed record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import branchy_jax as bj
from branchy_jax.measure import Energy
from experiments.run.command import provenance
from experiments.run.networks import FinishedRun
from experiments.run.records import Clock, Numbers, RunRecord, decode, encode, read_record


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """An operating point in batches of one size, of ``batches.json``.

    Attributes:
        operating_point: its name.
        clock: its times; the baseline is the fastest of its forms.
        exit_fractions: ``[N]`` on the images timed.
        thresholds: ``[N - 1]`` as the plan applies them.
        baseline_ms: an image.
        plain_baseline_ms: an image, as written.
        accuracy_on_these: on the images timed.
        plan: the planner's table.
        baseline: which form of it is fastest.
    """

    operating_point: str
    clock: Clock
    exit_fractions: Numbers
    thresholds: Numbers
    baseline_ms: float
    plain_baseline_ms: float
    accuracy_on_these: float
    plan: str
    baseline: str = ''


@dataclasses.dataclass(frozen=True)
class StaticRow:
    """A static network of ``static.json``.

    Attributes:
        network: what it is.
        accuracy: on test data.
        clock: its times, beside the baseline's.
        macs: of an image.
    """

    network: str
    accuracy: float
    clock: Clock
    macs: float


@dataclasses.dataclass(frozen=True)
class EnergyRow(Energy):
    """Joules of a network at an operating point, of ``energy.json``: those of an image.

    Attributes:
        network: its name.
        operating_point: or ``'baseline'``.
        batch: images in a call.
    """

    network: str
    operating_point: str
    batch: int


@dataclasses.dataclass(frozen=True)
class CacheRow:
    """Cache misses at a setting of the frontier, of ``cache.json``.

    Attributes:
        network: its name.
        thresholds: ``[N - 1]``.
        latency_ms: an image, measured by the run itself.
        first_level: misses ÷ data accesses.
        last_level: misses ÷ data accesses.
        accesses: data accesses.
    """

    network: str
    thresholds: Numbers
    latency_ms: float
    first_level: float
    last_level: float
    accesses: int


@dataclasses.dataclass(frozen=True)
class Folder:
    """What lies in the folder of a run; what was not run is empty.

    Attributes:
        record: of the main job.
        batches: of `experiments.batches`.
        static: of ``experiments.main --static``.
        energy: of `experiments.energy`.
        energy_note: how it was measured, or why not.
        cache: of `experiments.cache`.
        cache_note: what simulated the caches.
    """

    record: RunRecord
    batches: tuple[BatchRow, ...]
    static: tuple[StaticRow, ...]
    energy: tuple[EnergyRow, ...]
    energy_note: str
    cache: tuple[CacheRow, ...]
    cache_note: str


def read_folder(folder: Path) -> Folder | None:
    """Reads all there is; ``None`` where no finished run is."""
    if not (folder / 'report.json').exists():
        return None
    batches, static, energy, cache = (
        bj.report.read_json(path) if (path := folder / f'{name}.json').exists() else {}
        for name in ('batches', 'static', 'energy', 'cache')
    )
    for row in batches.get('batches', ()):  # the first records counted images and passes elsewhere
        row.setdefault('latency_images', row.get('images'))
        row.setdefault('latency_passes', batches.get('passes'))
    return Folder(
        record=read_record(folder),
        batches=tuple(decode(BatchRow, row) for row in batches.get('batches', ())),
        static=tuple(decode(StaticRow, row) for row in static.get('rows', ())),
        energy=tuple(decode(EnergyRow, row) for row in energy.get('rows', ())),
        energy_note=f'{energy["device"]}: {energy["note"]}' if energy else '',
        cache=tuple(decode(CacheRow, row) for row in cache.get('points', ())),
        cache_note=cache.get('simulated_by', ''),
    )


def write_rows(
    finished: FinishedRun, name: str, rows: Sequence[Any], *, by: str, key: str = 'rows', **more: Any
) -> Mapping[str, Any]:
    """Adds a file of rows to the folder of a run; returns what it holds.

    Args:
        finished: the run.
        name: of the file, without its ending.
        rows: records.
        by: the command, below ``experiments``.
        key: that the rows are under.
        **more: further fields.
    """
    config = finished.config
    record = {
        'network': config.network,
        'placement': config.placement,
        'dataset': config.dataset,
        **provenance(by),
        **more,
        key: [encode(row) for row in rows],
    }
    bj.report.write_json(finished.workdir / f'{name}.json', record)
    return record
