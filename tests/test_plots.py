"""Pictures hold the data given: read back from Matplotlib's own objects."""

import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from branchy_jax import plots
from branchy_jax.criteria import reliability
from experiments.pages import pictures

BASELINE = {'network': 'lenet', 'test_accuracy': 0.97, 'latency_ms': 0.5, 'gain': 1.0}
BRANCHY = {'network': 'b-lenet', 'test_accuracy': 0.975, 'latency_ms': 0.2, 'gain': 2.5}


@pytest.fixture
def drawn(monkeypatch):
    """Figures, in the order in which they were written."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *to, **how: figures.append(self) or savefig(self, *to, **how))
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
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('time per image, batch 1 (ms)', 'test accuracy (%)')
    assert (tmp_path / 'tradeoff.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='frontier: nothing to draw'):
        plots.tradeoff(tmp_path / 'tradeoff.png', [], BASELINE, BRANCHY)


def test_accuracy_against_cost_draws_screens_by_ascending_cost(tmp_path, drawn):
    screen = types.SimpleNamespace(cost=np.array([3e6, 1e6, 2e6]), accuracy=np.array([0.9, 0.5, 0.7]))
    one = types.SimpleNamespace(cost=np.array([4e6]), accuracy=np.array([0.8]))
    plots.accuracy_against_cost(tmp_path / 'a.png', {'entropy': screen, 'margin': one})
    (axes,) = drawn[0].axes
    np.testing.assert_allclose(lines_of(axes)['entropy'], [[1, 50], [2, 70], [3, 90]])
    np.testing.assert_allclose(lines_of(axes)['margin'], [[4, 80]])
    assert axes.get_xlabel() == 'expected cost of an input (million multiply-accumulates)'
    with pytest.raises(ValueError, match='screens: nothing to draw'):
        plots.accuracy_against_cost(tmp_path / 'a.png', {})


def test_reliability_diagrams_leave_empty_bins_out(tmp_path, drawn):
    before = [reliability([0.9, 0.9, 0.5], [True, False, True], bins=10)] * 2
    after = [reliability([0.6, 0.6, 0.6], [True, False, True], bins=10)] * 2
    plots.reliability_diagrams(tmp_path / 'a.png', {'before': before, 'after': after})
    first, second = drawn[0].axes
    np.testing.assert_allclose(lines_of(first)['before'], [[0.5, 1], [0.9, 0.5]])
    np.testing.assert_allclose(lines_of(first)['after'], [[0.6, 2 / 3]])
    assert second.get_title(loc='left') == 'exit 2: ECE 43.33 → 6.67 %'  # (2 × 0.4 + 0.5) / 3, 2/3 − 0.6
    for bad in ({}, {'before': []}, {'before': before, 'after': after[:1]}):
        with pytest.raises(ValueError, match='measured: expected one Reliability per exit'):
            plots.reliability_diagrams(tmp_path / 'a.png', bad)


@pytest.mark.parametrize('channels', [1, 3])
def test_images_are_shown_at_the_exit_they_left_at(tmp_path, drawn, channels):
    images = np.arange(1, 7, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(channels, 3)
    plots.images_by_exit(tmp_path / 'a.png', images, np.array([0, 1, 0, 0, 2, 0]), num_exits=3, columns=2)
    shown = [np.unique(np.asarray(axes.images[0].get_array())).tolist() for axes in drawn[0].axes]
    assert shown == [[1, 3, 4, 6], [2, 255], [5, 255]]
    assert drawn[0].axes[0].get_title(loc='left') == 'left at exit 1: 66.7 %'
    for bad in (images[0], images / 255, images[:5]):
        with pytest.raises(ValueError, match='images: expected uint8'):
            plots.images_by_exit(tmp_path / 'a.png', bad, np.zeros(6, int), num_exits=3)


def test_the_exit_that_answered_is_framed(tmp_path, drawn):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (2, 4, 4, 1)), generator.integers(0, 3, (2, 4, 4))
    predictions, exits = generator.integers(0, 3, (2, 2, 4, 4)), np.array([1, 0])
    plots.masks(tmp_path / 'masks.png', images, labels, predictions, exits, num_classes=3, title='A title')
    grid = np.array(drawn[0].axes).reshape(2, 4)
    assert [axes.get_title() for axes in grid[0]] == ['input', 'truth', 'exit 1', 'exit 2']
    assert [[axes.get_xlabel() for axes in line] for line in grid] == [['', '', '', 'answers'], ['', '', 'answers', '']]
    np.testing.assert_array_equal(grid[1, 2].images[0].get_array(), predictions[0, 1])
    for options in ({'num_classes': 2, 'class_names': ('a', 'b', 'c')}, {'num_classes': 3, 'class_names': ('a',)}):
        with pytest.raises(ValueError, match='predictions: expected'):
            plots.masks(tmp_path / 'masks.png', images, labels, predictions, exits, **options)
    with pytest.raises(ValueError, match='predictions: expected'):
        plots.masks(tmp_path / 'masks.png', images, labels[:1], predictions, exits, num_classes=3)


def test_curves_stand_against_the_papers(tmp_path, drawn):
    paper = {'b-lenet': [(1, 50), (2, 60)]}
    options = {'x': 'ms', 'y': '%', 'title': 'Figure 5'}
    pictures.against_paper(tmp_path / 'a.png', {}, paper, **options)
    ours = {'ours': [(0.5, 55), (2, 70)]}
    pictures.against_paper(tmp_path / 'a.png', ours, paper, marked={'knee': (2, 60)}, **options)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ['ours: not run']
    lines = lines_of(drawn[1].axes[0])
    np.testing.assert_allclose(lines['b-lenet (paper)'], [[1, 50], [2, 60]])
    np.testing.assert_allclose(lines['ours'], [[0.5, 55], [2, 70]])
    np.testing.assert_allclose(lines['knee'], [[2, 60]])
    assert not drawn[1].axes[0].texts


def test_cells_are_drawn_by_their_shares(tmp_path, drawn):
    common = {'shares': (0.9, 0.1), 'mac_limit': 4.0, 'baseline_ms': 0.5}
    gains = [('planned', 256, 3.0), ('planned', 1, 2.0), ('dense', 256, 1.0), ('dense', 1, 1.0)]
    rows = [{'executor': name, 'batch': batch, 'gain': gain, 'ms': 0.5 / gain} for name, batch, gain in gains]
    cells = [common | row for row in rows]
    for picture in (pictures.gain_against_batch, pictures.time_against_batch, pictures.time_against_macs):
        picture(tmp_path / 'a.png', cells)
    gain, time, follows = (lines_of(figure.axes[0]) for figure in drawn)
    np.testing.assert_allclose(gain['90/10 % leave'], [[1, 2], [256, 3]])
    np.testing.assert_allclose(time['90/10 % leave'], [[1, 0.25], [256, 256 / 6]])
    np.testing.assert_allclose(time['plain baseline'], [[1, 0.5], [256, 128]])
    np.testing.assert_allclose(follows['batch 256'], [[0.25, 1 / 3]])


def test_gradients_and_costs_are_drawn_over_layers_and_images(tmp_path, drawn):
    norms = np.array([[[1.0, 4.0], [2.0, 2.0]], [[4.0, 1.0], [2.0, 2.0]]])  # two seeds, two moments, two layers
    pictures.gradient_norms(tmp_path / 'a.png', {'with branches': norms}, steps=7)
    pictures.controlled_cost(tmp_path / 'a.png', {'controlled': np.array([0.3, 0.5])}, 0.4, [1])
    gradients, costs = (lines_of(figure.axes[0]) for figure in drawn)
    np.testing.assert_allclose(gradients['with branches, at initialisation'], [[1, 2], [2, 2]])  # geometric means
    np.testing.assert_allclose(gradients['with branches, after 7 steps'], [[1, 2], [2, 2]])
    np.testing.assert_allclose(costs['controlled'], [[0, 0.3], [1, 0.5]])
    assert costs['target'][:, 1].tolist() == [0.4, 0.4]
