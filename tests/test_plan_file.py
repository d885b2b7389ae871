"""Plans as files: what comes back is the plan, and no plan runs where it was not measured."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plan import check_same

import branchy_jax as bj
from branchy_jax.inference import Plan, dense, plan, segment_times

pytestmark = pytest.mark.usefixtures('xla_defaults')


@pytest.fixture(scope='module')
def planned(network):
    model, variables, images = network
    times = segment_times(model, variables, images, batch_sizes=[1, 12], passes=1)
    policy = bj.ExitPolicy(bj.criteria.margin, np.float32([0.4, -np.inf]))
    size = np.int64(12)  # which JSON does not know
    options = {'engine': 'xla', 'times': times, 'passes': 1, 'skip_heads': False}
    return plan(model, variables, images, policy, batch_size=size, **options)


@pytest.fixture
def path(planned, tmp_path):
    planned.save(tmp_path / 'plan.json')
    return tmp_path / 'plan.json'


def test_a_saved_plan_comes_back(network, planned, path):
    model, variables, images = network
    loaded = Plan.load(path, model, variables)
    for name in ('chosen', 'policy', 'batch_size', 'executor', 'exits', 'candidates'):
        assert getattr(loaded, name) == getattr(planned, name)
    for name, values in vars(planned.times).items():
        np.testing.assert_array_equal(getattr(loaded.times, name), values)
    assert str(loaded) == str(planned)
    check_same(loaded(images[:7]), dense(model)(variables, images[:7], planned.policy))
    loaded.warm_up()
    loaded.save(path)
    trained = jax.tree.map(lambda leaf: leaf * 1.5, variables)
    check_same(Plan.load(path, model, trained)(images), dense(model)(trained, images, planned.policy))


def test_a_saved_plan_for_onnx_runtime_comes_back_where_that_is_installed(network, tmp_path, monkeypatch):
    model, variables, images = network
    planned = plan(model, variables, images, [0.9, 0.9], engine='onnxruntime', passes=1, skip_heads=False)
    planned.save(tmp_path / 'plan.json')
    loaded = Plan.load(tmp_path / 'plan.json', model, variables)
    assert str(loaded) == str(planned)
    assert loaded.executor.startswith('ONNX Runtime')
    check_same(loaded(images[:7]), dense(model)(variables, images[:7], planned.policy))
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ValueError, match='onnxruntime is not installed'):
        Plan.load(tmp_path / 'plan.json', model, variables)


def test_the_file_is_plain_json_without_weights(path):
    record = json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert record['format'] == 4
    assert record['policy']['thresholds']['values'] == [pytest.approx(0.4), '-inf']
    assert len(path.read_text()) < 20_000
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_plans_from_elsewhere_are_refused_with_the_reason(network, path):
    written = path.read_text()
    for name in ('jax', 'jaxlib', 'branchy-jax', 'platform', 'device', 'processor', 'cores', 'devices'):
        record = json.loads(written)
        record['made_with'][name] = 'another'
        path.write_text(json.dumps(record))
        with pytest.raises(
            ValueError, match=rf'path: the plan .* is of other devices or versions \({name} another there'
        ):
            Plan.load(path, *network[:2])


class Other(nn.Module):
    """The network with another last stage, or with other names."""

    first: str = 'layer1'
    width: int = 9

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(8, name=self.first)(images.reshape(images.shape[0], -1)))
        return nn.Dense(3)(x), nn.Dense(3)(x), nn.Dense(3)(nn.Dense(self.width)(x))


def test_plans_of_other_networks_are_refused(network, planned, path):
    model, variables, images = network
    others = [(other, other.init(jax.random.key(0), images)) for other in (Other(), Other('layer0', 8))]
    others += [(bj.models.select_exits(model, [0, 2]), variables), (model, variables['params'])]
    for other, weights in others:
        with pytest.raises(ValueError, match='path: the plan in .* is of another network'):
            Plan.load(path, other, weights)
    assert Plan.load(path, model.clone(), variables).chosen == planned.chosen


def test_damaged_and_old_files_are_refused(network, path):
    written = path.read_text()
    for change, message in (
        (lambda record: record.update(format=3), 'has format 3; this version reads format 4, and version 0.2 wrote 1'),
        (lambda record: record['candidates'][0].update(executor='os.system'), r"damaged .*executor: got 'os.system'"),
        (lambda record: record['candidates'][0].pop('exits'), 'is damaged'),
        (lambda record: record.update(chosen=99), 'is damaged'),
        (lambda record: record.pop('policy'), 'is damaged'),
        (lambda record: record['policy']['criterion'].update(kind='Path'), 'is damaged'),
        (lambda record: record['policy']['thresholds'].update(values=['nan', 0.5]), 'thresholds: got NaN'),
        (lambda record: record.update(inputs=1), 'is damaged'),
        (lambda record: record.pop('format'), 'cannot read a plan'),
    ):
        record = json.loads(written)
        change(record)
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=f'path: .*{message}'):
            Plan.load(path, *network[:2])


def test_no_file_and_half_a_file_are_refused(network, path):
    path.write_text(path.read_text()[:500])
    for there in (path, path.parent / 'nothing'):
        with pytest.raises(ValueError, match='path: cannot read a plan from'):
            Plan.load(there, *network[:2])


def test_a_criterion_that_no_file_can_name_is_not_written(network, tmp_path):
    model, variables, images = network
    criterion = bj.criteria.as_criterion(lambda logits: -logits.max(axis=-1))
    planned = plan(
        model, variables, images, bj.ExitPolicy(criterion, jnp.full(2, -jnp.inf)), passes=1, budget_seconds=0.0
    )
    with pytest.raises(ValueError, match='policy: its criterion holds'):
        planned.save(tmp_path / 'plan.json')
    assert not list(tmp_path.iterdir())
