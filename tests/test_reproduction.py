"""Verdicts by hand-derived figures, networks with branches anywhere, and figures from stored runs."""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from experiments import claims, figures
from experiments.run.report import paper
from experiments.run.trainings import Trainer
from experiments.study import gradients, on_a_run, variants
from experiments.study.verdicts import DEPTHS, interval, judge, judge_all

STORED = Path(__file__).parents[1] / 'experiments' / 'results'


def small_dataset(count, side, classes):
    """Noise, the same in every part."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 1)).astype(np.uint8)
    part = bj.Batch(images, (np.arange(count) % classes).astype(np.int32))
    normalization = bj.data.fit_normalization(images)
    return bj.data.Dataset('small', part, part, part, num_classes=classes, normalization=normalization)


def test_interval_is_students():
    found = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.7764451 * np.sqrt(2.5 / 5)  # t with 4 degrees of freedom, from a printed table
    assert found['mean'] == 3
    assert (found['low'], found['high']) == pytest.approx((3 - half, 3 + half))


@pytest.mark.parametrize(
    ('differences', 'verdict'),
    [
        ([1.0, 1.1, 0.9], 'yes'),
        ([-1.0, -1.1, -0.9], 'no, the opposite'),
        ([1.0, -1.1, 0.2], 'no: not shown, the interval holds 0'),
        ([1.0], 'one seed cannot say'),
    ],
)
def test_verdicts_may_be_no(differences, verdict):
    assert judge('?', np.array(differences), unit='points')['verdict'] == verdict


def test_claims_are_judged_by_differences_of_a_seed():
    """Seeds differ by far more than variants do: only pairing shows the effect."""
    seeds = np.array([0.5, 0.6, 0.7, 0.8])
    noise = np.array([1, -1, 1, -1]) * 1e-4
    rows = []

    def variant(name, last, first=0.4):
        test = np.stack([np.full(4, first), seeds + last + noise * last], axis=1)
        for seed in range(4):
            accuracy = {'test_accuracy': test[seed].tolist(), 'train_accuracy': (test[seed] + 0.1).tolist()}
            rows.append({'variant': name, 'seed': seed, **accuracy})

    joint = [f'joint{more}' for more in ('', ', from the baseline', ', twice as long', ', first exit 1.0 to last 0.3')]
    for n, name in enumerate(['baseline', *joint]):
        variant(name, 0.01 * n)
    for depth in DEPTHS:
        variant(f'branch of {depth} convolutions', -0.02 * depth)
    for n in (2, 3):
        variant(f'branch after layer {n}', 0.0, first=0.3 + 0.1 * n)  # 0.4 after layer 1
    answers = judge_all(rows, 'b-lenet')
    verdicts = [answer['verdict'] for answer in answers]
    assert verdicts[0] == 'yes'
    assert verdicts[1].startswith('no: not shown')  # the same gap
    assert verdicts[2:4] == ['yes', 'no, the opposite']  # from the baseline; and after as many epochs in all
    assert verdicts[6] == 'no, the opposite'  # deeper branches
    assert answers[8]['claim'] == 'Later branches'
    assert answers[8]['mean'] == pytest.approx(10)  # points a place


def test_claims_are_trained_from_paired_seeds_and_once(tmp_path, monkeypatch):
    """At tiny scale: what is trained is read back, other settings are refused, the page has the verdicts."""
    options = argparse.Namespace(network='b-lenet', dataset='mnist5k', epochs=1, batch_size=30)
    options.learning_rate, options.weight_decay, options.cpu_devices, options.augment = 1e-3, 0.0, 1, False
    shapes = {'num_classes': 4, 'image_shape': (12, 12, 1), 'placement': 'text'}
    trainer = Trainer(claims.settings(options), shapes, small_dataset(60, 12, 4), tmp_path / 'checkpoints')
    every = claims.variants(trainer)
    assert set(every) >= {'baseline', 'joint', 'branch of 4 convolutions', 'branch after layer 3'}
    some = {name: every[name] for name in ('baseline', 'joint')}
    monkeypatch.setattr(claims, 'variants', lambda trainer: some)
    page = claims.run(trainer, tmp_path, seeds=2)
    assert 'Joint training regularises' in page
    rows = bj.report.read_json(tmp_path / 'claims_b-lenet.json')['rows']
    assert [(row['variant'], row['seed'], len(row['test_accuracy'])) for row in rows[1:3]] == [
        ('baseline', 1, 1),
        ('joint', 0, 2),
    ]
    first, second = (some['joint']('joint', seed)[0]['params']['fc1']['kernel'] for seed in (0, 1))
    assert not np.allclose(first, second, atol=1e-3)
    monkeypatch.setattr(jax, 'value_and_grad', None)
    assert claims.run(trainer, tmp_path, seeds=2) == page
    with pytest.raises(ValueError, match='workdir: .* other settings'):
        claims.run(trainer, tmp_path, seeds=3)


def test_gradients_are_measured_before_and_after(tmp_path):
    dataset = small_dataset(8, 8, 3)
    record = gradients.run(tmp_path, 'b-plain3', dataset, seeds=2, steps=1, batch_size=4)
    assert gradients.norms_of(record['rows'], 'without').shape == (2, 2, 3)
    assert len(record['answers']) == 4
    assert (tmp_path / 'gradients_b-plain3.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('network', 'after', 'following'), [('lenet', 3, 'fc1'), ('alexnet', 1, 'conv2'), ('resnet8', 1, 'block1')]
)
def test_a_branch_reads_what_the_next_layer_of_the_trunk_reads(network, after, following):
    """The head repeats activation, pooling and normalisation."""
    inputs = {}

    def note(call, args, kwargs, context):
        if context.method_name == '__call__':
            inputs[context.module.name] = args[0]
        return call(*args, **kwargs)

    def run(variables, images):
        with nn.intercept_methods(note):
            model.apply(variables, images)
        return [inputs[name].reshape(2, -1) for name in ('Conv_0', following)]

    model = variants.with_branch(network, after=after, convolutions=1)
    images = jax.random.normal(jax.random.key(0), (2, *bj.models.create(f'b-{network}').image_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    generator = np.random.default_rng(0)
    ours, theirs = jax.jit(run)(jax.tree.map(lambda x: generator.random(x.shape, np.float32), shapes), images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(ValueError, match='after: got 99; .* has places after layers 1 to'):
        variants.with_branch(network, after=99, convolutions=1)


def test_deep_plain_networks_have_the_same_trunk_with_and_without_branches():
    model, images = variants.DeepPlain(depth=6), jnp.ones((1, 8, 8, 1))
    with_branches = model.init(jax.random.key(0), images)
    without = bj.models.without_branches(model).init(jax.random.key(0), images)
    assert len(model.apply(with_branches, images)) == 3
    assert variants.trunk_layers(model, (8, 8, 1)) == [f'conv{n}' for n in range(1, 7)]
    for name, values in without['params'].items():
        jax.tree.map(np.testing.assert_array_equal, values, with_branches['params'][name])


def test_paper_figures_are_those_of_table_1():
    networks = ('b-lenet', 'b-alexnet', 'b-resnet110')
    assert [round(paper('Table I', branchy=name)[1]['gain'], 1) for name in networks] == [5.4, 1.5, 1.9]
    knees = [row['accuracy_percent'] for row in paper('Figure 3') if row['knee']]
    assert knees == [100 * row['test_accuracy'] for name in networks for row in paper('Table I', branchy=name)[1:]]


def test_figures_without_runs_say_so(tmp_path):
    page = figures.remake(tmp_path / 'none', tmp_path / 'out')
    assert page.count('not run') >= 8
    assert (tmp_path / 'out' / 'figure6.png').read_bytes().startswith(b'\x89PNG')


def test_the_stored_page_is_what_the_stored_records_make(tmp_path):
    """After a change to either: the command in results/README.md makes it anew."""
    page = figures.remake(STORED, tmp_path)
    assert page == (STORED / 'figures' / 'figures.md').read_text()
    row = bj.report.read_json(STORED / 'lenet_mnist_tuned' / 'report.json')['rows'][1]
    line = next(line for line in page.splitlines() if line.startswith('| b-lenet '))
    assert f'{100 * row["test_accuracy"]:.4g}' in line
    assert f'{row["gain"]:.4g} [' in line


def test_cache_misses_are_read_from_callgrind(tmp_path, monkeypatch):
    dump = (
        'version: 1\nevents: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw\nfn=x\nsummary: 0\ntotals: 900 60 40 7 4 1 6 2 0\n'
    )
    assert on_a_run.misses(dump) == {'first_level': 0.05, 'last_level': 0.02, 'accesses': 100}
    with pytest.raises(ValueError, match='not a dump'):
        on_a_run.misses('nothing')
    monkeypatch.setattr('shutil.which', lambda name: None)
    with pytest.raises(ValueError, match='valgrind: not found'):
        on_a_run.cache(tmp_path, images=1, settings=1)
