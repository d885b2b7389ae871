"""Plans as files: what comes back is the plan, and no plan runs where it was not measured."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inference import CRITERIA, check_same

import branchy_jax as bj
from branchy_jax.inference import Plan, dense, plan, segment_times
from branchy_jax.inference.planning.file import fingerprint

SPEC = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)


@pytest.fixture(scope='module')
def planned(network):
    model, variables, images = network
    times = segment_times(model, variables, images, batch_sizes=[1, 12], passes=1)
    policy = bj.ExitPolicy(bj.criteria.margin, np.float32([0.4, -np.inf]))
    size = np.int64(12)  # which JSON does not know
    return plan(model, variables, images, policy, batch_size=size, times=times, passes=1, skip_heads=False)


@pytest.fixture
def path(planned, tmp_path):
    planned.save(tmp_path / 'plan.json')
    return tmp_path / 'plan.json'


def test_what_was_saved_comes_back(network, planned, path):
    model, variables, images = network
    loaded = Plan.load(path, model, variables)
    for name in ('way', 'policy', 'batch_size', 'executor', 'exits'):
        assert getattr(loaded, name) == getattr(planned, name)
    assert repr(loaded.candidates) == repr(planned.candidates)  # two NaN are not equal, what they print is
    jax.tree.map(np.testing.assert_array_equal, loaded.times, planned.times)
    assert str(loaded) == str(planned)
    check_same(loaded(images[:7]), dense(model)(variables, images[:7], planned.policy))
    loaded.warm_up()
    loaded.save(path)  # a plan that was read can be written again
    assert Plan.load(path, model, variables).way == planned.way


def test_other_weights_of_the_same_network_are_welcome(network, planned, path):
    model, variables, images = network
    trained = jax.tree.map(lambda leaf: leaf * 1.5, variables)
    check_same(Plan.load(path, model, trained)(images), dense(model)(trained, images, planned.policy))


def test_the_file_is_plain_json_without_weights(network, path):
    record = json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity, which JSON has not
    assert record['format'] == 3
    assert record['arrays']['array0']['values'] == [pytest.approx(0.4), '-inf']
    assert len(path.read_text()) < 20_000
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    'name', ['jax', 'jaxlib', 'branchy-jax', 'platform', 'device', 'processor', 'cores', 'devices']
)
def test_plans_from_elsewhere_are_refused_with_the_reason(network, path, name):
    record = json.loads(path.read_text())
    record['made_with'][name] = 'another'
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf'path: the plan in .* was measured elsewhere \({name} another there'):
        Plan.load(path, *network[:2])


def test_plans_of_other_networks_are_refused(network, planned, path):
    model, variables, images = network
    sharper = model.clone(exits=(*model.exits[:2], (jnp.tanh, model.exits[2])))  # other layers, the same variables
    wider = model.clone(exits=(*model.exits[:2], nn.Dense(4, name='head3')))
    for other, weights in (
        (sharper, variables),
        (wider, wider.init(jax.random.key(0), images)),
        (bj.models.select_exits(model, [0, 2]), variables),
        (model.clone(image_shape=(5, 5, 1)), variables),
        (model.clone(image_shape={'a': SPEC, 'b': SPEC}), variables),
    ):
        with pytest.raises(ValueError, match='path: the plan in .* is of another network'):
            Plan.load(path, other, weights)
    with pytest.raises(ValueError, match='variables: got the collections'):
        Plan.load(path, model, variables['params'])
    assert Plan.load(path, model.clone(), variables).way == planned.way


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda record: record.update(format=1), 'has format 1, this version reads 3'),
        (lambda record: record['way'].update(kind='os.system'), r"is damaged \(ValueError: kind: got 'os.system'"),
        (lambda record: record['way'].pop('exits'), 'is damaged'),
        (lambda record: record.pop('policy'), 'is damaged'),
        (lambda record: record['policy']['criterion'].update(kind='Path'), 'is damaged'),
        (lambda record: record.pop('format'), 'cannot read a plan'),
    ],
)
def test_damaged_files_are_refused(network, path, change, message):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f'path: .*{message}'):
        Plan.load(path, *network[:2])


def test_no_file_and_half_a_file_are_refused(network, path):
    path.write_text(path.read_text()[:500])
    for there in (path, path.parent / 'nothing'):
        with pytest.raises(ValueError, match='path: cannot read a plan from'):
            Plan.load(there, *network[:2])


def test_a_criterion_of_ones_own_is_not_written(network, tmp_path):
    model, variables, images = network
    planned = plan(model, variables, images, bj.ExitPolicy(CRITERIA[1], jnp.full(2, -np.inf)), passes=1)
    with pytest.raises(ValueError, match='policy: its criterion holds'):
        planned.save(tmp_path / 'plan.json')
    assert not list(tmp_path.iterdir())


def test_inputs_of_unknown_structure_are_not_written(network, planned, tmp_path):
    model, variables, _ = network
    plain, inputs = (model.clone(image_shape=None), variables), {'x': jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)}
    with pytest.raises(ValueError, match='plan: its network takes several arrays and has no image_shape'):
        dataclasses.replace(planned, _networks=(plain, plain), _inputs=inputs).save(tmp_path / 'plan.json')


def test_fingerprints_know_no_addresses(network):
    """Functions made anew lie elsewhere, as they do in another process."""

    def made():
        halve, inner = jax.jit(lambda x: x / 2), jax.nn.relu
        return bj.BranchyNet(stages=(halve, inner), exits=(lambda x: halve(x), lambda x: jax.checkpoint(inner)(x)))

    inputs = [jax.ShapeDtypeStruct((1, 3), jnp.float32)]
    assert fingerprint(made(), {}, inputs) == fingerprint(made(), {}, inputs)
    assert fingerprint(made(), {}, inputs) != fingerprint(made(), {}, [jax.ShapeDtypeStruct((1, 4), jnp.float32)])
