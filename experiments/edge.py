"""What does a network cost that edge devices and a cloud share? Latency, bytes and accuracy for every cut.

    TFDS_DATA_DIR=DIR python -m experiments.edge --workdir=runs/edge --network=b-alexnet --dataset=cifar10

Writes the stage files of a published network, and starts one cloud and ``--edges`` edges from them, processes without
jax (`experiments.study.edge_cloud`). The edges answer test images, one at a time, for every cut, with activations in 4,
2 and 1 bytes. An edge simulates a link of a stated delay and bandwidth, and a processor ``--slower`` times slower than
the cloud's, by waiting. At cut 0 the cloud gets the stored pixels; at cut N, the number of exits, an edge answers
alone. In the last run the cloud is killed when it has answered half of its images, and starts again after ``--outage``
seconds. Needs ``pip install '.[onnx]'``; takes a quarter of an hour with ``--images=5000``. Writes ``edge.json``,
``edge.md`` and ``edge.png``. Expect no image without an answer, and with 4 bytes no answer that differs from `dense`,
except those that an edge gave because the cloud was away.

After Teerapittayanon, McDanel and Kung, Distributed Deep Neural Networks over the Cloud, the Edge and End Devices,
2017.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import branchy_jax as bj
from branchy_jax.plots import SERIES, new_axes, save
from experiments.run.report import Row, provenance, table
from experiments.study import flags
from experiments.study.edge_cloud import DTYPES

_ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, runs the processes for every cut, writes the report."""
    parser = flags.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for stage files and report.')
    parser.add_argument('--network', default='b-alexnet', help='A published network.')
    parser.add_argument('--dataset', default='cifar10', help='That it was trained on.')
    parser.add_argument('--images', type=flags.positive, default=1000, help='Number of test images.')
    parser.add_argument('--cuts', type=int, nargs='*', help='Cuts, before the run in which the cloud dies; all.')
    parser.add_argument('--edges', type=flags.positive, default=2, help='Number of edges.')
    parser.add_argument('--delay_ms', type=float, default=10.0, help='Delay of the link, one way.')
    parser.add_argument('--mbit', type=float, default=10.0, help='Megabits a second of the link.')
    parser.add_argument('--slower', type=float, default=10.0, help='How many times longer an edge computes.')
    parser.add_argument('--patience', type=float, default=1.0, help='Seconds after which the cloud counts as away.')
    parser.add_argument('--outage', type=float, default=3.0, help='Seconds that the killed cloud stays away.')
    options = parser.parse_args(arguments)
    weights = bj.models.load_pretrained(options.network, dataset=options.dataset)
    test = bj.data.load_dataset(options.dataset).test
    images, labels = (np.asarray(values[: options.images]) for values in (test.image, test.label))
    options.images = len(images)
    point, inputs = weights.operating_points[0], weights.normalize(images)
    given = {'inputs': weights.inputs, 'normalization': weights.normalization}
    options.workdir.mkdir(parents=True, exist_ok=True)
    np.save(options.workdir / 'images.npy', images)
    shutil.rmtree(options.workdir / 'stages', ignore_errors=True)
    bj.export.save_stages(options.workdir / 'stages', weights.model, weights.variables, point, **given)
    expected = bj.inference.dense(weights.model)(weights.variables, inputs, point)
    num_exits, rows = 1 + len(point.thresholds), []
    cuts = range(num_exits + 1) if options.cuts is None else options.cuts
    runs = [(cut, dtype) for cut in cuts for dtype in (DTYPES if 0 < cut < num_exits else DTYPES[:1])]
    for cut, dtype in runs:
        answers, counts = run(options, cut, dtype)
        sent = 'pixels' if cut == 0 else dtype if cut < num_exits else None
        rows.append({'cut': cut, 'sent_as': sent, **summary(answers, counts, labels, expected)})
        print(table(rows[-1:], *_COLUMNS), flush=True)
    beyond = int((np.asarray(expected.exit_index) >= 1).sum())
    answers, counts = run(options, 1, DTYPES[0], kill_after=beyond // 2)
    rows.append({'cut': 1, 'sent_as': DTYPES[0], 'outage': True, **summary(answers, counts, labels, expected)})
    names = ('network', 'dataset', 'images', 'edges', 'delay_ms', 'mbit', 'slower', 'patience', 'outage')
    record = {**provenance('edge'), **{name: getattr(options, name) for name in names}, 'rows': rows}
    bj.report.write_json(options.workdir / 'edge.json', record)
    bj.report.write_text(options.workdir / 'edge.md', page(record))
    picture(options.workdir / 'edge.png', record)
    print(page(record))


def run(
    options: argparse.Namespace, cut: int, dtype: str, *, kill_after: int | None = None
) -> tuple[dict[str, np.ndarray], Row]:
    """Starts a cloud and the edges, and waits for all answers.

    Args:
        options: of the command, whose folder holds the stage files and the images; the edges take them in turns.
        cut: the first exit that the cloud asks.
        dtype: of what is sent.
        kill_after: images that the cloud answers before it is killed; by default it lives.

    Returns:
        What `experiments.study.edge_cloud.answer` returns, of all images, and the counts of the last cloud.

    Raises:
        SystemExit: an edge failed, or an image does not have one answer.
    """
    given = [f'--cut={cut}', f'--dtype={dtype}', f'--images={options.workdir / "images.npy"}']
    link = options.delay_ms / 1e3, options.mbit * 125_000, options.patience
    given += [f'--slower={options.slower}', '--link', *map(str, link)]
    outputs = [options.workdir / f'edge_{n}.npz' for n in range(options.edges)]
    with contextlib.ExitStack() as stack:
        cloud = stack.enter_context(_started(options, 'cloud'))
        port, edges = int(cloud.stdout.readline()), []
        for n, output in enumerate(outputs):
            own = [f'--port={port}', f'--output={output}', '--share', str(n), str(options.edges)]
            edges.append(stack.enter_context(_started(options, 'edge', *own, *given)))
        if kill_after is not None:
            while _counts(port)['images'] < kill_after and any(edge.poll() is None for edge in edges):
                time.sleep(0.05)
            cloud.kill()
            cloud.wait()
            time.sleep(options.outage)
            cloud = stack.enter_context(_started(options, 'cloud', f'--port={port}'))
            cloud.stdout.readline()  # it listens
        codes = [edge.wait() for edge in edges]
        counts = _counts(port)
    if any(codes):
        raise SystemExit(f'an edge failed at cut {cut} with {dtype}')
    parts = [np.load(output, allow_pickle=False) for output in outputs]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(found['id'])
    if found['id'][order].tolist() != list(range(options.images)):
        raise SystemExit(f'{len(found["id"])} answers to {options.images} images, or one of them twice')
    return {name: values[order] for name, values in found.items()}, counts


@contextlib.contextmanager
def _started(options: argparse.Namespace, role: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Starts one of the two processes, and ends it at last."""
    command = [sys.executable, '-m', 'experiments.study.edge_cloud', role, options.workdir / 'stages', *flags]
    environment = {**os.environ, 'PYTHONPATH': str(_ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def _counts(port: int) -> Row:
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=10)) as connection:
        connection.request('GET', '/')
        return json.loads(connection.getresponse().read())


def summary(answers: dict[str, np.ndarray], counts: Row, labels: np.ndarray, expected: bj.ExitPrediction) -> Row:
    """Returns the figures of a run.

    Args:
        answers: of all images.
        counts: of the cloud.
        labels: right ones.
        expected: what `dense` answers.
    """
    place, latency = answers['place'], answers['latency_ms']
    differ = (answers['label'] != expected.label) | (answers['exit_index'] != expected.exit_index)
    sent = answers['bytes'][place != 'edge']
    return {
        'edge_share': float((place == 'edge').mean()),
        'bytes_sent': float(sent.mean()) if len(sent) else 0.0,
        'bytes_per_image': float(answers['bytes'].mean()),
        'latency_ms': float(latency.mean()),
        'p99_ms': float(np.quantile(latency, 0.99)),
        'accuracy': float((answers['label'] == labels).mean()),
        'differ': int((differ & (place != 'away')).sum()),
        'repeated': int((answers['attempts'] > 1).sum()),
        'cloud_away': int((place == 'away').sum()),
        'rows_in_batch': counts['images'] / counts['batches'] if counts['batches'] else None,
        'answered': len(place),
    }


_COLUMNS = ('cut', 'sent_as', 'edge_share', 'bytes_sent', 'bytes_per_image', 'latency_ms', 'p99_ms', 'accuracy')
_COLUMNS += ('differ', 'rows_in_batch')


def page(record: Row) -> str:
    """Lays out the record in Markdown."""
    *rows, outage = record['rows']
    return f"""# Edges and a cloud: {record['network']} on {record['dataset']}

`{record['command']}`, {record['device']}

{record['edges']} edges and one cloud on one machine answer {record['images']} test images, one at a time at each edge.
An edge simulates, by waiting, a link of {record['delay_ms']:g} ms one way and {record['mbit']:g} Mbit/s, and a
processor {record['slower']:g} times slower than the cloud's; the time of the loopback itself is left out. The edge asks
the exits before `cut`, the cloud asks the others; at cut 0 the cloud asks all, at the last cut none. `bytes sent` is of
an image that is sent, `bytes per image` the mean over all images. `differ` counts answers that differ from `dense`.

{table(rows, *_COLUMNS)}

![Latency against bytes of each cut](edge.png)

In one more run the cloud was killed when it had answered half of its images, and started again after
{record['outage']:g} s. An edge repeats a request for {record['patience']:g} s; then the edge answers with its last exit
and marks the answer.

{table([outage], 'cut', 'answered', 'repeated', 'cloud_away', 'differ', 'edge_share', 'accuracy', 'p99_ms')}
"""


def picture(path: Path, record: Row) -> None:
    """Draws latency against bytes, with the accuracy of each cut."""
    given = f'{record["delay_ms"]:g} ms one way, {record["mbit"]:g} Mbit/s, edges {record["slower"]:g} times slower'
    figure, axes = new_axes(f'{record["network"]}: {given}', x='bytes sent per image, mean', y='latency (ms), mean')
    for row in record['rows'][:-1]:
        place = row['bytes_per_image'], row['latency_ms']
        axes.plot(*place, 'o', color=SERIES[row['cut'] % len(SERIES)])
        text = f'cut {row["cut"]}, {row["sent_as"] or "nothing"}: {100 * row["accuracy"]:.2f} %'
        axes.annotate(text, place, xytext=(6, -2), textcoords='offset points', fontsize=7)
    widest = max(row['bytes_per_image'] for row in record['rows'])
    axes.set_xlim(-0.02 * widest, 1.2 * widest)  # the text of the widest needs room
    save(figure, path)


if __name__ == '__main__':
    main()
