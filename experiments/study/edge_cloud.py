"""An edge device and a cloud that share a network: two processes that need numpy and onnxruntime alone.

    python -m experiments.study.edge_cloud cloud FOLDER
    python -m experiments.study.edge_cloud edge FOLDER --port=PORT --cut=1 --images=images.npy --output=answers.npz

FOLDER holds the stage files of `branchy_jax.export.save_stages`. The edge asks the exits before the cut. It sends what
the cut hands on of the other images to the cloud, which answers them in batches with those of other edges. A request
holds the arrays one after the other, and in its header the SHA-256 of the manifest, so that a cloud refuses an edge of
another network or policy, and an id. A request may be repeated: the cloud remembers its answer by the id. If the cloud
stays away, the edge answers with its last exit.

The edge simulates, by waiting, a link of a stated delay and bandwidth and a slower processor. Its latencies leave out
the time of the loopback itself.
"""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import json
import math
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import run_exported
from experiments.run_exported import Answers, Network

DTYPES = ('float32', 'float16', 'uint8')
"""What floats are sent as. Bytes are 255 steps from the smallest to the largest number of each image's array."""

ANSWER = ('label', 'exit_index')
_REMEMBERED = 4096  # requests that the cloud can answer again
_AT_ONCE = 64  # requests in a batch of the cloud
_PAUSE_SECONDS = 0.05  # between two attempts


@dataclasses.dataclass(frozen=True)
class Format:
    """How the arrays of a cut are sent. Stored pixels, and what a criterion remembers, are sent as they are.

    Attributes:
        network: whose manifest says what the cut hands on.
        cut: the first exit that the cloud asks.
        dtype: of `DTYPES`.
    """

    network: Network
    cut: int
    dtype: str

    def arrays(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """Returns name, shape without the batch, dtype, and dtype in the request of each array."""
        manifest = self.network.manifest
        parts = manifest['programs'].values()
        specs = {array['name']: array for part in parts for array in (*part['inputs'], *part['outputs'])}
        if self.cut == 0 and manifest['input']['normalization'] is not None:
            return [('image', tuple(specs['image']['shape'][1:]), 'uint8', 'uint8')]
        result = []
        for name in manifest['cuts'][self.cut]['arrays']:
            own = specs[name]['dtype']
            changes = own == 'float32' and name.startswith('hidden')
            result.append((name, tuple(specs[name]['shape'][1:]), own, self.dtype if changes else own))
        return result

    def encode(self, values: Answers) -> bytes:
        """Returns the body of a request."""
        body = []
        for name, _, own, sent in self.arrays():
            array = values[name]
            if own == 'float32' and sent == 'uint8':
                axes = tuple(range(1, array.ndim))
                low, high = array.min(axes, keepdims=True), array.max(axes, keepdims=True)
                step = np.maximum((high - low) / np.float32(255), np.finfo(np.float32).tiny)
                body += [low, step, np.rint((array - low) / step).astype(sent)]
            else:
                limit = np.finfo(np.float16).max if sent == 'float16' else None
                body.append(np.clip(array, -limit, limit).astype(sent) if limit else array.astype(sent))
        return b''.join(array.tobytes() for array in body)

    def decode(self, body: bytes, rows: int) -> Answers:
        """Returns the arrays of a request; raises ValueError if the body has another size."""
        values, buffer = {}, memoryview(body)

        def take(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            nonlocal buffer
            size = rows * math.prod(shape) * np.dtype(dtype).itemsize
            if size > len(buffer):
                raise ValueError(f'body: got {len(body)} bytes, too few for {rows} images')
            content, buffer = buffer[:size], buffer[size:]
            return np.frombuffer(content, dtype).reshape(rows, *shape)

        for name, shape, own, sent in self.arrays():
            if own == 'float32' and sent == 'uint8':
                low, step = (take((1,) * len(shape), own) for _ in range(2))
                values[name] = low + step * take(shape, sent)
            else:
                values[name] = take(shape, sent).astype(own)
        if buffer:
            raise ValueError(f'body: got {len(body)} bytes, too many for {rows} images')
        return values


class Request(NamedTuple):
    """What one edge sent: the cut, the arrays by name; and the answer to come."""

    cut: int
    values: Answers
    answer: Future[Answers]


class Cloud(ThreadingHTTPServer):
    """The cloud, on the loopback, with a thread for each request; one of them at a time runs the network.

    Attributes:
        network: with all stages and heads.
        counts: images answered, batches run, and repeated requests.
    """

    def __init__(self, network: Network, port: int = 0) -> None:
        super().__init__(('127.0.0.1', port), _Handler)
        self.network, self.counts = network, dict.fromkeys(('images', 'batches', 'repeated'), 0)
        self._requests: collections.OrderedDict[str, Request] = collections.OrderedDict()
        self._waiting: list[Request] = []
        self._lock, self._running = threading.Lock(), threading.Lock()

    def ask(self, key: str, cut: int, values: Answers) -> Answers:
        """Answers a request, in one batch with those that have come meanwhile; one with a known id as the first."""
        with self._lock:
            if key in self._requests:
                self.counts['repeated'] += 1
            else:
                self._requests[key] = Request(cut, values, Future())
                self._waiting.append(self._requests[key])
            request = self._requests[key]
            if len(self._requests) > _REMEMBERED:
                self._requests.popitem(last=False)
        with self._running:
            while not request.answer.done():  # else the thread before ran it
                self._run([other for other in self._waiting if other.cut == cut][:_AT_ONCE])
        return request.answer.result()

    def _run(self, taken: Sequence[Request]) -> None:
        with self._lock:
            self._waiting = [request for request in self._waiting if all(request is not other for other in taken)]
        try:
            values = {name: np.concatenate([request.values[name] for request in taken]) for name in taken[0].values}
            answers = run_exported.run_exits(self.network, values, first=taken[0].cut)[0]
        except Exception as error:  # of any class: every request gets an answer
            for request in taken:
                request.answer.set_exception(error)
            return
        self.counts['batches'] += 1
        start = 0
        for request in taken:
            rows = slice(start, start + len(next(iter(request.values.values()))))
            request.answer.set_result({name: answers[name][rows] for name in ANSWER})
            start = rows.stop
        self.counts['images'] += start


class _Handler(BaseHTTPRequestHandler):
    """GET returns the counts; POST answers a request, and refuses one that does not fit with status 400."""

    disable_nagle_algorithm = True
    server: Cloud

    def do_GET(self) -> None:
        self._reply(http.HTTPStatus.OK, self.server.counts)

    def do_POST(self) -> None:
        start, body = time.perf_counter(), self.rfile.read(int(self.headers['Content-Length']))
        try:
            asked = json.loads(self.headers['X-Request'])
            key, cut, values = asked['id'], asked['cut'], self._decoded(body, asked)
        except (KeyError, TypeError, ValueError) as error:
            self._reply(http.HTTPStatus.BAD_REQUEST, {'error': str(error)})
            return
        answers = self.server.ask(key, cut, values)
        found = {name: array.tolist() for name, array in answers.items()}
        self._reply(http.HTTPStatus.OK, {**found, 'seconds': time.perf_counter() - start})

    def _decoded(self, body: bytes, asked: dict[str, Any]) -> Answers:
        network, cut, rows = self.server.network, asked['cut'], asked['rows']
        if asked['manifest'] != network.manifest['sha256']:
            raise ValueError(f'manifest: got {asked["manifest"]}, but {network.manifest["sha256"]} runs here')
        is_count = isinstance(rows, int) and rows > 0
        if not is_count or cut not in range(len(network.manifest['cuts'])) or asked['dtype'] not in DTYPES:
            raise ValueError(f'X-Request: got {asked}; give a cut of the manifest, rows, and one of {DTYPES}')
        values = Format(network, cut, asked['dtype']).decode(body, rows)
        return values if cut else {'image': network.normalize(values['image'])}

    def _reply(self, status: http.HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Writes no line for each request."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection to the cloud, as slow as stated.

    Attributes:
        port: of the cloud, on the loopback.
        delay: seconds of one way.
        rate: bytes a second.
        patience: seconds after which the cloud counts as away.
    """

    port: int
    delay: float = 0.0
    rate: float = float('inf')
    patience: float = 1.0

    def ask(self, body: bytes, **asked: Any) -> tuple[dict[str, Any] | None, int, float]:
        """Sends a request until it is answered, for some time.

        Returns:
            The answer, ``None`` if the cloud is away; attempts; seconds of the last one beyond the link and the cloud.

        Raises:
            ValueError: the cloud refused the request, and would refuse it again.
        """
        end, attempts, header = time.monotonic() + self.patience, 0, json.dumps({**asked, 'id': uuid.uuid4().hex})
        while attempts == 0 or time.monotonic() < end:
            attempts += 1
            start = time.perf_counter()
            try:
                status, content = self._send(body, header)
            except (OSError, http.client.HTTPException):  # no process listens, or the cloud died
                time.sleep(_PAUSE_SECONDS)
                continue
            answer = json.loads(content)
            if status != http.HTTPStatus.OK:
                raise ValueError(f'the cloud refuses the request: {answer["error"]}')
            stated = 2 * self.delay + (len(body) + len(content)) / self.rate + answer['seconds']
            return answer, attempts, time.perf_counter() - start - stated
        return None, attempts, 0.0

    def _send(self, body: bytes, header: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=max(self.patience, _PAUSE_SECONDS))
        with contextlib.closing(connection):
            time.sleep(self.delay + len(body) / self.rate)
            connection.request('POST', '/', body, {'X-Request': header})
            response = connection.getresponse()
            content = response.read()
        time.sleep(self.delay + len(content) / self.rate)
        return response.status, content


def answer(pixels: np.ndarray, form: Format, link: Link, slower: float = 1.0) -> dict[str, Any]:
    """Answers one stored image at an edge.

    Args:
        pixels: ``[1, H, W, C]``.
        form: the network, with the parts before the cut and those of exit 0; at cut N nothing is sent.
        link: to the cloud.
        slower: how many times longer the edge is to compute than this machine.

    Returns:
        ``label`` and ``exit_index``; ``place``: edge, cloud, or away, if the cloud was away and the edge answered with
        its last exit; ``latency_ms``, ``bytes`` sent, ``attempts`` to send.
    """
    network, start = form.network, time.perf_counter()
    inputs = {'image': network.normalize(pixels)}
    answers, rest, values = run_exported.run_exits(network, inputs, until=form.cut)
    time.sleep((slower - 1) * (time.perf_counter() - start))
    place, body, attempts, beyond = 'edge', b'', 0, 0.0
    if len(rest):
        body = form.encode({'image': pixels} if form.cut == 0 else values)
        asked = {'manifest': network.manifest['sha256'], 'cut': form.cut, 'rows': 1, 'dtype': form.dtype}
        reply, attempts, beyond = link.ask(body, **asked)
        place = 'away' if reply is None else 'cloud'
        # At cut 0 no exit was asked before.
        answers = reply or answers or run_exported.run_exits(network, inputs, until=1)[0]
    latency = 1e3 * (time.perf_counter() - start - beyond)
    own = {'place': place, 'latency_ms': latency, 'bytes': len(body), 'attempts': attempts}
    return {**{name: np.asarray(answers[name])[0] for name in ANSWER}, **own}


def main() -> None:
    """Runs one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('role', choices=('cloud', 'edge'))
    parser.add_argument('folder', type=Path, help='of stage files')
    parser.add_argument('--port', type=int, default=0, help='of the cloud, on 127.0.0.1; 0 is any free one')
    parser.add_argument('--cut', type=int, default=1, help='the first exit that the cloud asks')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='of what the edge sends')
    parser.add_argument('--images', type=Path, help='of the edges: stored pixels, .npy')
    parser.add_argument('--share', type=int, nargs=2, default=(0, 1), help='0 2: even images, 1 2: odd ones')
    parser.add_argument('--output', type=Path, help='of the edge: .npz')
    parser.add_argument('--link', type=float, nargs=3, default=(), help='delay, bytes a second, patience: see Link')
    parser.add_argument('--slower', type=float, default=1.0, help='how many times longer the edge computes')
    options = parser.parse_args()
    if options.role == 'cloud':
        cloud = Cloud(run_exported.load(options.folder), options.port)
        print(cloud.server_port, flush=True)
        cloud.serve_forever()
    parts = [f'{kind} {n}' for n in range(max(options.cut, 1)) for kind in ('stage', 'exit')]
    form = Format(run_exported.load(options.folder, parts), options.cut, options.dtype)
    link = Link(options.port, *options.link)
    images = np.load(options.images, allow_pickle=False)
    ids = range(options.share[0], len(images), options.share[1])
    answers = [{'id': n, **answer(images[n : n + 1], form, link, options.slower)} for n in ids]
    np.savez(options.output, **{name: np.stack([own[name] for own in answers]) for name in answers[0]})


if __name__ == '__main__':
    main()
