"""Plans along a path of thresholds: measured once, then loaded by everything that answers images.

    python -m experiments.service.plans --plans=runs/plans --network=b-lenet@mnist --dataset=mnist5k --floor=0.97

chooses a few settings of the thresholds on validation data, from leaving most, as far as the floor of accuracy allows,
to leaving least. It plans each of them on this device and writes the plans into the folder. `experiments.service.app`,
`experiments.service.on_ray` and `experiments.service.label` load that folder and measure nothing. A plan is for a
number of cores: ``--cores=1`` plans for replicas of one core each.
"""

import collections
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.inference import Plan
from branchy_jax.models import Pretrained
from branchy_jax.thresholds import Controller
from experiments.run.report import Row
from experiments.study import flags

_TO_PLAN_ON = 512
_RECENT = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the plans and prints their tables."""
    parser = flags.parser(__doc__)
    parser.add_argument('--plans', type=Path, required=True, help='folder to write')
    parser.add_argument('--network', default='b-lenet@mnist', help='network@dataset, or a folder')
    parser.add_argument('--dataset', default='mnist5k', help='whose validation images choose the thresholds')
    parser.add_argument('--floor', type=float, default=0.97, help='lowest accuracy on validation data')
    parser.add_argument('--settings', type=flags.positive, default=4, help='of the thresholds; a plan for each')
    parser.add_argument('--batch_size', type=flags.positive, default=16, help='images that are answered at once')
    parser.add_argument('--cores', type=flags.positive, help='to plan for; all by default')
    options = parser.parse_args(arguments)
    if options.cores is not None:
        take_cores(options.cores)
    weights, data = load(options.network), bj.data.load_dataset(options.dataset)
    sizes = {'settings': options.settings, 'batch_size': options.batch_size}
    make_plans(options.plans, weights, data.validation, floor=options.floor, **sizes)
    made = {name: getattr(options, name) for name in ('network', 'dataset', 'floor', 'settings', 'cores')}
    bj.report.write_json(options.plans / 'service.json', made)


def load(network: str) -> Pretrained:
    """Loads ``network@dataset``, or the network of a folder."""
    name, _, trained_on = network.partition('@')
    return bj.models.load_pretrained(name, dataset=trained_on or None)


def take_cores(count: int, rank: int = 0) -> None:
    """Binds this thread, and the threads that it starts, to some cores; processes of other ranks take the next ones."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(rank * count + n) % len(cores)] for n in range(count)})


def make_plans(
    folder: Path, weights: Pretrained, validation: bj.Batch, *, floor: float, settings: int, batch_size: int
) -> None:
    """Writes ``plan_0.json``, which leaves most, and so on to the plan that leaves least."""
    criterion = weights.operating_points[0].policy.criterion if weights.operating_points else bj.criteria.entropy
    network = weights.model, weights.variables
    table = bj.inference.exit_table(*network, validation, preprocess=weights.normalize, criterion=criterion)
    path = table.path_by_shares(floor=floor)
    images, planned = np.asarray(weights.normalize(validation.image[:_TO_PLAN_ON])), None
    for n, row in enumerate(np.linspace(0, len(path) - 1, settings).round().astype(int)):
        policy = bj.ExitPolicy(criterion, path[row])
        planned = bj.inference.plan(*network, images, policy, batch_size=batch_size, earlier=planned)
        planned.save(folder / f'plan_{n}.json')
        print(planned)


class Answerer:
    """Answers batches with the plan that the waiting time calls for: the longer images wait, the earlier they leave.

    After Apparate (Dai et al., Apparate: Rethinking Early Exits to Tame Latency-Throughput Tensions in ML Serving,
    2024). A controller moves along the plans; accuracy on validation data stays above the floor of the first.

    Args:
        weights: the network.
        plans: of the network, from leaving most to leaving least.
        target_ms: the waiting time to hold.
        deadline_ms: after which an answer counts as late.
        horizon: images after which an error of the waiting time has shrunk to a third.
    """

    def __init__(
        self,
        weights: Pretrained,
        plans: Sequence[Plan],
        *,
        target_ms: float = 20.0,
        deadline_ms: float = 250.0,
        horizon: float = 100.0,
    ) -> None:
        self.weights, self.plans, self.deadline_ms = weights, plans, deadline_ms
        # The path is the position itself: every setting of the thresholds has a plan of its own.
        settings = {'target': target_ms, 'scale': 4 * target_ms, 'position': 1.0, 'horizon': horizon}
        self.controller = Controller.create([[1.0], [0.0]], criterion=bj.criteria.entropy, **settings)
        self.answered, self.missed, self.exits = 0, 0, [0] * (1 + len(plans[0].thresholds))
        self.recent: collections.deque[tuple[Row, np.ndarray]] = collections.deque(maxlen=_RECENT)
        self._update = jax.jit(Controller.update)
        self.predict(np.zeros((1, *self.image_shape), np.uint8), self.plan)
        self._observe(np.zeros(0))

    @classmethod
    def load(cls, folder: Path | str, *, rank: int = 0, **options: Any) -> 'Answerer':
        """Loads what ``python -m experiments.service.plans`` wrote, and compiles it.

        Args:
            folder: of the plans.
            rank: of this process among those that answer on this machine: each takes cores of its own.
            **options: of the class.
        """
        made = bj.report.read_json(Path(folder) / 'service.json')
        if made['cores'] is not None:
            take_cores(made['cores'], rank)
        weights, plans, planned = load(made['network']), [], None
        for n in range(made['settings']):
            path = Path(folder) / f'plan_{n}.json'
            planned = Plan.load(path, weights.model, weights.variables, earlier=planned)
            planned.warm_up()
            plans.append(planned)
        return cls(weights, plans, **options)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)`` of an image."""
        return tuple(self.weights.inputs.shape[1:])

    @property
    def batch_size(self) -> int:
        """Images that are best answered at once."""
        return self.plans[0].batch_size

    @property
    def plan(self) -> Plan:
        """The plan at the controller's position."""
        return self.plans[round(float(self.controller.position) * (len(self.plans) - 1))]

    def decode(self, content: bytes) -> np.ndarray:
        """Returns the image that a request holds: uint8 as stored, in C order.

        Raises:
            ValueError: bytes that are not such an image.
        """
        if len(content) != np.prod(self.image_shape):
            expected = f'{np.prod(self.image_shape)} bytes, uint8 {self.image_shape}'
            raise ValueError(f'image: expected {expected}, got {len(content)}')
        return np.frombuffer(content, np.uint8).reshape(self.image_shape)

    def predict(self, images: np.ndarray, plan: Plan) -> bj.ExitPrediction:
        """Answers stored images ``[B, H, W, C]`` with a plan."""
        # Padded to whole batches, since JAX compiles the normalisation for every size.
        padded = np.minimum(np.arange(-(-len(images) // self.batch_size) * self.batch_size), len(images) - 1)
        normalized = np.asarray(self.weights.normalize(images[padded]))[: len(images)]
        return plan(normalized, as_numpy=True)

    def __call__(self, images: Sequence[np.ndarray], arrived: Sequence[float]) -> list[Row]:
        """Answers at most a batch of stored images, and moves the controller.

        Args:
            images: ``[H, W, C]`` each.
            arrived: seconds of `time.monotonic` at which they came.

        Returns:
            For each image its ``number`` in order of answers, its class as ``label``, the ``exit`` that answered, from
            0, ``waited_ms`` from its arrival until now, and whether the answer is ``in_time``.
        """
        prediction, rows = self.predict(np.stack(images), self.plan), []
        waited = 1e3 * (time.monotonic() - np.array(arrived))
        self._observe(waited)
        for image, label, leaves, ms in zip(images, prediction.label, prediction.exit_index, waited, strict=True):
            row = {'number': self.answered, 'label': int(label), 'exit': int(leaves), 'waited_ms': float(ms)}
            rows.append({**row, 'in_time': bool(ms <= self.deadline_ms)})
            self.answered += 1
            self.missed += ms > self.deadline_ms
            self.exits[leaves] += 1
            self.recent.append((rows[-1], image))
        return rows

    def _observe(self, waited: np.ndarray) -> None:
        observed = np.full(self.batch_size, np.nan, np.float32)  # one size, so that the update compiles once
        observed[: len(waited)] = waited
        self.controller = self._update(self.controller, observed)

    def stats(self) -> dict[str, Any]:
        """Returns counts, and the position along the plans."""
        return {
            'answered': self.answered,
            'missed': int(self.missed),
            'exits': list(self.exits),
            'position': float(self.controller.position),
            'recent_ms': [row['waited_ms'] for row, _ in list(self.recent)],
        }


if __name__ == '__main__':
    main()
