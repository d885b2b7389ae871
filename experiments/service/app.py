"""The service over HTTP, with a page that shows live where each image leaves.

    python -m experiments.service.app --network=b-lenet@mnist --dataset=mnist5k --floor=0.98 --feed=50

Then open http://127.0.0.1:8000. ``--feed`` sends test images itself, as many a second. It needs the extra ``[serve]``.

- ``POST /classify``: one image as stored, its bytes in C order; answers with JSON. 400: not such an image; 503: too
  many wait already, send it again.
- ``GET /stats`` and ``GET /recent``: counts, and the last images with the exits they left at; ``GET /``: the page.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import branchy_jax as bj
from experiments.service.service import Service

_PAGE = Path(__file__).with_name('page.html')


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_service_flags(parser)
    parser.add_argument('--port', type=int, default=8000, help='on 127.0.0.1')
    parser.add_argument('--feed', type=float, default=0.0, help='test images a second that it sends itself')
    options = parser.parse_args(arguments)
    service, dataset = make_service(options)
    if options.feed:
        threading.Thread(target=_feed, args=(service, dataset.test.image, options.feed), daemon=True).start()
    uvicorn.run(make_app(service), host='127.0.0.1', port=options.port, log_level='warning')


def add_service_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `make_service` reads."""
    parser.add_argument('--network', default='b-lenet@mnist', help='network@dataset, or a folder')
    parser.add_argument('--dataset', default='mnist5k', help='whose validation data choose thresholds')
    parser.add_argument('--floor', type=float, default=0.97, help='accuracy that thresholds never fall under')
    parser.add_argument('--target_ms', type=float, default=20.0, help='waiting time to hold')
    parser.add_argument('--capacity', type=int, default=256, help='images that may wait')
    parser.add_argument('--chunk_size', type=int, default=16, help='images that a stage takes at once')
    parser.add_argument('--deadline_ms', type=float, default=250.0, help='after which an answer counts as late')


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

    shape = service.image_shape

    async def classify(request: Request) -> Response:
        content = await request.body()
        if len(content) != int(np.prod(shape)):
            return _refusal(400, f'expected {int(np.prod(shape))} bytes, uint8 {tuple(shape)}, got {len(content)}')
        try:
            promised = service.submit(np.frombuffer(content, np.uint8).reshape(shape))
            return JSONResponse(dataclasses.asdict(await asyncio.wrap_future(promised)))
        except queue.Full:
            return _refusal(503, 'too many images wait; send it again', {'Retry-After': '0'})
        except RuntimeError as error:
            return _refusal(500, str(error))

    async def stats(_: Request) -> Response:
        return JSONResponse(service.stats())

    async def recent(_: Request) -> Response:
        return JSONResponse({'shape': list(shape), 'answers': [_shown(*entry) for entry in list(service.recent)]})

    async def page(_: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding='utf-8'))

    routes = [
        Route('/', page),
        Route('/stats', stats),
        Route('/recent', recent),
        Route('/classify', classify, methods=['POST']),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _refusal(status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps({'error': error}), status, headers, media_type='application/json')


def _shown(answer: Any, image: np.ndarray) -> dict[str, Any]:
    return {**dataclasses.asdict(answer), 'pixels': base64.b64encode(image.tobytes()).decode()}


def _feed(service: Service, images: np.ndarray, rate: float) -> None:
    generator = np.random.default_rng(0)
    while True:
        time.sleep(generator.exponential(1 / rate))
        with contextlib.suppress(queue.Full):
            service.submit(np.asarray(images[generator.integers(len(images))]))


if __name__ == '__main__':
    main()
