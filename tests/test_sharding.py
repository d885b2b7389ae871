"""Eight simulated devices do what one does: training, checkpoints, inference with survivors dispatched out, plans."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax import sharding


@pytest.fixture(scope='module')
def eight():
    command = [sys.executable, '-W', 'error', Path(__file__).with_name('eight_devices.py')]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_eight_devices_train_what_one_trains(eight):
    """Parameters after 20 steps, the share of each device, and checkpoints restored on another number of devices."""
    training = eight['training']
    for difference in ('scanned', 'by hand', 'eight to one', 'one to eight'):
        assert training[difference] <= 1e-5, difference
    assert training['moved'] > 0.1  # it did train
    assert training['shares of batches on a device']
    assert not training['whole batches on a device']
    assert training['devices of parameters'] == [8]
    assert training['loss is everywhere']
    assert training['devices after restoring'] == [1, 8]


@pytest.mark.parametrize('thresholds', ['skewed', 'all', 'none', 'half', 'uneven'])
def test_sharded_inference_is_dense(eight, thresholds):
    assert eight['inference']['same as dense'][thresholds]
    assert eight['inference']['same as compacted']


def test_survivors_of_one_device_are_dispatched_to_all(eight):
    waiting, dispatched = (np.array(eight['inference'][name]) for name in ('waiting', 'dispatched'))
    assert waiting[1].tolist() == [12, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(waiting.sum(1), dispatched.sum(1))
    assert (np.ptp(dispatched, axis=1) <= 1).all()
    assert dispatched[1].tolist() == [2] * 4 + [1] * 4
    assert 0 < dispatched[2].sum() < 12
    assert '100.0 %' in eight['inference']['report']
    assert eight['inference']['rows of a device'] == [12]
    assert eight['inference']['uneven waiting'] == [13, 13, 13]  # padding is not counted


def test_plan_knows_the_mesh(eight):
    assert eight['inference']['plan'] == {'same as dense': True, 'races on the mesh': 1, 'chunks fit a share': True}
    assert eight['inference']['outputs']


def test_impossible_shares_are_refused(eight):
    assert 'got 12 rows for 8 devices' in eight['refusals']['batch']
    assert 'num_devices: got 9' in eight['refusals']['devices']


def test_balance_of_no_images_is_refused(network):
    model, variables, images = network
    run = bj.inference.sharded(model, mesh=sharding.data_mesh(1), chunk_size=2)
    with pytest.raises(ValueError, match='images: got none'):
        run.balance(variables, images[:0], [0.5, 0.5])


def test_one_device_is_a_mesh_too(network):
    mesh = sharding.data_mesh(1)
    variables = sharding.replicate(mesh, network[1])
    assert sharding.mesh_of(variables) == mesh
    assert sharding.mesh_of(network[1]) is None
    # Replicated arrays are returned as they are, others are copied, because training donates its state.
    first, again = jax.tree.leaves(variables)[0], jax.tree.leaves(sharding.replicate(mesh, variables))[0]
    assert first is again
    jax.tree.map(lambda leaf: leaf.delete(), variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network[1]))
