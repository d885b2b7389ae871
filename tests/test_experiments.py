import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from experiments import confidence, energy, publish
from experiments.configs import common, lenet_mnist5k, unet_digit_canvases
from experiments.pages import paper
from experiments.run import job, trainings
from experiments.run.networks import first_stages, read_run
from experiments.run.records import RunRecord
from experiments.run.trainings import train_both
from experiments.study import static
from experiments.study.folders import read_folder

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'experiments' / 'configs').glob('*_*.py') if path.stem != '__init__')
COMMANDS = sorted(path.stem for path in (ROOT / 'experiments').glob('[!_]*.py'))
STORED = sorted((ROOT / 'experiments' / 'results').glob('*/report.json'))
STORED = [path for path in STORED if path.parent.name not in {'iree', 'onnx'}]  # no runs of the main job


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Settings of a run of seconds: B-LeNet on 12 × 12 images whose class is the bright quarter."""
    folder = tmp_path_factory.mktemp('run')
    generator = np.random.default_rng(0)
    labels = np.arange(160) % 4
    images = generator.integers(0, 100, (160, 12, 12))
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
    images = images.astype(np.uint8)
    np.savez(
        folder / 'quarters.npz', x_train=images[:120], y_train=labels[:120], x_test=images[120:], y_test=labels[120:]
    )
    config = lenet_mnist5k.get_config()
    config.dataset = str(folder / 'quarters.npz')
    config.update(
        regime='baseline',
        epochs=3,
        epochs_baseline=3,
        batch_size=15,
        crop_padding=0,
        latency_images=4,
        latency_passes=2,
    )
    return config


# A residual network that grows, as its exits allow or not.
_GROWN = {
    'network': 'b-resnet110',
    'placement': 'text',
    'network_options': {'depth': 20},
    'exit_weights': (1.0, 1.0, 1.0),
    'regime': 'joint',
    'banded': False,
}


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('done')
    return workdir, job.run(tiny, workdir).to_json()


def test_report_keeps_its_contract(done):
    workdir, _ = done
    report = bj.report.read_json(workdir / 'report.json')
    assert {'dataset', 'device', 'rows', 'frontier', 'paper'} <= set(report)
    baseline, branchy = report['rows']
    for row in (baseline, branchy):
        assert {
            'network',
            'test_accuracy',
            'exit_accuracy',
            'thresholds',
            'exit_fractions',
            'batch',
            'latency_ms',
            'gain',
            'macs',
            'mac_gain',
        } <= set(row)
        assert sum(row['exit_fractions']) == pytest.approx(1)
        assert row['latency_ms'] > 0
    assert (baseline['network'], branchy['network']) == ('lenet', 'b-lenet')
    assert (baseline['exit_fractions'], baseline['gain'], baseline['thresholds']) == ([1.0], 1.0, [])
    assert len(branchy['thresholds']) == 1
    assert branchy['mac_gain'] == pytest.approx(baseline['macs'] / branchy['macs'])
    assert [row['network'] for row in report['paper']] == ['LeNet (paper)', 'B-LeNet (paper)']
    assert sum(point['knee'] for point in report['frontier']) == 1
    assert {'report.md', 'tradeoff.png', 'lenet.safetensors', 'b-lenet.safetensors'} <= {
        path.name for path in workdir.iterdir()
    }


def test_figures_come_out_of_the_weights_again(done, tiny):
    """Thresholds from validation data, accuracy from test data, recomputed here from the stored weights alone."""
    workdir, report = done
    variables, metadata = bj.checkpoint.load_weights(workdir / 'b-lenet.safetensors')
    normalization = bj.Normalization(**variables.pop('normalization'))
    assert metadata['network'] == 'b-lenet'
    dataset = bj.data.load_dataset(tiny.dataset, validation_fraction=tiny.validation_fraction, seed=tiny.seed)
    model = bj.models.create('b-lenet', num_classes=4, image_shape=(12, 12, 1))
    row = report['rows'][1]
    for split, accuracy, fractions in (
        (dataset.test, 'test_accuracy', 'exit_fractions'),
        (dataset.validation, 'validation_accuracy', 'validation_exit_fractions'),
    ):
        found = bj.inference.dense(model)(variables, normalization(split.image), row['thresholds'])
        assert np.mean(found.label == split.label) == pytest.approx(row[accuracy])
        assert np.mean(found.exit_index == 0) == pytest.approx(row[fractions][0])
    assert row['test_accuracy'] > 0.5  # it did learn


def test_chosen_point_is_on_the_validation_frontier(done):
    _, report = done
    thresholds = [point['thresholds'] for point in report['frontier']]
    assert report['rows'][1]['thresholds'] in thresholds


def test_finished_run_is_not_trained_again(done, tiny, monkeypatch, tmp_path):
    workdir, report = done
    shutil.copytree(workdir, tmp_path / 'copy')
    monkeypatch.setattr(jax, 'value_and_grad', None)
    again = job.run(tiny, tmp_path / 'copy').to_json()
    for old, new in zip(report['rows'], again['rows'], strict=True):
        assert {key: old[key] for key in ('test_accuracy', 'thresholds', 'exit_fractions', 'macs')} == {
            key: new[key] for key in ('test_accuracy', 'thresholds', 'exit_fractions', 'macs')
        }


def test_folder_of_another_run_is_refused(done, tiny):
    workdir, _ = done
    before = (workdir / 'report.json').read_bytes()
    with pytest.raises(ValueError, match=r'workdir: .* other settings \(learning_rate\)'):
        job.run(changed(tiny, learning_rate=0.5), workdir)
    assert (workdir / 'report.json').read_bytes() == before


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'choose': 'kne'}, r"config.choose: got 'kne'; choose from accuracy, baseline, knee"),
        ({'optimizer': 'adamm'}, r'config.optimizer: .* adam, adamw, sgd'),
        ({'network': 'lenet'}, 'config.network: .* give the branchy one'),
        ({'network': 'b-lnet'}, 'name: unknown network'),
        ({'dataset': 'mnits'}, 'name: unknown data set'),
        ({'exit_weights': (1.0,)}, 'config.exit_weights: b-lenet has 2 exits, got 1'),
        ({'epochs': 0}, 'config.epochs: got 0'),
        ({'most_examples': 9, 'in_memory': False}, 'config.most_examples: is for data in memory'),
        ({'validation_fraction': 0.001}, 'validation_fraction: .* leaves no validation split'),
        ({'latency_batch': 5}, 'config.latency_batch: got 5, .* there are 4 images'),
        ({'shallow_depth': 8}, "config.shallow_depth: .* give config.regime 'joint'"),
        ({**_GROWN, 'shallow_depth': 8}, 'shallower: '),
    ],
)
def test_bad_settings_are_refused_before_any_work(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        job.run(changed(tiny, **changes), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('path', STORED, ids=lambda path: path.parent.name)
def test_stored_records_are_read_and_written_as_they_are(path):
    stored = bj.report.read_json(path)
    record = RunRecord.from_json(stored)
    written = json.loads(json.dumps(record.to_json()))
    assert {key: written[key] for key in stored} == stored
    assert record == RunRecord.from_json(written)
    assert len(record.points[0].thresholds) == len(record.exit_accuracy) - 1


def test_a_record_that_lacks_something_is_refused(done):
    _, report = done
    with pytest.raises(ValueError, match='frontier'):
        RunRecord.from_json({key: value for key, value in report.items() if key != 'frontier'})
    untimed = [{key: value for key, value in row.items() if key != 'latency_ms'} for row in report['rows']]
    with pytest.raises(ValueError, match='latency_ms'):
        RunRecord.from_json({**report, 'rows': untimed})


def test_stored_folders_are_read_whole():
    found = {path.parent.name: read_folder(path.parent) for path in STORED}
    assert {len(row.exit_fractions) for row in found['lenet_mnist_tuned'].batches} == {2}
    assert {row.clock.latency_images for row in found['lenet_mnist_tuned'].batches} == {2048}
    assert 'no meter' in found['lenet_mnist'].energy_note
    assert found['alexnet_cifar10'].cache[0].thresholds == ()
    assert read_folder(ROOT) is None


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_tell_their_command_line_and_share_no_flags(name):
    """Imported together, as they are here, no flag of one is in the way of another's."""
    module = importlib.import_module(f'experiments.{name}')
    assert f'-m experiments.{name} ' in module.__doc__ or f'python {name}.py ' in module.__doc__
    assert callable(module.main)


def test_side_by_side_lie_commands_only():
    found = [path.name for path in (ROOT / 'experiments').iterdir() if path.is_file()]
    found.remove('__init__.py')
    assert len(found) <= 16
    text = (ROOT / 'experiments' / 'results' / 'README.md').read_text()
    for name in set(re.findall(r'(?:-m |`)experiments\.(\w+(?:\.\w+)*)', text)):
        place = ROOT / 'experiments' / name.replace('.', '/')
        assert place.with_suffix('.py').exists() or (place / '__main__.py').exists(), name


def test_a_run_is_read_back_with_all_its_options(tiny, done, tmp_path):
    workdir, _ = done
    shutil.copytree(workdir, tmp_path / 'copy')
    stored = bj.report.read_json(workdir / 'config.json')
    bj.report.write_json(tmp_path / 'copy' / 'config.json', {**stored, 'gone': 1, 'network_options': {'dtype': 'x'}})
    assert read_run(tmp_path / 'copy').networks.options['dtype'] == 'x'
    finished = read_run(workdir)
    assert finished.config.batch_size == tiny.batch_size
    policy = finished.policies['table']
    assert policy.criterion == bj.criteria.entropy
    images = finished.networks.normalization(finished.dataset().test.image)
    found = bj.inference.dense(finished.networks.model)(finished.networks.variables, images, policy)
    assert np.mean(found.label == finished.dataset().test.label) == pytest.approx(finished.record.points[0].accuracy)


def test_a_stored_report_is_read_with_the_weights_that_ship(tmp_path):
    """Clocks, cache misses and confidence of a published network need no training of one's own."""
    stored = ROOT / 'experiments' / 'results' / 'alexnet_cifar10' / 'report.json'
    shutil.copy(stored, tmp_path)
    finished, shipped = read_run(tmp_path), bj.models.load_pretrained('b-alexnet', dataset='cifar10')
    assert finished.networks.model == shipped.model
    assert finished.config.learning_rate == shipped.card['recipe']['learning_rate']
    assert finished.policies['table'] == shipped.operating_points[0].policy
    baseline = finished.networks.baseline.apply(
        finished.networks.baseline_variables, np.zeros((1, 32, 32, 3), np.float32)
    )
    assert [logits.shape for logits in baseline] == [(1, 10)]
    record = bj.report.read_json(stored)
    record['rows'][1]['exit_accuracy'][0] += 0.01
    bj.report.write_json(tmp_path / 'report.json', record)
    with pytest.raises(ValueError, match='workdir: .* are of another run'):
        read_run(tmp_path)


def test_networks_cross_to_another_process_whole(done):
    networks = read_run(done[0]).networks
    there = pickle.loads(pickle.dumps(networks))
    assert there.model == networks.model
    for ours, theirs in zip(jax.tree.leaves(networks.variables), jax.tree.leaves(there.variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_is_published_with_its_policies(done, tmp_path):
    finished = read_run(done[0])
    finished = dataclasses.replace(finished, record=dataclasses.replace(finished.record, dataset='quarters'))
    path = publish.publish(finished, tmp_path)
    found = bj.models.pretrained.read_pretrained(path)
    assert found.operating_points[0].policy == finished.policies['table']
    assert found.operating_points[0].accuracy == finished.record.points[0].accuracy
    images = finished.dataset().test.image[:4]
    ours = finished.networks.model.apply(finished.networks.variables, finished.networks.normalization(images))
    for logits, expected in zip(found.model.apply(found.variables, found.normalize(images)), ours, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_static_controls_are_added_to_a_finished_run(done, tmp_path, monkeypatch):
    here = contextlib.nullcontext(ThreadPoolExecutor(1))  # another process would import all anew
    monkeypatch.setattr('experiments.run.timing.one_core', lambda: here)
    shutil.copytree(done[0], tmp_path / 'copy')
    (row,) = static.run(read_run(tmp_path / 'copy'))
    assert row.network == 'lenet, first 1 of 2 stages'
    assert 0 < row.accuracy <= 1
    assert row.clock.gain > 0
    assert read_folder(tmp_path / 'copy').static == (row,)


def test_static_controls_grow_as_their_baseline_does():
    images = jnp.zeros((1, 8, 8, 3))
    deep, shallow = (bj.models.create(f'b-resnet{depth}', image_shape=None) for depth in (26, 20))
    for n in range(2):
        fresh, trained = (jax.jit(first_stages(model, n).init)(jax.random.key(0), images) for model in (deep, shallow))
        grown = bj.training.initialize_from_shallower(deep, fresh, shallow, trained)
        assert jax.tree.structure(grown) == jax.tree.structure(fresh)


def test_a_baseline_is_not_its_own_teacher(tiny):
    config = changed(tiny, distillation=0.5)
    logits, labels = (jnp.array([[2.0, 0.0, 1.0, 0.0]]),), jnp.array([1])
    alone = trainings._loss(config, num_exits=1)(logits, labels)
    np.testing.assert_array_equal(alone, bj.losses.cross_entropy_per_exit(logits, labels))
    assert trainings._loss(config, num_exits=2)((*logits, *logits), labels)[1] < alone[0]


def test_a_finished_run_may_be_timed_otherwise(tiny, done, tmp_path):
    shutil.copytree(done[0], tmp_path / 'copy')
    job.claim(tmp_path / 'copy', changed(tiny, latency_passes=3))
    with pytest.raises(ValueError, match=r'holds a run with other settings \(epochs\)'):
        job.claim(tmp_path / 'copy', changed(tiny, epochs=4))


def test_no_meter_means_no_figure(done, tmp_path):
    shutil.copytree(done[0], tmp_path / 'copy')
    record = energy.run(read_run(tmp_path / 'copy'), None, batches=[1], seconds=1)
    assert (record['meter'], record['rows'], record['note']) == (None, [], energy.NO_METER)


def test_joules_are_of_an_image(done, tmp_path):
    shutil.copytree(done[0], tmp_path / 'copy')
    joules, ticks = itertools.count(), itertools.count()
    meter = bj.measure.Meter('simulated', lambda: float(next(joules)))
    clocks = {'clock': lambda: 0.1 * next(ticks), 'sleep': lambda seconds: None}
    record = energy.run(read_run(tmp_path / 'copy'), meter, batches=[1], seconds=1, **clocks)
    assert [row['operating_point'] for row in record['rows']][:2] == ['baseline', 'table']
    rows = read_folder(tmp_path / 'copy').energy
    assert {row.batch for row in rows} == {1}
    for row in rows:
        drawn = row.watts * row.seconds / row.calls / len(read_run(tmp_path / 'copy').dataset().test)
        assert row.joules_with_idle == pytest.approx(drawn)


def run_main(*arguments):
    command = [sys.executable, '-m', 'experiments.main', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_misspelled_field_fails_with_a_suggestion(tmp_path):
    config = '--config=experiments/configs/lenet_mnist5k.py'
    result = run_main(config, f'--workdir={tmp_path}', '--config.learning_rat=1')
    assert result.returncode != 0
    assert 'Did you mean "learning_rate"' in result.stderr
    assert 'ValueError: config: ' in result.stderr
    assert 'choose from accumulate, banded, batch_size' in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_are_whole(name):
    module = importlib.import_module(f'experiments.configs.{name}')
    config = module.get_config()
    assert set(config) == set(common.get_config())
    job._check(config)
    for heading in ('Paper:', 'Command:', 'Run time:', 'Expect:', f'experiments/configs/{name}.py'):
        assert heading in module.__doc__
    assert config.network in bj.models.names()


@pytest.mark.parametrize('regime', ['joint', 'frozen'])
def test_other_regimes_train(tiny, tmp_path, regime):
    """Frozen: the branchy network's last exit is the baseline, to the bit. Joint: it is another network."""
    config = changed(tiny, regime=regime, epochs=1, epochs_baseline=1, banded=False, optimizer='sgd')
    dataset = bj.data.load_dataset(config.dataset, validation_fraction=config.validation_fraction)
    options = {'num_classes': 4, 'image_shape': (12, 12, 1)}
    baseline, branchy = train_both(config, options, dataset, tmp_path)
    shared = [name for name in branchy['params'] if not name.startswith('exit')]
    same = [
        all(jax.tree.leaves(jax.tree.map(np.array_equal, baseline['params'][name], branchy['params'][name])))
        for name in shared
    ]
    assert same == [regime == 'frozen'] * len(shared)


def test_paper_figures_are_those_of_table_1():
    rows = {row['network']: row for name in paper.TABLE_1 for row in paper.rows_beside(name)}
    gains = {name: round(row['gain'], 1) for name, row in rows.items() if name.startswith('B-')}
    assert gains == {'B-LeNet (paper)': 5.4, 'B-AlexNet (paper)': 1.5, 'B-ResNet (paper)': 1.9}
    json.dumps(rows)


def test_confidence_reports_on_a_finished_run(done):
    workdir, _ = done
    record = confidence.run(read_run(workdir), splits=30, size=600)
    assert record == bj.report.read_json(workdir / 'confidence.json')
    assert {'promises', 'comparison', 'expectations', 'calibration', 'search'} <= set(record)
    for row in record['promises']:
        assert {'network', 'method', 'epsilon', 'delta', 'splits', 'broken', 'cost_saved'} <= set(row)
        assert row['broken'] <= row['allowed'] + 0.1  # 30 sets only
    assert len({row['cost_saved'] for row in record['promises']}) > 1
    assert {row['exit'] for row in record['calibration']} == {1, 2}
    exact = [row for row in record['search'] if row['method'] == 'exact']
    assert all(row['gap'] >= 0 for row in record['search'])
    assert len(exact) == 3
    page = (workdir / 'confidence.md').read_text()
    for picture in ('reliability.png', 'control.png', 'protocols.png', 'exits.png'):
        assert f'({picture})' in page
        assert (workdir / picture).read_bytes().startswith(b'\x89PNG')


def test_segmentation_goes_through_the_same_job(tmp_path):
    """Bright squares on noise, in 16 × 16 pixels: rows with mIoU, batches through the planner, a picture of masks."""
    generator = np.random.default_rng(0)
    images, masks = generator.integers(0, 60, (60, 16, 16)), np.zeros((60, 16, 16), int)
    for n, (row, column) in enumerate(generator.integers(0, 9, (60, 2))):
        masks[n, row : row + 7, column : column + 7] = 1 + n % 2
    images = (images + 90 * masks).astype(np.uint8)
    np.savez(tmp_path / 'squares.npz', x_train=images[:44], y_train=masks[:44], x_test=images[44:], y_test=masks[44:])
    config = unet_digit_canvases.get_config('quick')
    config.dataset = str(tmp_path / 'squares.npz')
    config.update(epochs=2, epochs_baseline=2, batch_size=8, latency_batch=4, latency_images=8, latency_passes=2)
    config.validation_fraction = 0.2
    config.network_options.update(width=2, head_width=2)
    job.run(config, tmp_path / 'run')
    report = bj.report.read_json(tmp_path / 'run' / 'report.json')
    baseline, branchy = report['rows']
    for row in (baseline, branchy):
        assert {'test_miou', 'exit_miou', 'gain', 'mac_gain', 'macs', 'exit_fractions', 'latency_ms'} <= set(row)
        assert row['batch'] == 4
        assert 0 < row['test_miou'] <= 1
    assert len(branchy['exit_miou']) == 3
    assert len(report['criteria_tried']) == 3
    assert set(report['class_iou']) == {'baseline', 'exit 1', 'exit 2', 'exit 3', 'operating point'}
    assert np.nanmean(report['class_iou']['operating point']) == pytest.approx(branchy['test_miou'])
    for row in report['pixelwise']:
        assert sum(row['pixel_fractions']) == pytest.approx(1)
    never = report['pixelwise'][0]
    if never['exit_fractions_leaving'][-1] == 1:
        assert never['mac_gain_leaving'] < 1  # heads computed, nothing saved: said so
    assert (tmp_path / 'run' / 'masks.png').stat().st_size > 10_000
    assert 'That alone saves nothing' in (tmp_path / 'run' / 'report.md').read_text()


def started(settings, devices):
    """What `start_again_on_cpu` hands on, in a process of its own: its environment and the devices it then has."""
    program = (
        'import json, os; from experiments.run.processes import start_again_on_cpu, as_a_user_starts_them; '
        f'start_again_on_cpu({devices}); import jax; count = len(jax.devices()); '
        'ours = {k: os.environ.get(k) for k in ("GLIBC_TUNABLES", "JAX_CPU_ENABLE_ASYNC_DISPATCH")}; '
        'inside = as_a_user_starts_them(); inside.__enter__(); '
        'print(json.dumps([count, ours, os.environ.get("XLA_FLAGS", ""), os.environ.get("GLIBC_TUNABLES")]))'
    )
    unset = ('GLIBC_TUNABLES', 'JAX_CPU_ENABLE_ASYNC_DISPATCH', 'XLA_FLAGS')
    environment = {**{name: value for name, value in os.environ.items() if name not in unset}, **settings}
    run = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_commands_start_themselves_as_a_cpu_trains_fastest():
    count, ours, flags, allocator = started({}, 2)
    assert (count, ours['JAX_CPU_ENABLE_ASYNC_DISPATCH']) == (2, '0')
    assert 'mmap_max=0' in ours['GLIBC_TUNABLES']
    assert (flags, allocator) == ('', None)  # as a user starts them, for the clocks


def test_what_the_user_has_set_stays():
    mine = {
        'GLIBC_TUNABLES': 'glibc.malloc.perturb=0',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=3 --xla_cpu_multi_thread_eigen=true',
    }
    count, ours, flags, allocator = started(mine, 2)
    assert (count, ours['GLIBC_TUNABLES'], allocator) == (3, *[mine['GLIBC_TUNABLES']] * 2)
    assert '--xla_cpu_multi_thread_eigen=true' in flags


def test_one_device_needs_no_start():
    count, ours, _, _ = started({}, 1)
    assert (count, set(ours.values())) == (1, {None})
