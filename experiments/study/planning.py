"""How long planning takes, and what for; then how long a plan at other thresholds and the warm-up take.

    python -m experiments.study.planning --workdir=runs/planning

Weights are random: time does not depend on them. Images leave at forced shares. Nothing is taken from a cache of
compiled programs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.report import markdown_table, write_json, write_text
from branchy_jax.thresholds import ExitTable
from branchy_jax.types import Variables
from experiments.run import command
from experiments.study.cells import USUAL_SHARES

# Residual branches so weak that a hundred of them do not overflow where no BatchNorm knows the images.
_KERNEL_SCALE = 0.3


def main(arguments: Sequence[str] | None = None) -> None:
    """Plans, prints where the time goes, and writes ``planning.json`` and ``planning.md``."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder to write into.')
    parser.add_argument('--network', default='b-resnet110', help='With exits.')
    parser.add_argument('--batch', type=command.positive, default=64, help='Images in a call.')
    options = parser.parse_args(arguments)
    jax.config.update('jax_enable_compilation_cache', False)
    record = measure(options.network, options.batch)
    write_json(options.workdir / 'planning.json', {**command.provenance('study.planning'), **record})
    write_text(options.workdir / 'planning.md', page(record, **command.provenance('study.planning')))


def measure(name: str, batch: int) -> dict[str, Any]:
    """Plans twice, and warms the second plan up. Returns seconds, of wall and of all cores, by what was done."""
    model = bj.models.create(name)
    images = np.random.default_rng(1).standard_normal((batch, *model.image_shape), np.float32)
    variables = random_variables(model, images)
    costs = bj.costs.count_macs(model, inputs=images)
    exits = len(costs.stages)
    table = ExitTable(
        uncertainty=bj.inference.exit_outputs(model, variables, images).uncertainty,
        statistics=np.zeros((exits, batch, 1)),
        costs=costs,
        criterion=bj.criteria.entropy,
        split='random images',
    )
    equal = np.full(exits, 1 / exits)
    first, other = table.for_shares(USUAL_SHARES.get(exits, equal)), table.for_shares(equal)
    clock, phases = _Clock(), []
    planned = bj.inference.plan(model, variables, images, first, on_progress=lambda text, _: phases.append(clock(text)))
    later = _Clock()
    again = bj.inference.plan(model, variables, images, other, earlier=planned)
    phases = [{**phase, **taken} for phase, taken in zip(phases, _differences(phases), strict=True)]
    seconds = {'plan': phases[-1]['at'], 'plan at other thresholds': later('')['at']}
    warm = _Clock()
    again.warm_up()
    seconds['warm-up'] = warm('')['at']
    for phase in phases:
        print(f'{phase["seconds"]:8.1f} s {phase["core_seconds"]:8.1f} core s   {phase["what"]}')
    print(seconds, planned, sep='\n')
    return {'network': name, 'batch': batch, 'seconds': seconds, 'phases': phases, 'plan': str(planned)}


def random_variables(model: Any, images: np.ndarray) -> Variables:
    """Makes variables without compiling an initialisation."""
    generator = np.random.default_rng(0)

    def leaf(path: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind == 'kernel':
            scale = _KERNEL_SCALE * np.sqrt(2 / np.prod(spec.shape[:-1]))
            return generator.standard_normal(spec.shape, np.float32) * np.float32(scale)
        return np.full(spec.shape, float(kind in ('scale', 'var')), np.float32)

    specs = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, specs))


class _Clock:
    """Returns seconds since it was made: of the wall, and of all cores together."""

    def __init__(self) -> None:
        self._wall, self._cores = time.perf_counter(), time.process_time()

    def __call__(self, what: str) -> dict[str, Any]:
        return {'what': what, 'at': time.perf_counter() - self._wall, 'cores_at': time.process_time() - self._cores}


def _differences(phases: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns how long each phase took, which is until the next began."""
    ends = [*phases[1:], phases[-1]]
    return [
        {'seconds': end['at'] - phase['at'], 'core_seconds': end['cores_at'] - phase['cores_at']}
        for phase, end in zip(phases, ends, strict=True)
    ]


def page(record: dict[str, Any], *, device: str, command: str) -> str:
    """Returns the Markdown page."""
    rows = [[p['what'], f'{p["seconds"]:.1f}', f'{p["core_seconds"]:.1f}'] for p in record['phases'][:-1]]
    seconds = '\n'.join(f'- {what}: {value:.1f} s' for what, value in record['seconds'].items())
    return f"""# How long planning takes

`{command}`

{device}. {record['network']}, batches of {record['batch']}, nothing compiled before.

{seconds}

{markdown_table(['while planning', 'seconds', 'seconds of all cores'], rows)}

```
{record['plan']}
```
"""


if __name__ == '__main__':
    main()
