"""How long do images wait under load, and what becomes of them if a replica dies? In one process, or on Ray.

    python -m experiments.service.plans --plans=runs/plans --network=b-alexnet@cifar10 --dataset=cifar10 --floor=0.78
    python -m experiments.service.load --plans=runs/plans --workdir=runs/load

sends 5,000 test images over HTTP, from 4 clients, from 32 and from 4 again, and writes ``load.json`` and ``load.md``.
Each client sends its next image when the last one is answered, and sends a refused image again. The page of
`experiments.service.app` is there to watch meanwhile. Expect every image to be answered, and images to leave earlier
where 32 clients send.

    python -m experiments.service.load --plans=runs/plans --workdir=runs/load_ray --ray

sends them to replicas of `experiments.service.on_ray` from 32 clients, over HTTP and through a handle: to one replica,
to two, to two of which one is killed, and to one to which Ray adds a second. Some minutes; plan with ``--cores=1``.
Expect every image to be answered, at most 32 of them after a client sent them again. Where a replica was killed or
added, expect a new one to answer.
"""

import argparse
import contextlib
import functools
import http.client
import json
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import branchy_jax as bj
from experiments.run.report import Row, provenance, table
from experiments.service import app
from experiments.service.plans import Answerer
from experiments.study import flags

_FEW = 8  # of this many clients one sends before and after the burst
Case = tuple[int, int, bool]
"""The fewest and the most replicas, and whether one of them is killed."""
_ON_RAY: Sequence[Case] = ((1, 1, False), (2, 2, False), (2, 2, True), (1, 2, False))
Send = Callable[[np.ndarray], tuple[Row, int]]
"""Sends an image until it is answered; returns the answer, and how often it was sent again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the service, sends, writes the report."""
    parser = flags.parser(__doc__)
    parser.add_argument('--plans', type=Path, required=True, help='folder of experiments.service.plans')
    parser.add_argument('--workdir', type=Path, required=True, help='folder for results')
    parser.add_argument('--ray', action='store_true', help='replicas on Ray in place of one process')
    parser.add_argument('--port', type=flags.positive, default=8000, help='of the replicas, on 127.0.0.1')
    parser.add_argument('--target_ms', type=float, default=20.0, help='target of the waiting time')
    parser.add_argument('--requests', type=flags.positive, default=5000, help='images in each row of the report')
    parser.add_argument('--clients', type=flags.positive, default=32, help='that send at the same time')
    options = parser.parse_args(arguments)
    made = bj.report.read_json(options.plans / 'service.json')
    test = bj.data.load_dataset(made['dataset']).test
    rows = list((on_ray if options.ray else in_one_process)(options, test))
    given = {name: getattr(options, name) for name in ('target_ms', 'requests', 'clients')}
    record = {**provenance('service.load'), **made, **given, 'rows': rows}
    bj.report.write_json(options.workdir / 'load.json', record)
    bj.report.write_text(options.workdir / 'load.md', page(record))
    print(page(record))


def in_one_process(options: argparse.Namespace, test: bj.Batch) -> Iterator[Row]:
    """Yields a row before, during and after a burst of clients."""
    service = app.Service(Answerer.load(options.plans, target_ms=options.target_ms))
    with app.served(service) as port:
        print(f'http://127.0.0.1:{port}')
        for clients in (options.clients // _FEW, options.clients, options.clients // _FEW):
            row = send_all(functools.partial(send_over_http, port), test, options.requests, max(1, clients))
            yield {'service': 'one process', 'through': 'HTTP', **row}


def on_ray(options: argparse.Namespace, test: bj.Batch, cases: Sequence[Case] = _ON_RAY) -> Iterator[Row]:
    """Yields for each case a row over HTTP and one through a handle."""
    from experiments.service.on_ray import deploy, started

    with started(options.port):
        for fewest, most, kills in cases:
            handle = deploy(options.plans, fewest, most, options.target_ms)
            replicas = f'{fewest}' if fewest == most else f'{fewest} to {most}'
            senders = {'HTTP': (send_over_http, options.port), 'handle': (send_through_handle, handle)}
            for through, (send, to) in senders.items():
                row = send_all(functools.partial(send, to), test, options.requests, options.clients, kills=kills)
                yield {'service': f'Ray × {replicas}', 'through': through, **row}


def send_over_http(port: int, image: np.ndarray) -> tuple[Row, int]:
    """Sends an image to a port of the loopback until it is answered."""
    repeated = 0
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port)) as connection:
        while True:
            connection.request('POST', '/classify', body=image.tobytes())
            response = connection.getresponse()
            content = response.read()
            if response.status == http.HTTPStatus.OK:
                return json.loads(content), repeated
            repeated += 1
            time.sleep(min(1.0, 0.02 * 2**repeated))  # longer each time


def send_through_handle(handle: Any, image: np.ndarray) -> tuple[Row, int]:
    """Sends an image through a handle of Ray Serve; again if the replica died before it answered."""
    from ray.exceptions import RayActorError

    repeated = 0
    while True:
        try:
            return handle.classify.remote(image).result(), repeated
        except RayActorError:  # as its ActorDiedError; to classify an image twice does no harm
            repeated += 1


def send_all(send: Send, test: bj.Batch, requests: int, clients: int, *, kills: bool = False) -> Row:
    """Sends images from several clients at the same time, each its next one when the last one is answered.

    Args:
        send: sends an image.
        test: images as stored, with labels, which are sent in turns.
        requests: how many images are sent.
        clients: that send.
        kills: whether a process that answers is killed after a third of the answers. Images are then sent until a
            process answers that did not before.
    """

    def timed(n: int) -> tuple[Row, int, float]:
        start = time.perf_counter()
        answer, repeated = send(np.asarray(test.image[n % len(test)]))
        return answer, repeated, 1e3 * (time.perf_counter() - start)

    send(np.asarray(test.image[0]))  # opens a handle, which several threads must not do at the same time
    start, row = time.perf_counter(), {'clients': clients}
    with ThreadPoolExecutor(clients) as pool:
        sent = [pool.submit(timed, n) for n in range(requests)]
        if kills:
            before = {future.result()[0]['process'] for future in sent[: requests // 3]}
            row['in_flight'] = sum(future.running() for future in sent)
            os.kill(min(before), signal.SIGKILL)
        answers, repeated, waited = zip(*[future.result() for future in sent], strict=True)
    row |= {'answered': len(answers), 'repeated': sum(repeated), 'per_second': requests / (time.perf_counter() - start)}
    row['p50_ms'], row['p99_ms'] = np.quantile(waited, [0.5, 0.99]).tolist()
    right = [answer['label'] == test.label[n % len(test)] for n, answer in enumerate(answers)]
    row |= {'accuracy': float(np.mean(right))}
    row['processes'] = len({answer.get('process') for answer in answers})
    row['exit_fractions'] = (np.bincount([answer['exit'] for answer in answers]) / requests).tolist()
    while kills and send(np.asarray(test.image[0]))[0]['process'] in before:
        time.sleep(0.1)
    return row


_COLUMNS = ('service', 'through', 'clients', 'in_flight', 'answered', 'processes', 'repeated')
_CLOCKS = ('per_second', 'p50_ms', 'p99_ms')


def page(record: Row) -> str:
    """Lays out the record in Markdown."""
    text = (
        f'{record["device"]}. In each row the clients send {record["requests"]} images, each client its next one when '
        f'the last one is answered, and again if it is refused. Thresholds follow the waiting time in the process that '
        f'answers: its target is {record["target_ms"]:g} ms, and accuracy on validation data stays above '
        f'{100 * record["floor"]:g} %. In rows with images in flight a replica was killed when that many had no '
        f'answer; a new replica answered afterwards. The column of processes counts those that answered. Service and '
        f'clients share the machine.'
    )
    rows = table(record['rows'], *_COLUMNS, *_CLOCKS, 'accuracy', 'exit_fractions')
    parts = f'# A service under load: {record["network"]}', f'`{record["command"]}`', textwrap.fill(text, 120), rows
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    main()
