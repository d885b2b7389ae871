"""The main job and the commands on its folders, on a run of seconds."""

import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from experiments import benchmark, claims, confidence, edge, figures, main
from experiments.configs import common, efficientnet_lite0_cifar10, lenet_mnist5k, unet_digit_canvases
from experiments.peers import command
from experiments.run import networks, report, timing, trainings
from experiments.run.trainings import Trainer
from experiments.study import compatibility, gradients, on_a_run
from experiments.study.finished import publish, read_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'experiments' / 'configs').glob('*_*.py') if path.stem != '__init__')
RESULTS = ROOT / 'experiments' / 'results'
STORED = [
    path for path in sorted(RESULTS.glob('*/report.json')) if path.parent.name not in {'iree', 'onnx'}
]  # no runs of the main job
TIME_RUN = timing.time_run
ROW = {'network', 'test_accuracy', 'exit_accuracy', 'thresholds', 'exit_fractions', 'batch', 'latency_ms', 'gain'}


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update(changes)
    return config


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Settings of a run of seconds: B-LeNet on 12 × 12 images whose class is the bright quarter."""
    folder = tmp_path_factory.mktemp('run')
    generator = np.random.default_rng(0)
    labels = np.arange(160) % 4
    images = generator.integers(0, 100, (160, 12, 12))
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
    arrays = {'x_train': images[:120], 'y_train': labels[:120], 'x_test': images[120:], 'y_test': labels[120:]}
    np.savez(folder / 'quarters.npz', **{name: values.astype(np.uint8) for name, values in arrays.items()})
    changes = {'regime': 'baseline', 'epochs': 3, 'epochs_baseline': 3, 'batch_size': 15, 'crop_padding': 0}
    config = changed(lenet_mnist5k.get_config(), dataset=str(folder / 'quarters.npz'), **changes)
    return changed(config, latency_images=4, latency_passes=2)


def clocks(networks, planned_on, images, policies, *, batch, passes):
    """What `time_run` returns, without its plans."""
    clock = {'batch': batch, 'latency_images': len(images), 'latency_passes': passes, 'latency_ms': 0.5}
    clock |= dict.fromkeys(('gain', 'gain_low', 'gain_high', 'gain_plain'), 1.0)
    exits = 1 + len(policies['table'].thresholds)
    alone = {'exit_latency_ms': [0.5] * exits, 'trunk_only_ms': [0.5] * (exits + 1)}
    return {'baseline': clock, 'points': dict.fromkeys(policies, clock), **alone}


@pytest.fixture(scope='module', autouse=True)
def clocks_stand_still():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.timing, 'time_run', clocks)
        yield


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    """The folder of a run and its report."""
    workdir = tmp_path_factory.mktemp('done')
    return workdir, main.run(tiny, workdir)


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done[0], tmp_path / 'copy'))


def test_report_keeps_its_contract(done):
    workdir, record = done
    stored = bj.report.read_json(workdir / 'report.json')
    assert stored == json.loads(json.dumps(record))
    assert {'dataset', 'device', 'rows', 'frontier', 'paper'} <= set(stored)
    baseline, branchy = stored['rows']
    for row in (baseline, branchy):
        assert ROW | {'macs', 'mac_gain'} <= set(row)
        assert sum(row['exit_fractions']) == pytest.approx(1)
        assert row['latency_ms'] > 0
    assert (baseline['network'], branchy['network']) == ('lenet', 'b-lenet')
    assert (baseline['exit_fractions'], baseline['gain'], baseline['thresholds']) == ([1.0], 1.0, [])
    assert branchy['mac_gain'] == pytest.approx(baseline['macs'] / branchy['macs'])
    assert branchy['thresholds'] in [point['thresholds'] for point in stored['frontier']]
    assert [row['network'] for row in stored['paper']] == ['LeNet (paper)', 'B-LeNet (paper)']
    assert sum(point['knee'] for point in stored['frontier']) == 1
    names = {path.name for path in workdir.iterdir()}
    assert {'report.md', 'tradeoff.png', 'lenet.safetensors', 'b-lenet.safetensors'} <= names


def test_figures_come_out_of_the_weights_again(done, tiny):
    """Thresholds from validation data, accuracy from test data, recomputed here from the stored weights alone."""
    workdir, record = done
    variables, metadata = bj.checkpoint.load_weights(workdir / 'b-lenet.safetensors')
    normalization = bj.Normalization(**variables.pop('normalization'))
    assert metadata['network'] == 'b-lenet'
    dataset = bj.data.load_dataset(tiny.dataset, validation_fraction=tiny.validation_fraction, seed=tiny.seed)
    dense = bj.inference.dense(bj.models.create('b-lenet', num_classes=4, image_shape=(12, 12, 1)))
    row = record['rows'][1]
    for split, before in ((dataset.test, ''), (dataset.validation, 'validation_')):
        prediction = dense(variables, normalization(split.image), np.float32(row['thresholds']))
        assert np.mean(prediction.label == split.label) == pytest.approx(row[f'{before or "test_"}accuracy'])
        assert np.mean(prediction.exit_index == 0) == pytest.approx(row[f'{before}exit_fractions'][0])
    assert row['test_accuracy'] > 0.5  # it did learn


def test_a_folder_is_resumed_and_one_of_another_run_refused(copy, done, tiny, monkeypatch):
    monkeypatch.setattr(jax, 'value_and_grad', None)  # a finished run is not trained again
    again = main.run(changed(tiny, latency_passes=3), copy)  # it may be timed otherwise
    for name in ('test_accuracy', 'thresholds', 'exit_fractions', 'macs'):
        assert [row[name] for row in again['rows']] == [row[name] for row in done[1]['rows']]
    before = (copy / 'report.json').read_bytes()
    with pytest.raises(ValueError, match=r'workdir: .* other settings \(learning_rate\)'):
        main.run(changed(tiny, learning_rate=0.5), copy)
    assert (copy / 'report.json').read_bytes() == before


def test_a_finished_run_compares_criteria_on_validation_data(copy, tiny, monkeypatch):
    monkeypatch.setattr(jax, 'value_and_grad', None)
    record = main.run(changed(tiny, criteria=('max_probability', 'margin')), copy)
    gains = {row['criterion']: row['mac_gain'] for row in record['criteria_tried']}
    assert list(gains) == ['max probability', 'margin']
    assert record['criterion'] == max(gains, key=gains.get)
    finished, row = read_run(copy), record['rows'][1]
    policy, test = finished.policies['table'], finished.dataset().test
    assert policy.criterion.name == record['criterion']
    networks = finished.networks
    answers = bj.inference.dense(networks.model)(networks.variables, networks.normalization(test.image), policy)
    assert np.mean(answers.label == test.label) == pytest.approx(row['test_accuracy'])


GROWN = {
    'network': 'b-resnet110',
    'network_options': {'depth': 20},
    'exit_weights': (1.0, 1.0, 1.0),
    'regime': 'joint',
    'banded': False,
}  # a residual network that grows, as its exits allow or not


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'choose': 'kne'}, r"config.choose: got 'kne'; choose from accuracy, baseline, knee"),
        ({'criteria': ('entropi',)}, r"config.criteria: got 'entropi'; choose from entropy, margin, max_probability"),
        ({'network': 'lenet'}, 'config.network: .* give the branchy one'),
        ({'network': 'b-lnet'}, 'name: unknown network'),
        ({'dataset': 'mnits'}, 'name: unknown data set'),
        ({'exit_weights': (1.0,)}, 'config.exit_weights: b-lenet has 2 exits, got 1'),
        ({'epochs': 0}, 'config.epochs: got 0'),
        ({'validation_fraction': 0.001}, 'validation_fraction: .* leaves a split empty'),
        ({'latency_batch': 5}, 'config.latency_batch: got 5, .* there are 4 images'),
        ({'shallow_depth': 8}, "config.shallow_depth: .* give config.regime 'joint'"),
        ({**GROWN, 'shallow_depth': 8}, 'shallower: '),
    ],
)
def test_bad_settings_are_refused_before_any_work(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main.run(changed(tiny, **changes), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_a_pretrained_network_trains_after_its_first_stage(tiny, tmp_path):
    """B-LeNet from the weights of a LeNet: the first stage stays, and its activations are computed once."""
    options = {'image_shape': (12, 12, 1), 'num_classes': 4}
    pretrained = bj.models.create('lenet', **options).init(jax.random.key(5), jnp.zeros((1, 12, 12, 1)))
    config = changed(tiny, regime='finetune', pretrained=str(tmp_path / 'weights.safetensors'), epochs=2, images=60)
    config = changed(config, optimizer='sgd', weight_decay=0.1, heads_first=0.3, fresh_rate=2.0)
    with pytest.raises(ValueError, match=r'config.pretrained: no file .*; `python -m experiments.peers --imagenet`'):
        main.run(config, tmp_path / 'run')
    other = bj.models.create('lenet').init(jax.random.key(5), jnp.zeros((1, 28, 28, 1)))
    other['params']['conv2']['kernel'] = jnp.zeros(3)
    bj.checkpoint.save_weights(tmp_path / 'other.safetensors', other)
    with pytest.raises(ValueError, match='config.pretrained: .* holds arrays of another network: params/conv2/kernel'):
        main.run(changed(config, pretrained=str(tmp_path / 'other.safetensors')), tmp_path / 'other')
    bj.checkpoint.save_weights(config.pretrained, pretrained)
    main.run(config, tmp_path / 'run')
    for name in ('lenet', 'b-lenet'):
        trained, _ = bj.checkpoint.load_weights(tmp_path / 'run' / f'{name}.safetensors')
        np.testing.assert_array_equal(trained['params']['conv1']['kernel'], pretrained['params']['conv1']['kernel'])
        assert (trained['params']['fc1']['kernel'] != pretrained['params']['fc1']['kernel']).any()
    plain, mirrored = (np.load(tmp_path / 'run' / 'features' / f'{view}_0.npy') for view in ('plain', 'mirrored'))
    assert (plain.shape, plain.dtype) == (mirrored.shape, np.float16)
    assert (plain != mirrored).any()


PAGES = {
    'benchmark_*/*': benchmark.page,
    'peers/peers': command.page,
    'confidence_lenet_mnist/confidence': confidence.page,
    'claims/claims_*': claims.page,
    'claims/gradients_*': gradients.page,
    'compatibility/compatibility': compatibility.page,
    'edge/edge': edge.page,
    'service/load*': lambda record: pytest.importorskip('experiments.service.load').page(record),
}


@pytest.mark.parametrize('name', [*PAGES, *(f'{path.parent.name}/report' for path in STORED)])
def test_a_stored_page_is_what_its_record_makes(name):
    paths = sorted(RESULTS.glob(f'{name}.json'))
    assert paths
    for path in paths:
        assert PAGES.get(name, page_of_a_run)(bj.report.read_json(path)) == path.with_suffix('.md').read_text()


def page_of_a_run(record):
    (name,) = re.search(r'configs/(\w+)\.py', record['command']).groups()
    config = importlib.import_module(f'experiments.configs.{name}').get_config()
    return report.page(record, config.choose)


def test_a_damaged_report_is_refused(copy, done):
    record = done[1]
    untimed = [{key: value for key, value in row.items() if key != 'latency_ms'} for row in record['rows']]
    for damaged in ({key: value for key, value in record.items() if key != 'frontier'}, {**record, 'rows': untimed}):
        bj.report.write_json(copy / 'report.json', damaged)
        with pytest.raises(ValueError, match='workdir: .* it lacks (frontier|latency_ms)'):
            read_run(copy)


def test_a_run_is_read_back_with_all_its_options(copy, done, tiny):
    finished = read_run(done[0])
    assert finished.config.batch_size == tiny.batch_size
    policy, test = finished.policies['table'], finished.dataset().test
    assert policy.criterion == bj.criteria.entropy
    both = finished.networks
    there = pickle.loads(pickle.dumps(both))  # as clocks in another process get it
    assert there.model == both.model
    prediction = bj.inference.dense(there.model)(there.variables, there.normalization(test.image), policy)
    assert np.mean(prediction.label == test.label) == pytest.approx(done[1]['rows'][1]['test_accuracy'])
    stored = bj.report.read_json(copy / 'config.json')
    bj.report.write_json(copy / 'config.json', {**stored, 'gone': 1, 'network_options': {'dtype': 'x'}})
    assert read_run(copy).networks.options['dtype'] == 'x'


def test_a_stored_report_is_read_with_the_weights_that_ship(tmp_path):
    """Clocks, cache misses and confidence of a published network need no training of one's own."""
    stored = RESULTS / 'alexnet_cifar10' / 'report.json'
    shutil.copy(stored, tmp_path)
    finished, shipped = read_run(tmp_path), bj.models.load_pretrained('b-alexnet', dataset='cifar10')
    assert finished.networks.model == shipped.model
    assert finished.policies['table'] == shipped.operating_points[0].policy
    record = bj.report.read_json(stored)
    record['rows'][1]['exit_accuracy'][0] += 0.01
    bj.report.write_json(tmp_path / 'report.json', record)
    with pytest.raises(ValueError, match='workdir: .* of another run'):
        read_run(tmp_path)


@pytest.mark.parametrize('halves', [False, True])
def test_a_run_is_published_with_its_policies(done, tmp_path, halves):
    finished = read_run(done[0])
    finished.report['dataset'] = 'quarters'
    path = publish(finished, tmp_path, halves=halves)
    published = bj.models.pretrained.read_pretrained(path)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(bj.checkpoint.load_weights(path)[0]) if leaf.ndim > 1}
    assert dtypes == {'float16' if halves else 'float32'}
    baseline = f'baseline, trained on its own: {100 * published.card["baseline_accuracy"]:.2f} %'
    assert baseline in path.with_suffix('.md').read_text()
    assert published.operating_points[0].policy == finished.policies['table']
    assert published.operating_points[0].accuracy == finished.report['rows'][1]['test_accuracy']
    images = finished.dataset().test.image[:4]
    ours = finished.networks.model.apply(finished.networks.variables, finished.networks.normalization(images))
    theirs = published.model.apply(published.variables, published.normalize(images))
    np.testing.assert_allclose(theirs[1], ours[1], **({'atol': 0.01} if halves else {'rtol': 1e-5}))


def test_a_baseline_is_not_its_own_teacher(tiny):
    config = changed(tiny, distillation=0.5)
    logits, labels = (jnp.array([[2.0, 0.0, 1.0, 0.0]]),), jnp.array([1])
    alone = trainings.loss_of(config, num_exits=1)(logits, labels)
    np.testing.assert_array_equal(alone, bj.losses.cross_entropy_per_exit(logits, labels))
    assert trainings.loss_of(config, num_exits=2)((*logits, *logits), labels)[1] < alone[0]


def test_joules_are_of_an_image_and_no_meter_means_no_figure(copy, monkeypatch):
    monkeypatch.setattr(bj.inference, 'plan', lambda *_, **__: lambda image: image)
    finished = read_run(copy)
    assert on_a_run.energy(finished, None, [1], seconds=1) == []
    assert bj.report.read_json(copy / 'energy.json')['note'] == on_a_run.NO_METER
    joules, ticks = itertools.count(), itertools.count()
    meter = bj.measure.Meter('simulated', lambda: float(next(joules)))
    clocks = {'clock': lambda: 0.1 * next(ticks), 'sleep': lambda seconds: None}
    rows = on_a_run.energy(finished, meter, [1], seconds=1, **clocks)
    drawn = rows[1]['watts'] * rows[1]['seconds'] / rows[1]['calls'] / len(finished.dataset().test)
    assert (rows[1]['operating_point'], rows[1]['joules_with_idle']) == ('table', pytest.approx(drawn))
    assert f'{rows[0]["joules"]:.3g}' in figures.energy({'copy': {'energy': bj.report.read_json(copy / 'energy.json')}})


def test_misspelled_field_fails_with_a_suggestion(tmp_path):
    config = '--config=experiments/configs/lenet_mnist5k.py'
    command = [sys.executable, '-m', 'experiments.main', config, f'--workdir={tmp_path}', '--config.learning_rat=1']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert 'ValueError: config: no field' in result.stderr
    assert 'Did you mean "learning_rate"' in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_are_whole(name):
    module = importlib.import_module(f'experiments.configs.{name}')
    config = module.get_config()
    assert set(config) == set(common.get_config())
    networks.check(config)


@pytest.mark.parametrize('module', [efficientnet_lite0_cifar10, unet_digit_canvases])
def test_a_config_has_a_short_form(module):
    short, whole = module.get_config('quick'), module.get_config()
    networks.check(short)
    assert short.latency_images < whole.latency_images
    with pytest.raises(ValueError, match="variant: got 'quik'; there is 'quick'"):
        module.get_config('quik')


@pytest.mark.parametrize('regime', ['joint', 'frozen'])
def test_other_regimes_train(tiny, tmp_path, regime):
    """Frozen: the branchy network's last exit is the baseline, to the bit. Joint: it is another network."""
    config = changed(tiny, regime=regime, epochs=1, epochs_baseline=1, optimizer='sgd')
    dataset = bj.data.load_dataset(config.dataset, validation_fraction=config.validation_fraction)
    options = {'num_classes': 4, 'image_shape': (12, 12, 1)}
    baseline, branchy = (variables['params'] for variables in Trainer(config, options, dataset, tmp_path).train_both())
    same = [
        all(jax.tree.leaves(jax.tree.map(np.array_equal, values, branchy[name]))) for name, values in baseline.items()
    ]
    assert same == [regime == 'frozen'] * len(same)


def test_confidence_reports_on_a_finished_run(copy):
    record = confidence.run(read_run(copy), splits=30, size=600)
    assert record == bj.report.read_json(copy / 'confidence.json')
    guaranteed = [row for row in record['guarantees'] if 'delta' in row]
    assert all(row['broken'] <= row['allowed'] + 0.1 for row in guaranteed)  # 30 sets only
    assert len({row['cost_saved'] for row in guaranteed}) > 1
    assert {row['exit'] for row in record['calibration']} == {0, 1}
    assert {row['equal_to_entropy'] for row in record['criteria'] if row['criterion'] == 'entropy'} == {1.0}
    assert '(reliability.png)' in (copy / 'confidence.md').read_text()
    assert (copy / 'reliability.png').is_file()


def test_segmentation_goes_through_the_same_job(tmp_path):
    """Bright squares on noise, in 16 × 16 pixels: rows with mIoU, the cheapest of three criteria."""
    generator = np.random.default_rng(0)
    images, masks = generator.integers(0, 60, (60, 16, 16)), np.zeros((60, 16, 16), int)
    for n, (row, column) in enumerate(generator.integers(0, 9, (60, 2))):
        masks[n, row : row + 7, column : column + 7] = 1 + n % 2
    images = (images + 90 * masks).astype(np.uint8)
    np.savez(tmp_path / 'squares.npz', x_train=images[:44], y_train=masks[:44], x_test=images[44:], y_test=masks[44:])
    config = unet_digit_canvases.get_config('quick')
    config.update(dataset=str(tmp_path / 'squares.npz'), epochs=1, epochs_baseline=1, batch_size=8)
    config.update(latency_batch=4, latency_images=8, latency_passes=2, validation_fraction=0.2)
    config.network_options.update(width=2, head_width=2)
    record = main.run(config, tmp_path / 'run')
    assert all(0 < row['test_miou'] <= 1 for row in record['rows'])
    assert [(row['batch'], row['latency_images']) for row in record['rows']] == [(4, 8), (4, 8)]
    assert (len(record['rows'][1]['exit_miou']), len(record['criteria_tried'])) == (3, 3)


@pytest.mark.parametrize('batch', [1, 4])
def test_both_networks_are_timed_as_planned(done, monkeypatch, batch):
    monkeypatch.setattr(timing, 'time_run', TIME_RUN)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'here')  # another process would import all anew
    finished = read_run(done[0])
    images = np.asarray(finished.networks.normalization(finished.dataset().test.image[:8]))
    clocks = timing.time_run(finished.networks, images, images, finished.policies, batch=batch, passes=2)
    assert list(clocks['points']) == list(finished.policies)
    assert (len(clocks['exit_latency_ms']), len(clocks['trunk_only_ms'])) == (2, 3)
    row = clocks['points']['table']
    assert (row['batch'], row['latency_images']) == (batch, 8)
    assert row['gain_low'] <= row['gain'] <= row['gain_high']
    assert (row['executor'], clocks['baseline']['gain']) == (str(row['executor']), 1)


@pytest.mark.parametrize('flags', ['', '--xla_force_host_platform_device_count=3 --xla_cpu_multi_thread_eigen=true'])
def test_commands_start_themselves_as_a_cpu_trains_fastest(monkeypatch, flags):
    """What the user has set stays, and clocks tick in the environment that the user has set."""
    names = ('GLIBC_TUNABLES', 'JAX_CPU_ENABLE_ASYNC_DISPATCH')
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('XLA_FLAGS', flags)
    started = {}
    monkeypatch.setattr(os, 'execve', lambda program, arguments, environment: started.update(environment))
    trainings.start_again_on_cpu(1)
    assert not started
    trainings.start_again_on_cpu(2)
    assert started['XLA_FLAGS'] == (flags or '--xla_force_host_platform_device_count=2')
    assert 'mmap_max=0' in started['GLIBC_TUNABLES']
    for name in (*names, 'XLA_FLAGS', trainings.STARTED):
        monkeypatch.setenv(name, started[name])
    with timing.one_core():
        assert [os.environ.get(name) for name in (*names, 'XLA_FLAGS')] == [None, None, flags]
    assert os.environ['XLA_FLAGS'] == started['XLA_FLAGS']
