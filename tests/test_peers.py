"""Peers do the same work on the same images, take turns in processes of their own, and the page says who did not."""

import contextlib
import functools
import importlib.util
import os
from concurrent.futures import Future

import fake_contenders as fake
import jax
import numpy as np
import pytest
from conftest import random_variables

import branchy_jax as bj
from experiments.peers import command, contenders, forcing, limit, turns
from experiments.peers.forcing import Forced
from experiments.peers.job import Job
from experiments.study.cells import random_network

EXITS = [0, 0, 1, 0]
LABELS = [3, 1, 9, 0]


@pytest.fixture(scope='module')
def lenet():
    return random_network('b-lenet')


@pytest.fixture(scope='module')
def forced():
    """Four images in calls of two that say themselves what to answer; of the last exit that is 9."""
    images = np.zeros((4, 1, 2, 1), np.float32)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = LABELS, EXITS
    logits = np.zeros((2, 4, 10))
    logits[0, range(4), LABELS] = logits[1, range(4), 9] = 1
    return Forced(Job('b-fake', {}, images, 2, (0.5,), 1), np.array(EXITS), logits)


def measure(forced, **them):
    return turns.measure(forced, them, rounds=3, seconds=0.0)


@pytest.mark.parametrize('name', ['b-lenet', 'b-alexnet', 'b-resnet20'])
def test_torch_networks_compute_what_ours_do(name):
    torch = pytest.importorskip('torch', reason="pip install '.[peers]'")
    from experiments.peers import torch_networks

    model, _ = random_network(name)
    images = np.random.default_rng(0).standard_normal((6, *model.image_shape), np.float32)
    variables = random_variables(model, images)
    outputs = bj.inference.exit_outputs(model, variables, images)
    network = torch_networks.create(name, variables)
    with torch.inference_mode():
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
        hidden = tensor
        for stage, head, ours in zip(network.stages, network.exits, outputs.logits, strict=True):
            hidden = stage(hidden)
            np.testing.assert_allclose(head(hidden), ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())
        np.testing.assert_array_equal(network.labels()(tensor), outputs.logits[-1].argmax(-1))


def test_masks_of_torch_stop_where_all_leave(lenet):
    torch = pytest.importorskip('torch', reason="pip install '.[peers]'")
    from experiments.peers import torch_networks

    drawn = forcing.force('b-lenet', *lenet, (0.75, 0.25), 8, cores=1)
    network = torch_networks.create('b-lenet', drawn.job.variables)
    network.stages[1] = None  # is not run
    labels, exits = torch_networks.with_exits(network, torch.from_numpy(drawn.job.channels_first[0]), [np.inf])
    np.testing.assert_array_equal(labels, drawn.labels(np.zeros(8, int)))
    np.testing.assert_array_equal(exits, np.zeros(8))


def test_forced_images_lie_clearly_apart(lenet, monkeypatch):
    drawn = forcing.force('b-lenet', *lenet, (0.94, 0.06), 32, cores=1)
    uncertainty = np.asarray(bj.criteria.entropy.uncertainty_of(drawn.logits))[0]
    assert np.bincount(drawn.exits).tolist() == [30, 2]
    assert np.abs(uncertainty - drawn.job.thresholds[0]).min() > 1e-4
    assert uncertainty.std() > 0.1
    expected = bj.inference.dense(lenet[0])(lenet[1], drawn.job.images, np.float32(drawn.job.thresholds))
    np.testing.assert_array_equal(drawn.labels(drawn.exits), expected.label)
    monkeypatch.setattr(forcing, '_MARGIN', np.inf)
    monkeypatch.setattr(forcing, '_MOST_DRAWS', 2)
    with pytest.raises(ValueError, match='shares: got'):
        forcing.force('b-lenet', *lenet, (0.5, 0.5), 4, cores=1)


def test_everyone_takes_part_or_says_why_not(forced, tmp_path):
    """A contender of another checkout runs the library that lies there."""
    (tmp_path / 'branchy_jax.py').write_text('raise ImportError("of the other checkout")')
    them = {'gone': fake.missing, 'dies_later': fake.dies_later, 'dies_at_start': fake.dies_at_start}
    them['other'] = functools.partial(contenders.planned, checkout=str(tmp_path))
    planned, plain, *absent = measure(forced, planned=fake.answering, plain=fake.without_exits, **them)
    assert (planned['contender'], planned['shares']) == ('planned', [0.75, 0.25])
    assert planned['settings'] == 'as the images say'
    assert (plain['contender'], plain['shares'], len(plain['ms_of_rounds'])) == ('plain', [0.0, 1.0], 3)
    assert plain['ratio_low'] <= plain['ratio'] <= plain['ratio_high']
    assert {row['contender']: row['absent'] for row in absent} == {
        'gone': "ModuleNotFoundError: No module named 'torch'",
        'dies_at_start': 'its process died',
        'other': 'ImportError: of the other checkout',
        'dies_later': 'its process died in round 1',
    }
    assert (plain['network'], plain['batch'], plain['forced']) == ('b-fake', 2, [0.75, 0.25])


class Here(contextlib.nullcontext):
    """An executor without a process; every turn takes a second."""

    def __init__(self, workers, mp_context):
        super().__init__(self)

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(1.0 if function is turns.take_turn else function(*arguments))
        return future


def test_other_work_is_refused(forced, monkeypatch):
    """Only the plan may skip a head, and without it there is no cell."""
    monkeypatch.setattr(turns, 'ProcessPoolExecutor', Here)
    assert measure(forced, planned=fake.late)[0]['shares'] == [0.0, 1.0]
    for them, error, message in (
        ({'planned': fake.answering, 'late': fake.late}, ValueError, 'late: 3 of 4 images leave at other exits'),
        ({'planned': fake.wrong}, ValueError, r'planned: only 0\.0% of the labels'),
        ({'planned': fake.missing}, RuntimeError, "^planned: ModuleNotFoundError: No module named 'torch'"),
    ):
        with pytest.raises(error, match=message):
            measure(forced, **them)


@pytest.mark.filterwarnings('ignore:os.fork')  # by OpenVINO's telemetry
def test_bare_networks_and_exits_do_the_same_work_in_every_runtime(lenet, monkeypatch):
    asked = []

    def plan(model, variables, images, policy, **options):
        asked.append((len(policy), options))

        def run(images, *, as_numpy):
            assert as_numpy
            return jax.device_get(bj.inference.dense(model)(variables, images, policy))

        run.executor = 'dense'
        return run

    monkeypatch.setattr(bj.inference, 'plan', plan)
    job = forcing.force('b-lenet', *lenet, (0.75, 0.25), 8, cores=2).job
    expected = bj.inference.dense(lenet[0])(job.variables, job.images, np.float32(job.thresholds))
    last = bj.inference.exit_outputs(*lenet, job.images).logits[-1].argmax(-1)
    packages = {'PyTorch': 'torch', 'torch.compile': '', 'ONNX Runtime': 'onnxruntime', 'OpenVINO': 'openvino'}
    for name, contender in contenders.CONTENDERS.items():
        package = packages.get(name.removesuffix(', bare'), 'jax')  # to compile in PyTorch takes a minute
        if not package or not all(map(importlib.util.find_spec, {package, 'jax' if package == 'jax' else 'torch'})):
            continue
        labels, exits = contender(job).answers()
        np.testing.assert_array_equal(labels, last if name.endswith(', bare') else expected.label)
        np.testing.assert_array_equal(exits, None if name.endswith(', bare') else expected.exit_index)
    assert asked == [(1, {'batch_size': 8}), (0, {'batch_size': 8}), (1, {'batch_size': 8, 'engine': 'xla'})]


def timed(batch, contender, ms, ratio, **more):
    row = {'network': 'b-lenet', 'batch': batch, 'cores': 2, 'rounds': 20, 'forced': [0.9375, 0.0625]}
    row |= {'command': 'python -m experiments.peers', 'device': 'a CPU', 'packages': 'torch 2.14.1'}
    row |= {'ms': ms, 'ms_of_rounds': 7 * [ms], 'ratio_low': ratio - 0.1, 'ratio_high': ratio + 0.1}
    return {**row, 'contender': contender, 'ratio': ratio, 'settings': 'its own', **more}


def test_command_adds_to_what_is_there(tmp_path, monkeypatch, lenet):
    """At tiny scale: real images, forced; contenders that compute nothing."""
    monkeypatch.setattr(command, 'random_network', lambda name: lenet)

    def measured(forced, them, *, rounds):
        assert list(them) == list(contenders.CONTENDERS)
        cell = {'batch': forced.job.batch, 'cores': forced.job.cores, 'rounds': rounds}
        return [timed(1, 'planned', 0.05, 1.0) | cell, timed(1, 'PyTorch', 0.1, 2.0) | cell]

    monkeypatch.setattr(turns, 'measure', measured)
    flags = [f'--workdir={tmp_path}', '--networks=b-lenet']
    command.main([*flags, '--batches=1,4', '--rounds=2'])
    command.main([*flags, '--batches=4', '--one_core'])
    command.main([*flags, '--batches=4'])
    rows, cores = bj.report.read_json(tmp_path / 'peers.json')['rows'], os.cpu_count()
    cells = [(row['cores'], row['batch'], row['rounds']) for row in rows[::2]]
    assert cells == [(1, 4, 20), (cores, 1, 2), (cores, 4, 20)]
    for bad in ('--networks=lenet', '--other=nowhere'):
        with pytest.raises(SystemExit):
            command.main([f'--workdir={tmp_path}', bad])


def test_limit_is_of_the_stages_and_heads_of_the_file_in_its_engine(monkeypatch, lenet):
    """With known times: 20 for all images without exits, 8 to the first exit, 24 to the last, 12 for the file."""
    pytest.importorskip('onnxruntime', reason="pip install '.[onnx]'")
    forced = forcing.force('b-lenet', *lenet, (0.75, 0.25), 8, cores=1)
    found = {}

    def timed_alone(runs, **_):
        found.update({name: run() for name, run in runs.items()})
        return {name: np.full(6, seconds) for name, seconds in {'file': 12.0, 'bare': 20, '0': 8, '1': 24}.items()}

    monkeypatch.setattr(limit, 'interleaved_passes', timed_alone)
    row = limit.measure(forced, rounds=6)
    np.testing.assert_array_equal(found['file'][1], forced.exits)
    for name, logits in {'bare': forced.logits[1:], '0': forced.logits[:1], '1': forced.logits}.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4)
    assert [row['gain'], row['time_limit'], row['realised']] == pytest.approx([20 / 12, 20 / 12, 1])
    assert '| b-lenet | 8 | 1 | 75, 25 |' in ' '.join(
        limit.page({'rows': [row | {'command': '', 'device': ''}]}).split()
    )
