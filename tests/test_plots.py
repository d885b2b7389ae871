"""Pictures hold the data given: read back from Matplotlib's own objects."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from branchy_jax import plots
from branchy_jax.criteria import entropy, reliability
from branchy_jax.thresholds import Screen
from experiments.pages import pictures

BASELINE = {'network': 'lenet', 'test_accuracy': 0.97, 'latency_ms': 0.5, 'gain': 1.0}
BRANCHY = {'network': 'b-lenet', 'test_accuracy': 0.975, 'latency_ms': 0.2, 'gain': 2.5}


@pytest.fixture
def drawn(monkeypatch):
    """Figures, in the order in which they were written; the first one really is."""
    figures, savefig = [], Figure.savefig

    def record(figure, path, **options):
        figures.append(figure)
        return savefig(figure, path, **options) if len(figures) == 1 else path.touch()

    monkeypatch.setattr(Figure, 'savefig', record)
    return figures


def lines_of(axes):
    return {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}


def test_tradeoff_draws_its_records(tmp_path, drawn):
    points = [(0.1, 0.9), (0.2, 0.96), (0.4, 0.98)]
    frontier = [{'latency_ms': ms, 'test_accuracy': accuracy} for ms, accuracy in points]
    plots.tradeoff(tmp_path / 'tradeoff.png', frontier, BASELINE, BRANCHY, knee=frontier[1], title='A title')
    (axes,) = drawn[0].axes
    lines = lines_of(axes)
    np.testing.assert_allclose(lines['thresholds of the frontier'], [[0.1, 90], [0.2, 96], [0.4, 98]])
    np.testing.assert_allclose(lines['knee'], [[0.2, 96]])
    np.testing.assert_allclose(lines['lenet, no exits'], [[0.5, 97]])
    np.testing.assert_allclose(lines['chosen on validation data, 2.50× faster'], [[0.2, 97.5]])
    assert (tmp_path / 'tradeoff.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='frontier: nothing to draw'):
        plots.tradeoff(tmp_path / 'tradeoff.png', [], BASELINE, BRANCHY)


def test_accuracy_against_cost_draws_screens_by_ascending_cost(tmp_path, drawn):
    accuracy, cost = np.array([0.9, 0.5, 0.7]), np.array([3.0, 1.0, 2.0])
    screen = Screen(np.zeros((3, 1)), accuracy, np.ones((3, 2)) / 2, cost, entropy, 'test')
    one = screen.replace(accuracy=np.array([0.8]), cost=np.array([4.0]))
    plots.accuracy_against_cost(tmp_path / 'a.png', {'entropy': screen, 'margin': one})
    (axes,) = drawn[0].axes
    np.testing.assert_allclose(lines_of(axes)['entropy'], [[1, 50], [2, 70], [3, 90]])
    np.testing.assert_allclose(lines_of(axes)['margin'], [[4, 80]])
    assert axes.get_ylabel() == 'accuracy on test data (%)'
    with pytest.raises(ValueError, match='screens: nothing to draw'):
        plots.accuracy_against_cost(tmp_path / 'a.png', {})


def test_reliability_diagrams_leave_empty_bins_out(tmp_path, drawn):
    before = [reliability([0.9, 0.9, 0.5], [True, False, True], bins=10)] * 2
    after = [reliability([0.6, 0.6, 0.6], [True, False, True], bins=10)] * 2
    plots.reliability_diagrams(tmp_path / 'a.png', {'before': before, 'after': after})
    first, second = drawn[0].axes
    np.testing.assert_allclose(lines_of(first)['before'], [[0.5, 1], [0.9, 0.5]])
    np.testing.assert_allclose(lines_of(first)['after'], [[0.6, 2 / 3]])
    assert second.get_title(loc='left') == 'exit 1: ECE 43.33 → 6.67 %'  # (2 × 0.4 + 0.5) / 3, 2/3 − 0.6
    for bad in ({}, {'before': []}, {'before': before, 'after': after[:1]}):
        with pytest.raises(ValueError, match='measured: expected one Reliability per exit'):
            plots.reliability_diagrams(tmp_path / 'a.png', bad)


def test_images_are_shown_at_the_exit_they_left_at(tmp_path, drawn):
    exits = np.array([0, 1, 0, 0, 2, 0])
    for channels in (1, 3):
        images = np.arange(1, 7, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, channels), np.uint8)
        plots.images_by_exit(tmp_path / 'a.png', images, exits, num_exits=3, columns=2)
        shown = [np.asarray(axes.images[0].get_array())[::2, ::2].reshape(4, -1)[:, 0] for axes in drawn[-1].axes]
        np.testing.assert_array_equal(shown, [[1, 3, 4, 6], [2, 255, 255, 255], [5, 255, 255, 255]])
    assert drawn[0].axes[0].get_title(loc='left') == 'left at exit 0: 66.7 %'
    for bad in (images[0], images / 255, images[:5]):
        with pytest.raises(ValueError, match='images: expected uint8'):
            plots.images_by_exit(tmp_path / 'a.png', bad, exits, num_exits=3)


def test_the_exit_that_answered_is_framed(tmp_path, drawn):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (2, 4, 4, 1)), generator.integers(0, 3, (2, 4, 4))
    predictions, exits = generator.integers(0, 3, (2, 2, 4, 4)), np.array([1, 0])
    plots.masks(tmp_path / 'masks.png', images, labels, predictions, exits, num_classes=3, title='A title')
    grid = np.array(drawn[0].axes).reshape(2, 4)
    assert [axes.get_title() for axes in grid[0]] == ['input', 'truth', 'exit 0', 'exit 1']
    assert [[axes.get_xlabel() for axes in line] for line in grid] == [['', '', '', 'answers'], ['', '', 'answers', '']]
    np.testing.assert_array_equal(grid[1, 2].images[0].get_array(), predictions[0, 1])
    for truth, names in ((labels, ('a',)), (labels, 'abcd'), (labels[:1], 'abc')):
        with pytest.raises(ValueError, match='predictions: expected'):
            plots.masks(tmp_path / 'masks.png', images, truth, predictions, exits, num_classes=3, class_names=names)


def test_curves_stand_against_the_papers(tmp_path, drawn):
    paper = {'b-lenet (paper)': [(1, 50), (2, 60)]}
    options = {'x': 'ms', 'y': '%', 'title': 'Figure 5'}
    for ours in ({}, {'ours': [(0.5, 55), (2, 70)]}):
        pictures.against_paper(tmp_path / 'a.png', ours, paper, marked={'knee': (2, 60)}, **options)
    assert [len(figure.axes[0].texts) for figure in drawn] == [1, 0]  # 'ours: not run'
    lines = lines_of(drawn[1].axes[0])
    for name, points in (('b-lenet (paper)', [[1, 50], [2, 60]]), ('ours', [[0.5, 55], [2, 70]]), ('knee', [[2, 60]])):
        np.testing.assert_allclose(lines[name], points)


def test_gains_are_drawn_by_batch_and_gradients_by_layer(tmp_path, drawn):
    shared = {'operating_point': '90/10', 'mac_limit': 4.0}
    rows = [{**shared, 'batch': batch, 'gain': gain} for batch, gain in ((256, 3.0), (1, 2.0))]
    pictures.gain_against_batch(tmp_path / 'a.png', rows)
    np.testing.assert_allclose(lines_of(drawn[0].axes[0])['90/10 % leave'], [[1, 2], [256, 3]])
    norms = np.array([[[1.0, 4.0], [2.0, 2.0]], [[4.0, 1.0], [2.0, 2.0]]])  # two seeds, two moments, two layers
    pictures.gradient_norms(tmp_path / 'a.png', {'with branches': norms}, steps=7)
    gradients = lines_of(drawn[1].axes[0])
    for moment in ('at initialisation', 'after 7 steps'):
        np.testing.assert_allclose(gradients[f'with branches, {moment}'], [[1, 2], [2, 2]])  # geometric means
