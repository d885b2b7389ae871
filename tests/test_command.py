"""The console command: trains, reports, plans and exports on a small data set of its own."""

import re
import subprocess
import sys

import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax import command


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A network that classifies bright and dark squares, trained by the command."""
    folder = tmp_path_factory.mktemp('command')
    generator = np.random.default_rng(0)
    labels = np.tile(np.arange(2), 60)
    images = generator.integers(0, 100, (120, 12, 12, 1)) + 150 * labels[:, None, None, None]
    arrays = {'x_train': images[:80], 'y_train': labels[:80], 'x_test': images[80:], 'y_test': labels[80:]}
    np.savez(folder / 'squares.npz', **{name: value.astype(np.uint8) for name, value in arrays.items()})
    options = f'--dataset={folder}/squares.npz --to={folder}/run --epochs=3 --batch_size=8 --exit_weights 1 0.3'
    command.main(['train', 'b-lenet', *options.split()])
    return folder


def test_trained_weights_are_saved_with_their_points(trained):
    weights = bj.models.load_pretrained(trained / 'run')
    assert weights.card['network'] == 'b-lenet'
    assert weights.operating_points[0].split == 'validation'
    assert weights.operating_points[0].accuracy >= weights.operating_points[1].accuracy
    assert weights.inputs.shape[1:] == (12, 12, 1)


def test_report_has_accuracy_and_gain(trained, capsys):
    command.main(['report', str(trained / 'run'), '--images=4'])
    output = capsys.readouterr().out
    weights = bj.models.load_pretrained(trained / 'run')
    test = bj.data.load_dataset(str(trained / 'squares.npz')).test
    run = bj.inference.dense(weights.model)
    prediction = run(weights.variables, weights.normalize(test.image), weights.operating_points[0])
    accuracy = 100 * np.mean(np.asarray(prediction.label) == test.label)
    row = next(line for line in output.splitlines() if line.startswith('| 1 '))
    assert f'| {accuracy:.2f} ' in row
    assert '| test ' in row
    assert re.search(r'one image at a time, 4 images on cpu: \d+\.\d\d times as fast', output)


def test_plan_prints_its_candidates(trained, capsys):
    command.main(['plan', str(trained / 'run'), '--batch_size=4', '--point=2'])
    assert 'batches of 4' in capsys.readouterr().out


@pytest.mark.parametrize('to', ['programs', 'net.onnx'])
def test_export_writes_the_form_that_the_name_asks_for(trained, tmp_path, to):
    command.main(['export', str(trained / 'run'), f'--to={tmp_path / to}'])
    assert (tmp_path / to).is_dir() == (to == 'programs')
    assert (tmp_path / to).exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['report', 'b-lenet@cats'], "network: no weights of 'b-lenet' on 'cats'"),
        (['export', 'b-lenet@mnist', '--to=x', '--point=99'], '--point: got 99; there are 1 to '),
        (['train', 'b-lenett', '--to=x'], "name: unknown network 'b-lenett'"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_a_whole_session():
    run = subprocess.run([sys.executable, '-m', 'branchy_jax.command', '--help'], capture_output=True, text=True)
    assert run.returncode == 0
    for line in ('branchy-jax train b-lenet', 'branchy-jax report', 'branchy-jax plan', 'branchy-jax export'):
        assert line in run.stdout
