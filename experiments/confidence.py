"""How far the confidence of trained exits can be trusted, and what it buys: one report.

    python -m experiments.confidence --workdir=runs/lenet_mnist

Takes the networks that the main job left in the folder. Writes ``confidence.json``, ``confidence.md`` and pictures.
What is fitted or chosen comes from the validation data; test data report, and serve as the population from which the
simulation of the guarantees draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import branchy_jax as bj
from experiments.pages.confidence import page
from experiments.run import command
from experiments.run.networks import FinishedRun, read_run
from experiments.study import comparisons
from experiments.study.cached import Cached
from experiments.study.promises import Population, simulate


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and writes the report."""
    parser = command.parser_of_a_run(__doc__)
    parser.add_argument('--splits', type=command.positive, default=1000, help='Calibration sets to draw.')
    parser.add_argument('--calibration_size', type=command.positive, default=2000, help='Inputs in a calibration set.')
    options = parser.parse_args(arguments)
    run(read_run(options.workdir), splits=options.splits, size=options.calibration_size)


def run(finished: FinishedRun, *, splits: int, size: int) -> dict[str, Any]:
    """Makes ``confidence.json``, ``confidence.md`` and the pictures; returns the record.

    Args:
        finished: the run.
        splits: calibration sets to draw.
        size: inputs in one.
    """
    networks, dataset, workdir = finished.networks, finished.dataset(), finished.workdir
    costs = bj.costs.count_macs(networks.model, inputs=networks.inputs)

    def cached(images: Any, labels: Any) -> Cached:
        outputs = bj.inference.exit_outputs(
            networks.model, networks.variables, images, preprocess=networks.normalization
        )
        return Cached(outputs.logits, labels, costs)

    validation = cached(dataset.validation.image, dataset.validation.label)
    test = cached(dataset.test.image, dataset.test.label)
    title = f'{networks.name} on {finished.config.dataset}'
    fitting, choosing = validation.halves()  # what is fitted on one half is screened on the other
    calibration, temperatures = comparisons.calibrations(fitting, test, workdir / 'reliability.png', title)

    criteria = comparisons.all_criteria(fitting, temperatures)
    record = {
        'network': networks.name,
        'dataset': finished.config.dataset,
        **command.provenance('confidence'),
        'inputs': {'validation': len(validation), 'test': len(test), 'calibration set': size},
        **simulate(networks.name, _populations(validation, test, splits=splits, size=size)),
        'calibration': calibration,
        'criteria': comparisons.compare_criteria(criteria, choosing, test),
        'search': comparisons.searches(networks, dataset.validation.image, validation, test),
        'exact_search': comparisons.time_exact_search(),
        'control': comparisons.control(cached, dataset.test, validation, workdir / 'control.png', title),
        'protocols': comparisons.protocols(criteria, choosing, test, workdir / 'protocols.png', title),
        'exits': comparisons.who_leaves_where(dataset.test.image, validation, test, workdir / 'exits.png', title),
    }
    bj.report.write_json(workdir / 'confidence.json', record)
    bj.report.write_text(workdir / 'confidence.md', page(record))
    return record


def _populations(validation: Cached, test: Cached, *, splits: int, size: int) -> dict[str, Population]:
    """The paths come from validation data, the calibration sets from the test outputs."""
    found = {}
    for name, labels, test_labels in (('error gap', validation.labels, test.labels), ('disagreement', None, None)):
        statistics = 1 - bj.thresholds.losses_against_full(validation.logits, labels)[..., None]
        path = validation.table().replace(statistics=statistics).screen().path()
        losses = bj.thresholds.losses_against_full(test.logits, test_labels)
        found[name] = Population(path, test.table(split='test'), losses, size=size, splits=splits)
    return found


if __name__ == '__main__':
    main()
