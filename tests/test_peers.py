"""Peers do the same work on the same images, take turns in processes of their own, and the page says who did not."""

import json
import os
import time

import fake_contenders as fake
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import branchy_jax as bj
from experiments.pages import peers as pages
from experiments.peers import cells, command, contenders, forcing
from experiments.peers.forcing import Forced, leave_in_shares
from experiments.peers.job import Job, Ready, fastest
from experiments.peers.workers import Unavailable, Worker

EXITS = [0, 0, 1, 0]
LABELS = [3, 1, 9, 0]


@pytest.fixture(scope='module')
def lenet():
    return forcing.random_network('b-lenet')


@pytest.fixture(scope='module')
def forced():
    """Four images in calls of two that say themselves what to answer; of the last exit that is 9."""
    images = np.zeros((4, 1, 2, 1), np.float32)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = LABELS, EXITS
    logits = np.zeros((2, 4, 10))
    logits[0, range(4), LABELS] = logits[1, range(4), 9] = 1
    return Forced(Job('b-fake', {}, images, 2, (0.5,), 1), np.array(EXITS), logits)


def measure(forced, **them):
    return cells.measure(forced, them, rounds=3, seconds=0.0)


def record_of(*found):
    rows = [
        {
            **json.loads(json.dumps(cell, default=vars)),
            'command': 'python -m experiments.peers',
            'device': 'a CPU',
            'packages': {'torch': '2.14.1'},
        }
        for cell in found
    ]
    return {'unit': 'ms per image', 'cells': rows}


def timed(name, ms, ratio, low, high, told=''):
    return cells.Timed(name, ms, ratio, low, high, (0.9375, 0.0625), told, 0.0, (ms,))


def cell(network, batch, *others, **absent):
    planned = timed('planned here', 0.05, 1.0, 1.0, 1.0, 'staged')
    return cells.Cell(network, batch, 2, 100, 20, (0.9375, 0.0625), (planned, *others), absent)


@pytest.mark.parametrize('name', ['b-lenet', 'b-alexnet', 'b-resnet20'])
def test_torch_networks_compute_what_ours_do(name):
    torch = pytest.importorskip('torch', reason='pip install branchy-jax[peers]')
    from experiments.peers import torch_networks

    model, variables = forcing.random_network(name)
    variables = jax.tree_util.tree_map_with_path(_lively, variables)
    images = np.random.default_rng(0).standard_normal((6, *model.image_shape), np.float32)
    outputs = bj.inference.exit_outputs(model, variables, images)
    network = torch_networks.create(name, variables)
    with torch.inference_mode():
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
        for ours, theirs in zip(outputs.logits, network(tensor), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())
        np.testing.assert_array_equal(network.labels()(tensor), outputs.logits[-1].argmax(-1))


def _lively(path, leaf):
    """Gives BatchNorms and biases other values than those they start with."""
    change = np.random.default_rng(len(str(path))).uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    return leaf if path[-1].key == 'kernel' else leaf * change + (0.1 * change if path[-1].key != 'var' else 0)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('thresholds', [(-np.inf,), (np.inf,), None])
def test_masks_of_torch_are_dense(lenet, channels_last, thresholds):
    torch = pytest.importorskip('torch', reason='pip install branchy-jax[peers]')
    from experiments.peers import torch_networks

    job = forcing.force('b-lenet', *lenet, (0.75, 0.25), 8, cores=1).job
    thresholds = job.thresholds if thresholds is None else thresholds
    expected = bj.inference.dense(lenet[0])(job.variables, job.images, np.float32(thresholds))
    with torch.inference_mode():
        images = torch.from_numpy(job.images).permute(0, 3, 1, 2)
        labels, exits = torch_networks.with_exits(
            torch_networks.create('b-lenet', job.variables), images, thresholds, channels_last=channels_last
        )
    np.testing.assert_array_equal(labels, expected.label)
    np.testing.assert_array_equal(exits, expected.exit_index)


def test_torch_has_no_other_networks():
    pytest.importorskip('torch', reason='pip install branchy-jax[peers]')
    from experiments.peers import torch_networks

    with pytest.raises(ValueError, match="name: got 'b-vit'"):
        torch_networks.create('b-vit', {'params': {}})


@given(st.data())
def test_images_leave_in_exactly_the_shares_asked_for(data):
    exits, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 60))
    weights = np.array(data.draw(st.lists(st.integers(0, 20), min_size=exits, max_size=exits))) + 1e-9
    shares = weights / weights.sum()
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    uncertainty = np.stack([generator.permutation(count) for _ in range(exits)]).astype(np.float32)
    thresholds, left, margin = leave_in_shares(uncertainty, shares)
    ends = np.round(np.cumsum(shares[:-1]) * count).astype(int)
    np.testing.assert_array_equal(np.bincount(left, minlength=exits), np.diff([0, *ends, count]))
    confident = uncertainty[:-1] < np.array(thresholds)[:, None]
    np.testing.assert_array_equal(
        left, [next((n for n in range(exits - 1) if confident[n, m]), exits - 1) for m in range(count)]
    )
    assert margin >= 0.5


def test_forced_images_are_told_apart_clearly(lenet):
    found = forcing.force('b-lenet', *lenet, (0.94, 0.06), 32, cores=1)
    uncertainty = np.asarray(bj.criteria.entropy.uncertainty_of(found.logits))[0]
    assert np.bincount(found.exits).tolist() == [30, 2]
    assert np.abs(uncertainty - found.job.thresholds[0]).min() > 1e-4
    assert uncertainty.std() > 0.1
    expected = bj.inference.dense(lenet[0])(lenet[1], found.job.images, np.float32(found.job.thresholds))
    np.testing.assert_array_equal(found.labels(found.exits), expected.label)


def test_shares_that_nothing_meets_are_refused(lenet, monkeypatch):
    monkeypatch.setattr(forcing, '_MARGIN', np.inf)
    monkeypatch.setattr(forcing, '_MOST_DRAWS', 2)
    with pytest.raises(ValueError, match='shares: got'):
        forcing.force('b-lenet', *lenet, (0.5, 0.5), 4, cores=1)


def test_everyone_takes_part_or_says_why_not(forced, capsys):
    found = measure(
        forced,
        planned=fake.obedient,
        plain=fake.without_exits,
        gone=fake.missing,
        mortal=fake.mortal,
        stillborn=fake.stillborn,
    )
    planned, plain = found.contenders
    assert (planned.name, planned.shares, planned.told, planned.ratio) == ('planned', (0.75, 0.25), 'as told', 1.0)
    assert (plain.name, plain.shares, len(plain.ms_of_rounds)) == ('plain', (0.0, 1.0), 3)
    assert plain.ratio_low <= plain.ratio <= plain.ratio_high
    assert found.absent == {
        'gone': "ModuleNotFoundError: No module named 'torch'",
        'stillborn': "the process of 'stillborn' died",
        'mortal': "the process of 'mortal' died in round 1",
    }
    assert (found.network, found.batch, found.images, found.shares) == ('b-fake', 2, 4, (0.75, 0.25))
    assert "mortal is left out: the process of 'mortal' died" in capsys.readouterr().out


def test_only_the_plan_may_skip_a_head(forced):
    assert measure(forced, planned=fake.late).contenders[0].shares == (0.0, 1.0)
    with pytest.raises(ValueError, match='late: 3 of 4 images leave at other exits'):
        measure(forced, planned=fake.obedient, late=fake.late)


def test_other_work_is_refused(forced):
    with pytest.raises(ValueError, match='planned: 1 of 4 images leave at other exits'):
        measure(forced, planned=fake.early)
    with pytest.raises(ValueError, match=r'planned: only 0\.0% of the labels'):
        measure(forced, planned=fake.wrong)


@pytest.mark.parametrize('lost', [fake.missing, fake.stillborn, fake.mortal])
def test_without_the_plan_there_is_no_cell(forced, lost):
    with pytest.raises(Unavailable, match='^planned: '):
        measure(forced, planned=lost, plain=fake.without_exits)


def test_a_worker_that_waits_is_idle(forced):
    worker = Worker('obedient', fake.obedient)
    opened = worker.open(forced.job, seconds=0.0)
    time.sleep(0.2)
    turn = worker.turn(opened.passes)
    worker.close()
    assert turn.seconds > 0
    assert turn.burnt < 0.5
    assert opened.labels.tolist() == LABELS


def test_the_fastest_way_is_taken():
    slow = Ready(lambda _: (time.sleep(0.02), None), [np.zeros(1)], 'settings')
    quick = Ready(lambda _: (np.zeros(1), None), [np.zeros(1)], 'settings')
    assert fastest({'slow': slow, 'quick': quick}).told == 'quick, settings'


def test_plans_with_and_without_exits_do_the_same_work(lenet):
    found = forcing.force('b-lenet', *lenet, (0.94, 0.06), 4, cores=2)
    labels, exits = contenders.planned(found.job).answers()
    assert (exits >= found.exits).all()
    np.testing.assert_array_equal(labels, found.labels(exits))
    labels, exits = contenders.planned_bare(found.job).answers()
    assert exits is None
    np.testing.assert_array_equal(labels, found.labels(np.ones(4, int)))


def test_onnx_files_do_the_same_work(lenet):
    pytest.importorskip('onnxruntime', reason='pip install branchy-jax[peers]')
    found = forcing.force('b-lenet', *lenet, (0.94, 0.06), 1, cores=1)
    labels, exits = contenders.onnx_if(found.job).answers()
    np.testing.assert_array_equal(exits, found.exits)
    np.testing.assert_array_equal(labels, found.labels(found.exits))
    with pytest.raises(ValueError, match='takes one image'):
        contenders.onnx_if(forcing.force('b-lenet', *lenet, (0.94, 0.06), 32, cores=1).job)
    pytest.importorskip('torch', reason='pip install branchy-jax[peers]')
    labels, exits = contenders.onnx_plain(found.job).answers()
    assert exits is None
    np.testing.assert_array_equal(labels, found.labels(np.ones(100, int)))


def test_page_says_who_is_faster_and_who_was_not_there(tmp_path):
    found = record_of(
        cell('b-lenet', 1, timed('PyTorch', 0.2, 4.0, 3.9, 4.1), timed('ONNX Runtime', 0.06, 1.2, 1.1, 1.3)),
        cell('b-lenet', 32, timed('PyTorch', 0.049, 0.98, 0.95, 1.02), **{'ONNX Runtime': 'it takes one image'}),
        cell('b-alexnet', 1, PyTorch='no torch'),
    )
    page = pages.page(found)
    lines = [' '.join(line.split()) for line in page.splitlines()]
    assert '| b-lenet | 1 | 2 | 93.8, 6.2 | ONNX Runtime | 1.20 [1.10, 1.30] | staged |' in lines
    assert '| b-lenet | 32 | 2 | 93.8, 6.2 | PyTorch | 0.98 [0.95, 1.02] | staged |' in lines
    assert '| b-alexnet | 1 | 2 | 93.8, 6.2 | – | – | staged |' in lines
    assert '| b-lenet | 32 | 2 | 0.0500 | 0.0490 | – |' in lines
    assert lines[lines.index('Where the lower end is below 1:') + 2].startswith('- b-lenet, batch 32, 2 cores: 0.0500')
    assert '- ONNX Runtime: it takes one image (b-lenet at 32).' in lines
    assert '- PyTorch: no torch (b-alexnet at 1).' in lines
    pages.picture(tmp_path / 'peers.png', found)
    assert (tmp_path / 'peers.png').read_bytes().startswith(b'\x89PNG')


def test_page_takes_a_ratio_apart():
    """0.8 = 1.6 × 3 ÷ 6: the peer's network is slower, but its exits save twice as much."""
    row = '| b-lenet | 1 | 2 | torch.compile, exits | 0.80 | 1.60 | 3.00 | 6.00 |'
    bare = timed('planned here, bare', 0.15, 3.0, 2.9, 3.1)
    peers = [timed('torch.compile', 0.24, 4.8, 4.7, 4.9), timed('torch.compile, exits', 0.04, 0.8, 0.7, 0.9)]
    page = pages.page(record_of(cell('b-lenet', 1, bare, *peers), cell('b-lenet', 32, *peers)))
    lines = [' '.join(line.split()) for line in page.splitlines()]
    assert row in lines
    assert sum(line.startswith('| b-lenet | 32 |') and line.endswith('6.00 |') for line in lines) == 0
    quick = pages.page(record_of(cell('b-lenet', 1, timed('planned here, bare', 0.01, 0.2, 0.1, 0.3), *peers)))
    assert 'torch.compile, exits: 0.80 [0.70, 0.90] times as long' in quick  # no peer of itself


def test_page_of_cells_that_hold():
    page = pages.page(record_of(cell('b-lenet', 1, timed('PyTorch', 0.2, 4.0, 3.9, 4.1))))
    assert 'In all 1 cells the lower end is at least 1.' in page
    assert 'Everyone took part.' in page


def test_command_adds_to_what_is_there(tmp_path, monkeypatch, lenet):
    """At tiny scale: real images, forced; contenders that compute nothing."""
    monkeypatch.setattr(command, 'random_network', lambda name: lenet)
    seen = []

    def measured(forced, them, *, rounds):
        seen.append((forced.job.network, forced.job.batch, forced.job.cores, list(them), rounds))
        return cells.Cell(
            'b-lenet',
            forced.job.batch,
            forced.job.cores,
            100,
            rounds,
            (0.94, 0.06),
            (timed('planned here', 0.05, 1, 1, 1), timed('PyTorch', 0.1, 2, 2, 2)),
            {},
        )

    monkeypatch.setattr(cells, 'measure', measured)
    flags = [f'--workdir={tmp_path}', '--networks=b-lenet']
    command.main([*flags, '--batches=1,4', '--rounds=2'])
    command.main([*flags, '--batches=1', '--one_core'])
    command.main([*flags, '--batches=4'])
    everyone = list(contenders.CONTENDERS)
    assert seen == [
        ('b-lenet', batch, cores, everyone, rounds)
        for batch, cores, rounds in [
            (1, os.cpu_count(), 2),
            (4, os.cpu_count(), 2),
            (1, 1, 20),
            (4, os.cpu_count(), 20),
        ]
    ]
    rows = bj.report.read_json(tmp_path / 'peers.json')['cells']
    assert {(row['batch'], row['cores'], row['rounds']) for row in rows} == {
        (1, 1, 20),
        (1, os.cpu_count(), 2),
        (4, os.cpu_count(), 20),
    }
    assert (tmp_path / 'peers.md').read_text().startswith('# Beside PyTorch')
    assert (tmp_path / 'peers.png').exists()


def test_networks_without_usual_shares_are_refused(tmp_path):
    with pytest.raises(ValueError, match="networks: got 'lenet'"):
        command.main([f'--workdir={tmp_path}', '--networks=lenet'])
