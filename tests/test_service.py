"""The service over HTTP: no image is lost or answered twice, bad images are refused, faults are reported."""

import concurrent.futures
import json
import queue
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from experiments.service.service import Service

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 1)).astype(np.uint8)


@pytest.fixture(scope='module')
def weights():
    model = bj.models.create('b-lenet', num_classes=4, image_shape=(12, 12, 1))
    inputs = jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    variables = model.init(jax.random.key(0), jnp.zeros(inputs.shape))
    normalization = bj.Normalization(mean=jnp.array([0.5]), deviation=jnp.array([0.25]))
    return bj.models.Pretrained(model, variables, inputs, normalization, (), {})


@pytest.fixture(scope='module')
def table(weights):
    data = bj.Batch(IMAGES, np.arange(40) % 4)
    return bj.inference.exit_table(weights.model, weights.variables, data, preprocess=weights.normalize)


def controller(table, **options):
    path = table.path_by_shares()
    settings = {'target': 1e6, 'scale': 1e6, 'position': 0.5, **options}
    return bj.thresholds.Controller.create(path, criterion=bj.criteria.entropy, **settings)


@pytest.fixture
def service(weights, table):
    made = Service(weights, controller(table), chunk_size=4).start()
    yield made
    made.close()


def test_every_image_is_answered_once_as_dense_answers_it(weights, table):
    steady = controller(table, horizon=1e30)  # thresholds stay where they are
    service = Service(weights, steady, chunk_size=4).start()
    expected = bj.inference.dense(weights.model)(weights.variables, weights.normalize(IMAGES), steady.policy)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        futures = list(threads.map(service.submit, IMAGES))
    answers = [future.result(timeout=60) for future in futures]
    service.close()
    assert [answer.label for answer in answers] == np.asarray(expected.label).tolist()
    assert [answer.exit for answer in answers] == np.asarray(expected.exit_index).tolist()
    assert sorted(answer.number for answer in answers) == list(range(40))
    counts = service.stats()
    assert (counts['taken'], counts['answered'], counts['refused'], counts['failed']) == (40, 40, 0, 0)
    assert sum(counts['exits']) == 40


def test_what_does_not_fit_is_refused_and_the_rest_answered(weights, table):
    service = Service(weights, controller(table), capacity=3, chunk_size=4)  # not started: nothing leaves the queue
    futures = [service.submit(image) for image in IMAGES[:3]]
    with pytest.raises(queue.Full):
        service.submit(IMAGES[3])
    service.start()
    assert [future.result(timeout=60).number for future in futures] == [0, 1, 2]
    service.close()
    assert [service.counts[name] for name in ('taken', 'refused', 'answered')] == [3, 1, 3]


def test_more_waiting_makes_images_leave_earlier(weights, table):
    """Every image waits longer than a target of 0 ms: the thresholds go to the end that leaves most."""
    service = Service(weights, controller(table, target=0.0, scale=1e-3, horizon=10.0), chunk_size=4).start()
    for image in IMAGES:
        service.submit(image).result(timeout=60)
    service.close()
    assert service.stats()['position'] == 0
    np.testing.assert_array_equal(service.stats()['thresholds'], table.path_by_shares()[0])


def test_closing_answers_what_was_taken(service):
    futures = [service.submit(image) for image in IMAGES]
    service.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match='has ended'):
        service.submit(IMAGES[0])


def test_a_fault_of_the_network_is_received_to_whoever_waits(service, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError('broken')

    monkeypatch.setattr(service, '_answer', broken)
    with pytest.raises(RuntimeError, match='ended: broken'):
        service.submit(IMAGES[0]).result(timeout=60)
    with pytest.raises(RuntimeError, match='has ended'):
        service.submit(IMAGES[1])


@pytest.fixture
def address(service):
    app = pytest.importorskip('experiments.service.app', reason="pip install '.[serve]'")
    with app.served(service) as port:
        yield f'http://127.0.0.1:{port}'


def get(address, path, body=None):
    with urllib.request.urlopen(urllib.request.Request(address + path, data=body), timeout=60) as response:
        content = response.read().decode()
    return content if path == '/' else json.loads(content)


def test_over_http(address, service):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        received = list(threads.map(lambda image: get(address, '/classify', image.tobytes()), IMAGES))
    assert sorted(answer['number'] for answer in received) == list(range(40))
    assert get(address, '/stats')['answered'] == 40
    recent = get(address, '/recent')
    assert (recent['shape'], len(recent['answers'])) == ([12, 12, 1], 40)
    assert {'number', 'label', 'exit', 'waited_ms', 'in_time', 'pixels'} == set(recent['answers'][0])
    assert 'Where images leave' in get(address, '/')


def test_what_is_no_image_is_400_and_a_full_queue_503_over_http(address, service, monkeypatch):
    def full(image):
        raise queue.Full

    refused = []
    for body in (b'short', IMAGES[0].tobytes()):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(address, '/classify', body)
        refused.append((error.value.code, error.value.read().decode()))
        error.value.close()
        monkeypatch.setattr(service, 'submit', full)
    assert [code for code, _ in refused] == [400, 503]
    assert 'expected 144 bytes' in refused[0][1]
    assert service.counts['taken'] == 0


def test_a_burst_is_answered_whole_and_summed_up(address):
    app = pytest.importorskip('experiments.service.app')
    test = bj.Batch(IMAGES, np.arange(40) % 4)
    replies = app.send(int(address.rsplit(':', 1)[1]), test, [50.0, 200.0, 50.0], 0.2)
    rows = app.summary(replies, [50.0, 200.0, 50.0])
    assert [row['phase'] for row in rows] == ['before', 'burst', 'after']
    assert sum(row['answered'] for row in rows) == len(replies)
    assert sum(rows[1]['exit_fractions']) == pytest.approx(1)
