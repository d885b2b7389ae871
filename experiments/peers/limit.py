"""How much of the gain that ONNX Runtime's own stages and heads allow does the file for batches realise?"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.inference.onnx_program import onnx_program
from branchy_jax.measure import interleaved_passes, paired_ratio
from experiments.peers.contenders import session_of
from experiments.peers.forcing import Forced
from experiments.peers.job import Job
from experiments.run.report import Row, of_ratio, table

_COLUMNS = ('network', 'batch', 'cores', 'forced', 'bare_ms', 'ms', 'gain', 'time_limit', 'realised', 'mac_limit')


def measure(forced: Forced, *, rounds: int) -> Row:
    """Times the file whose rows leave one by one, and the stages and heads up to each exit on all rows, in turns.

    Args:
        forced: the job of one batch, and who leaves where.
        rounds: timed passes of each.

    Returns:
        A row: ``gain``, the time of the network without exits ÷ that of the file; ``time_limit``, the same ÷ the time
        of stages and heads up to each exit, weighted by the shares that leave there; ``realised``, gain ÷ limit.

    Raises:
        ValueError: an image leaves at another exit than forced.
    """
    import onnx

    job, num_exits = forced.job, len(forced.logits)
    model, image = bj.models.create(job.network), jax.ShapeDtypeStruct(job.images[:1].shape, np.float32)
    make = functools.partial(onnx_program, model, job.variables, np.array(job.thresholds), image)
    whole, every = session_of(make(batch=True), job), onnx.load_from_string(make(every_exit=True))
    answer = functools.partial(whole.run, ['label', 'exit_index'], {'image': job.images})
    if (answer()[1] != forced.exits).any():
        raise ValueError(f'{job.network}: images leave at other exits than forced')
    passes: dict[str, Callable[[], Any]] = {'file': answer, 'bare': _up_to(every, slice(-1, None), job)}
    passes |= {str(n): _up_to(every, slice(n + 1), job) for n in range(num_exits)}
    seconds = interleaved_passes(passes, passes=rounds, settle=2)
    shares = np.bincount(forced.exits, minlength=num_exits) / len(forced.exits)
    limit = sum(share * seconds[str(n)] for n, share in enumerate(shares))
    row: Row = {'network': job.network, 'batch': job.batch, 'cores': job.cores, 'forced': shares.tolist()}
    for name, of in (('bare_ms', 'bare'), ('ms', 'file')):
        row[name] = float(np.median(seconds[of])) / len(forced.exits) * 1e3
    bare, file = seconds['bare'], seconds['file']
    for name, pair in {'gain': (bare, file), 'time_limit': (bare, limit), 'realised': (limit, file)}.items():
        row |= of_ratio(name, paired_ratio(*pair))
    costs = bj.costs.count_macs(model, inputs=image)
    return {**row, 'mac_limit': float(bj.costs.mac_limit(costs, shares)), 'rounds': rounds}


def _up_to(file: Any, outputs: slice, job: Job) -> Callable[[], Any]:
    """Returns a call that computes these outputs of a file from all images, and nothing else."""
    import onnx.utils

    part = onnx.utils.Extractor(file).extract_model(['image'], [output.name for output in file.graph.output[outputs]])
    return functools.partial(session_of(part.SerializeToString(), job).run, None, {'image': job.images})


def page(record: Row) -> str:
    """Lays out rows in Markdown."""
    rows = record['rows']
    commands = '\n'.join(sorted({f'- `{row["command"]}`, {row["device"]}, {row["rounds"]} rounds' for row in rows}))
    return f"""# The file for batches in ONNX Runtime, beside the limit of its gain

{commands}

Our own files in one process, in turns; milliseconds an image. `bare` is the network without exits. The time limit of
the gain is the time of `bare` ÷ the expected time of the stages and heads up to the exit of an image, each measured on
all images of the batch in the same engine; realised is gain ÷ limit. Ratios are medians over rounds with their 95 %
interval.

{table(rows, *_COLUMNS)}
"""
