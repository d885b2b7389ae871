"""Labels images that do not fit into memory: Ray Data reads, answers and writes them block by block.

    python -m experiments.service.label --plans=runs/plans --images=images --output=labels

reads Parquet files with the columns ``id`` and ``image``, the bytes of an image as stored, and answers with the plan at
which most images leave early. It writes Parquet files with the columns ``id``, ``label``, ``exit``, ``uncertainty``
of that exit, and ``memory``: by how many bytes the worker's own memory has grown since it loaded the plans. Blocks lie
in Ray's store, which processes share. Ray Data does not keep the order: join by ``id``. It needs the extra ``[ray]``.

    python -m experiments.service.label --plans=runs/plans --images=images --output=labels --check=cifar10

writes 50,000 images of the data set to the folder first, and at last compares with `exit_outputs`. Some minutes. Expect
that no label and no exit differs but for ties, and that the memory stays below two blocks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import branchy_jax as bj
from experiments.run.report import Row
from experiments.service.on_ray import started
from experiments.service.plans import Answerer
from experiments.study import flags

_TIE = 1e-4  # relative distance from a threshold below which rounding may decide
_BATCH = 256  # images that a worker answers at once
_CHECKED, _FILE = 50_000, 5_000  # images, and images of a file


def main(arguments: Sequence[str] | None = None) -> None:
    """Labels the images; compares, if asked."""
    parser = flags.parser(__doc__)
    parser.add_argument('--plans', type=Path, required=True, help='folder of experiments.service.plans')
    parser.add_argument('--images', type=Path, required=True, help='folder of Parquet files to read')
    parser.add_argument('--output', type=Path, required=True, help='folder of Parquet files to write')
    parser.add_argument('--workers', type=flags.positive, default=1, help='processes that answer')
    parser.add_argument('--check', help='data set to write, label and compare')
    options = parser.parse_args(arguments)
    images = None
    if options.check is not None:
        data = bj.data.load_dataset(options.check)
        images = np.concatenate([data.train.image, data.validation.image])[:_CHECKED]
        write_images(options.images, images)
    with started():
        label(options.plans, options.images, options.output, workers=options.workers)
    if images is not None:
        print(compare(options.plans, images, options.output))


class Labeler:
    """Answers batches of images in a worker of Ray Data.

    Args:
        folder: of the plans.
    """

    def __init__(self, folder: str) -> None:
        self._answerer, self._at_start = Answerer.load(folder), 0
        nothing = bytes(np.prod(self._answerer.image_shape))
        self({'id': np.arange(_BATCH), 'image': [nothing] * _BATCH})  # compiles
        self._at_start = _own_memory()

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Answers a batch with the columns ``id`` and ``image``."""
        images = np.stack([self._answerer.decode(content) for content in batch['image']])
        prediction = self._answerer.predict(images, self._answerer.plans[0])
        return {
            'id': batch['id'],
            'label': prediction.label,
            'exit': prediction.exit_index,
            'uncertainty': prediction.uncertainty,
            'memory': np.full(len(images), _own_memory() - self._at_start),
        }


def _own_memory() -> int:
    """Returns the bytes of this process that no other one shares; Ray's store of blocks is shared."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def label(plans: Path, images: Path, output: Path, *, workers: int = 1) -> None:
    """Labels the images of a folder."""
    answered = ray.data.read_parquet(str(images.resolve())).map_batches(
        Labeler,
        fn_constructor_args=(str(plans.resolve()),),
        batch_size=_BATCH,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    answered.write_parquet(str(output.resolve()), mode='overwrite')


def write_images(folder: Path, images: np.ndarray) -> None:
    """Writes images with ids from 0 as Parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), _FILE):
        part = images[start : start + _FILE]
        columns = {'id': np.arange(start, start + len(part)), 'image': [image.tobytes() for image in part]}
        pq.write_table(pa.table(columns), folder / f'{start:08}.parquet')


def compare(plans: Path, images: np.ndarray, output: Path) -> Row:
    """Returns how many answers differ from `exit_outputs`, how many are ties, and a worker's memory in blocks."""
    answerer = Answerer.load(plans)
    weights, policy = answerer.weights, answerer.plans[0].policy
    outputs = bj.inference.exit_outputs(
        weights.model, weights.variables, images, criterion=policy.criterion, preprocess=weights.normalization
    )
    side, thresholds = outputs.uncertainty[:-1], np.asarray(policy.thresholds)[:, None]
    rows, always = np.arange(len(images)), np.ones((1, len(images)), bool)
    exits = np.vstack([bj.criteria.is_confident(side, thresholds), always]).argmax(axis=0)
    tie = (np.abs(side - thresholds) <= _TIE * thresholds).any(axis=0)
    expected = {'id': rows, 'label': outputs.logits[exits, rows].argmax(axis=1), 'exit': exits}
    written = pq.read_table(output).sort_by('id').to_pydict()
    differ = np.any([np.array(written[name]) != values for name, values in expected.items()], axis=0)
    block = min(images.nbytes, ray.data.DataContext.get_current().target_max_block_size)
    blocks = max(written['memory']) / block
    return {'images': len(images), 'differ': int(differ[~tie].sum()), 'ties': int(tie.sum()), 'blocks': blocks}


if __name__ == '__main__':
    main()
