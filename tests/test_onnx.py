"""One ONNX file answers as `dense` does, skips what an exit makes superfluous, and is whole or not there."""

import collections
import functools
import json
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.export import onnx_file

onnx = pytest.importorskip('onnx', reason='pip install branchy-jax[onnx]')
runtime = pytest.importorskip('onnxruntime', reason='pip install branchy-jax[onnx]')

ANSWER = ('label', 'exit_index', 'logits', 'uncertainty')
SCALE = bj.Normalization(mean=jnp.float32([0.5, 0.4]), deviation=jnp.float32([0.25, 0.5]))


@pytest.fixture(scope='module')
def convolutional():
    """A network of most kinds of layers, on images of two channels; heads in every style."""
    norm = functools.partial(nn.LayerNorm, epsilon=1e-3)
    model = bj.BranchyNet(
        stages=(
            (nn.Conv(4, (3, 3)), nn.BatchNorm(momentum=0.9), nn.relu),
            (nn.Conv(6, (2, 2), strides=2), lambda x: nn.max_pool(x, (3, 3), (1, 1), padding='SAME'), nn.gelu),
            (norm(), lambda x: x + jnp.pad(x[..., :5], [(0, 0)] * 3 + [(1, 0)]), nn.silu),
        ),
        exits=(
            (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), bj.models.layers.flatten, nn.Dense(5)),
            (lambda x: x.mean(axis=(1, 2)), nn.Dense(5)),
            (
                lambda x: x.reshape(x.shape[0], -1, 6),
                nn.MultiHeadDotProductAttention(2),
                lambda x: x[:, 0],
                nn.Dense(5),
            ),
        ),
        image_shape=(6, 4, 2),
    )
    images = jax.random.normal(jax.random.key(1), (20, 6, 4, 2)) * 3
    return model, jax.jit(model.init)(jax.random.key(0), images), images


@pytest.fixture(scope='module')
def policy(convolutional):
    return policy_of(convolutional, bj.criteria.entropy)


def policy_of(convolutional, criterion):
    """Thresholds that let a good share of the images leave at each exit."""
    model, variables, images = convolutional
    _, uncertainty = bj.criteria.replay(criterion, jnp.stack(jax.jit(model.apply)(variables, images)))
    cuts = np.sort(np.asarray(uncertainty), axis=1)
    return bj.ExitPolicy(criterion, jnp.asarray((cuts[:2, 6] + cuts[:2, 7]) / 2, jnp.float32))


@pytest.fixture(scope='module')
def saved(convolutional, policy, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'network.onnx'
    bj.export.save_onnx(path, *convolutional[:2], thresholds=policy)
    return path


def session(path, **options):
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(settings, name, value)
    return runtime.InferenceSession(path, settings, providers=['CPUExecutionProvider'])


def answers(path, images):
    """Runs a file image by image."""
    one = session(path)
    found = [one.run(ANSWER, {'image': np.asarray(image)[None]}) for image in images]
    return bj.ExitPrediction(*(np.concatenate(values) for values in zip(*found, strict=True)))


def check(found, expected):
    assert found.label.dtype == found.exit_index.dtype == np.int32
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-5)


def test_file_is_dense(convolutional, policy, saved):
    model, variables, images = convolutional
    expected = bj.inference.dense(model)(variables, images, policy)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    check(answers(saved, images), expected)


@pytest.mark.parametrize(
    'criterion',
    [
        bj.criteria.margin,
        bj.criteria.max_probability,
        bj.criteria.ensemble(),
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures([2.0, 1.5, 1.0]),
        'learned',
    ],
    ids=str,
)
def test_criteria_are_part_of_the_file(convolutional, criterion, tmp_path):
    model, variables, images = convolutional
    if criterion == 'learned':
        logits = jnp.stack(jax.jit(model.apply)(variables, images))
        criterion = bj.criteria.fit_learned(logits, np.arange(20) % 5, jax.random.key(0), steps=3)
    policy = policy_of(convolutional, criterion)
    bj.export.save_onnx(tmp_path / 'file.onnx', model, variables, thresholds=policy)
    expected = bj.inference.dense(model)(variables, images, policy)
    assert len(set(expected.exit_index.tolist())) > 1
    check(answers(tmp_path / 'file.onnx', images), expected)


def test_tiny_entropies_keep_their_digits(tmp_path):
    model = bj.BranchyNet(stages=((), ()), exits=((), ()), image_shape=(4,))
    logits = np.array([[0, -9, -16, -30], [0, -17, -17, -17], [1, -np.inf, 0, 0]], np.float32)
    bj.export.save_onnx(tmp_path / 'file.onnx', model, {}, thresholds=[np.inf])
    expected = bj.criteria.entropy_of_logits(logits)
    np.testing.assert_allclose(answers(tmp_path / 'file.onnx', logits).uncertainty, expected, rtol=2e-5)


def graphs(graph):
    """Yields a graph and those of its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.g.node:
                yield from graphs(attribute.g)


def exits_of(names):
    """The numbers of the exits that nodes serve."""
    found = [re.match(r'(?:stage|exit|criterion)_(\d+)/', name) for name in names]
    return {int(match[1]) for match in found if match}


def test_each_stage_lies_in_the_branch_of_the_exit_before_it(saved, policy):
    file = onnx.load(saved)
    conditionals = [[n.name for n in graph.node if n.op_type == 'If'] for graph in graphs(file.graph)]
    assert [len(names) for names in conditionals if names] == [1, 1]
    for graph in graphs(file.graph):
        # What a branch returns is named after the conditional.
        serve = exits_of(node.name for node in graph.node if node.op_type != 'Identity')
        assert len(serve) <= 1, 'each stage, head and criterion is where it serves'
    names = [a.name for graph in graphs(file.graph) for a in graph.initializer]
    assert len(names) == len(set(names))
    assert {'Transpose', 'BatchNormalization'} & {n.op_type for n in file.graph.node} <= {'Transpose'}
    told = {p.key: p.value for p in file.metadata_props}
    assert [float(text) for text in json.loads(told['thresholds'])] == np.asarray(policy.thresholds).tolist()
    assert (told['criterion'], told['normalization'].split(':')[0]) == ('entropy', 'none')


def test_skipped_nodes_do_not_run(convolutional, policy, saved, tmp_path):
    model, variables, images = convolutional
    leaves = np.asarray(bj.inference.dense(model)(variables, images, policy).exit_index)
    for n in range(3):
        profiled = session(saved, enable_profiling=True, profile_file_prefix=str(tmp_path / f'exit{n}'))
        profiled.run(None, {'image': np.asarray(images)[leaves == n][:1]})
        with open(profiled.end_profiling()) as file:
            ran = [event['name'] for event in json.load(file) if event['cat'] == 'Node']
        assert exits_of(ran) == set(range(1, n + 2))


def test_thresholds_are_changed_in_the_file(convolutional, saved, tmp_path):
    model, variables, images = convolutional
    file = onnx.load(saved)
    held = {array.name: array for array in file.graph.initializer}
    for name, value in (('threshold_1', -np.inf), ('threshold_2', np.inf)):
        held[name].CopyFrom(onnx.numpy_helper.from_array(np.float32(value), name))
    onnx.save(file, tmp_path / 'changed.onnx')
    expected = bj.inference.dense(model)(variables, images, [-np.inf, np.inf])
    assert set(expected.exit_index.tolist()) == {1}
    check(answers(tmp_path / 'changed.onnx', images), expected)


def test_pixels_go_in_where_a_normalisation_is_given(convolutional, policy, tmp_path):
    model, variables, _ = convolutional
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 4, 2)).astype(np.uint8)
    bj.export.save_onnx(tmp_path / 'one.onnx', model, variables, thresholds=policy, normalization=SCALE)
    check(answers(tmp_path / 'one.onnx', pixels), bj.inference.dense(model)(variables, SCALE(pixels), policy))
    bj.export.save_onnx(tmp_path / 'batch.onnx', model, variables, thresholds=policy, normalization=SCALE, batch=True)
    expected = jax.jit(model.apply)(variables, SCALE(pixels))
    for found, logits in zip(session(tmp_path / 'batch.onnx').run(None, {'image': pixels}), expected, strict=True):
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_batches_of_any_size_return_every_exit(convolutional, policy, tmp_path):
    model, variables, images = convolutional
    bj.export.save_onnx(tmp_path / 'batch.onnx', model, variables, thresholds=policy, batch=True)
    whole = session(tmp_path / 'batch.onnx')
    assert [output.name for output in whole.get_outputs()] == ['logits_1', 'logits_2', 'logits_3']
    assert not [node for node in onnx.load(tmp_path / 'batch.onnx').graph.node if node.op_type == 'If']
    expected = jax.jit(model.apply)(variables, images)
    for size in (1, 2, 7):
        for found, logits in zip(whole.run(None, {'image': np.asarray(images[:size])}), expected, strict=True):
            np.testing.assert_allclose(found, logits[:size], rtol=1e-4, atol=1e-4)


def test_lenet_is_dense(tmp_path):
    model = bj.models.create('b-lenet')
    images = jax.random.normal(jax.random.key(2), (2, *model.image_shape))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    first = bj.criteria.entropy_of_logits(jax.jit(model.apply)(variables, images)[0])
    thresholds = [float(first.mean())]
    bj.export.save_onnx(tmp_path / 'file.onnx', model, variables, thresholds=thresholds)
    expected = bj.inference.dense(model)(variables, images, thresholds)
    assert sorted(expected.exit_index.tolist()) == [0, 1]
    check(answers(tmp_path / 'file.onnx', images), expected)


def test_an_uncertainty_at_the_threshold_or_nan_goes_on(tmp_path):
    model = bj.BranchyNet(stages=((), ()), exits=((), ()), image_shape=(3,))
    logits = np.array([[0, -np.inf, -np.inf], [np.nan, 0, 0], [5, 0, 0]], np.float32)
    for threshold, exits in ((0.0, [1, 1, 1]), (1e-6, [0, 1, 1]), (1.0, [0, 1, 0]), (np.inf, [0, 1, 0])):
        bj.export.save_onnx(tmp_path / 'file.onnx', model, {}, thresholds=[threshold])
        assert answers(tmp_path / 'file.onnx', logits).exit_index.tolist() == exits
        assert bj.inference.dense(model)({}, logits, [threshold]).exit_index.tolist() == exits


def test_padding_lies_on_the_side_where_it_was(tmp_path):
    layers = (
        lambda x: nn.max_pool(x, (2, 2), (1, 1), padding='SAME'),
        lambda x: nn.max_pool(x, (3, 2), (2, 1), padding=((2, 0), (0, 1))),
        lambda x: nn.avg_pool(x, (2, 2), (1, 1), padding='SAME'),
        lambda x: nn.avg_pool(x, (2, 3), (1, 2), padding=((1, 0), (0, 2)), count_include_pad=False),
        nn.Conv(2, (2, 3), padding=((1, 0), (0, 2)), kernel_dilation=(2, 1)),
    )
    heads = tuple((layer, bj.models.layers.flatten, nn.Dense(3)) for layer in layers)
    model = bj.BranchyNet(stages=((),) * 5, exits=heads, image_shape=(5, 4, 2))
    images = np.asarray(jax.random.normal(jax.random.key(0), (3, 5, 4, 2)))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    bj.export.save_onnx(tmp_path / 'file.onnx', model, variables, thresholds=np.zeros(4), batch=True)
    found = session(tmp_path / 'file.onnx').run(None, {'image': images})
    for logits, expected in zip(found, jax.jit(model.apply)(variables, images), strict=True):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


class Sorted(nn.Module):
    """A layer whose primitive has no ONNX form."""

    @nn.compact
    def __call__(self, x):
        return jnp.sort(x, axis=-1)


def small(*layers, head=(), **options):
    model = bj.BranchyNet(stages=((nn.Dense(4), *layers),), exits=((nn.Dense(3), *head),), image_shape=(4,), **options)
    return model, model.init(jax.random.key(0), jnp.ones((1, 4)))


@pytest.mark.parametrize(
    ('network', 'options', 'message'),
    [
        (lambda: small(Sorted(name='ordering')), {}, "model: stage 1 computes 'sort'.*ordering"),
        (lambda: small(head=(Sorted(name='last'),)), {}, "model: exit 1 computes 'sort'.*last"),
        (lambda: small(nn.Dense(2, dtype=jnp.bfloat16)), {}, 'bfloat16; build the network with dtype=float32'),
        (
            lambda: small(lambda x: x - x.mean(axis=0, keepdims=True)),
            {'batch': True},
            'computes with the size of the batch',
        ),
        (small, {'thresholds': [0.5]}, 'thresholds: a network with 1 exits'),
        (small, {'normalization': SCALE}, r'normalization: is for images of .* \[4\]'),
        (lambda: (small()[0].clone(image_shape=None), small()[1]), {}, 'model: has no image_shape'),
    ],
    ids=['stage', 'exit', 'bfloat16', 'batch', 'thresholds', 'normalization', 'image_shape'],
)
def test_what_has_no_form_is_refused(network, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bj.export.save_onnx(tmp_path / 'new.onnx', *network(), **{'thresholds': [], **options})
    assert not list(tmp_path.iterdir())


def test_criterion_without_a_form_is_named(convolutional, tmp_path):
    criterion = bj.criteria.from_logits(lambda z: jnp.sort(z)[..., 0], name='smallest')
    policy = bj.ExitPolicy(criterion, jnp.zeros(2))
    with pytest.raises(ValueError, match="model: criterion 'smallest' computes 'sort'"):
        bj.export.save_onnx(tmp_path / 'new.onnx', *convolutional[:2], thresholds=policy)
    assert not list(tmp_path.iterdir())


def test_unwritable_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match='path: .* is a folder'):
        bj.export.save_onnx(tmp_path, *small(), thresholds=[])
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(ValueError, match='path: cannot write'):
        bj.export.save_onnx(tmp_path / 'file' / 'new.onnx', *small(), thresholds=[])
    assert (tmp_path / 'file').read_text() == 'kept'


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    path = tmp_path / 'network.onnx'
    path.write_bytes(b'before')
    monkeypatch.setattr(os, 'replace', fail)
    monkeypatch.setattr(onnx_file.Path, 'replace', fail)
    monkeypatch.setattr(onnx_file.Path, 'rename', fail)
    with pytest.raises(ValueError, match='No space left'):
        bj.export.save_onnx(path, *small(), thresholds=[])
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b'before', 1)


def test_only_what_the_checker_accepts_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, 'OPSET', 1)  # long before most operators
    with pytest.raises(onnx.checker.ValidationError):
        bj.export.save_onnx(tmp_path / 'network.onnx', *small(), thresholds=[])
    assert not list(tmp_path.iterdir())


def test_activations_are_laid_out_anew_only_where_they_enter():
    """A chain of convolutions, poolings and additions stays in ONNX's order."""
    model = bj.BranchyNet(
        stages=((nn.Conv(4, (3, 3)), nn.relu, nn.Conv(4, (3, 3)), lambda x: nn.max_pool(x + 1, (2, 2), (2, 2))),),
        exits=((bj.models.layers.flatten, nn.Dense(3)),),
        image_shape=(6, 6, 2),
    )
    variables = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 2)))
    made = {}

    def keep(path, graph, inputs, metadata):
        made.update(collections.Counter(node.op for node in graph.nodes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, '_write', keep)
        bj.export.save_onnx('unused.onnx', model, variables, thresholds=[])
    assert made['Transpose'] == 1
    assert (made['Conv'], made['Gemm'], made['Flatten']) == (2, 1, 1)


def test_a_criterion_that_counts_the_batch_is_refused(convolutional, tmp_path):
    model, variables, _ = convolutional
    policy = policy_of(convolutional, bj.criteria.patience)
    with pytest.raises(ValueError, match="criterion 'patience' computes"):
        bj.export.save_onnx(tmp_path / 'file.onnx', model, variables, thresholds=policy)
    assert not (tmp_path / 'file.onnx').exists()
