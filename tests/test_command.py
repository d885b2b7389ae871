"""The console command: trains, reports, plans and exports on a small data set of its own."""

import re

import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax import command


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A network that classifies bright and dark squares, trained by the command."""
    folder = tmp_path_factory.mktemp('command')
    labels = np.tile(np.arange(2), 60)
    images = np.random.default_rng(0).integers(0, 100, (120, 12, 12, 1)) + 150 * labels[:, None, None, None]
    arrays = {'x_train': images[:80], 'y_train': labels[:80], 'x_test': images[80:], 'y_test': labels[80:]}
    np.savez(folder / 'squares.npz', **{name: value.astype(np.uint8) for name, value in arrays.items()})
    options = f'--dataset={folder}/squares.npz --to={folder}/run --epochs=3 --batch_size=8 --exit_weights 1 0.3'
    command.main(['train', 'b-lenet', *options.split()])
    return folder


def test_a_trained_network_is_saved_and_reported(trained, capsys):
    weights = bj.models.load_pretrained(trained / 'run')
    best, knee = weights.operating_points
    assert (weights.card['network'], weights.inputs.shape[1:], best.split) == ('b-lenet', (12, 12, 1), 'validation')
    assert best.accuracy >= knee.accuracy
    command.main(['report', str(trained / 'run'), '--images=4'])
    output = capsys.readouterr().out
    test = bj.data.load_dataset(str(trained / 'squares.npz')).test
    prediction = bj.inference.dense(weights.model)(weights.variables, weights.normalize(test.image), best)
    accuracy = 100 * np.mean(np.asarray(prediction.label) == test.label)
    assert re.search(rf'\| 1 .*\| test .*\| {accuracy:.2f} ', output)
    assert re.search(r'one image at a time, 4 images on cpu: \d+\.\d\d times as fast', output)


@pytest.mark.usefixtures('xla_defaults')
def test_plan_prints_its_candidates(trained, capsys):
    command.main(['plan', str(trained / 'run'), '--batch_size=4', '--point=2'])
    assert 'batches of 4' in capsys.readouterr().out


def test_export_writes_the_form_that_the_name_asks_for(trained, tmp_path):
    for to in ('programs', 'net.onnx'):
        command.main(['export', str(trained / 'run'), f'--to={tmp_path / to}'])
    assert (tmp_path / 'programs').is_dir()
    assert (tmp_path / 'net.onnx').is_file()


def test_another_training_in_the_same_folder_is_refused_and_changes_nothing(trained, capsys):
    before = {path.name: path.read_bytes() for path in (trained / 'run').iterdir() if path.is_file()}
    options = f'--dataset={trained}/squares.npz --to={trained}/run --epochs=3 --batch_size=8 --exit_weights=1,0.3'
    with pytest.raises(SystemExit, match='2'):
        command.main(['train', 'b-lenet', *options.split(), '--seed=1'])
    assert 'seed or key: ' in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (trained / 'run').iterdir() if path.is_file()}


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


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit, match='0'):
        command.main(['--version'])
    assert capsys.readouterr().out == f'branchy-jax {bj.__version__}\n'
