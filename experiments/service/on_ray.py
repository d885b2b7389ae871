"""Answers images over HTTP from several processes, which Ray starts, feeds and replaces.

    python -m experiments.service.plans --plans=runs/plans --network=b-lenet@mnist --dataset=mnist5k --cores=1
    python -m experiments.service.on_ray --plans=runs/plans --max_replicas=2

answers ``POST /classify`` as `experiments.service.app` does. Each replica loads the plans and measures nothing. Ray
collects batches, starts more replicas as more requests wait, and replaces those that die or fail the health check. In
each replica the thresholds follow the waiting time. It needs the extra ``[ray]``, and joins the cluster at
``RAY_ADDRESS``, if any. `experiments.service.load` measures it under load, and kills a replica.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from experiments.run.report import Row
from experiments.service.app import respond
from experiments.service.plans import Answerer
from experiments.study import flags

_STORE_BYTES = 2**28


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until interrupted."""
    parser = flags.parser(__doc__)
    parser.add_argument('--plans', type=Path, required=True, help='folder of experiments.service.plans')
    parser.add_argument('--min_replicas', type=flags.positive, default=1, help='without load')
    parser.add_argument('--max_replicas', type=flags.positive, default=2, help='under load')
    parser.add_argument('--target_ms', type=float, default=20.0, help='target of the waiting time')
    parser.add_argument('--port', type=flags.positive, default=8000, help='on 127.0.0.1')
    options = parser.parse_args(arguments)
    with started(options.port):
        deploy(options.plans, options.min_replicas, options.max_replicas, options.target_ms, blocking=True)


@contextlib.contextmanager
def started(port: int | None = None) -> Iterator[None]:
    """Joins the cluster at ``RAY_ADDRESS``, or starts Ray here; with a port also the HTTP of Ray Serve.

    A cluster that this process has joined or started before serves as it is, and stays.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # sends nothing
    joins = 'RAY_ADDRESS' in os.environ
    here = {'include_dashboard': False, 'object_store_memory': _STORE_BYTES}
    ray.init(log_to_driver=False, **({} if joins else here))
    try:
        if port is not None:
            serve.start(http_options={'host': '127.0.0.1', 'port': port})
        yield
    finally:
        if port is not None and not joins:
            serve.shutdown()
        ray.shutdown()


@serve.deployment(max_ongoing_requests=64, health_check_period_s=1.0, health_check_timeout_s=10.0)
class Replica:
    """Answers images with plans from a folder.

    Args:
        folder: of the plans.
        target_ms: of the waiting time, from the arrival in this process to the answer.
    """

    def __init__(self, folder: str, target_ms: float) -> None:
        rank = serve.get_replica_context().rank.local_rank
        self._answerer = Answerer.load(folder, rank=rank, target_ms=target_ms)
        self._answer.set_max_batch_size(self._answerer.batch_size)

    async def __call__(self, request: Request) -> Response:
        """Answers a request over HTTP."""
        return await respond(request, self._answerer, self.classify)

    async def classify(self, image: np.ndarray) -> Row:
        """Answers one stored image; the answer names the process."""
        return {**await self._answer((image, time.monotonic())), 'process': os.getpid()}

    @serve.batch(batch_wait_timeout_s=0.002)
    async def _answer(self, waiting: list[tuple[np.ndarray, float]]) -> list[Row]:
        images, arrived = zip(*waiting, strict=True)
        return await asyncio.to_thread(self._answerer, images, arrived)

    def check_health(self) -> None:
        """Raises if the network does not answer an image with finite numbers; Ray then replaces the replica."""
        nothing = np.zeros((1, *self._answerer.image_shape), np.uint8)
        if not np.isfinite(self._answerer.predict(nothing, self._answerer.plan).logits).all():
            raise RuntimeError('the network answers an image with numbers that are not finite')


def deploy(folder: Path, fewest: int, most: int, target_ms: float, *, blocking: bool = False) -> Any:
    """Starts replicas, and returns their handle once they answer."""
    scaling = {'min_replicas': fewest, 'initial_replicas': fewest, 'max_replicas': most}
    scaling |= {'target_ongoing_requests': 16, 'upscale_delay_s': 5}  # Ray's own delay is 30 s
    replicas = Replica.options(autoscaling_config=scaling)
    quiet = {'log_level': 'ERROR', 'enable_access_log': False}
    return serve.run(replicas.bind(str(folder.resolve()), target_ms), blocking=blocking, logging_config=quiet)


if __name__ == '__main__':
    main()
