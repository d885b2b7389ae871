"""Answers images over HTTP from one process, with a page that shows which images leave early.

    python -m experiments.service.plans --plans=runs/plans --network=b-lenet@mnist --dataset=mnist5k --floor=0.98
    python -m experiments.service.app --plans=runs/plans

Then open http://127.0.0.1:8000. It needs the extra ``[serve]``. `experiments.service.load` measures it under load.

- ``POST /classify``: one image as stored, its bytes in C order; answers with JSON. 400: not such an image; 503: too
  many wait already, send it again.
- ``GET /stats`` and ``GET /recent``: counts, and the last images with the exits they left at; ``GET /``: the page.

An image that does not fit into the queue is refused at once. So memory is bounded, and no accepted image is lost.
"""

import asyncio
import base64
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from experiments.run.report import Row
from experiments.service.plans import Answerer
from experiments.study import flags

_PAGE = Path(__file__).with_name('page.html')


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until interrupted."""
    parser = flags.parser(__doc__)
    parser.add_argument('--plans', type=Path, required=True, help='folder of experiments.service.plans')
    parser.add_argument('--target_ms', type=float, default=20.0, help='target of the waiting time')
    parser.add_argument('--deadline_ms', type=float, default=250.0, help='after which an answer counts as late')
    parser.add_argument('--capacity', type=flags.positive, default=256, help='images that may wait')
    parser.add_argument('--port', type=flags.positive, default=8000, help='on 127.0.0.1')
    options = parser.parse_args(arguments)
    answerer = Answerer.load(options.plans, target_ms=options.target_ms, deadline_ms=options.deadline_ms)
    app = make_app(Service(answerer, capacity=options.capacity))
    uvicorn.run(app, host='127.0.0.1', port=options.port, log_level='warning')


class Service:
    """A bounded queue in front of the plans, which answer all images that wait, at most a batch at once.

    Args:
        answerer: the plans.
        capacity: images that may wait; more are refused.
    """

    def __init__(self, answerer: Answerer, *, capacity: int = 256) -> None:
        self.answerer, self.capacity, self.refused = answerer, capacity, 0
        self._waiting: asyncio.Queue[tuple[np.ndarray, float, asyncio.Future[Row]]] = asyncio.Queue(capacity)

    async def classify(self, image: np.ndarray) -> Row:
        """Answers one stored image.

        Raises:
            asyncio.QueueFull: too many wait already.
        """
        answer = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((image, time.monotonic(), answer))
        except asyncio.QueueFull:
            self.refused += 1
            raise
        return await answer

    async def run(self) -> None:
        """Answers batches until it is cancelled. An error of the network is raised for each image of its batch."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.answerer.batch_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images, arrived, answers = zip(*batch, strict=True)
            (result,) = await asyncio.gather(asyncio.to_thread(self.answerer, images, arrived), return_exceptions=True)
            for n, answer in enumerate(answers):
                if answer.done():  # cancelled, because its client has left
                    continue
                if isinstance(result, BaseException):
                    answer.set_exception(result)
                else:
                    answer.set_result(result[n])

    def stats(self) -> Row:
        """Returns counts and the length of the queue."""
        waiting = {'waiting': self._waiting.qsize(), 'capacity': self.capacity, 'refused': self.refused}
        return {**waiting, **self.answerer.stats()}


def make_app(service: Service) -> Starlette:
    """Builds the HTTP application, which runs the service as long as it lives."""
    answerer = service.answerer

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(service.run())
        yield
        running.cancel()  # every request is answered by now

    async def classify(request: Request) -> Response:
        try:
            return await respond(request, answerer, service.classify)
        except asyncio.QueueFull:
            return JSONResponse({'error': 'too many images wait; send it again'}, 503, {'Retry-After': '0'})

    def recent(_: Request) -> Response:
        answers = [
            {**row, 'pixels': base64.b64encode(image.tobytes()).decode()} for row, image in list(answerer.recent)
        ]
        return JSONResponse({'shape': list(answerer.image_shape), 'answers': answers})

    routes = [
        Route('/', lambda _: HTMLResponse(_PAGE.read_text(encoding='utf-8'))),
        Route('/stats', lambda _: JSONResponse(service.stats())),
        Route('/recent', recent),
        Route('/classify', classify, methods=['POST']),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def respond(request: Request, answerer: Answerer, classify: Callable[[np.ndarray], Awaitable[Row]]) -> Response:
    """Answers a request that holds an image: with JSON, or with status 400 if it holds no image."""
    try:
        image = answerer.decode(await request.body())
    except ValueError as error:
        return JSONResponse({'error': str(error)}, 400)
    return JSONResponse(await classify(image))


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


if __name__ == '__main__':
    main()
