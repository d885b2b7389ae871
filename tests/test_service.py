"""Services: no image is lost, bad images are refused, faults are reported, in one process and on Ray."""

import argparse
import asyncio
import concurrent.futures
import functools
import json
import re
import socket
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest

import branchy_jax as bj
from experiments.service import plans
from experiments.service.plans import Answerer

app = pytest.importorskip('experiments.service.app', reason="pip install '.[serve]'")
load = pytest.importorskip('experiments.service.load')

TEST = bj.Batch(np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1)).astype(np.uint8), np.arange(40) % 10)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp('plans'), 'b-lenet@mnist'
    plans.make_plans(folder, plans.load(network), TEST, floor=0.0, settings=3, batch_size=4)
    made = {'network': network, 'dataset': 'mnist5k', 'floor': 0.0, 'settings': 3, 'cores': None}
    bj.report.write_json(folder / 'service.json', made)
    return folder


@pytest.fixture
def answerer(folder):
    return Answerer.load(folder, target_ms=1e6, horizon=1e30)  # thresholds stay where they are


@pytest.fixture
def service(answerer):
    return app.Service(answerer, capacity=40)


@pytest.fixture
def port(service):
    with app.served(service) as port:
        yield port


def get(port, path, body=None):
    request = urllib.request.Request(f'http://127.0.0.1:{port}{path}', data=body)
    with urllib.request.urlopen(request, timeout=60) as response:
        content = response.read().decode()
    return content if path == '/' else json.loads(content)


def refusal(port, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(port, '/classify', body)
    text = error.value.read().decode()
    error.value.close()
    return error.value.code, text


def test_every_image_is_answered_once_as_dense_answers_it(answerer, port):
    answerer.controller = answerer.controller.replace(position=np.float32(0.5))
    weights, policy = answerer.weights, answerer.plans[1].policy
    expected = bj.inference.dense(weights.model)(weights.variables, weights.normalize(TEST.image), policy)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        received = list(threads.map(lambda image: get(port, '/classify', image.tobytes()), TEST.image))
    assert [answer['label'] for answer in received] == expected.label.tolist()
    assert [answer['exit'] for answer in received] == expected.exit_index.tolist()
    asked = policy.thresholds[0] > -np.inf  # a plan leaves out an exit that gains no time on this machine
    assert len(set(expected.exit_index.tolist())) == 1 + asked
    assert sorted(answer['number'] for answer in received) == list(range(40))
    stats, recent = get(port, '/stats'), get(port, '/recent')
    assert (stats['answered'], stats['refused'], sum(stats['exits'])) == (40, 0, 40)
    assert (recent['shape'], len(recent['answers'])) == ([28, 28, 1], 40)
    assert {'number', 'label', 'exit', 'waited_ms', 'in_time', 'pixels'} == set(recent['answers'][0])
    assert 'Where images leave' in get(port, '/')


def test_more_waiting_makes_images_leave_earlier(folder):
    """Every image waits longer than a target of nearly 0 ms: the plan that leaves most answers in the end."""
    answerer = Answerer.load(folder, target_ms=1e-3, horizon=10.0)
    answers = [answerer([image], [0.0])[0] for image in TEST.image]
    assert answerer.plan is answerer.plans[0]
    assert (answers[0]['exit'], answers[-1]['exit']) == (1, 0)
    assert (answers[0]['in_time'], answerer.missed) == (False, 40)


def test_what_does_not_fit_is_refused_and_the_rest_answered(answerer):
    async def one_more_than_fit():
        service = app.Service(answerer, capacity=3)
        waiting = [asyncio.create_task(service.classify(image)) for image in TEST.image[:4]]
        await asyncio.sleep(0)
        running = asyncio.create_task(service.run())
        results = await asyncio.gather(*waiting, return_exceptions=True)
        running.cancel()
        return results, service.stats()['refused']

    results, refused = asyncio.run(one_more_than_fit())
    assert [result['number'] for result in results[:3]] == [0, 1, 2]
    assert isinstance(results[3], asyncio.QueueFull)
    assert refused == 1


def test_bad_images_full_queues_and_faults_have_a_status_and_the_next_image_an_answer(service, port, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    async def full(image):
        raise asyncio.QueueFull

    image = TEST.image[0].tobytes()
    code, text = refusal(port, b'short')
    assert (code, 'expected 784 bytes' in text) == (400, True)
    with monkeypatch.context() as patched:
        patched.setattr(service.answerer, 'predict', broken)
        assert refusal(port, image)[0] == 500
    with monkeypatch.context() as patched:
        patched.setattr(service, 'classify', full)
        assert refusal(port, image)[0] == 503
    assert get(port, '/classify', image)['number'] == 0


def check_row(row, *, requests, clients):
    assert (row['answered'], row['clients']) == (requests, clients)
    assert 0 < row['p50_ms'] <= row['p99_ms']
    assert sum(row['exit_fractions']) == pytest.approx(1)


def test_load_on_one_process_is_answered_whole(port):
    row = load.send_all(functools.partial(load.send_over_http, port), TEST, 60, 4)
    check_row(row, requests=60, clients=4)
    assert (row['processes'], row['repeated']) == (1, 0)
    record = {'network': 'b-lenet@mnist', 'command': '', 'device': '', 'requests': 60, 'target_ms': 20.0, 'floor': 0.5}
    assert '| 4       | –         | 60       | 1         | 0        |' in load.page({**record, 'rows': [row]})


def processes_of_ray():
    names = psutil.process_iter(['name', 'cmdline'])
    return {each for each in names if re.search(r'\bray(let|::)|gcs_server', ' '.join(each.info['cmdline'] or []))}


@pytest.fixture(scope='module')
def port_of_ray():
    """A port of Ray Serve, which starts once for all tests here and leaves no process."""
    pytest.importorskip('ray', reason="pip install '.[ray]'")
    from experiments.service.on_ray import started

    before = processes_of_ray()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with started(port):
        yield port
    assert not psutil.wait_procs(processes_of_ray() - before, timeout=30)[1]


def on_ray(test):
    """Marks a test that uses Ray: several processes, and modules that warn of code of their own."""
    return pytest.mark.slow(pytest.mark.filterwarnings('ignore')(test))


@on_ray
def test_a_killed_replica_loses_no_request_and_is_replaced(port_of_ray, folder):
    options = argparse.Namespace(plans=folder, port=port_of_ray, target_ms=1e6, requests=90, clients=24)
    rows = list(load.on_ray(options, TEST, cases=[(2, 2, True)]))
    assert [row['through'] for row in rows] == ['HTTP', 'handle']
    for row in rows:
        check_row(row, requests=90, clients=24)
        assert row['in_flight'] >= 20
        assert row['processes'] >= 2


@on_ray
@pytest.mark.usefixtures('port_of_ray')
def test_ray_data_labels_as_exit_outputs_joined_by_id(folder, tmp_path):
    from ray import serve

    from experiments.service import label

    serve.delete('default')  # replicas of the other tests hold all cores that Ray counts
    label.write_images(tmp_path / 'images', TEST.image)
    label.label(folder, tmp_path / 'images', tmp_path / 'labels')
    compared = label.compare(folder, TEST.image, tmp_path / 'labels')
    assert (compared['images'], compared['differ']) == (40, 0)
    assert compared['ties'] <= 1  # the threshold of the plan is next to the largest uncertainty
