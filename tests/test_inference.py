"""Every exit's answers to a data set, in memory or as it comes, and the refusal of what is no network or no data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES

import branchy_jax as bj
from branchy_jax.inference import dense, exit_outputs, exit_table, staged


def check_same(answer, expected, rtol=1e-5, atol=1e-6):
    assert answer.label.shape == expected.label.shape
    np.testing.assert_array_equal(answer.label, expected.label)
    np.testing.assert_array_equal(answer.exit_index, expected.exit_index)
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=rtol, atol=atol)
    np.testing.assert_allclose(answer.uncertainty, expected.uncertainty, rtol=rtol, atol=atol)


def entropy64(logits):
    """The entropy of the softmax in NumPy float64."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    return -(probabilities * np.log(probabilities)).sum(-1)


def twice(images):
    return 2 * images


@pytest.fixture(scope='module')
def labelled(network):
    return bj.Batch(np.asarray(network[2]), np.arange(24) % CLASSES)


def test_outputs_are_those_of_every_exit_and_compile_once(network, compilations):
    """In memory with a last batch that is padded; in batches of other sizes, an empty one among them."""
    model, variables, images = network[0], network[1], np.asarray(network[2][:11])
    logits, reports = np.float64(jnp.stack(model.apply(variables, 2 * images))), []
    run = functools.partial(exit_outputs, model, variables, preprocess=twice, on_progress=lambda *n: reports.append(n))

    def check(outputs, rows=slice(None)):
        np.testing.assert_allclose(outputs.logits, logits[:, rows], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs.uncertainty, entropy64(logits[:, rows]), rtol=1e-5, atol=1e-6)

    check(run(images, batch_size=4))
    assert reports == [(4, 11), (8, 11), (11, 11)]
    before = compilations.count
    check(run(images[:9], batch_size=4), slice(9))
    check(run(np.split(images, [4, 4, 9])))
    assert compilations.count == before
    assert reports[-1] == (11, None)
    without = exit_outputs(model, variables, iter([images]), keep_logits=False)
    assert without.logits is None
    assert without.uncertainty.shape == (3, 11)


def test_a_table_holds_what_every_exit_gets_right(network, labelled):
    model, variables, images = network
    expected = np.stack(model.apply(variables, images)).argmax(-1) == labelled.label
    batches = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], labelled) for rows in np.split(np.arange(24), [10, 20]))
    for data in (labelled, batches):
        table = exit_table(model, variables, data)
        np.testing.assert_array_equal(table.statistics[..., 0], expected)
    own = exit_table(
        model, variables, labelled.replace(label=np.full(24, 99)), statistics=lambda logits, _: logits, metric=max
    )
    assert own.statistics.shape == (3, 24, CLASSES)  # statistics of one's own take any target


def test_exit_shares_predicted_are_those_realised(network, labelled):
    """Thresholds chosen on cached outputs do the same when they run."""
    model, variables, images = network
    screened = exit_table(model, variables, labelled).screen()
    for index in np.linspace(0, len(screened) - 1, 5, dtype=int):
        point = screened.point(index)
        answer = dense(model)(variables, images, point)
        np.testing.assert_array_equal(np.bincount(answer.exit_index, minlength=3) / 24, point.exit_fractions)
        assert np.mean(answer.label == labelled.label) == point.accuracy


def test_data_that_do_not_fit_are_refused(network, labelled):
    model, variables, images = network
    few = jax.tree.map(lambda leaf: leaf[:4], labelled)

    def failing():
        yield images[:4]
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        exit_outputs(model, variables, failing())
    for bad, options, message in (
        (images[:0], {}, 'images: got none'),
        (iter([]), {}, 'images: got none'),
        (5, {}, 'inputs: expected arrays'),
        (
            [images[:4, :2]],
            {},
            'inputs: their shape does not fit the variables, or the variables are of another network: .*kernel',
        ),
        ([images[:4], images[:4, :2]], {}, 'are to be alike'),
        (images, {'batch_size': 0}, 'batch_size: got 0'),
        (images, {'batch_size': 2.5}, 'batch_size: got 2.5; expected an integer'),
        (images, {'criterion': 'entropy'}, "criterion: got 'entropy'"),
    ):
        with pytest.raises(ValueError, match=message):
            exit_outputs(model, variables, bad, **options)
    for bad, message in (
        ([], 'data: got no batches'),
        ([images], 'data: got ArrayImpl'),
        (5, 'data: got int'),
        (few.replace(label=few.label[:3]), 'data: got 4 images and 3 labels'),
        (few.replace(label=np.full(4, -1)), r'labels: expected classes in \[0, 3\), got -1'),
        (iter([few, few.replace(label=np.full(4, CLASSES))]), r'labels: expected classes in \[0, 3\), got 3'),
    ):
        with pytest.raises(ValueError, match=message):
            exit_table(model, variables, bad)


THRESHOLDS = np.float32([0.1, 0.1])
USES = {
    'dense': lambda model, *rest: dense(model)(*rest, THRESHOLDS),
    'staged': lambda model, variables, images: staged(model)(variables, images[0], THRESHOLDS),
    'compacted': lambda model, *rest: bj.inference.compacted(model, chunk_size=8)(*rest, THRESHOLDS),
    'stream': lambda model, *rest: list(bj.inference.stream(model, chunk_size=8)(rest[0], [rest[1]], THRESHOLDS)),
    'exit_outputs': exit_outputs,
    'exit_table': lambda *network: exit_table(*network[:2], bj.Batch(network[2], np.zeros(24, int))),
    'plan': lambda *network: bj.inference.plan(*network, THRESHOLDS),
    'optimize': lambda model, variables, images: bj.inference.optimize(model, variables, inputs=images),
    'create_train_state': lambda model, variables, images: bj.training.create_train_state(model, variables),
}


@pytest.mark.parametrize('use', USES.values(), ids=USES)
def test_what_is_no_network_or_no_variables_is_refused(network, use):
    model, variables, images = network
    with pytest.raises(ValueError, match="model: got 'b-lenet'; give a Flax module"):
        use('b-lenet', variables, images)
    for bad in (variables['params'], {}, None):
        with pytest.raises(ValueError, match='variables: got .*[Gg]ive what model.init returned'):
            use(model, bad, images)
