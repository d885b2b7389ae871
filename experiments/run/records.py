"""The results of a run as one typed record, which ``report.json`` holds; only this module writes and reads it.

Fields are called ``accuracy`` whatever the metric of the task is; in the file they carry its name, such as
``test_accuracy`` or ``test_miou``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import branchy_jax as bj

Numbers = tuple[float, ...]
Kind = TypeVar('Kind')


@dataclasses.dataclass(frozen=True)
class Clock:
    """Times of one network, from passes that took turns with its baseline's.

    Attributes:
        batch: images in a call.
        latency_images: images in a pass.
        latency_passes: how many passes.
        latency_ms: mean over images, the median of that over passes.
        gain: time of the baseline ÷ this, like with like: the median over pairs of passes.
        gain_low: lower end of its 95 % interval.
        gain_high: upper end.
        gain_plain: the same over the baseline as written.
        executor: that the planner chose, or how `staged` was compiled; empty where nothing was chosen.
    """

    batch: int
    latency_images: int
    latency_passes: int
    latency_ms: float
    gain: float
    gain_low: float
    gain_high: float
    gain_plain: float
    executor: str = ''

    @classmethod
    def read(
        cls, seconds: Mapping[Any, np.ndarray], name: Any, *, baseline: Any, images: int, batch: int, executor: str = ''
    ) -> Clock:
        """Reads `branchy_jax.measure.interleaved_passes`.

        Args:
            seconds: of passes over all images, by name; ``'plain'`` is the baseline as written.
            name: whose figures these are.
            baseline: the name of the network to compare with.
            images: in a pass.
            batch: images in a call.
            executor: that the planner chose.
        """
        gain = bj.measure.paired_ratio(seconds[baseline], seconds[name])
        return cls(
            batch=batch,
            latency_images=images,
            latency_passes=len(seconds[name]),
            latency_ms=float(np.median(seconds[name])) / images * 1e3,
            gain=gain.median,
            gain_low=gain.low,
            gain_high=gain.high,
            gain_plain=bj.measure.paired_ratio(seconds['plain'], seconds[name]).median,
            executor=executor,
        )


@dataclasses.dataclass(frozen=True)
class Timed:
    """Times of a run.

    Attributes:
        baseline: of the one-exit network.
        points: of the branchy network, by operating point.
        exit_latency_ms: ``[N]`` time of an image that leaves at exit n.
        trunk_only_ms: ``[N + 1]`` of each stage alone, then of the last head: what the paper's protocol counts.
    """

    baseline: Clock
    points: Mapping[str, Clock]
    exit_latency_ms: Numbers
    trunk_only_ms: Numbers


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The one-exit network, trained on its own.

    Attributes:
        accuracy: on test data.
        clock: its times.
        macs: of an image.
    """

    accuracy: float
    clock: Clock
    macs: float


@dataclasses.dataclass(frozen=True)
class Point:
    """An operating point: chosen on validation data, evaluated on test data.

    Attributes:
        name: the table's is ``'table'``.
        accuracy: on test data.
        thresholds: ``[N - 1]``.
        exit_fractions: ``[N]`` on test data.
        clock: its times.
        trunk_only_ms: by the paper's protocol, which times neither side heads nor their softmax.
        trunk_only_gain: likewise.
        macs: expected, of an image.
        mac_gain: the baseline's ÷ these.
        validation_accuracy: that it was chosen by.
        validation_exit_fractions: ``[N]``.
    """

    name: str
    accuracy: float
    thresholds: Numbers
    exit_fractions: Numbers
    clock: Clock
    trunk_only_ms: float
    trunk_only_gain: float
    macs: float
    mac_gain: float
    validation_accuracy: float
    validation_exit_fractions: Numbers


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """A setting of the validation frontier, evaluated on test data.

    Attributes:
        thresholds: ``[N - 1]``.
        validation_accuracy: that put it on the frontier.
        accuracy: on test data.
        exit_fractions: ``[N]`` on test data.
        macs: expected, of an image.
        latency_ms: from the times of images that leave at each exit.
        knee: whether it is the frontier's knee.
    """

    thresholds: Numbers
    validation_accuracy: float
    accuracy: float
    exit_fractions: Numbers
    macs: float
    latency_ms: float
    knee: bool


@dataclasses.dataclass(frozen=True)
class Tried:
    """A criterion at its own best thresholds, on validation data.

    Attributes:
        criterion: its name.
        validation_accuracy: of these thresholds.
        mac_gain: likewise.
        thresholds: ``[N - 1]``.
    """

    criterion: str
    validation_accuracy: float
    mac_gain: float
    thresholds: Numbers


@dataclasses.dataclass(frozen=True)
class LeavingFirst:
    """The paper's Figure 4: first and last exit only.

    Attributes:
        share: of the test inputs that leave at the first exit.
        accuracy: of all, on test data.
        threshold: the largest uncertainty let through.
    """

    share: float
    accuracy: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class Pixelwise:
    """Anytime dense prediction at one threshold for pixels.

    Attributes:
        pixel_threshold: below which a pixel keeps its answer.
        pixel_fractions: ``[N]`` share of the pixels that each exit answers.
        test_miou_of_mosaic: where no image leaves early.
        test_miou_leaving: where an image leaves once nearly all of its pixels are sure.
        exit_fractions_leaving: ``[N]`` of images then.
        mac_gain_leaving: then.
    """

    pixel_threshold: float
    pixel_fractions: Numbers
    test_miou_of_mosaic: float
    test_miou_leaving: float
    exit_fractions_leaving: Numbers
    mac_gain_leaving: float


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Every result of the main job. The first operating point is the table's.

    Attributes:
        network: the branchy one; its baseline's name lacks the ``b-``.
        dataset: by name.
        task: of `experiments.run.tasks.TASKS`.
        command: that made it.
        device: and where.
        num_classes: K.
        image_shape: ``(H, W, C)``.
        criterion: of all thresholds here, by name.
        baseline: the one-exit network.
        exit_accuracy: ``[N]`` of each exit alone, on test data.
        points: the operating points.
        frontier: by ascending cost.
        first_and_last: by ascending share.
        exit_latency_ms: as `Timed`.
        trunk_only_ms: as `Timed`.
        stage_macs: ``[N]``.
        exit_macs: ``[N]`` of heads.
        tried: every criterion that was tried.
        paper: the paper's rows, to stand beside.
        class_iou: ``[K]`` by baseline, exit and operating point, ``None`` where nothing is of a class; of masks only.
        pixelwise: of masks only.
    """

    network: str
    dataset: str
    task: str
    command: str
    device: str
    num_classes: int
    image_shape: tuple[int, ...]
    criterion: str
    baseline: Baseline
    exit_accuracy: Numbers
    points: tuple[Point, ...]
    frontier: tuple[FrontierPoint, ...]
    first_and_last: tuple[LeavingFirst, ...]
    exit_latency_ms: Numbers
    trunk_only_ms: Numbers
    stage_macs: Numbers
    exit_macs: Numbers
    tried: tuple[Tried, ...] = ()
    paper: tuple[Mapping[str, Any], ...] = ()
    class_iou: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    pixelwise: tuple[Pixelwise, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what ``report.json`` holds: ``dataset``, ``device``, ``rows``, ``frontier``, ``paper`` and more."""
        metric = _METRICS[self.task]
        found = encode(self, metric)
        network, exit_accuracy, baseline = found.pop('network'), found.pop(f'exit_{metric}'), found.pop('baseline')
        whole = {f'exit_{metric}': [self.baseline.accuracy], 'thresholds': [], 'exit_fractions': [1.0], 'mac_gain': 1.0}
        table = {key: value for key, value in found['operating_points'][0].items() if key != 'name'}
        rows = [
            {'network': network[2:], **whole, **baseline},
            {'network': network, f'exit_{metric}': exit_accuracy, **table},
        ]
        found = {'rows': rows, **found}
        return {key: value for key, value in found.items() if value or key not in ('class_iou', 'pixelwise')}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RunRecord:
        """Reads what `to_json` returned.

        Raises:
            ValueError: a field is missing.
        """
        stored = {'task': 'classification', **stored}  # the first records did not say
        try:
            baseline, table = stored['rows']
            metric = _METRICS[stored['task']]
            return decode(cls, {**table, **stored, 'baseline': decode(Baseline, baseline, metric)}, metric)
        except (KeyError, ValueError) as error:
            raise ValueError(f'stored: not the record of a run, {error} is missing or no such field') from error


_METRICS = {'classification': 'accuracy', 'segmentation': 'miou'}
_KEYS = {
    'accuracy': 'test_{}',
    'validation_accuracy': 'validation_{}',
    'exit_accuracy': 'exit_{}',
    'points': 'operating_points',
    'tried': 'criteria_tried',
}
_KINDS = {
    'tried': Tried,
    'points': Point,
    'frontier': FrontierPoint,
    'first_and_last': LeavingFirst,
    'pixelwise': Pixelwise,
}


def read_record(workdir: Path | str) -> RunRecord:
    """Reads the record of a finished run.

    Raises:
        ValueError: the folder holds no finished run.
    """
    return RunRecord.from_json(bj.report.read_json(Path(workdir) / 'report.json'))


def encode(part: Any, metric: str = 'accuracy') -> Any:
    """Returns a part of a record as JSON has it: the clock's fields among its own, the metric's name in the keys."""
    if isinstance(part, tuple):
        return [encode(entry, metric) for entry in part]
    if not dataclasses.is_dataclass(part):
        return part
    found = {}
    for name, value in vars(part).items():
        if name == 'clock':
            found.update({key: entry for key, entry in vars(value).items() if entry != ''})
        else:
            found[_KEYS.get(name, name).format(metric)] = encode(value, metric)
    return found


def decode(kind: type[Kind], stored: Mapping[str, Any], metric: str = 'accuracy') -> Kind:
    """Reads what `encode` returned, fields that are not there having their defaults.

    Raises:
        KeyError: a field without a default is missing.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        key = _KEYS.get(field.name, field.name).format(metric)
        if field.name == 'clock':
            values['clock'] = decode(Clock, stored, metric)
        elif key in stored or (field.default is field.default_factory is dataclasses.MISSING):
            values[field.name] = _decoded(stored[key], _KINDS.get(field.name), metric)
    return kind(**values)


def _decoded(value: Any, kind: type | None, metric: str) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(entry, kind, metric) for entry in value)
    if isinstance(value, Mapping) and kind is not None:
        return decode(kind, value, metric)
    if isinstance(value, Mapping):
        return {key: _decoded(entry, None, metric) for key, entry in value.items()}
    return value
