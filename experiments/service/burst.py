"""Bursts of several times the sustained load, over HTTP on the loopback: accuracy, refusals, late answers.

    python -m experiments.service.burst --network=b-alexnet@cifar10 --dataset=cifar10 --floor=0.78 --workdir=DIR

The sustained load is measured first: images a second through the same stream at the path's end that leaves least. Then
test images come at random moments, at half that load, at ``--times`` of it, and at half again; what is refused is sent
again until it is taken. Writes ``burst.json`` and ``burst.md``. Test data only score; thresholds come from validation
data. It needs the extra ``[serve]``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import http.client
import json
import queue
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

import branchy_jax as bj
from experiments.service.app import add_service_flags, make_app, make_service
from experiments.service.service import Service

_CLIENTS = 64
_TO_SUSTAIN = 2048


@dataclasses.dataclass(frozen=True)
class Reply:
    """The reply to one image: its row, its phase, whether the class is right, and the fields of the answer."""

    row: int
    phase: int
    right: bool
    exit: int
    waited_ms: float
    in_time: bool
    tries: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the phases and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_service_flags(parser)
    parser.add_argument('--workdir', type=Path, required=True)
    parser.add_argument('--times', type=float, default=5.0, help='of the sustained load, in the burst')
    parser.add_argument('--seconds', type=float, default=8.0, help='of each phase')
    options = parser.parse_args(arguments)
    service, dataset = make_service(options)
    sustained = sustained_load(service, dataset, options.chunk_size)
    loads = [0.5 * sustained, options.times * sustained, 0.5 * sustained]
    port, server = serve(service)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replies = send(port, dataset, loads, options.seconds)
    server.should_exit = True
    record = {
        'command': ' '.join(['python -m experiments.service.burst', *sys.argv[1:]]),
        'network': options.network,
        'floor': options.floor,
        'target_ms': options.target_ms,
        'sustained': sustained,
        'capacity': options.capacity,
        'deadline_ms': options.deadline_ms,
        'phases': [phase(replies, n, load) for n, load in enumerate(loads)],
        'service': service.stats(),
        'memory_grown_mb': (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024,
    }
    record['service'].pop('recent_ms')
    options.workdir.mkdir(parents=True, exist_ok=True)
    bj.report.write_json(options.workdir / 'burst.json', record)
    bj.report.write_text(options.workdir / 'burst.md', page(record))
    print(page(record))


def sustained_load(service: Service, dataset: bj.data.Dataset, chunk_size: int) -> float:
    """Returns images a second through the stream at the setting that leaves least."""
    weights = service.weights
    images = np.asarray(weights.normalize(dataset.validation.image[:_TO_SUSTAIN]))
    run = bj.inference.stream(weights.model, chunk_size=chunk_size)
    policy = service.controller.replace(position=np.float32(1)).policy
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in run(weights.variables, [images], policy):
            pass
        rates.append(len(images) / (time.perf_counter() - start))
    return float(np.median(rates))


def serve(service: Service) -> tuple[int, uvicorn.Server]:
    """Starts the HTTP server in a thread, on any free port of the loopback."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), host='127.0.0.1', port=0, log_level='warning'))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server.servers[0].sockets[0].getsockname()[1], server


def send(port: int, dataset: bj.data.Dataset, loads: Sequence[float], seconds: float) -> list[Reply]:
    """Sends test images at random moments, phase by phase, and returns all replies."""
    due: queue.Queue[tuple[int, int] | None] = queue.Queue()
    replies: list[Reply] = []
    clients = [threading.Thread(target=_client, args=(port, dataset.test, due, replies)) for _ in range(_CLIENTS)]
    for client in clients:
        client.start()
    for moment, number, row in _arrivals(loads, seconds, len(dataset.test)):
        time.sleep(max(0.0, moment - time.monotonic()))
        due.put((number, row))
    for _ in clients:
        due.put(None)
    for client in clients:
        client.join()
    return replies


def _arrivals(loads: Sequence[float], seconds: float, count: int) -> Iterator[tuple[float, int, int]]:
    """Yields when which test image comes, and in which phase: a Poisson process whose rate changes."""
    generator, moment = np.random.default_rng(0), time.monotonic()
    for number, load in enumerate(loads):
        end = moment + seconds
        while moment < end:
            yield moment, number, int(generator.integers(count))
            moment += float(generator.exponential(1 / load))


def _client(port: int, test: bj.Batch, due: queue.Queue[Any], replies: list[Reply]) -> None:
    connection = http.client.HTTPConnection('127.0.0.1', port)
    while (entry := due.get()) is not None:
        number, row = entry
        tries = 0
        while True:
            tries += 1
            connection.request('POST', '/classify', body=np.asarray(test.image[row]).tobytes())
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status == http.HTTPStatus.OK:
                break
            time.sleep(min(1.0, 0.02 * 2**tries))  # longer after each refusal
        right = answer['label'] == int(test.label[row])
        replies.append(Reply(row, number, right, answer['exit'], answer['waited_ms'], answer['in_time'], tries))


def phase(replies: Sequence[Reply], number: int, load: float) -> dict[str, Any]:
    """Sums up the replies of a phase."""
    own = [reply for reply in replies if reply.phase == number]
    waited = np.array([reply.waited_ms for reply in own])
    exits = collections.Counter(reply.exit for reply in own)
    return {
        'load': load,
        'sent': len(own),
        'refused': sum(reply.tries - 1 for reply in own),
        'late': sum(not reply.in_time for reply in own),
        'mean_ms': float(waited.mean()),
        'p99_ms': float(np.quantile(waited, 0.99)),
        'accuracy': float(np.mean([reply.right for reply in own])),
        'exits': {str(n): exits[n] / len(own) for n in sorted(exits)},
    }


def page(record: dict[str, Any]) -> str:
    """Lays the record out."""
    last = max(int(n) for found in record['phases'] for n in found['exits'])
    rows = [
        [
            name,
            f'{found["load"]:.0f}',
            str(found['sent']),
            str(found['refused']),
            str(found['late']),
            f'{found["mean_ms"]:.1f}',
            f'{found["p99_ms"]:.1f}',
            f'{100 * found["accuracy"]:.2f}',
            ', '.join(f'{100 * found["exits"].get(str(n), 0):.1f}' for n in range(1, 1 + last)),
        ]
        for name, found in zip(('before', 'burst', 'after'), record['phases'], strict=True)
    ]
    columns = [
        'phase',
        'images a second',
        'answered',
        'refused, sent again',
        'late',
        'mean ms',
        '99 % ms',
        'accuracy %',
        'exits %',
    ]
    counts = record['service']
    return f"""# Bursts over HTTP: {record['network']}

`{record['command']}`

{record['sustained']:.0f} images a second are sustained where images leave least. Waiting time to hold:
{record['target_ms']:g} ms, from arrival to answer; floor of accuracy, on validation data: {100 * record['floor']:g} %;
at most {record['capacity']} images wait for the network; late is after {record['deadline_ms']:g} ms.

{bj.report.markdown_table(columns, rows)}

The service took {counts['taken']} images, answered {counts['answered']}, failed {counts['failed']}; every client got
one answer for each image. Peak memory grew by {record['memory_grown_mb']:.0f} MB while it served. Server and clients
share the machine.
"""


if __name__ == '__main__':
    main()
