"""One ONNX file answers as `dense` does, and skips the stages after a confident exit."""

import collections
import collections.abc
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Function, random_variables
from jax import lax

import branchy_jax as bj
from branchy_jax.export import save_onnx
from branchy_jax.inference import onnx_program

onnx = pytest.importorskip('onnx', reason="pip install '.[onnx]'")
runtime = pytest.importorskip('onnxruntime', reason="pip install '.[onnx]'")

LOOKING_BACK = bj.criteria.ensemble()
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


def policy_of(model, variables, images, criterion):
    """Thresholds that let a third of the images leave at each exit."""
    _, uncertainty = bj.criteria.replay(criterion, jnp.stack(jax.jit(model.apply)(variables, images)))
    cuts, third = np.sort(np.asarray(uncertainty), axis=1)[:-1], len(images) // 3
    return bj.ExitPolicy(criterion, jnp.asarray((cuts[:, third] + cuts[:, third + 1]) / 2, jnp.float32))


@pytest.fixture(scope='module')
def layers():
    """A network, its variables, stored pixels, and a policy."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 4, 2)).astype(np.uint8)
    model = Layers()
    variables = random_variables(model, SCALE(pixels))
    return model, variables, pixels, policy_of(model, variables, SCALE(pixels), bj.criteria.entropy)


@pytest.fixture(scope='module')
def saved(layers, tmp_path_factory):
    """The file of the network, and what `dense` answers."""
    model, variables, pixels, policy = layers
    path = tmp_path_factory.mktemp('onnx') / 'network.onnx'
    save_onnx(path, model, variables, policy, inputs=SCALE(pixels), normalization=SCALE)
    return path, bj.inference.dense(model)(variables, SCALE(pixels), policy)


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


def check_batches(path, expected, images):
    """Checks what a file for batches returns at several sizes: answers, or the logits of every exit."""
    whole = session(path)
    for size in (*(n for n in (64, 7, 5) if n <= len(images)), 1, 0):
        results = whole.run(None, {'image': np.asarray(images)[:size]})
        wanted = jax.tree.map(lambda leaf, size=size: leaf[:size], expected)
        if isinstance(expected, bj.ExitPrediction):
            check(bj.ExitPrediction(*results), wanted)
        else:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), tuple(results), wanted)


def test_file_is_dense(layers, saved):
    assert set(saved[1].exit_index.tolist()) == {0, 1, 2}
    check(answers(saved[0], layers[2]), saved[1])


def test_a_criterion_of_several_exits_follows_the_rows_that_go_on(layers, tmp_path):
    model, variables, pixels, policy = layers
    policy = policy_of(model, variables, SCALE(pixels), LOOKING_BACK)
    options = {'inputs': SCALE(pixels), 'normalization': SCALE, 'batch': True}
    save_onnx(tmp_path / 'rows.onnx', model, variables, policy, **options)
    expected = bj.inference.dense(model)(variables, SCALE(pixels), policy)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    check_batches(tmp_path / 'rows.onnx', expected, pixels)


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """The file for batches of a transformer, its images, and a function that returns what `dense` answers."""
    shape = {'image_shape': (4, 4, 1), 'patch_size': 2, 'depth': 3, 'width': 8, 'num_heads': 2, 'exits_after': (1, 2)}
    model = bj.models.create('b-vit', num_classes=5, **shape)  # block 2 begins with the LayerNorm of exit 1
    images = np.asarray(jax.random.normal(jax.random.key(0), (64, 4, 4, 1)))
    variables = random_variables(model, images)
    policy = policy_of(model, variables, images, bj.criteria.entropy)
    path = tmp_path_factory.mktemp('rows') / 'rows.onnx'
    save_onnx(path, model, variables, policy, inputs=images, batch=True)
    return path, images, lambda thresholds=policy: bj.inference.dense(model)(variables, images, thresholds)


def test_rows_of_a_batch_leave_one_by_one(rows, tmp_path):
    path, images, answer = rows
    for size in (7, 64):
        assert set(answer().exit_index[:size].tolist()) == {0, 1, 2}
    check_batches(path, answer(), images)
    for thresholds in ([np.inf, 0], [-np.inf, -np.inf]):  # all leave at the first exit, none before the last
        set_thresholds(path, tmp_path / 'changed.onnx', thresholds)
        check_batches(tmp_path / 'changed.onnx', answer(thresholds), images)


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
def test_criteria_are_part_of_the_file(criterion, tmp_path):
    model, inputs = (
        Function(lambda x: (x, x[:, ::2] @ jnp.eye(3, 5), 2 * x)),
        jax.random.normal(jax.random.key(1), (20, 5)),
    )
    if criterion == 'learned':
        criterion = bj.criteria.fit_learned(
            jnp.stack(model.apply({}, inputs)), np.arange(20) % 5, jax.random.key(0), steps=3
        )
    policy = policy_of(model, {}, inputs, criterion)
    if criterion is bj.criteria.patience:
        policy = bj.ExitPolicy(criterion, jnp.array([-0.5, -0.5]))
    save_onnx(tmp_path / 'file.onnx', model, {}, policy, inputs=inputs)
    expected = bj.inference.dense(model)({}, inputs, policy)
    assert len(set(expected.exit_index.tolist())) > 1
    check(answers(tmp_path / 'file.onnx', inputs), expected)


def graphs(graph):
    """Yields a graph and those of its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.g.node:
                yield from graphs(attribute.g)


def exits_of(names):
    """The numbers of the exits that nodes serve."""
    return {int(number) for name in names for number in re.findall(r'^(?:stage|exit|criterion)_(\d+)/', name)}


def test_each_stage_lies_in_the_branch_of_the_exit_before_it(layers, saved):
    file = onnx.load(saved[0])
    conditionals = [[n.name for n in graph.node if n.op_type == 'If'] for graph in graphs(file.graph)]
    assert [len(names) for names in conditionals if names] == [1, 1]
    per_graph = [exits_of(node.name for node in graph.node) for graph in graphs(file.graph)]
    assert [exits for exits in per_graph if exits] == [{0}, {1}, {2}]
    names = [a.name for graph in graphs(file.graph) for a in graph.initializer]
    assert len(names) == len(set(names))
    metadata = {p.key: p.value for p in file.metadata_props}
    assert [float(text) for text in json.loads(metadata['thresholds'])] == np.asarray(layers[3].thresholds).tolist()
    assert metadata['criterion'] == 'entropy'
    assert json.loads(metadata['normalization'])['mean'] == np.asarray(SCALE.mean).tolist()


@pytest.mark.parametrize('file', ['one image', 'rows'])
def test_skipped_nodes_do_not_run(file, layers, saved, rows, tmp_path):
    path, images, leaves = (saved[0], layers[2], saved[1]) if file == 'one image' else (*rows[:2], rows[2]())
    for n in range(3):
        some = images[np.asarray(leaves.exit_index) == n]
        profiled = session(path, enable_profiling=True, profile_file_prefix=str(tmp_path / f'exit{n}'))
        profiled.run(None, {'image': some[:1] if file == 'one image' else some})
        with open(profiled.end_profiling()) as events:
            ran = [event['name'] for event in json.load(events) if event['cat'] == 'Node']
        assert exits_of(ran) == set(range(n + 1))


def set_thresholds(path, changed, thresholds):
    """Writes a file with other thresholds."""
    file = onnx.load(path)
    arrays = {array.name: array for array in file.graph.initializer}
    for n, threshold in enumerate(thresholds):
        arrays[f'threshold_{n}'].CopyFrom(onnx.numpy_helper.from_array(np.float32(threshold), f'threshold_{n}'))
    onnx.save(file, changed)


def test_thresholds_are_changed_in_the_file_and_ties_and_nan_go_on(tmp_path):
    logits = np.array([[0, -np.inf, -np.inf], [np.nan, 0, 0], [5, 0, 0]], np.float32)
    model = Function(lambda x: (x, x))
    save_onnx(tmp_path / 'file.onnx', model, {}, [-np.inf], inputs=logits)
    for value, exits in ((0.0, [1, 1, 1]), (1e-6, [0, 1, 1]), (1.0, [0, 1, 0]), (np.inf, [0, 1, 0])):
        set_thresholds(tmp_path / 'file.onnx', tmp_path / 'changed.onnx', [value])
        assert answers(tmp_path / 'changed.onnx', logits).exit_index.tolist() == exits
        assert bj.inference.dense(model)({}, logits, [value]).exit_index.tolist() == exits


def test_tiny_entropies_have_all_digits(tmp_path):
    logits = np.array([[0, -9, -16, -30], [0, -17, -17, -17], [1, -np.inf, 0, 0]], np.float32)
    save_onnx(tmp_path / 'file.onnx', Function(lambda x: (x, x)), {}, [np.inf], inputs=logits)
    expected = bj.criteria.entropy.uncertainty_of(logits)
    np.testing.assert_allclose(answers(tmp_path / 'file.onnx', logits).uncertainty, expected, rtol=2e-5)


def test_a_conditional_of_the_network_itself_is_translated(tmp_path):
    class Either(nn.Module):
        @nn.compact
        def __call__(self, x):
            positive = self.param('w', nn.initializers.ones, ()) > 0
            return (jax.lax.cond(positive, lambda: x @ jnp.ones((3, 3)), lambda: jnp.tanh(x) * int(x.shape[0])),)

    images = np.array([[1, 2, 3]], np.float32)
    for w, expected in ((1.0, [[6, 6, 6]]), (-1.0, np.tanh(images))):
        save_onnx(tmp_path / 'file.onnx', Either(), {'params': {'w': jnp.float32(w)}}, [], inputs=images)
        np.testing.assert_allclose(answers(tmp_path / 'file.onnx', images).logits, expected, rtol=1e-5)


FUNCTIONS = (
    lambda x: nn.max_pool(x, (2, 2), (1, 1), padding='SAME'),
    lambda x: nn.max_pool(x, (3, 2), (2, 1), padding=((2, 0), (0, 1))),
    lambda x: nn.avg_pool(x, (2, 2), (1, 1), padding='SAME'),
    lambda x: nn.avg_pool(x, (2, 3), (1, 2), padding=((1, 0), (0, 2)), count_include_pad=False),
    nn.Conv(2, (2, 3), padding=((1, 0), (0, 2)), kernel_dilation=(2, 1)),
    lambda x: x[:, 0],
    lambda x: x[:, -1, 1:3],
    lambda x: x.mean(axis=()) + x.max(axis=()),
    lambda x: x[:, ::2, 1:4:2],
    lambda x: x[:, ::-1, 3:0:-2],
    lambda x: x[:, jnp.array([0, 2, 3]), jnp.array([3, 1, 1])] + x[:, jnp.array([0, 2, 3]), 0],
    lambda x: jnp.take_along_axis(x, x.argmax(1, keepdims=True), 1),
    jax.vmap(lambda row: lax.dynamic_slice_in_dim(row, row[:, 0, 0].argmax(), 2)[:, 1]),
    lambda x: lax.dynamic_slice_in_dim(x, 3, 2, axis=2),
    lambda x: jnp.take(jnp.arange(3.0), x[..., 0].argmax(1), mode='clip'),
    lambda x: nn.Embed(7, 3)(x[..., 0, 0].argmax(1)),
    lambda x: jnp.isnan(nn.Embed(3, 3)(x[..., 0, 0].argmax(1))),  # out of bounds: NaN
    lambda x: jnp.isnan(jnp.take(x, jnp.array([0, 9]), 1)),
    lambda x: jax.nn.one_hot(x[..., 0].argmax(1), 5),
    lambda x: jnp.split(x, 2, axis=2)[1] * x.shape[0] / x.shape[0],
    lambda x: jnp.broadcast_to(jnp.arange(4.0), (x.shape[0], 4)) + x[..., 0, 0, :1],
    lambda x: jnp.concatenate([jnp.tile(jnp.arange(2.0), (x.shape[0], 1)), jnp.tile(x[:, 0, 0], (1, 2))], 1),
    lambda x: jnp.cumsum(x, 1) + lax.cumsum(x, 2, reverse=True),
    lambda x: jnp.argsort(jnp.round(x), 1) - jnp.argsort(x.argmax(2, keepdims=True), 1),  # many ties
    lambda x: jnp.sort(x, 2, descending=True) - jnp.median(x, 1, keepdims=True),
    lambda x: lax.top_k(x, 1)[0] % 0.7 - lax.top_k(-x, 2)[1] % 2,
    lambda x: lax.round(2 * jnp.round(x) / 4) + jnp.round(x / 2),
    lambda x: (x - x.mean(1, keepdims=True)) / jnp.std(x, 1, keepdims=True),  # divides by NaN if there is no row
    lambda x: jnp.where(jnp.isfinite(x) & (x != 1), jnp.expm1(x) ** 4, 0.0).clip(-1, 1),
    lambda x: jnp.select([x > 1, x > 0], [x, 2 * x], 0.0) + lax.select_n((x > 0).astype(int) + (x > 1), x, -x, 3 * x),
    lambda x: jnp.stack([(x > 0).any(1), (x > 1).all(1) ^ (x < 0).any(1)]).swapaxes(0, 1),
    lambda x: jnp.sinh(x) + jnp.arctan(x) + nn.log_softmax(nn.softplus(nn.gelu(x, approximate=False))),
    lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, -1, 2), (0, 0, 1), (0, 0, 0))),
    lambda x: jnp.roll(jnp.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), mode='reflect'), (1, -1), (1, 2)),
    lambda x: (
        jax.image.resize(x, (x.shape[0], 7, 8, 2), 'nearest') + jax.image.resize(x, (x.shape[0], 7, 8, 2), 'linear')
    ),
    jax.vmap(lambda row: jax.ops.segment_sum(row, 2 * row[:, 0, 0].argsort(), 5)),  # some are out of bounds
    lambda x: x.at[:, jnp.array([0, 3, 0])].add(2 * x[:, :3]),
    lambda x: jnp.einsum('bhwc,bvwd,de->bvhe', x, x, jnp.eye(2, 3)),
    nn.Conv(4, (3, 3), padding='CIRCULAR', feature_group_count=2),
    nn.ConvTranspose(3, (3, 2), (2, 1)),
    nn.ConvTranspose(2, (2, 2), (2, 2), padding=((-1, 0), (0, 1))),
    nn.GroupNorm(2),
    nn.remat(nn.Dense)(2),
    lambda x: nn.RNN(nn.GRUCell(3), reverse=True)(x[:, :, 0]),
    lambda x: nn.MultiHeadDotProductAttention(2)(x[:, :, 0], mask=nn.make_causal_mask(x[:, :, 0, 0])),
)


class Results(nn.Module):
    """The results of functions as the logits of the last of two exits."""

    functions: tuple

    @nn.compact
    def __call__(self, x):
        results = [function(x).reshape(x.shape[0], -1).astype(jnp.float32) for function in self.functions]
        last = jnp.concatenate(results, axis=1)
        return nn.Dense(last.shape[1])(x.mean((1, 2))), last


@pytest.fixture(scope='module')
def results():
    """A network, its variables, a policy by which some go on; images, the logits of both exits, and answers."""
    images = np.asarray(jax.random.normal(jax.random.key(0), (5, 5, 4, 2)))
    model = Results(FUNCTIONS)
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    first = bj.criteria.as_criterion(lambda z: z[..., 0], name='first')
    policy = bj.ExitPolicy(first, logits[0][:, :1].mean(0))
    return (model, variables, policy), images, logits, bj.inference.dense(model)(variables, images, policy)


@pytest.mark.parametrize('kind', ['one image', 'batch', 'every_exit'])
def test_layers_and_indexing_are_translated(kind, results, tmp_path):
    network, images, logits, expected = results
    path, options = tmp_path / 'file.onnx', {} if kind == 'one image' else {kind: True}
    save_onnx(path, *network, inputs=images, **options)
    if kind == 'one image':
        check(answers(path, images), expected)
    else:
        check_batches(path, expected if kind == 'batch' else logits, images)
        assert (kind == 'batch') == ('If' in [node.op_type for node in onnx.load(path).graph.node])


@pytest.mark.parametrize('dtype', [np.int32, np.bool_, np.uint8])
def test_inputs_of_other_dtypes(dtype, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(dtype)
    model = Function(lambda x: (x + 0.5, jnp.eye(2, 4)[x[:, ::-1].astype(int)].sum(1)))
    save_onnx(tmp_path / 'file.onnx', model, {}, [1.3], inputs=tokens, batch=True)
    check_batches(tmp_path / 'file.onnx', bj.inference.dense(model)({}, tokens, [1.3]), tokens)


class Multiplied(nn.Module):
    """A layer whose primitive has no ONNX form."""

    @nn.compact
    def __call__(self, x):
        return jnp.cumprod(x, axis=-1)


class Small(nn.Module):
    """One exit, a dense layer behind another one."""

    layer: collections.abc.Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return (nn.Dense(4, dtype=self.dtype)(self.layer(x)),)


PRODUCT = bj.criteria.as_criterion(lambda z: jnp.cumprod(z, -1)[..., -1], name='product')


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (Small(Multiplied()), {}, "model: stage 0 computes 'cumprod'.*Small/layer"),
        (Small(), {'policy': bj.ExitPolicy(PRODUCT, jnp.zeros(0))}, "model: criterion 'product' computes 'cumprod'"),
        (Small(dtype=jnp.bfloat16), {}, 'bfloat16; build the network with dtype=float32'),
        (
            Small(lambda x: x - x.mean(axis=0, keepdims=True)),
            {'every_exit': True},
            'rows of a batch influence one another',
        ),
        (Small(lambda x: x * int(x.shape[0])), {'batch': True}, 'runs at the batch size of the example alone'),
        (Small(), {'policy': [0.5]}, 'thresholds: a network with 1 exits'),
        (Small(), {'normalization': SCALE}, r'normalization: is for images of .* \[4\]'),
        (Small(), {'path': ''}, 'path: .* is a folder'),
    ],
)
def test_networks_without_an_onnx_form_are_refused(model, options, message, tmp_path):
    inputs = jnp.ones((2, 4))
    given = {'path': 'new.onnx', 'policy': [], 'inputs': inputs, **options}
    with pytest.raises(ValueError, match=message):
        save_onnx(
            model=model, variables=model.init(jax.random.key(0), inputs), **given | {'path': tmp_path / given['path']}
        )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_checked_leaves_no_file(tmp_path, monkeypatch):
    variables = Small().init(jax.random.key(0), jnp.ones((1, 4)))
    write = functools.partial(save_onnx, model=Small(), variables=variables, policy=[], inputs=jnp.ones((1, 4)))
    (tmp_path / 'file').write_text('before')
    with pytest.raises(ValueError, match='path: cannot write'):
        write(tmp_path / 'file' / 'new.onnx')
    monkeypatch.setattr(onnx_program, 'OPSET', 1)  # long before most operators
    with pytest.raises(onnx.checker.ValidationError):
        write(tmp_path / 'network.onnx')
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('file', 'before')]


def chain(x):
    x = nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x)))
    return (nn.Dense(3)(nn.max_pool(x + 1, (2, 2), (2, 2)).mean((1, 2))),)


def test_a_chain_of_convolutions_is_transposed_once(tmp_path):
    images, model = jnp.ones((1, 6, 6, 2)), Function(chain)
    save_onnx(tmp_path / 'chain.onnx', model, random_variables(model, images), [], inputs=images)
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / 'chain.onnx').graph.node)
    assert (counts['Transpose'], counts['Conv'], counts['MatMul']) == (1, 2, 1)
