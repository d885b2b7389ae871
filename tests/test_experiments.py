import functools
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import branchy_jax as bj
from experiments import confidence, job, paper
from experiments.configs import common, lenet_mnist5k, unet_digit_canvases

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'experiments' / 'configs').glob('*_*.py') if path.stem != '__init__')


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


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('done')
    return workdir, job.run(tiny, workdir)


def test_report_keeps_its_contract(done):
    workdir, _ = done
    report = bj.report.read_json(workdir / 'report.json')
    assert {'dataset', 'device', 'rows', 'frontier', 'paper'} <= set(report)
    baseline, branchy = report['rows']
    for row in (baseline, branchy):
        assert {
            'network', 'test_accuracy', 'exit_accuracy', 'thresholds', 'exit_fractions', 'batch', 'latency_ms',
            'gain', 'macs', 'mac_gain',
        } <= set(row)  # fmt: skip
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
    monkeypatch.setattr('branchy_jax.training.epochs.train_epoch', None)
    again = job.run(tiny, tmp_path / 'copy')
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
        ({'validation_fraction': 0.001}, 'validation split .* is empty'),
    ],
)
def test_bad_settings_are_refused_before_any_work(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        job.run(changed(tiny, **changes), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def run_main(*arguments):
    command = [sys.executable, '-m', 'experiments.main', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_misspelled_field_fails_with_a_suggestion(tmp_path):
    config = '--config=experiments/configs/lenet_mnist5k.py'
    result = run_main(config, f'--workdir={tmp_path}', '--config.learning_rat=1')
    assert result.returncode != 0
    assert 'Did you mean "learning_rate"' in result.stderr
    assert 'ValueError: config: ' in result.stderr
    assert 'choose from banded, batch_size' in result.stderr
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
def test_other_regimes_train(tiny, tmp_path, regime, monkeypatch):
    """Frozen: the branchy network's last exit is the baseline, to the bit. Joint: it is another network."""
    monkeypatch.setattr(job, 'time_networks', functools.partial(pytest.fail, 'not reached'))
    from experiments.trainings import train_both

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


def test_confidence_reports_on_a_finished_run(tiny, done):
    workdir, _ = done
    record = confidence.run(tiny, workdir, splits=30, size=600)
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
