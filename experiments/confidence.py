"""Can the confidence of trained exits be trusted, and how much does it save? Reports on a finished run.

    python -m experiments.confidence --workdir=runs/lenet_mnist

Examines guarantees, calibration and criteria, in some minutes on 2 cores. Reads the networks of the main job from the
folder, or those of the package, and writes ``confidence.json`` (rows by section), ``confidence.md`` and
``reliability.png`` there. Validation data fit and choose; test data report, and are the population from which the
simulation of the guarantees draws.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.thresholds import ExitTable
from experiments.run.report import Row, provenance, store, table
from experiments.study import flags
from experiments.study.finished import FinishedRun, read_run
from experiments.study.guarantees import Population, simulate

_GIVEN_UP = (0.0, 0.002, 0.005, 0.01)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and writes the report."""
    parser = flags.parser(__doc__, 'Folder of a finished main job, or a stored report.')
    parser.add_argument('--splits', type=flags.positive, default=1000, help='Number of calibration sets.')
    parser.add_argument('--calibration_size', type=flags.positive, default=2000, help='Inputs in a calibration set.')
    options = parser.parse_args(arguments)
    run(read_run(options.workdir), splits=options.splits, size=options.calibration_size)


def run(finished: FinishedRun, *, splits: int, size: int) -> Row:
    """Makes ``confidence.json``, ``confidence.md`` and the picture; returns the record.

    Args:
        finished: the run.
        splits: calibration sets to draw.
        size: inputs in one.
    """
    networks, dataset, workdir = finished.networks, finished.dataset(), finished.workdir
    costs = bj.costs.count_macs(networks.model, inputs=networks.inputs)
    look = functools.partial(
        bj.inference.exit_outputs, networks.model, networks.variables, preprocess=networks.normalization
    )
    parts = (dataset.validation, dataset.test)
    validation, test = (Cached(look(part.image).logits, part.label, costs) for part in parts)
    title = f'{networks.name} on {finished.config.dataset}'
    fitting, choosing = validation.halves()  # what is fitted on one half is screened on the other
    calibration, temperatures = calibrations(fitting, test, workdir / 'reliability.png', title)
    criteria = all_criteria(fitting, temperatures)
    guarantees = []
    for loss, labels, test_labels in (('error gap', validation.labels, test.labels), ('disagreement', None, None)):
        # The path comes from validation data, the calibration sets from the test outputs.
        statistics = 1 - bj.thresholds.losses_against_full(validation.logits, labels)[..., None]
        path = validation.table().replace(statistics=statistics).screen().path()
        losses = bj.thresholds.losses_against_full(test.logits, test_labels)
        guarantees += simulate(loss, Population(path, test.table(split='test'), losses, size=size, splits=splits))
    sizes = {'validation': len(validation.labels), 'test': len(test.labels), 'calibration': size, 'splits': splits}
    record = {'network': networks.name, 'dataset': finished.config.dataset, **provenance('confidence'), 'inputs': sizes}
    record |= {'guarantees': guarantees, 'calibration': calibration}
    record['criteria'] = compare_criteria(criteria, choosing, test)
    return store(workdir / 'confidence.json', record, page)


@dataclasses.dataclass(frozen=True)
class Cached:
    """The logits of trained exits on a part of the data, computed once.

    Attributes:
        logits: ``[N, B, K]`` as the heads gave them.
        labels: ``[B]``.
        costs: per stage and head.
    """

    logits: np.ndarray
    labels: np.ndarray
    costs: bj.costs.StageCosts

    def halves(self) -> 'tuple[Cached, ...]':
        """Splits the part at random into two."""
        rows = np.array_split(np.random.default_rng(0).permutation(len(self.labels)), 2)
        return tuple(Cached(self.logits[:, part], self.labels[part], self.costs) for part in rows)

    def table(self, criterion: Criterion = bj.criteria.entropy, *, split: str = 'validation') -> ExitTable:
        """Returns the table of a criterion on the part."""
        return ExitTable.from_logits(self.logits, self.labels, self.costs, criterion=criterion, split=split)


def calibrations(fitting: Cached, test: Cached, picture: Path, title: str) -> tuple[list[Row], np.ndarray]:
    """Fits temperatures on validation data and reports calibration on test data; returns rows and temperatures."""
    temperatures = bj.criteria.fit_temperatures(fitting.logits, fitting.labels)
    shared = bj.criteria.fit_temperatures(fitting.logits, fitting.labels, shared=True)
    right = test.logits.argmax(-1) == test.labels
    rows, diagrams = [], {'before': [], 'after': []}
    for n, logits in enumerate(test.logits):
        row = {'exit': n, 'temperature': float(temperatures[n])}
        for name, temperature in (('before', 1.0), ('after', temperatures[n]), ('after_shared', shared[n])):
            scaled = jnp.asarray(logits / temperature)
            confidence = np.asarray(jax.nn.softmax(scaled).max(-1))
            reliability = bj.criteria.reliability(confidence, right[n])
            if name in diagrams:
                diagrams[name].append(reliability)
            row[f'ece_{name}'] = reliability.error
            row[f'adaptive_ece_{name}'] = bj.criteria.reliability(confidence, right[n], equal_counts=True).error
            row[f'brier_{name}'] = bj.criteria.brier_score(scaled, test.labels)
        rows.append(row)
    bj.plots.reliability_diagrams(picture, diagrams, title=f'{title}: reliability on test data')
    return rows, temperatures


def all_criteria(fitting: Cached, temperatures: np.ndarray) -> list[Criterion]:
    """Returns every criterion, entropy first; fits those that learn on validation data."""
    return [
        bj.criteria.entropy,
        bj.criteria.max_probability,
        bj.criteria.margin,
        bj.criteria.patience,
        bj.criteria.ensemble('arithmetic'),
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures(temperatures),
        bj.criteria.fit_learned(fitting.logits, fitting.labels, jax.random.key(0)),
    ]


def compare_criteria(criteria: Sequence[Criterion], choosing: Cached, test: Cached) -> list[Row]:
    """Compares the costs of criteria by two measures.

    ``cost``: of the cheapest setting that on validation data gives up no more than asked against the last exit, with
    its accuracy on test data. ``equal_to_entropy``: read off the test curve of the validation frontier at the accuracy
    of the last exit minus what is given up, so that costs compare at equal accuracy on test data; ÷ entropy's.
    """
    full, full_test = (float((part.logits[-1].argmax(-1) == part.labels).mean()) for part in (choosing, test))
    rows: list[Row] = []
    of_entropy: dict[float, float] = {}
    for criterion in criteria:
        frontier = choosing.table(criterion).screen().frontier()
        on_test = test.table(criterion, split='test').evaluate(frontier)
        for given_up in _GIVEN_UP:
            row: Row = {'criterion': criterion.name, 'given_up': given_up}
            reached = np.flatnonzero(frontier.accuracy >= full - given_up - 1e-9)
            if len(reached):
                row['cost'] = float(on_test.cost[reached[0]])
                row['accuracy_change'] = float(on_test.accuracy[reached[0]]) - full_test
            reaching = on_test.cost[on_test.accuracy >= full_test - given_up - 1e-9]
            if len(reaching):
                of_entropy.setdefault(given_up, float(reaching.min()))
                row['equal_to_entropy'] = float(reaching.min()) / of_entropy[given_up]
            rows.append(row)
    return rows


_GUARANTEES = ('loss', 'method', 'epsilon', 'delta', 'broken', 'allowed', 'mean_risk', 'cost_saved')
_CALIBRATION = ('exit', 'temperature', 'ece_before', 'ece_after', 'ece_after_shared', 'brier_before', 'brier_after')
_CRITERIA = ('criterion', 'given_up', 'cost', 'accuracy_change', 'equal_to_entropy')


def page(record: Row) -> str:
    """Lays out the record in Markdown, with the picture of the same folder."""
    inputs = record['inputs']
    return f"""# Confidence of {record['network']} on {record['dataset']}

`{record['command']}`, {record['device']}. Parameters and thresholds come from {inputs['validation']:,} validation
images, figures from {inputs['test']:,} test images. Costs are multiply-accumulates of an image.

## Guarantees

{inputs['splits']:,} calibration sets of {inputs['calibration']:,} were drawn from the test outputs with replacement. A
guarantee is broken if the risk of the whole population is above ε. The share broken may be δ, and two standard errors
more by chance.

{table(record['guarantees'], *_GUARANTEES)}

## Calibration

{table(record['calibration'], *_CALIBRATION)}

![Reliability diagrams](reliability.png)

## Criteria

Criteria that learn were fitted on one half of the validation data. On the other half the cheapest thresholds were
chosen that give up at most the stated accuracy against the last exit. The table shows their cost and change of accuracy
on test data, then the cost at equal test accuracy ÷ that of entropy. A dash means that no setting reached it.

{table(record['criteria'], *_CRITERIA)}
"""


if __name__ == '__main__':
    main()
