"""Edges and a cloud answer as `dense` does; no image is lost when the cloud dies; nothing is left running."""

import ast
import concurrent.futures
import contextlib
import http.client
import json
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ThreeExits, random_variables
from test_export import imported

import branchy_jax as bj
from experiments import edge, run_exported
from experiments.study import edge_cloud

for package in ('onnx', 'onnxruntime'):
    pytest.importorskip(package, reason="pip install '.[onnx]'")

SCALE = bj.Normalization(mean=jnp.float32([0.5]), deviation=jnp.float32([0.25]))
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)


@pytest.fixture(scope='module')
def weights():
    """A network of three exits whose criterion uses earlier exits."""
    model, inputs, criterion = ThreeExits(), SCALE(PIXELS), bj.criteria.ensemble()
    variables = random_variables(model, inputs)
    cut = np.sort(bj.criteria.replay(criterion, jnp.stack(model.apply(variables, inputs)))[1], axis=1)
    policy = bj.ExitPolicy(criterion, (cut[:-1, 15] + cut[:-1, 16]) / 2)
    return bj.models.Pretrained(model, variables, jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32), SCALE, (policy,), {})


@pytest.fixture(scope='module')
def folder(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('edge') / 'stages'
    options = {'inputs': weights.inputs, 'normalization': SCALE}
    bj.export.save_stages(path, weights.model, weights.variables, weights.operating_points[0], **options)
    return path


@pytest.fixture(scope='module')
def expected(weights):
    answer = bj.inference.dense(weights.model)(weights.variables, SCALE(PIXELS), weights.operating_points[0])
    assert set(answer.exit_index.tolist()) == {0, 1, 2}
    return answer


@pytest.fixture
def network(folder):
    return run_exported.load(folder)


@contextlib.contextmanager
def serving(network):
    with edge_cloud.Cloud(network) as cloud:
        thread = threading.Thread(target=cloud.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield cloud
        finally:
            cloud.shutdown()
            thread.join()


def answers_of(network, cut, dtype, link):
    form = edge_cloud.Format(network, cut, dtype)
    rows = [edge_cloud.answer(PIXELS[n : n + 1], form, link) for n in range(len(PIXELS))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_two_processes_need_no_jax():
    assert imported(ast.walk(ast.parse(Path(edge_cloud.__file__).read_text()))) == {'numpy', 'experiments'}


@pytest.mark.parametrize('cut', range(4))
def test_every_cut_answers_as_dense_does(network, expected, cut):
    with serving(network) as cloud:
        answers = answers_of(network, cut, 'float32', edge_cloud.Link(cloud.server_port))
        sent = np.asarray(expected.exit_index) >= cut
        assert cloud.counts == {'images': sent.sum(), 'batches': sent.sum(), 'repeated': 0}
    np.testing.assert_array_equal(answers['label'], expected.label)
    np.testing.assert_array_equal(answers['exit_index'], expected.exit_index)
    np.testing.assert_array_equal(answers['place'], np.where(sent, 'cloud', 'edge'))
    # Stored pixels; 8 hidden values and what the criterion remembers of 3 classes, 4 bytes each.
    np.testing.assert_array_equal(answers['bytes'], [16, 44, 44, 0][cut] * sent)


@pytest.mark.parametrize(('dtype', 'size'), [('float32', 4), ('float16', 2), ('uint8', 1)])
def test_what_is_sent_in_fewer_bytes_is_that_close(network, dtype, size):
    values = run_exported.run_exits(network, {'image': network.normalize(PIXELS)}, until=1)[2]
    rows, form = len(values['hidden_0']), edge_cloud.Format(network, 1, dtype)
    values['hidden_0'][0] = 7  # a row without a range
    body = form.encode(values)
    assert len(body) == rows * (8 * size + 3 * 4 + (8 if dtype == 'uint8' else 0))
    decoded = form.decode(body, rows)
    span = np.ptp(values['hidden_0'], axis=1, keepdims=True)
    half_a_step = {'float32': 0, 'float16': abs(values['hidden_0']) * 2**-11, 'uint8': span / 255 / 2}[dtype]
    assert (abs(decoded['hidden_0'] - values['hidden_0']) <= half_a_step + 1e-6 * span).all()
    np.testing.assert_array_equal(decoded['carry_0'], values['carry_0'])


@pytest.mark.parametrize('cut', [0, 1, 2])
def test_without_a_cloud_the_edge_answers_with_its_last_exit(network, expected, cut):
    with edge_cloud.Cloud(network) as closed:
        link = edge_cloud.Link(closed.server_port, patience=0.0)
    answers = answers_of(network, cut, 'float32', link)
    late = np.asarray(expected.exit_index) >= cut
    np.testing.assert_array_equal(answers['place'], np.where(late, 'away', 'edge'))
    np.testing.assert_array_equal(answers['exit_index'], np.where(late, max(cut - 1, 0), expected.exit_index))
    np.testing.assert_array_equal(answers['label'][~late], expected.label[~late])


def test_what_waits_runs_in_one_batch_and_a_repeated_request_runs_once(network, expected):
    busy, free = threading.Event(), threading.Event()
    run = network.programs['stage 0']

    def slow(image):
        busy.set()
        assert free.wait(20)
        return run(image)

    network.programs['stage 0'] = slow
    images = network.normalize(PIXELS)
    with edge_cloud.Cloud(network) as cloud, concurrent.futures.ThreadPoolExecutor(8) as edges:
        ask = lambda n: edges.submit(cloud.ask, f'id {n}', 0, {'image': images[3 * n : 3 * n + 3]})  # noqa: E731
        first = ask(0)
        assert busy.wait(20)
        rest = [ask(n) for n in (1, 2, 3, 4, 0, 1)]
        while cloud.counts['repeated'] < 2 or len(cloud._waiting) < 4:
            pass
        free.set()
        labels = [answer.result(20)['label'].tolist() for answer in (first, *rest)]
    assert cloud.counts == {'images': 15, 'batches': 2, 'repeated': 2}
    assert labels == [np.asarray(expected.label)[3 * n : 3 * n + 3].tolist() for n in (0, 1, 2, 3, 4, 0, 1)]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'manifest': 'another'}, 'manifest: got another, but [0-9a-f]{64} runs here'),
        ({'cut': 3}, "X-Request: got .*'cut': 3"),
        ({'dtype': 'int4'}, 'X-Request: got .*int4'),
        ({'rows': 10**15}, 'body: got 44 bytes, too few'),
        ({'dtype': 'float16'}, 'body: got 44 bytes, too many'),
        ({'rows': 0}, 'X-Request: got'),
        ({'rows': None}, 'X-Request: got'),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_not_repeated(network, change, message):
    asked = {'manifest': network.manifest['sha256'], 'cut': 1, 'rows': 1, 'dtype': 'float32', **change}
    with serving(network) as cloud:
        link = edge_cloud.Link(cloud.server_port, patience=20.0)
        with pytest.raises(ValueError, match=f'the cloud refuses the request: {message}'):
            link.ask(bytes(44), **asked)
        connection = http.client.HTTPConnection('127.0.0.1', cloud.server_port)
        connection.request('GET', '/')
        assert json.loads(connection.getresponse().read())['images'] == 0
        connection.close()


@pytest.mark.slow  # ten processes start
def test_no_image_is_lost_when_the_cloud_dies_and_nothing_is_left_running(weights, tmp_path, monkeypatch, capsys):
    test = bj.Batch(PIXELS, np.arange(40) % 3)
    monkeypatch.setattr(bj.models, 'load_pretrained', lambda *_, **__: weights)
    monkeypatch.setattr(bj.data, 'load_dataset', lambda _: bj.data.Dataset('tiny', test, test, test, 3, SCALE))
    monkeypatch.setattr(edge, 'DTYPES', ('float32',))
    edge.main([f'--workdir={tmp_path}', '--delay_ms=20', '--slower=2', '--outage=0.5', '--patience=0.1'])
    record = bj.report.read_json(tmp_path / 'edge.json')
    *rows, outage = record['rows']
    assert [(row['cut'], row['answered'], row['differ'], row['cloud_away']) for row in rows] == [
        (cut, 40, 0, 0) for cut in range(4)
    ]
    assert (outage['answered'], outage['differ']) == (40, 0)
    assert outage['repeated'] > 0
    assert outage['cloud_away'] > 0
    assert all(row['latency_ms'] >= 40 for row in rows if row['edge_share'] == 0)  # the link, both ways
    assert re.search(r'\| 1 +\| 40 ', (tmp_path / 'edge.md').read_text())
    assert (tmp_path / 'edge.png').read_bytes().startswith(b'\x89PNG')
    running = [path.read_bytes() for path in Path('/proc').glob('[0-9]*/cmdline') if path.exists()]
    assert not [command for command in running if str(tmp_path).encode() in command]
