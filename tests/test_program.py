"""Stages and heads, found in the traced program of a plain module; rows that influence one another are refused."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Function, random_variables, thresholds_between
from jax import lax

import branchy_jax as bj
from branchy_jax.program import check_rows_by_trial, stages


def run_parts(parts, variables, inputs):
    """Returns what every stage hands on, and the logits of every exit."""
    hidden, handed_on, logits = inputs, [], []
    for n in range(len(parts.exits)):
        hidden = parts.run_stage(n, variables, hidden)
        handed_on.append(hidden)
        logits.append(parts.run_exit(n, variables, hidden))
    return handed_on, logits


class Skip(nn.Module):
    """A skip from the images to the last exit, a layer that nothing reads, and positions made of weights alone."""

    @nn.compact
    def __call__(self, x):
        nn.Dense(50, name='unused')(x)
        y = nn.Dense(6, name='first')(x)
        early = nn.Dense(3, name='side')(nn.relu(y))
        y = jnp.tanh(y) + jnp.tanh(nn.Dense(6, name='positions')(jnp.ones((1, 2))))
        return early, nn.Dense(3, name='last')(y) + nn.Dense(3, name='skip')(x)


@pytest.fixture(scope='module')
def skip():
    images = jax.random.normal(jax.random.key(0), (4, 2))
    return Skip(), Skip().init(jax.random.key(1), images), images


def test_a_stage_computes_what_a_later_exit_needs_and_nothing_else(skip):
    model, variables, images = skip
    parts = stages(model, variables, images)
    handed_on, logits = run_parts(parts, variables, images)
    for part, whole in zip(logits, model.apply(variables, images), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-6)
    # The skip starts from the images, which are handed on for it; values of weights alone are computed where needed.
    assert [sorted(x.shape for x in hidden) for hidden in handed_on] == [[(4, 2), (4, 6)], [(4, 3)]]
    macs = bj.costs.count_macs(model, inputs=images)
    assert (macs.stages.tolist(), macs.exits.tolist()) == ([2 * 6, 6 * 3 + 2 * 3 + 2 * 6], [6 * 3, 0])


def test_asked_exits_leave_the_others_out(network):
    model, variables, images = network
    parts = stages(model, variables, images, exits=[1, 2])
    assert (parts.num_exits, parts.exits) == (3, (1, 2))
    _, logits = run_parts(parts, variables, images)
    for part, whole in zip(logits, model.apply(variables, images)[1:], strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)
    assert parts.macs.stages.tolist() == [16 * 8 + 8 * 8, 8 * 8 + 8 * 3]


def test_shapes_serve_and_tracers_do(network):
    model, variables, images = network
    shapes = jax.eval_shape(lambda: (variables, images[:1]))
    parts = stages(model, *shapes)
    np.testing.assert_array_equal(parts.macs.stages, stages(model, variables, images).macs.stages)

    @jax.jit
    def early(variables, images):
        inside = stages(model, variables, images)
        return inside.run_exit(0, variables, inside.run_stage(0, variables, images))

    for size in (1, 24):  # another size than the example's
        expected = model.apply(variables, images[:size])[0]
        np.testing.assert_allclose(early(variables, images[:size]), expected, rtol=1e-5, atol=1e-6)
        hidden = parts.run_stage(0, variables, images[:size])
        np.testing.assert_allclose(parts.run_exit(0, variables, hidden), expected, rtol=1e-5, atol=1e-6)


def test_each_batch_size_is_traced_once():
    traces = []

    class Noted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x.shape[0])
            return nn.Dense(3)(x), nn.Dense(3)(nn.relu(x))

    images, models = jnp.ones((4, 2)), [Noted(), Noted()]  # equal modules
    variables = models[0].init(jax.random.key(0), images)
    traces.clear()
    for model, size in itertools.product(models, (4, 1, 4)):
        run_parts(stages(model, variables, images), variables, images[:size])
    assert sorted(size for size in traces if isinstance(size, int)) == [1, 4]
    assert len(traces) == 3


class TimeFirst(nn.Module):
    """Works on [T, B, D], and starts with a class token."""

    @nn.compact
    def __call__(self, x):
        token = jnp.broadcast_to(self.param('token', nn.initializers.normal(), (1, 1, 4)), (x.shape[0], 1, 4))
        x = jnp.concatenate([token, x], axis=1).transpose(1, 0, 2)
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(3)(x.sum(0)), nn.Dense(3)(nn.relu(nn.Dense(4)(x))[0])


def test_the_batch_may_lie_on_any_axis(getkey):
    inputs = jax.random.normal(getkey(), (5, 2, 4))
    model = TimeFirst()
    variables = model.init(getkey(), inputs)
    (hidden, _), logits = run_parts(stages(model, variables, inputs), variables, inputs)
    assert [leaf.shape for leaf in hidden] == [(5, 3, 4)]
    for part, whole in zip(logits, model.apply(variables, inputs), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-6)
    policy = thresholds_between(model, variables, inputs)
    oracle = bj.inference.dense(model)(variables, inputs, policy)
    for size in (1, 2):  # a batch of one has another program: nothing is to be broadcast
        answer = bj.inference.compacted(model, chunk_size=size)(variables, inputs, policy)
        np.testing.assert_array_equal(answer.exit_index, oracle.exit_index)
        np.testing.assert_allclose(answer.logits, oracle.logits, atol=1e-6)


class Around(nn.Module):
    """A function of activations [B, 3, 4] between dense layers, in front of both exits."""

    function: object

    @nn.compact
    def __call__(self, x):
        x = self.function(nn.Dense(4)(x))
        rows = x.reshape(x.shape[0], -1)
        return nn.Dense(3)(rows), nn.Dense(3)(nn.relu(nn.Dense(4)(rows)))


INPUTS = jax.random.normal(jax.random.key(0), (5, 3, 4))


def around(function):
    model = Around(function)
    return model, jax.eval_shape(model.init, jax.random.key(1), INPUTS)


def normalized_by_the_batch(x):
    return (x - x.mean(0, keepdims=True)) / (1 + x.std(0, keepdims=True))


@jax.custom_jvp
def minus_the_mean(x):
    return x - x.mean(0, keepdims=True)


minus_the_mean.defjvp(lambda primals, tangents: (minus_the_mean(*primals), tangents[0]))


def halving(condition, body):
    return lambda x: lax.while_loop(condition, body, (x, jnp.abs(x).mean((1, 2))))[0]


MIXING = {
    'minus the mean': lambda x: x - x.mean(0, keepdims=True),
    'batch statistics': normalized_by_the_batch,
    'sort': lambda x: jnp.sort(x, 0),
    'cumsum': lambda x: jnp.cumsum(x, 0),
    'softmax': lambda x: nn.softmax(x, axis=0),
    'roll': lambda x: x + jnp.roll(x, 1, axis=0),
    'norm of the batch': lambda x: x / jnp.linalg.norm(x),
    'products of rows': lambda x: jnp.einsum('btf,ctf->bt', x, x),
    'top k': lambda x: x + lax.top_k(x.transpose(1, 2, 0), 1)[0].transpose(2, 0, 1),
    'pooling': lambda x: nn.max_pool(x.transpose(1, 0, 2), (3,), (1,), 'SAME').transpose(1, 0, 2),
    'capacity': lambda x: x * (jnp.cumsum((x.mean((1, 2)) > 0).astype(int)) < 3)[:, None, None],
    'fft': lambda x: jnp.fft.fft(x, axis=0).real,
    'first row': lambda x: x - x[:1],
    'mean in a loop': lambda x: lax.fori_loop(0, 3, lambda i, z: z - z.mean(0, keepdims=True), x),
    'scan over rows': lambda x: lax.scan(lambda c, row: (c + row, c + row), jnp.zeros(x.shape[1:]), x)[1],
    'shift': lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1],
    'mean under vmap': lambda x: jax.vmap(lambda row: row - lax.pmean(row, 'rows'), axis_name='rows')(x),
    'mean with a derivative, in a loop': lambda x: lax.fori_loop(0, 3, lambda i, z: minus_the_mean(z), x),
    'padding by -1': lambda x: lax.pad(x, 0.0, ((1, -1, 0), (0, 0, 0), (0, 0, 0))),
    'first row written': lambda x: lax.dynamic_update_slice(x, jnp.ones((1, 3, 4)), (0, 0, 0)),
    'reshaped for transposed': lambda x: x.reshape(3, x.shape[0], 4).transpose(1, 0, 2),
    'mean, and asks for the number of rows': lambda x: x - x.mean(0, keepdims=True) * (1 if x.shape[0] > 2 else 2),
    'folded mean': lambda x: (x.reshape(-1, 4) - x.reshape(-1, 4).mean(0, keepdims=True)).reshape(x.shape),
}
INNOCENT = {
    'flatten': lambda x: x.reshape(x.shape[0], -1),
    'fold and back': lambda x: jnp.tanh(x.reshape(-1, 4)).reshape(x.shape),
    'attention': lambda x: nn.softmax(jnp.einsum('btf,bsf->bts', x, x)) @ x,
    'first position': lambda x: x[:, 0],
    'last position': lambda x: x[:, -1:],
    'class token': lambda x: jnp.concatenate([jnp.ones((x.shape[0], 1, 4)), x], axis=1),
    'scan over time': lambda x: lax.scan(
        lambda c, step: (c + step, c + step), jnp.zeros((x.shape[0], 4)), x.transpose(1, 0, 2)
    )[1].transpose(1, 0, 2),
    'map over rows': lambda x: jax.vmap(lambda row: row - row.mean())(x),
    'sort of features': lambda x: jnp.sort(x, -1),
    'positions by index': lambda x: x[:, jnp.array([0, 2])],
    'best position': lambda x: jnp.take_along_axis(x, x[..., 0].argmax(1)[:, None, None], 1),
    'top k': lambda x: lax.top_k(x, 2)[0],
    'pooling': lambda x: nn.avg_pool(x, (2,), (1,), 'SAME'),
    'resize': lambda x: jax.image.resize(x, (x.shape[0], 6, 4), 'bilinear'),
    'one column set': lambda x: x.at[:, 0].set(0.0),
    'embedding': lambda x: jnp.eye(7)[jnp.clip(x[..., 0].astype(int), 0, 6)],
    'loop': lambda x: lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z), x),
    'loop until every row is done': halving(
        lambda c: (c[1] > 0.1).any(),
        lambda c: (jnp.where((c[1] > 0.1)[:, None, None], c[0] / 2, c[0]), jnp.where(c[1] > 0.1, c[1] / 2, c[1])),
    ),
    'time folded and unfolded': lambda x: jnp.tanh(x.transpose(1, 0, 2).reshape(-1, 4)).reshape(3, x.shape[0], 4)[0],
    'kernel for each row': lambda x: jax.vmap(lambda row: jnp.convolve(row[:, 0], row[0], mode='same'))(x),
    'matrix for each row': lambda x: jnp.linalg.inv(x @ x.transpose(0, 2, 1) + 9 * jnp.eye(3)[None]),
    'two views in one batch': lambda x: jnp.tanh(jnp.concatenate([x, -x])).reshape(2, x.shape[0], 3, 4)[0],
    'edges of features': lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode='edge'),
    'means of features': lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode='mean'),
    'tile': lambda x: jnp.concatenate([jnp.tile(jnp.ones((1, 1, 4)), (x.shape[0], 1, 1)), x], axis=1),
}


@pytest.mark.parametrize('function', MIXING.values(), ids=MIXING)
def test_rows_that_influence_one_another_are_refused(function):
    with pytest.raises(ValueError, match=r'rows of a batch influence one another at Around'):
        stages(*around(function), INPUTS)


def test_the_place_is_the_line_and_the_module():
    with pytest.raises(ValueError, match=r'at Around/.*, .*test_program.py:\d+: reduce_sum works along the axis'):
        stages(*around(jax.named_call(normalized_by_the_batch, name='normalize')), INPUTS)

    norm, images = Function(lambda x: (nn.BatchNorm(False, name='norm')(x),)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match='model: changes variables .*use_running_average=not train'):
        bj.inference.dense(norm)(random_variables(norm, images), images, [])


@pytest.mark.parametrize('function', INNOCENT.values(), ids=INNOCENT)
def test_innocent_idioms_are_accepted(function):
    assert stages(*around(function), INPUTS).fixed_because == ''
    check_rows_by_trial(*around(function), INPUTS)


BY_TRIAL = {
    "another row's number": lambda x: x[jnp.argmax(x[:, 0], axis=-1)],
    'number of the row': lambda x: x + jnp.arange(x.shape[0])[:, None, None],
    'size of the batch': lambda x: x / x.shape[0],
    'noise': lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    'first row set': lambda x: x.at[0].set(0.0),
    'sum of folded rows': lambda x: jnp.cumsum(x.reshape(-1, 4), 0).reshape(x.shape),
    'rows unfolded in another order': lambda x: x.reshape(-1, 4).reshape(3, x.shape[0], 4).transpose(1, 0, 2),
    'loop until the last row is done': halving(lambda c: (c[1] > 0.1).any(), lambda c: (c[0] / 2, c[1] / 2)),
    'products inverted': lambda x: x * jnp.linalg.cholesky(x[:, 0] @ x[:, 0].T + 9 * jnp.eye(x.shape[0]))[:, :1, None],
    'a number for each row': lambda x: x + jnp.linspace(0, 1, x.shape[0])[:, None, None],
    'no fault': lambda x: x[jnp.arange(x.shape[0]), x[..., 0].argmax(1)],  # the best position of each row
}


@pytest.mark.parametrize('name', BY_TRIAL)
def test_what_the_program_does_not_tell_is_tried(name):
    model = Around(BY_TRIAL[name])
    variables = random_variables(model, INPUTS)
    if name == 'no fault':
        assert bj.inference.exit_outputs(model, variables, INPUTS).uncertainty.shape == (2, 5)
        return
    with pytest.raises(
        ValueError, match='rows of a batch influence one another, probably at (Around|an unknown place)'
    ):
        bj.inference.exit_outputs(model, variables, INPUTS)


class Numbered(nn.Module):
    """A position of each row, which starts at 0."""

    @nn.compact
    def __call__(self, x):
        return x + self.param('positions', nn.initializers.zeros, (16, 4))[jnp.arange(x.shape[0])]


def until_none_is_large(x):
    return lax.while_loop(lambda z: (jnp.abs(z) > 1).any(), lambda z: z / 2, 3 * x)


@pytest.mark.parametrize('layer', [lambda x: x + jnp.arange(x.shape[0])[:, None], Numbered(), until_none_is_large])
def test_attach_tries_rows_too(layer):
    with pytest.raises(ValueError, match='rows of a batch influence one another, probably at'):
        bj.models.attach(nn.Sequential([nn.Dense(4), layer, nn.Dense(3)]), ['layers_0'], inputs=INPUTS[:, 0])


def asks_for_the_number(x):
    return 2 * x if x.shape[0] > 4 else x + 1


def test_a_module_that_asks_for_the_number_of_rows(getkey):
    """It runs where batches stay whole, at the size asked; where rows are gathered it is refused."""
    model, inputs = Around(asks_for_the_number), jax.random.normal(getkey(), (5, 3, 4))
    variables = model.init(getkey(), inputs)
    policy = [-np.inf]
    for size in (5, 2):
        answer = bj.inference.dense(model)(variables, inputs[:size], policy)
        np.testing.assert_allclose(answer.logits, model.apply(variables, inputs[:size])[1], atol=1e-6)
    alone = bj.inference.staged(model)(variables, inputs[0], policy)
    np.testing.assert_allclose(alone.logits, model.apply(variables, inputs[:1])[1][0], atol=1e-6)
    with pytest.raises(ValueError, match='batch size of the example alone, since its trace with a symbolic batch'):
        bj.inference.compacted(model, chunk_size=2)(variables, inputs, policy)


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda x: {'early': x}, 'model: returns a dict; return a tuple of the logits'),
        (lambda x: (), 'model: returns a tuple; return a tuple of the logits'),
        (lambda x: (x, x.argmax(-1)), r'model: exit 1 returns int32 \(2,\); return logits \[B, …, K\]'),
        (lambda x: (x, (x, x)), 'model: exit 1 returns tuple; return logits'),
        (lambda x: (x, x[0, None] * 2 + jnp.ones((3, 4))), 'model: exit 1 returns .* for a batch of b; logits lead'),
    ],
)
def test_what_is_no_logits_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        stages(Function(function), {}, jnp.ones((2, 4)))
