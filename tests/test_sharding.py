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

pytestmark = pytest.mark.slow  # a process with eight devices


@pytest.fixture(scope='module')
def eight():
    command = [sys.executable, '-W', 'error', Path(__file__).with_name('eight_devices.py')]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_eight_devices_train_what_one_trains(eight):
    """Parameters after several epochs, the share of each device, and a checkpoint restored on one device."""
    training = eight['training']
    assert max(training['scanned'], training['by hand'], training['eight to one'], training['one to eight']) <= 1e-5
    assert training['moved'] > 0.1  # it did train
    assert training['shares of batches on a device']
    assert not training['whole batches on a device']
    assert training['devices'] == [1, 8, 1, 8]
    assert training['loss is everywhere']


def test_sharded_inference_is_dense_and_survivors_are_dispatched_to_all(eight):
    inference = eight['inference']
    assert inference['same as dense'] == dict.fromkeys(('skewed', 'all', 'none', 'uneven', 'planned'), True)
    waiting, dispatched = (np.array(inference[name]) for name in ('waiting', 'dispatched'))
    assert waiting[1].tolist() == [6, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(waiting.sum(1), dispatched.sum(1))
    assert (np.ptp(dispatched, axis=1) <= 1).all()
    assert dispatched[1].tolist() == [1] * 6 + [0] * 2
    assert 0 < dispatched[2].sum() < 6
    assert '100.0 %' in inference['report']
    assert inference['rows of a device'] == [6]
    assert inference['uneven waiting'] == [13, 13, 13]  # padding is not counted
    assert inference['planned'].startswith('sharded × 8')
    assert inference['outputs']


def test_impossible_shares_are_refused(eight, network):
    assert 'got 12 rows for 8 devices' in eight['refusal']
    with pytest.raises(ValueError, match='num_devices: got 9'):
        sharding.data_mesh(9)
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
