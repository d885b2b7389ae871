"""One step against hand-written gradient descent; epochs, starting points and refusals."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import augment, check_equal

import branchy_jax as bj
from branchy_jax.losses import cross_entropy_per_exit
from branchy_jax.training import create_train_state, fit, initialize_from_baseline, paper_adam, train_step

SGD = optax.sgd(0.1)


def is_same(result, expected):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, result, expected)))


@pytest.fixture
def batch(small_data):
    return augment(None, jax.tree.map(lambda values: jnp.asarray(values[:16]), small_data))


def test_step_is_gradient_descent_on_the_weighted_sum(network, batch, getkey):
    model, variables, _ = network
    weights, key = jnp.array([0.5, 0.25, 2.0]), getkey()

    def objective(params):
        mode = {'train': True, 'rngs': {'dropout': key}, 'mutable': ['batch_stats']}
        logits, _ = model.apply({**variables, 'params': params}, batch.image, **mode)
        losses = [optax.softmax_cross_entropy_with_integer_labels(z, batch.label).mean() for z in logits]
        return 0.5 * losses[0] + 0.25 * losses[1] + 2.0 * losses[2]

    loss, gradients = jax.value_and_grad(objective)(variables['params'])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradients)
    given = jax.tree.map(jnp.copy, variables)
    state, metrics = train_step(create_train_state(model, given, SGD), batch, weights, key)
    check_equal(given, variables)  # donation leaves the caller's arrays
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    assert int(state.step) == 1
    assert metrics['exit_loss'].shape == metrics['exit_accuracy'].shape == (3,)


@pytest.mark.parametrize('exit_index', [0, 1, 2])
def test_loss_of_an_exit_leaves_later_stages_alone(network, batch, getkey, exit_index):
    """Loss n gives a gradient to the layers before exit n and to head n, and to no other."""
    model, variables, _ = network
    weights = jnp.zeros(3).at[exit_index].set(1.0)
    state, _ = train_step(create_train_state(model, variables, SGD), batch, weights, getkey())
    moved = {name for name, params in state.params.items() if not is_same(params, variables['params'][name])}
    reached = {'layer1', 'norm1', *(f'layer{n + 1}' for n in range(1, exit_index + 1))}
    assert moved == reached | {f'head{exit_index + 1}'}


class Branches(nn.Module):
    """A module with a list field, which has no hash."""

    parts: nn.Sequential

    def __call__(self, x):
        return self.parts.layers[0](x.reshape(len(x), -1)), self.parts(x.reshape(len(x), -1))


def test_one_trace_per_shape(batch, getkey):
    """Equal models and optimisers trace once: JAX compares the static fields of a state."""
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(n=2)(lambda logits, labels: cross_entropy_per_exit(logits, labels))
    for size in (16, 16, 8, 16, 8):
        model = Branches(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3)]))
        part = bj.Batch(batch.image[:size], batch.label[:size])
        state = create_train_state(model, model.init(jax.random.key(0), part.image), paper_adam(1e-2))
        state, _ = train_step(state, part, jnp.ones(2), getkey(), loss=loss)
    with pytest.raises(AssertionError, match='traced > 2 times'):
        train_step(state, jax.tree.map(lambda x: x[:4], batch), jnp.ones(2), getkey(), loss=loss)


def test_training_learns_and_metrics_go_to_any_writer_as_numbers(network, train):
    model, variables, _ = network
    written, averages = [], []
    state = train(
        create_train_state(model, variables, optax.adam(1e-2)),
        epochs=11.4,
        on_metrics=lambda step, scalars: written.append((step, scalars)),
        on_epoch=lambda epoch, state, metrics: averages.append((epoch, metrics)),
    )
    assert int(state.step) == 57
    assert [step for step, _ in written] == [*range(5, 56, 5), 57]  # the fraction of an epoch at the end, too
    assert [epoch for epoch, _ in averages] == list(range(1, 12))
    assert written[-1][1]['loss'] < 0.6 * written[0][1]['loss']
    for name, values in averages[0][1].items():
        for n, value in enumerate(np.atleast_1d(values), 1):
            assert written[0][1][name if np.ndim(values) == 0 else f'{name}/{n}'] == float(value)
    assert {type(value) for _, scalars in written for value in scalars.values()} == {float}
    assert {'loss', 'exit_loss/1', 'exit_loss/3', 'exit_accuracy/3'} <= set(written[0][1])


def test_scanned_epochs_are_epochs_step_by_step(network, train):
    model, variables, _ = network
    calls, results = {True: [], False: []}, []
    for scan, seen in calls.items():
        options = {'epochs': 2, 'scan': scan, 'on_step': lambda *call, seen=seen: seen.append(call[:3])}
        results.append(train(create_train_state(model, variables, SGD), **options))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert calls[True] == [(epoch, 5, 5) for epoch in range(2)]
    assert calls[False] == [(epoch, step, 5) for epoch in range(2) for step in range(1, 6)]


class Batches:
    """A stream that yields as many batches as ``counts`` says, and records the orders that it gets."""

    def __init__(self, data, counts):
        self.data, self.counts, self.orders = data, iter(counts), []

    def __len__(self):
        return len(self.data.label)

    def batches(self, order, first_step=0):
        self.orders.append(order)
        for _ in range(next(self.counts)):
            yield jax.tree.map(lambda values: values[:16], self.data)


def test_a_stream_gives_an_epoch_as_many_steps_as_it_has(network, train, small_data):
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables, SGD)
    assert int(train(new(), data=Batches(small_data, [9, 9]), epochs=1.4).step) == 7
    with pytest.raises(ValueError, match='data: its batches ended after 2 of 5 steps of epoch 2'):
        train(new(), data=Batches(small_data, [5, 2]), epochs=3)
    streams = [Batches(small_data, [9, 9]) for _ in range(2)]
    for stream in streams:
        train(new(), data=stream, epochs=2)
    check_equal(*(stream.orders for stream in streams))  # a pure function of the key
    first, second = streams[0].orders
    assert (first != second).any()
    assert first.shape == (5, 16)
    assert np.unique(first).tolist() == list(range(80))


@pytest.mark.parametrize('scan', [True, False])
def test_every_step_of_every_epoch_draws_anew(network, small_data, scan):
    """All labels are equal and images depend on the key alone, so equal losses mean equal keys."""
    model, variables, _ = network
    data = bj.Batch(jnp.asarray(small_data.image), jnp.zeros(80, jnp.int32))

    def noise(key, batch):
        shape = batch.image.shape
        return batch.replace(image=jnp.broadcast_to(jax.random.normal(key, (1, *shape[1:])), shape))

    def losses():
        history, state = [], create_train_state(model, variables, optax.set_to_zero())
        options = {'epochs': 2, 'batch_size': 20, 'augment': noise, 'scan': scan}
        options['on_step'] = lambda epoch, step, steps, metrics: history.append(float(metrics['loss']))
        fit(state, data, jnp.array([1.0, 0.0, 0.0]), jax.random.key(0), **options)
        return history

    first, again = losses(), losses()
    assert first == again
    assert len(set(first)) == len(first) == (2 if scan else 8)


def test_frozen_trunk_trains_heads_only(network, batch, getkey):
    model, variables, images = network
    state = create_train_state(model, variables, optax.adam(0.1), frozen_trunk=True, inputs=images)
    for _ in range(3):
        state, _ = train_step(state, batch, jnp.ones(3), getkey())
    check_equal(state.model_state, {'batch_stats': variables['batch_stats']})
    for name, params in state.params.items():
        assert is_same(params, variables['params'][name]) == (name not in ('head1', 'head2')), name
    np.testing.assert_array_equal(model.apply(state.variables, batch.image)[2], model.apply(variables, batch.image)[2])
    with pytest.raises(ValueError, match='inputs: got None; frozen_trunk=True needs'):
        create_train_state(model, variables, frozen_trunk=True)


@pytest.fixture
def trained(network):
    """Variables of the trained baseline: the trunk and the last head, all one higher than those of `network`."""
    _, variables, _ = network
    params = {name: value for name, value in variables['params'].items() if name not in ('head1', 'head2')}
    return jax.tree.map(lambda x: x + 1, {**variables, 'params': params})


def test_baseline_initialisation_reports_what_it_did(network, trained):
    _, variables, _ = network
    trained['params']['head3'] = {'kernel': jnp.zeros((8, 99)), 'scale': jnp.zeros(2)}
    start, report = initialize_from_baseline(variables, jax.tree.map(lambda x: x.astype(jnp.float16), trained))
    assert set(report.fresh) == {f'params/head{n}/{leaf}' for n in (1, 2, 3) for leaf in ('kernel', 'bias')}
    assert set(report.left) == {'params/head3/kernel', 'params/head3/scale'}
    assert len(report.taken) + len(report.fresh) == len(jax.tree.leaves(variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype('float32')}  # those of the network
    np.testing.assert_allclose(start['params']['layer2']['kernel'], trained['params']['layer2']['kernel'], 1e-3)
    check_equal(start['params']['head1'], variables['params']['head1'])
    with pytest.raises(ValueError, match='trained: 1 of its 1 arrays match no array of the network'):
        initialize_from_baseline(variables, {'params': {'other': jnp.zeros(3)}})


def test_strict_initialisation_takes_a_whole_baseline_or_none(network, trained):
    model, variables, images = network
    for options in ({}, {'model': model, 'inputs': images}):
        start, report = initialize_from_baseline(variables, trained, strict=True, **options)
        assert {path.split('/')[1] for path in report.fresh} == {'head1', 'head2'}
        check_equal(start['batch_stats'], trained['batch_stats'])

    def changed(module, **arrays):
        return {**trained, 'params': {**trained['params'], module: {**trained['params'].get(module, {}), **arrays}}}

    for bad, message in [
        (changed('head9', kernel=jnp.zeros(2)), r'1 of its \d+ arrays match no array .*params/head9/kernel \(2,\), '),
        (changed('layer2', kernel=jnp.zeros((8, 9))), r'params/layer2/kernel \(8, 9\)'),
        ({'params': trained['params']}, 'trained: lacks batch_stats/norm1/mean, batch_stats/norm1/var, which'),
    ]:
        initialize_from_baseline(variables, bad)
        with pytest.raises(ValueError, match=message):
            initialize_from_baseline(variables, bad, strict=True)
    del trained['params']['layer2']  # a whole module: only the network's program says that it belongs to the trunk
    initialize_from_baseline(variables, trained, strict=True)
    with pytest.raises(ValueError, match='trained: lacks params/layer2/bias, params/layer2/kernel, which belong'):
        initialize_from_baseline(variables, trained, strict=True, model=model, inputs=images)


def test_adam_is_the_papers():
    params = {'w': jnp.array(1.0)}
    ours, reference = paper_adam(), optax.adam(1e-3, b1=0.99, b2=0.999)
    states = [ours.init(params), reference.init(params)]
    for gradient in (1.0, -3.0, 0.5):
        updates = [
            optimizer.update({'w': jnp.array(gradient)}, state)
            for optimizer, state in zip((ours, reference), states, strict=True)
        ]
        states = [state for _, state in updates]
        check_equal(updates[0][0], updates[1][0])
    assert (paper_adam(), hash(paper_adam())) == (paper_adam(1e-3), hash(paper_adam(1e-3)))
    assert paper_adam() != paper_adam(1e-2)


def test_bfloat16_computation_trains_float32_parameters(batch, getkey):
    dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)

    model = Branches(nn.Sequential([dense(3), nn.relu, dense(3)]))
    state = create_train_state(model, model.init(getkey(), batch.image), optax.adam(0.02))
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, batch, jnp.ones(2), getkey())
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.9 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_bad_arguments_are_refused(network, batch, getkey):
    model, variables, _ = network
    state = create_train_state(model, variables, SGD)
    with pytest.raises(ValueError, match='exit_weights: expected one for each of 3 exits'):
        train_step(state, batch, jnp.ones(2), getkey())
    with pytest.raises(ValueError, match='labels: expected integers'):
        train_step(state, batch.replace(label=batch.image[:, 0, 0, 0]), jnp.ones(3), getkey())
    with pytest.raises(ValueError, match="variables: got .*'layer1'.*; give what model.init returned"):
        create_train_state(model, variables['params'])
    with pytest.raises(ValueError, match="model: got 'b-lenet'"):
        create_train_state('b-lenet', variables)
    for bad in (-1, float('nan')):
        with pytest.raises(ValueError, match='learning_rate: got'):
            paper_adam(bad)
    assert paper_adam(optax.constant_schedule(0.1)).init is not None


def test_small_steps_accumulate_into_one_update(network, batch, getkey):
    """Two steps of eight equal one of sixteen if BatchNorm, whose statistics are of eight images, is frozen."""
    model, variables, images = network
    frozen = functools.partial(create_train_state, model, variables, frozen_trunk=True, inputs=images)
    whole, _ = train_step(frozen(SGD), batch, jnp.ones(3), getkey())
    state = frozen(optax.MultiSteps(SGD, 2).gradient_transformation())
    for rows in (slice(8), slice(8, None)):
        before = state.params['head1']['kernel'].copy()
        state, _ = train_step(state, jax.tree.map(lambda x, rows=rows: x[rows], batch), jnp.ones(3), getkey())
        assert (before == state.params['head1']['kernel']).all() == (rows == slice(8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, whole.params)


@pytest.mark.parametrize('placement', ['text', 'tuned'])
def test_a_grown_network_answers_as_before(placement):
    """From 14 layers to 20: every exit gives the same logits."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 8, 8, 3)).astype(np.float32)
    shallow, deep = (
        bj.models.create('b-resnet110', depth=depth, placement=placement, image_shape=(8, 8, 3)) for depth in (14, 20)
    )

    def variables(model, vectors):  # as if initialised or trained, without a program to compile
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        scale = {1: vectors, 2: 0.1, 4: 0.1}
        return jax.tree.map(lambda x: (scale[x.ndim] * generator.uniform(0.5, 1, x.shape)).astype(x.dtype), shapes)

    trained, fresh = variables(shallow, 1.0), variables(deep, 0.0)
    grown = bj.training.initialize_from_shallower(deep, fresh, shallow, trained)
    answers = (jax.jit(model.apply)(given, images) for model, given in ((deep, grown), (shallow, trained)))
    for logits, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    blocks = [name for name in grown['params'] if name.startswith('block')]
    identities = [name for name in blocks if not grown['params'][name]['norm2']['scale'].any()]
    assert (len(blocks), len(identities)) == (9, 3)
    for bad in (deep.clone(depth=26), shallow.clone(placement='released'), bj.models.without_branches(shallow)):
        with pytest.raises(ValueError, match='shallower: expected the same ResNet with fewer blocks'):
            bj.training.initialize_from_shallower(deep, fresh, bad, trained)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'epochs': -1}, 'epochs: got -1'),
        ({'epochs': float('nan')}, 'epochs: got nan'),
        ({'batch_size': 0}, 'batch_size: got 0'),
        ({'batch_size': 2.5}, 'batch_size: got 2.5'),
        ({'batch_size': 81}, 'batch_size: got 81 for 80 examples'),
        ({'save_every': 0}, 'save_every: got 0'),
        ({'exit_weights': jnp.ones(2)}, 'exit_weights: expected one for each of 3 exits'),
    ],
)
def test_impossible_settings_are_refused(network, train, options, message):
    model, variables, _ = network
    with pytest.raises(ValueError, match=message):
        train(create_train_state(model, variables, SGD), **{'epochs': 1, **options})


def test_labels_without_a_class_are_refused(network, train, small_data):
    model, variables, _ = network
    state = create_train_state(model, variables, SGD)
    bad = small_data.replace(label=small_data.label + 1)
    smoothed = functools.partial(cross_entropy_per_exit, label_smoothing=0.1)
    for loss in (cross_entropy_per_exit, smoothed):
        with pytest.raises(ValueError, match=r'labels: expected classes in \[0, 3\), got 1 to 3'):
            train(state, data=bad, epochs=1, loss=loss)


def test_other_tasks_bring_their_loss_and_their_metrics(network, batch, getkey):
    """Squared error against real targets, with its own metric."""
    model, variables, _ = network
    targets = jax.random.normal(getkey(), (16, 3))

    def squared_error(logits, targets):
        return jnp.stack([jnp.mean((z - targets) ** 2) for z in logits])

    state = create_train_state(model, variables, SGD)
    given = bj.Batch(batch.image, targets)
    metric = lambda logits, targets: {'exit_error': squared_error(logits, targets) ** 0.5}  # noqa: E731
    state, metrics = train_step(state, given, jnp.ones(3), getkey(), loss=squared_error, metrics=metric)
    assert set(metrics) == {'loss', 'exit_loss', 'exit_error'}
    np.testing.assert_allclose(metrics['exit_error'], np.sqrt(metrics['exit_loss']), rtol=1e-6)
