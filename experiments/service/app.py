"""What does a service do if more images come than its network can answer? Serves one over HTTP, with a live page.

    python -m experiments.service.app --network=b-lenet@mnist --dataset=mnist5k --floor=0.98 --feed=50

Then open http://127.0.0.1:8000. ``--feed`` sends test images itself, as many a second. It needs the extra ``[serve]``.

    python -m experiments.service.app --burst=runs/burst --network=b-alexnet@cifar10 --dataset=cifar10 --floor=0.78

sends bursts instead, for half a minute after the network has compiled, and writes ``burst.json`` and ``burst.md``.
First it measures the sustained load: images a second through the same stream with the thresholds at which fewest leave
early. Then it sends test images at random moments: at half that load, at ``--times`` of it, and at half again.
Thresholds come from validation data.

- ``POST /classify``: one image as stored, its bytes in C order; answers with JSON. 400: not such an image; 503: too
  many wait already, send it again.
- ``GET /stats`` and ``GET /recent``: counts, and the last images with the exits they left at; ``GET /``: the page.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import http.client
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import branchy_jax as bj
from experiments.run.report import Row, provenance, table
from experiments.service.service import Service
from experiments.study import flags

_CLIENTS = 64
_TO_SUSTAIN = 2048
_PAGE = Path(__file__).with_name('page.html')


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until interrupted, or sends bursts."""
    parser = flags.parser(__doc__)
    parser.add_argument('--network', default='b-lenet@mnist', help='network@dataset, or a folder')
    parser.add_argument('--dataset', default='mnist5k', help='for thresholds and test images')
    parser.add_argument('--floor', type=float, default=0.97, help='lowest accuracy on validation data')
    parser.add_argument('--target_ms', type=float, default=20.0, help='target of the waiting time')
    parser.add_argument('--capacity', type=int, default=256, help='images that may wait')
    parser.add_argument('--chunk_size', type=int, default=16, help='images that a stage takes at once')
    parser.add_argument('--deadline_ms', type=float, default=250.0, help='after which an answer counts as late')
    parser.add_argument('--port', type=int, default=8000, help='on 127.0.0.1')
    parser.add_argument('--feed', type=float, default=0.0, help='test images a second to send from this process')
    parser.add_argument('--burst', type=Path, help='sends bursts instead; folder for results')
    parser.add_argument('--times', type=float, default=5.0, help='burst ÷ sustained load')
    parser.add_argument('--seconds', type=float, default=8.0, help='seconds of each phase')
    options = parser.parse_args(arguments)
    service, dataset = make_service(options)
    if options.burst is not None:
        _burst(service, dataset, options)
        return
    if options.feed:
        threading.Thread(target=_feed, args=(service, dataset.test.image, options.feed), daemon=True).start()
    uvicorn.run(make_app(service), host='127.0.0.1', port=options.port, log_level='warning')


def _burst(service: Service, dataset: bj.data.Dataset, options: argparse.Namespace) -> None:
    sustained = sustained_load(service, dataset)
    loads = [0.5 * sustained, options.times * sustained, 0.5 * sustained]
    with served(service) as port:
        replies = send(port, dataset.test, loads, options.seconds)
        counts = service.stats()
    given = ('network', 'dataset', 'floor', 'target_ms', 'capacity', 'deadline_ms')
    record = {**provenance('service.app'), **{name: getattr(options, name) for name in given}, 'sustained': sustained}
    record |= {name: counts[name] for name in ('taken', 'answered', 'failed')}
    record['rows'] = summary(replies, loads)
    bj.report.write_json(options.burst / 'burst.json', record)
    bj.report.write_text(options.burst / 'burst.md', burst_page(record))
    print(burst_page(record))


@contextlib.contextmanager
def served(service: Service) -> Iterator[int]:
    """Serves in a thread, on any free port of the loopback, which it yields."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), host='127.0.0.1', port=0, log_level='warning'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def make_service(options: argparse.Namespace) -> tuple[Service, bj.data.Dataset]:
    """Loads the network, picks the path of thresholds on validation data, and starts the service."""
    name, _, trained_on = options.network.partition('@')
    weights = bj.models.load_pretrained(name, dataset=trained_on or None)
    model, variables = bj.inference.optimize(weights.model, weights.variables, inputs=weights.inputs)
    dataset = bj.data.load_dataset(options.dataset)
    criterion = weights.operating_points[0].policy.criterion
    table = bj.inference.exit_table(
        weights.model, weights.variables, dataset.validation, preprocess=weights.normalize, criterion=criterion
    )
    path = table.path_by_shares(size=51, floor=options.floor)
    controller = bj.thresholds.Controller.create(
        path, criterion=criterion, target=options.target_ms, scale=4 * options.target_ms, position=1.0, horizon=100.0
    )
    fast = dataclasses.replace(weights, model=model, variables=variables)
    service = Service(
        fast, controller, capacity=options.capacity, chunk_size=options.chunk_size, deadline=options.deadline_ms / 1e3
    )
    return service.start(), dataset


def make_app(service: Service) -> Starlette:
    """Builds the HTTP application; it closes the service when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    shape, size = service.image_shape, int(np.prod(service.image_shape))

    async def classify(request: Request) -> Response:
        content = await request.body()
        if len(content) != size:
            return JSONResponse({'error': f'expected {size} bytes, uint8 {shape}, got {len(content)}'}, 400)
        try:
            answer = service.submit(np.frombuffer(content, np.uint8).reshape(shape))
            return JSONResponse(dataclasses.asdict(await asyncio.wrap_future(answer)))
        except queue.Full:
            return JSONResponse({'error': 'too many images wait; send it again'}, 503, {'Retry-After': '0'})
        except RuntimeError as error:
            return JSONResponse({'error': str(error)}, 500)

    def recent(_: Request) -> Response:
        return JSONResponse({'shape': list(shape), 'answers': [_shown(*entry) for entry in list(service.recent)]})

    routes = [
        Route('/', lambda _: HTMLResponse(_PAGE.read_text(encoding='utf-8'))),
        Route('/stats', lambda _: JSONResponse(service.stats())),
        Route('/recent', recent),
        Route('/classify', classify, methods=['POST']),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _shown(answer: Any, image: np.ndarray) -> dict[str, Any]:
    return {**dataclasses.asdict(answer), 'pixels': base64.b64encode(image.tobytes()).decode()}


def _feed(service: Service, images: np.ndarray, rate: float) -> None:
    generator = np.random.default_rng(0)
    while True:
        time.sleep(generator.exponential(1 / rate))
        with contextlib.suppress(queue.Full):
            service.submit(np.asarray(images[generator.integers(len(images))]))


def sustained_load(service: Service, dataset: bj.data.Dataset) -> float:
    """Returns images a second through the service's stream with the thresholds at which fewest leave early."""
    weights = service.weights
    images = np.asarray(weights.normalize(dataset.validation.image[:_TO_SUSTAIN]))
    policy, rates = service.controller.replace(position=np.float32(1)).policy, []
    for _ in range(3):
        start = time.perf_counter()
        for _ in service.stream(weights.variables, [images], policy):
            pass
        rates.append(len(images) / (time.perf_counter() - start))
    return float(np.median(rates))


def send(port: int, test: bj.Batch, loads: Sequence[float], seconds: float) -> list[Row]:
    """Sends test images at random moments, phase by phase; sends a refused image again until it is accepted.

    Args:
        port: of the service, on the loopback.
        test: images as stored, with labels.
        loads: images a second, of each phase: the rate of a Poisson process.
        seconds: of a phase.

    Returns:
        The answer to each image, with its phase, whether its class is right, and how often it was refused.
    """
    generator, replies = np.random.default_rng(0), []
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for phase, load in enumerate(loads):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                row = int(generator.integers(len(test)))
                image, label = np.asarray(test.image[row]), int(test.label[row])
                replies.append(clients.submit(_classify, port, image, label, phase))
                time.sleep(generator.exponential(1 / load))
    return [reply.result() for reply in replies]


def _classify(port: int, image: np.ndarray, label: int, phase: int) -> Row:
    refused = 0
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port)) as connection:
        while True:
            connection.request('POST', '/classify', body=image.tobytes())
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status == http.HTTPStatus.OK:
                return {**answer, 'phase': phase, 'right': answer['label'] == label, 'refused': refused}
            refused += 1
            time.sleep(min(1.0, 0.02 * 2**refused))  # longer after each refusal


def summary(replies: Sequence[Row], loads: Sequence[float]) -> list[Row]:
    """Returns a row for each phase."""
    rows = []
    for number, (name, load) in enumerate(zip(('before', 'burst', 'after'), loads, strict=True)):
        own = [reply for reply in replies if reply['phase'] == number]
        waited = np.array([reply['waited_ms'] for reply in own])
        exits = np.bincount([reply['exit'] for reply in own]) / len(own)
        row = {'phase': name, 'load': load, 'answered': len(own), 'refused': sum(reply['refused'] for reply in own)}
        row |= {'late': sum(not reply['in_time'] for reply in own), 'mean_ms': float(waited.mean())}
        row |= {'p99_ms': float(np.quantile(waited, 0.99)), 'accuracy': float(np.mean([r['right'] for r in own]))}
        rows.append({**row, 'exit_fractions': exits.tolist()})
    return rows


_COLUMNS = ('phase', 'load', 'answered', 'refused', 'late', 'mean_ms', 'p99_ms', 'accuracy', 'exit_fractions')


def burst_page(record: Row) -> str:
    """Lays out the record in Markdown."""
    return f"""# Bursts over HTTP: {record['network']}

`{record['command']}`

The load is in images a second; the network sustains {record['sustained']:.0f} with the thresholds at which fewest leave
early. The target of the waiting time, from arrival to answer, is {record['target_ms']:g} ms; the floor of accuracy on
validation data is {100 * record['floor']:g} %. At most {record['capacity']} images wait for the network. An answer is
late after {record['deadline_ms']:g} ms.

{table(record['rows'], *_COLUMNS)}

The service accepted {record['taken']} images, answered {record['answered']} and failed {record['failed']}; every client
received one answer for each image. Server and clients share the machine.
"""


if __name__ == '__main__':
    main()
