"""Verdicts by hand-derived figures, networks with branches anywhere, and figures from stored runs."""

import shutil
import tarfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import check_equal

import branchy_jax as bj
from experiments import cache, figures
from experiments.pages import paper
from experiments.run import reproduce
from experiments.run.networks import image_specs
from experiments.study import variants
from experiments.study.seeds import Recipe, Seeds
from experiments.study.verdicts import DEPTHS, interval, judge, judge_all

STORED = Path(__file__).parents[1] / 'experiments' / 'results'


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

    def variant(last, first=0.4):
        test = np.stack([np.full(4, first), seeds + last + noise * last], axis=1)
        return {'test_accuracy': test.tolist(), 'train_accuracy': (test + 0.1).tolist()}

    joint = [f'joint{more}' for more in ('', ', from the baseline', ', twice as long', ', first exit 1.0 to last 0.3')]
    names = ['baseline', *joint]
    found = {name: variant(0.01 * n) for n, name in enumerate(names)}
    found |= {f'branch of {depth} convolutions': variant(-0.02 * depth) for depth in DEPTHS}
    found |= {f'branch after layer {n}': variant(0.0, first=0.3 + 0.1 * n) for n in (2, 3)}  # 0.4 after layer 1
    every = judge_all(found, 'b-lenet')
    judged = {claim['claim']: [answer['verdict'] for answer in claim['answers']] for claim in every}
    assert judged['Joint training regularises'][0] == 'yes'
    assert judged['Joint training regularises'][1].startswith('no: not shown')  # the same gap
    assert judged['Starting from the trained baseline is better than from random'] == ['yes', 'no, the opposite']
    assert judged['Deeper branches (Figure 5)'][0] == 'no, the opposite'
    assert every[4]['answers'][0]['mean'] == pytest.approx(10)  # points a place


def test_seeds_are_paired_and_trained_once(small_data, network, tmp_path, monkeypatch):
    """A seed trains alike whoever trains before it; another seed trains otherwise. What is trained is read back."""
    model = network[0]
    dataset = bj.data.Dataset(
        name='small',
        train=small_data,
        validation=small_data,
        test=small_data,
        num_classes=3,
        normalization=bj.data.fit_normalization(small_data.image),
    )
    recipe = Recipe(epochs=1, batch_size=16, learning_rate=1e-3, crop_padding=0, flip=False)
    one = Seeds(dataset, recipe, count=1, directory=tmp_path / 'one').train('any', model, [1.0, 1.0, 1.0])
    two = Seeds(dataset, recipe, count=2, directory=tmp_path / 'two').train('any', model, [1.0, 1.0, 1.0])
    assert two.test_accuracy.shape == (2, 3)
    for ours, theirs in zip(jax.tree.leaves(one.variables[0]), jax.tree.leaves(two.variables[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    kernels = [variables['params']['layer1']['kernel'] for variables in two.variables]
    assert not np.allclose(*kernels, atol=1e-3)
    saved = []
    monkeypatch.setattr(bj.checkpoint, 'save', lambda *arguments, **_: saved.append(arguments))
    again = Seeds(dataset, recipe, count=2, directory=tmp_path / 'two').train('any', model, [1.0, 1.0, 1.0])
    check_equal(again.variables, two.variables)
    assert not saved


@pytest.mark.parametrize(('network', 'after'), [('lenet', 3), ('alexnet', 2), ('resnet8', 2)])
@pytest.mark.parametrize('convolutions', [0, 2])
def test_branches_go_anywhere(network, after, convolutions):
    model = variants.with_branch(network, after=after, convolutions=convolutions)
    branchy, trunk = bj.models.create(f'b-{network}'), bj.models.create(network)
    images = image_specs(branchy.image_shape)
    ours, theirs = (jax.eval_shape(m.init, jax.random.key(0), images)['params'] for m in (model, trunk))
    (head,) = set(ours) - set(theirs)
    assert set(ours[head]) == {'Dense_0', *(f'Conv_{n}' for n in range(convolutions))}
    assert set(theirs) <= set(ours)
    read = bj.program.leaves_read(model, {'params': ours} | statistics_of(model, images), images, [0])
    layers = variants.trunk_layers(branchy, branchy.image_shape)
    assert [name for name in layers if any(f"['{name}']" in path for path in read)] == layers[:after]


def statistics_of(model, images):
    """The shapes of BatchNorm's statistics, where a network has any."""
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {name: values for name, values in variables.items() if name != 'params'}


@pytest.mark.parametrize(
    ('network', 'after', 'following'),
    [
        ('lenet', 2, 'conv3'),
        ('lenet', 3, 'fc1'),
        ('alexnet', 1, 'conv2'),
        ('alexnet', 3, 'conv4'),
        ('alexnet', 5, 'fc1'),
        ('resnet8', 1, 'block1'),
        ('resnet8', 2, 'block2'),
    ],
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


def test_a_trunk_has_only_so_many_places():
    with pytest.raises(ValueError, match='after: got 4; lenet has places after layers 1 to 3'):
        variants.with_branch('lenet', after=4, convolutions=1)


def test_deep_plain_networks_have_the_same_trunk_with_and_without_branches():
    model, images = variants.DeepPlain(depth=6, branches=2), jnp.ones((1, 8, 8, 1))
    with_branches = model.init(jax.random.key(0), images)
    without = bj.models.without_branches(model).init(jax.random.key(0), images)
    assert len(model.apply(with_branches, images)) == 3
    assert variants.trunk_layers(model, (8, 8, 1)) == [f'conv{n}' for n in range(1, 7)]
    for name, values in without['params'].items():
        jax.tree.map(np.testing.assert_array_equal, values, with_branches['params'][name])


def test_figures_without_runs_say_so(tmp_path):
    page = figures.remake(tmp_path / 'none', tmp_path / 'out')
    assert page.count('not run') >= 8
    assert 'gain' in page
    assert (tmp_path / 'out' / 'figure6.png').read_bytes().startswith(b'\x89PNG')


def test_figures_come_from_the_stored_records(tmp_path):
    shutil.copytree(STORED / 'lenet_mnist_tuned', tmp_path / 'runs' / 'lenet_mnist_tuned')
    page = figures.remake(tmp_path / 'runs', tmp_path / 'out')
    row = bj.report.read_json(STORED / 'lenet_mnist_tuned' / 'report.json')['rows'][1]
    line = next(line for line in page.splitlines() if line.startswith('| b-lenet '))
    assert f'{100 * row["test_accuracy"]:.2f}' in line
    assert f'{row["gain"]:.2f} [' in line
    assert page.count('| b-alexnet ') == 1  # not run
    for points, knee in paper.FIGURE_3.values():
        assert points[knee][1] in (99.25, 79.19, 79.17)  # the rows of Table I


def test_the_stored_page_is_what_the_stored_records_make(tmp_path):
    """After a change to either: the command in results/README.md makes it anew."""
    assert figures.remake(STORED, tmp_path) == (STORED / 'figures' / 'figures.md').read_text()


def test_gpu_steps_name_files_that_their_commands_make(tmp_path):
    for quick in (False, True):
        steps = reproduce.steps(tmp_path, quick=quick)
        assert len({step.makes for step in steps}) == len(steps)
        for step in steps:
            assert (Path(__file__).parents[1] / (step.arguments[0].replace('.', '/') + '.py')).exists()
            for argument in step.arguments:
                if argument.startswith('--config=experiments'):
                    file = argument.removeprefix('--config=').removesuffix(':gpu')
                    assert (Path(__file__).parents[1] / file).exists()
    assert sum(step.seconds for step in reproduce.steps(tmp_path, quick=False)) < 25 * 60


def test_packing_halves_weights_and_keeps_records(tmp_path):
    run = tmp_path / 'runs' / 'lenet_mnist'
    run.mkdir(parents=True)
    values = np.linspace(-1, 1, 100, dtype=np.float32)
    bj.checkpoint.save_weights(run / 'b-lenet.safetensors', {'params': {'a': values}}, metadata={'network': 'b-lenet'})
    bj.report.write_json(run / 'report.json', {'a': 1})
    made = reproduce.pack(tmp_path / 'runs', tmp_path / 'out')
    assert sorted(path.name for path in made) == ['records.tar.gz', 'weights_lenet.tar.gz']
    for path in made:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / 'back', filter='data')
    found, metadata = bj.checkpoint.load_weights(tmp_path / 'back' / 'lenet_mnist' / 'b-lenet.safetensors')
    assert metadata['network'] == 'b-lenet'
    np.testing.assert_allclose(np.asarray(found['params']['a'], np.float32), values, atol=1e-3)
    assert bj.report.read_json(tmp_path / 'back' / 'lenet_mnist' / 'report.json') == {'a': 1}


def test_cache_misses_need_valgrind(tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.which', lambda name: None)
    with pytest.raises(ValueError, match='valgrind: not found'):
        cache.run(tmp_path, images=1, settings=1)


def test_cache_misses_are_read_from_callgrind():
    dump = (
        'version: 1\nevents: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw\nfn=x\nsummary: 0\ntotals: 900 60 40 7 4 1 6 2 0\n'
    )
    assert cache.misses(dump) == {'first_level': 0.05, 'last_level': 0.02, 'accesses': 100}
    with pytest.raises(ValueError, match='not a dump'):
        cache.misses('nothing')
