"""One ONNX file answers as `dense` does, and skips the stages after a confident exit."""

import collections
import collections.abc
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
from branchy_jax.export import onnx_file, save_onnx

onnx = pytest.importorskip('onnx', reason='pip install branchy-jax[onnx]')
runtime = pytest.importorskip('onnxruntime', reason='pip install branchy-jax[onnx]')

ANSWER = ('label', 'exit_index', 'logits', 'uncertainty')
SCALE = bj.Normalization(mean=jnp.float32([0.5, 0.4]), deviation=jnp.float32([0.25, 0.5]))


class Layers(nn.Module):
    """Most kinds of layers, on images of two channels; heads in every style."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x)))
        first = nn.Dense(5)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))
        x = nn.max_pool(nn.Conv(6, (2, 2), strides=2)(x), (3, 3), (1, 1), padding='SAME')
        x = nn.gelu(x)
        second = nn.Dense(5)(x.mean(axis=(1, 2)))
        x = nn.LayerNorm(epsilon=1e-3)(x)
        x = nn.silu(x + jnp.pad(x[..., :5], [(0, 0)] * 3 + [(1, 0)]))
        x = nn.MultiHeadDotProductAttention(2)(x.reshape(x.shape[0], -1, 6))
        return first, second, nn.Dense(5)(x[:, 0])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        early = nn.Dense(10)(x.mean((1, 2)))
        x = nn.relu(nn.Conv(32, (3, 3), 2)(x))
        return early, nn.Dense(10)(x.mean((1, 2)))


class Function(nn.Module):
    """Exits without parameters."""

    function: collections.abc.Callable

    def __call__(self, x):
        return self.function(x)


@pytest.fixture(scope='module')
def layers():
    model, images = Layers(), jax.random.normal(jax.random.key(1), (20, 6, 4, 2)) * 3
    return model, jax.jit(model.init)(jax.random.key(0), images), images


@pytest.fixture(scope='module')
def policy(layers):
    return policy_of(*layers, bj.criteria.entropy)


def policy_of(model, variables, images, criterion):
    """Thresholds that let a third of the images leave at each exit."""
    _, uncertainty = bj.criteria.replay(criterion, jnp.stack(jax.jit(model.apply)(variables, images)))
    cuts, third = np.sort(np.asarray(uncertainty), axis=1)[:-1], len(images) // 3
    return bj.ExitPolicy(criterion, jnp.asarray((cuts[:, third] + cuts[:, third + 1]) / 2, jnp.float32))


@pytest.fixture(scope='module')
def saved(layers, policy, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'network.onnx'
    save_onnx(path, *layers[:2], policy, inputs=layers[2])
    return path


def session(path, **options):
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return runtime.InferenceSession(path, settings, providers=['CPUExecutionProvider'])


def answers(path, images):
    """Runs a file image by image."""
    one = session(path)
    results = [one.run(ANSWER, {'image': np.asarray(image)[None]}) for image in images]
    return bj.ExitPrediction(*(np.concatenate(values) for values in zip(*results, strict=True)))


def check(result, expected):
    assert result.label.dtype == result.exit_index.dtype == np.int32
    np.testing.assert_array_equal(result.exit_index, expected.exit_index)
    np.testing.assert_array_equal(result.label, expected.label)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-5)


def check_batches(path, model, variables, inputs, file_inputs=None, sizes=(1, 2, 5)):
    """Checks a file for batches at several sizes."""
    leaves = jax.tree.leaves(inputs if file_inputs is None else file_inputs)
    names = ['image'] if len(leaves) == 1 else [f'image_{n + 1}' for n in range(len(leaves))]
    whole, expected = session(path), model.apply(variables, inputs)
    for size in sizes:
        results = whole.run(None, {name: np.asarray(leaf)[:size] for name, leaf in zip(names, leaves, strict=True)})
        for result, logits in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, logits[:size], rtol=1e-4, atol=1e-4)


def test_file_is_dense(layers, policy, saved):
    model, variables, images = layers
    expected = bj.inference.dense(model)(variables, images, policy)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    check(answers(saved, images), expected)


@pytest.mark.parametrize('model', [Net(), bj.models.create('b-lenet')], ids=['the user’s own', 'b-lenet'])
def test_plain_modules_are_exported(model, tmp_path):
    images = jax.random.normal(jax.random.key(2), (6, *getattr(model, 'image_shape', (8, 8, 3))))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    policy = policy_of(model, variables, images, bj.criteria.entropy)
    save_onnx(tmp_path / 'file.onnx', model, variables, policy, inputs=images[:2])
    expected = bj.inference.dense(model)(variables, images, policy)
    assert sorted(set(expected.exit_index.tolist())) == [0, 1]
    check(answers(tmp_path / 'file.onnx', images), expected)


@pytest.mark.parametrize(
    'criterion',
    [
        bj.criteria.margin,
        bj.criteria.patience,
        bj.criteria.ensemble(),
        bj.criteria.ensemble('geometric'),
        bj.criteria.with_temperatures([2.0, 1.5, 1.0]),
        'learned',
    ],
    ids=str,
)
def test_criteria_are_part_of_the_file(layers, criterion, tmp_path):
    model, variables, images = layers
    if criterion == 'learned':
        logits = jnp.stack(jax.jit(model.apply)(variables, images))
        criterion = bj.criteria.fit_learned(logits, np.arange(20) % 5, jax.random.key(0), steps=3)
    policy = policy_of(model, variables, images, criterion)
    if criterion is bj.criteria.patience:
        policy = bj.ExitPolicy(criterion, jnp.array([-0.5, -0.5]))
    save_onnx(tmp_path / 'file.onnx', model, variables, policy, inputs=images)
    expected = bj.inference.dense(model)(variables, images, policy)
    assert len(set(expected.exit_index.tolist())) > 1 or criterion is bj.criteria.patience
    check(answers(tmp_path / 'file.onnx', images), expected)


def test_tiny_entropies_have_all_digits(tmp_path):
    logits = np.array([[0, -9, -16, -30], [0, -17, -17, -17], [1, -np.inf, 0, 0]], np.float32)
    save_onnx(tmp_path / 'file.onnx', Function(lambda x: (x, x)), {}, [np.inf], inputs=logits)
    expected = bj.criteria.entropy.uncertainty_of(logits)
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
    matches = [re.match(r'(?:stage|exit|criterion)_(\d+)/', name) for name in names]
    return {int(match[1]) for match in matches if match}


def test_each_stage_lies_in_the_branch_of_the_exit_before_it(saved, policy):
    file = onnx.load(saved)
    conditionals = [[n.name for n in graph.node if n.op_type == 'If'] for graph in graphs(file.graph)]
    assert [len(names) for names in conditionals if names] == [1, 1]
    for graph in graphs(file.graph):
        # Identity nodes return the results of a branch and are named after the conditional.
        assert len(exits_of(node.name for node in graph.node if node.op_type != 'Identity')) <= 1
    names = [a.name for graph in graphs(file.graph) for a in graph.initializer]
    assert len(names) == len(set(names))
    metadata = {p.key: p.value for p in file.metadata_props}
    assert [float(text) for text in json.loads(metadata['thresholds'])] == np.asarray(policy.thresholds).tolist()
    assert (metadata['criterion'], metadata['normalization'].split(':')[0]) == ('entropy', 'none')


def test_skipped_nodes_do_not_run(layers, policy, saved, tmp_path):
    model, variables, images = layers
    leaves = np.asarray(bj.inference.dense(model)(variables, images, policy).exit_index)
    for n in range(3):
        profiled = session(saved, enable_profiling=True, profile_file_prefix=str(tmp_path / f'exit{n}'))
        profiled.run(None, {'image': np.asarray(images)[leaves == n][:1]})
        with open(profiled.end_profiling()) as file:
            ran = [event['name'] for event in json.load(file) if event['cat'] == 'Node']
        assert exits_of(ran) == set(range(1, n + 2))


def test_thresholds_are_changed_in_the_file(layers, saved, tmp_path):
    model, variables, images = layers
    file = onnx.load(saved)
    arrays = {array.name: array for array in file.graph.initializer}
    for name, value in (('threshold_1', -np.inf), ('threshold_2', np.inf)):
        arrays[name].CopyFrom(onnx.numpy_helper.from_array(np.float32(value), name))
    onnx.save(file, tmp_path / 'changed.onnx')
    expected = bj.inference.dense(model)(variables, images, [-np.inf, np.inf])
    assert set(expected.exit_index.tolist()) == {1}
    check(answers(tmp_path / 'changed.onnx', images), expected)


def test_a_file_with_a_normalization_takes_pixels(layers, policy, tmp_path):
    model, variables, _ = layers
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 4, 2)).astype(np.uint8)
    options = {'inputs': SCALE(pixels), 'normalization': SCALE}
    save_onnx(tmp_path / 'one.onnx', model, variables, policy, **options)
    check(answers(tmp_path / 'one.onnx', pixels), bj.inference.dense(model)(variables, SCALE(pixels), policy))
    save_onnx(tmp_path / 'batch.onnx', model, variables, policy, batch=True, **options)
    check_batches(tmp_path / 'batch.onnx', model, variables, SCALE(pixels), pixels)


def test_batches_of_any_size_return_every_exit(layers, policy, tmp_path):
    model, variables, images = layers
    save_onnx(tmp_path / 'batch.onnx', model, variables, policy, inputs=images, batch=True)
    check_batches(tmp_path / 'batch.onnx', model, variables, images)
    assert [output.name for output in session(tmp_path / 'batch.onnx').get_outputs()] == [
        'logits_1',
        'logits_2',
        'logits_3',
    ]
    assert not [node for node in onnx.load(tmp_path / 'batch.onnx').graph.node if node.op_type == 'If']


def test_an_uncertainty_at_the_threshold_or_nan_goes_on(tmp_path):
    logits = np.array([[0, -np.inf, -np.inf], [np.nan, 0, 0], [5, 0, 0]], np.float32)
    model = Function(lambda x: (x, x))
    for threshold, exits in ((0.0, [1, 1, 1]), (1e-6, [0, 1, 1]), (1.0, [0, 1, 0]), (np.inf, [0, 1, 0])):
        save_onnx(tmp_path / 'file.onnx', model, {}, [threshold], inputs=logits)
        assert answers(tmp_path / 'file.onnx', logits).exit_index.tolist() == exits
        assert bj.inference.dense(model)({}, logits, [threshold]).exit_index.tolist() == exits


POOLINGS = (
    lambda x: nn.max_pool(x, (2, 2), (1, 1), padding='SAME'),
    lambda x: nn.max_pool(x, (3, 2), (2, 1), padding=((2, 0), (0, 1))),
    lambda x: nn.avg_pool(x, (2, 2), (1, 1), padding='SAME'),
    lambda x: nn.avg_pool(x, (2, 3), (1, 2), padding=((1, 0), (0, 2)), count_include_pad=False),
    nn.Conv(2, (2, 3), padding=((1, 0), (0, 2)), kernel_dilation=(2, 1)),
)
INDEXING = (
    lambda x: x[:, 0],
    lambda x: x[:, -1, 1:3],
    lambda x: x[:, ::2, 1:4:2],
    lambda x: x[:, jnp.array([0, 2, 3])],
    lambda x: jnp.split(x, 2, axis=2)[1],
    lambda x: x * x.shape[0] / x.shape[0],
    lambda x: nn.Embed(7, 3)(x[..., 0, 0].argmax(1)),
    lambda x: jnp.broadcast_to(jnp.arange(4.0), (x.shape[0], 4)) + x[..., 0, 0, :1],
    lambda x: jnp.where(jnp.isfinite(x) & (x != 1), jnp.expm1(x) ** 4, 0.0).clip(-1, 1),
)


class Heads(nn.Module):
    """One exit per layer, of which each is flattened and cut to four logits."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        values = [layer(x) for layer in self.layers]
        return tuple(nn.Dense(4)(value.reshape(x.shape[0], -1)) for value in values)


@pytest.mark.parametrize('functions', [POOLINGS, INDEXING], ids=['padding', 'indexing'])
def test_layers_and_indexing_are_translated(functions, tmp_path):
    images = np.asarray(jax.random.normal(jax.random.key(0), (5, 5, 4, 2)))
    model = Heads(functions)
    variables = model.init(jax.random.key(1), images)
    save_onnx(tmp_path / 'file.onnx', model, variables, np.zeros(len(functions) - 1), inputs=images, batch=True)
    check_batches(tmp_path / 'file.onnx', model, variables, images)


class Sorted(nn.Module):
    """A layer whose primitive has no ONNX form."""

    @nn.compact
    def __call__(self, x):
        return jnp.sort(x, axis=-1)


class Small(nn.Module):
    """One exit; ``layer`` comes before or behind its dense layer."""

    layer: collections.abc.Callable = nn.relu
    behind: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, dtype=self.dtype)
        return (self.layer(dense(x)) if self.behind else dense(self.layer(x)),)


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (Small(Sorted()), {}, "model: stage 1 computes 'sort'.*Small/layer"),
        (Small(dtype=jnp.bfloat16), {}, 'bfloat16; build the network with dtype=float32'),
        (Small(lambda x: x - x.mean(axis=0, keepdims=True)), {'batch': True}, 'rows of a batch influence one another'),
        (Small(lambda x: x * int(x.shape[0])), {'batch': True}, 'runs at the batch size of the example alone'),
        (Small(), {'policy': [0.5]}, 'thresholds: a network with 1 exits'),
        (Small(), {'normalization': SCALE}, r'normalization: is for images of .* \[4\]'),
    ],
)
def test_networks_without_an_onnx_form_are_refused(model, options, message, tmp_path):
    inputs = jnp.ones((2, 4))
    variables, policy = model.init(jax.random.key(0), inputs), options.pop('policy', [])
    with pytest.raises(ValueError, match=message):
        save_onnx(tmp_path / 'new.onnx', model, variables, policy, inputs=inputs, **options)
    assert not list(tmp_path.iterdir())


def test_criterion_without_a_form_is_named(layers, tmp_path):
    criterion = bj.criteria.as_criterion(lambda z: jnp.sort(z)[..., 0], name='smallest')
    with pytest.raises(ValueError, match="model: criterion 'smallest' computes 'sort'"):
        save_onnx(tmp_path / 'new.onnx', *layers[:2], bj.ExitPolicy(criterion, jnp.zeros(2)), inputs=layers[2])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small():
    model = Small()
    return functools.partial(
        save_onnx,
        model=model,
        variables=model.init(jax.random.key(0), jnp.ones((1, 4))),
        policy=[],
        inputs=jax.ShapeDtypeStruct((1, 4), jnp.float32),
    )


def test_unwritable_paths_are_refused(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='path: .* is a folder'):
        small(tmp_path)
    (tmp_path / 'file').write_text('before')
    with pytest.raises(ValueError, match='path: cannot write'):
        small(tmp_path / 'file' / 'new.onnx')
    assert (tmp_path / 'file').read_text() == 'before'

    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    for owner, name in ((os, 'replace'), (onnx_file.Path, 'replace'), (onnx_file.Path, 'rename')):
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ValueError, match='No space left'):
        small(tmp_path / 'file')
    assert ((tmp_path / 'file').read_text(), len(list(tmp_path.iterdir()))) == ('before', 1)


def test_only_files_that_the_checker_accepts_are_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, 'OPSET', 1)  # long before most operators
    with pytest.raises(onnx.checker.ValidationError):
        small(tmp_path / 'network.onnx')
    assert not list(tmp_path.iterdir())


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x)))
        return (nn.Dense(3)(nn.max_pool(x + 1, (2, 2), (2, 2)).mean((1, 2))),)


def test_a_chain_of_convolutions_is_transposed_once(tmp_path):
    images = jnp.ones((1, 6, 6, 2))
    save_onnx(tmp_path / 'chain.onnx', Chain(), Chain().init(jax.random.key(0), images), [], inputs=images)
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / 'chain.onnx').graph.node)
    assert (counts['Transpose'], counts['Conv'], counts['MatMul']) == (1, 2, 1)
