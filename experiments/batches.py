"""Times a finished run on batches, through the planner, against the plain baseline and one that is planned alike.

    python -m experiments.batches --workdir=runs/resnet110_cifar10 --batches=1,256,10000

Single images run by `staged` on one core, both networks, as in the run's own report. Writes ``batches.json`` into the
folder. Batches are of test images, so that exits are taken in their true shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

import branchy_jax as bj
from experiments.run import command
from experiments.run.networks import Networks, read_run
from experiments.run.records import Clock, Numbers
from experiments.run.timing import Policies, fastest, on_device, time_images, whole
from experiments.study.folders import BatchRow, write_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the run in ``--workdir``."""
    parser = command.parser_of_a_run(__doc__)
    parser.add_argument(
        '--batches', type=command.positives, default=[256], help='Sizes; those above the images are left out.'
    )
    parser.add_argument('--passes', type=command.positive, default=20, help='Interleaved pairs.')
    parser.add_argument('--images', type=command.positive, default=2048, help='In a pass, at most.')
    options = parser.parse_args(arguments)
    finished = read_run(options.workdir)
    test = finished.dataset().test
    images = np.asarray(finished.networks.normalization(test.image[: options.images]))
    rows = []
    for batch in (size for size in options.batches if size <= len(images)):
        timing = {'batch': batch, 'passes': options.passes}
        for row in time_all(finished.networks, images, test.label, finished.policies, **timing):
            rows.append(row)
            write_rows(finished, 'batches', rows, by='batches', key='batches')
            clock = row.clock
            print(
                f'{finished.networks.name} {row.operating_point}, batch {batch}: {clock.latency_ms:.4f} ms an image, '
                f'gain {clock.gain:.2f} over the fastest baseline, {clock.gain_plain:.2f} over the plain one, by '
                f'{clock.executor or row.baseline}',
                flush=True,
            )


def time_all(
    networks: Networks, images: np.ndarray, labels: np.ndarray, policies: Policies, *, batch: int, passes: int
) -> Iterator[BatchRow]:
    """Times all operating points, one after another, or of single images in turns.

    Args:
        networks: both.
        images: ``[M, H, W, C]`` normalised.
        labels: ``[M, …]``.
        policies: by operating point.
        batch: images in a call.
        passes: interleaved pairs.
    """
    if batch > 1:
        for name, policy in policies.items():
            yield time_batch(networks, images, labels, name, policy, batch=batch, passes=passes)
        return
    timed, execute = (
        time_images(networks, images, policies, passes=passes),
        bj.inference.dense(networks.model),
    )
    for name, policy in policies.items():
        answer = execute(networks.variables, images, policy)
        yield BatchRow(
            operating_point=name,
            clock=timed.points[name],
            exit_fractions=_fractions(answer.exit_index, networks),
            thresholds=tuple(np.asarray(policy.thresholds).tolist()),
            baseline_ms=timed.baseline.latency_ms,
            plain_baseline_ms=timed.baseline.latency_ms * timed.baseline.gain_plain,
            accuracy_on_these=float((np.asarray(answer.label) == labels[: len(images)]).mean()),
            plan='',
            baseline='staged',
        )


def _fractions(exits: np.ndarray, networks: Networks) -> Numbers:
    return tuple((np.bincount(exits, minlength=networks.num_exits) / len(exits)).tolist())


def time_batch(
    networks: Networks,
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    policy: bj.ExitPolicy,
    *,
    batch: int,
    passes: int,
) -> BatchRow:
    """Plans both networks for a batch size, and times the plans beside the plain baseline on the same images.

    Args:
        networks: both.
        images: ``[M, H, W, C]`` normalised; the first whole batches of them are used.
        labels: ``[M, …]``.
        name: of the operating point.
        policy: of the operating point.
        batch: images in a call.
        passes: interleaved pairs.
    """
    count = len(images) // batch * batch
    images, labels = images[:count], labels[:count]
    planned = bj.inference.plan(networks.model, networks.variables, images, policy, batch_size=batch)
    # In chunks, image by image, with all cores: what serves the network with exits serves the baseline too.
    alike = bj.inference.plan(
        networks.baseline, networks.baseline_variables, images, np.zeros(0, np.float32), batch_size=batch
    )
    baselines = {'plain': whole(networks.baseline, networks.baseline_variables), alike.executor: alike}
    inputs = on_device(images, batch)
    functions = {key: bj.measure.one_by_one(run, inputs) for key, run in {**baselines, 'planned': planned}.items()}
    seconds = bj.measure.interleaved_passes(functions, passes=passes)
    baseline = fastest(seconds, tuple(baselines))
    answers = [planned(part) for part in inputs]
    exits = np.concatenate([np.asarray(answer.exit_index) for answer in answers])
    right = np.concatenate([np.asarray(answer.label) for answer in answers]) == labels
    return BatchRow(
        operating_point=name,
        clock=Clock.read(seconds, 'planned', baseline=baseline, images=count, batch=batch, executor=planned.executor),
        exit_fractions=_fractions(exits, networks),
        thresholds=tuple(np.asarray(planned.thresholds).tolist()),
        baseline_ms=float(np.median(seconds[baseline])) / count * 1e3,
        plain_baseline_ms=float(np.median(seconds['plain'])) / count * 1e3,
        accuracy_on_these=float(right.mean()),
        plan=str(planned),
        baseline=baseline,
    )


if __name__ == '__main__':
    main()
