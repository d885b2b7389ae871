import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import check_equal, prepare

import branchy_jax as bj
from branchy_jax.losses import cross_entropy_per_exit
from branchy_jax.training import (
    create_train_state,
    epoch_order,
    fit,
    initialize_from_baseline,
    paper_adam,
    train_step,
)

SGD = optax.sgd(0.1)


def is_same(found, expected):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


@pytest.fixture
def batch(small_data):
    return prepare(None, jax.tree.map(lambda values: jnp.asarray(values[:16]), small_data))


def test_step_is_gradient_descent_on_the_weighted_sum(network, batch, getkey):
    model, variables, _ = network
    weights, key = jnp.array([0.5, 0.25, 2.0]), getkey()

    def objective(params):
        logits, _ = model.apply(
            {**variables, 'params': params}, batch.image, train=True, rngs={'dropout': key}, mutable=['batch_stats']
        )
        losses = [optax.softmax_cross_entropy_with_integer_labels(z, batch.label).mean() for z in logits]
        return 0.5 * losses[0] + 0.25 * losses[1] + 2.0 * losses[2]

    loss, gradients = jax.value_and_grad(objective)(variables['params'])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradients)
    state, metrics = train_step(create_train_state(model, variables, SGD), batch, weights, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    assert int(state.step) == 1
    assert metrics['exit_loss'].shape == metrics['exit_accuracy'].shape == (3,)


@pytest.mark.parametrize('exit_index', [0, 1, 2])
def test_loss_of_an_exit_leaves_later_stages_alone(network, batch, getkey, exit_index):
    """Nothing behind exit n gets a gradient from loss n; everything before it does, and no other head."""
    model, variables, _ = network
    weights = jnp.zeros(3).at[exit_index].set(1.0)
    state, _ = train_step(create_train_state(model, variables, SGD), batch, weights, getkey())
    moved = {name for name, params in state.params.items() if not is_same(params, variables['params'][name])}
    reached = {'layer1', 'norm1', *(f'layer{n + 1}' for n in range(1, exit_index + 1))}
    assert moved == reached | {f'head{exit_index + 1}'}


def test_one_trace_per_shape(network, batch, getkey):
    """Whatever state, model and optimiser, as long as they are equal."""
    model, variables, _ = network
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(n=2)(lambda logits, labels: cross_entropy_per_exit(logits, labels))
    for size in (16, 16, 8, 16, 8):
        state = create_train_state(model.clone(), variables, paper_adam(1e-2))
        part = jax.tree.map(lambda x, size=size: x[:size], batch)
        state, _ = train_step(state, part, jnp.ones(3), getkey(), loss=loss)
    with pytest.raises(AssertionError, match='traced > 2 times'):
        train_step(state, jax.tree.map(lambda x: x[:4], batch), jnp.ones(3), getkey(), loss=loss)


def test_training_learns_and_state_counts(network, train):
    model, variables, _ = network
    seen = []
    state = train(
        create_train_state(model, variables, optax.adam(1e-2)),
        epochs=12,
        on_epoch=lambda epoch, state, metrics: seen.append((epoch, float(metrics['loss']))),
    )
    assert [epoch for epoch, _ in seen] == list(range(1, 13))
    assert seen[-1][1] < 0.6 * seen[0][1]
    assert int(state.step) == 12 * 5


def test_metrics_go_to_any_writer_as_numbers(network, train):
    model, variables, _ = network
    written, averages = [], []
    train(
        create_train_state(model, variables, SGD),
        epochs=1.4,
        on_metrics=lambda step, scalars: written.append((step, scalars)),
        on_epoch=lambda epoch, state, metrics: averages.append(metrics),
    )
    assert [step for step, _ in written] == [5, 7]  # the part of an epoch at the end, too
    for name, values in averages[0].items():
        for n, value in enumerate(np.atleast_1d(values), 1):
            assert written[0][1][name if np.ndim(values) == 0 else f'{name}/{n}'] == float(value)
    assert {type(value) for _, scalars in written for value in scalars.values()} == {float}
    assert {'loss', 'exit_loss/1', 'exit_loss/3', 'exit_accuracy/3'} <= set(written[0][1])


def test_scanned_epochs_are_epochs_step_by_step(network, train, small_data, getkey):
    model, variables, _ = network
    calls = []
    results = [
        train(
            create_train_state(model, variables, SGD),
            epochs=2,
            scan=scan,
            on_step=lambda epoch, step, steps, metrics, scan=scan: calls.append((scan, epoch, step, steps)),
        )
        for scan in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert calls == [
        *((True, epoch, 5, 5) for epoch in range(2)),
        *((False, epoch, step, 5) for epoch in range(2) for step in range(1, 6)),
    ]


class Batches:
    """A stream that yields what it is told, whatever it is asked for."""

    def __init__(self, data, counts):
        self.data, self.counts = data, iter(counts)

    def __len__(self):
        return len(self.data.label)

    def batches(self, order, first_step=0):
        for _ in range(next(self.counts)):
            yield jax.tree.map(lambda values: values[:16], self.data)


def test_a_stream_gives_an_epoch_as_many_steps_as_it_has(network, train, small_data):
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables, SGD)
    assert int(train(new(), data=Batches(small_data, [9, 9]), epochs=1.4).step) == 7
    with pytest.raises(ValueError, match='data: its batches ended after 2 of 5 steps of epoch 2'):
        train(new(), data=Batches(small_data, [5, 2]), epochs=3)


@pytest.mark.parametrize('scan', [True, False])
def test_every_step_of_every_epoch_draws_anew(network, small_data, scan):
    """All labels alike and images made of the key alone: the loss tells one key from another."""
    model, variables, _ = network
    data = bj.Batch(jnp.asarray(small_data.image), jnp.zeros(80, jnp.int32))

    def noise(key, batch):
        shape = batch.image.shape
        return batch.replace(image=jnp.broadcast_to(jax.random.normal(key, (1, *shape[1:])), shape))

    def losses():
        found = []
        fit(
            create_train_state(model, variables, optax.set_to_zero()),
            data,
            jnp.array([1.0, 0.0, 0.0]),
            jax.random.key(0),
            epochs=2,
            batch_size=20,
            prepare=noise,
            scan=scan,
            on_step=lambda epoch, step, steps, metrics: found.append(float(metrics['loss'])),
        )
        return found

    first, again = losses(), losses()
    assert first == again
    assert len(set(first)) == len(first) == (2 if scan else 8)


def test_frozen_trunk_trains_heads_only(network, batch, getkey):
    model, variables, _ = network
    state = create_train_state(model, variables, optax.adam(0.1), frozen_trunk=True)
    for _ in range(3):
        state, _ = train_step(state, batch, jnp.ones(3), getkey())
    check_equal(state.model_state, {'batch_stats': variables['batch_stats']})
    for name, params in state.params.items():
        assert is_same(params, variables['params'][name]) == (name not in ('head1', 'head2')), name
    np.testing.assert_array_equal(model.apply(state.variables, batch.image)[2], model.apply(variables, batch.image)[2])


def test_baseline_initialisation_reports_what_it_did(network):
    model, variables, images = network
    baseline = bj.models.without_branches(model)
    trained = jax.tree.map(lambda x: x + 1, baseline.init(jax.random.key(9), images))
    trained['params']['head3'] = {'kernel': jnp.zeros((8, 99)), 'scale': jnp.zeros(2)}
    start, report = initialize_from_baseline(variables, trained)
    assert set(report.fresh) == {
        *(f'params/head{n}/{leaf}' for n in (1, 2, 3) for leaf in ('kernel', 'bias')),
    }
    assert set(report.left) == {'params/head3/kernel', 'params/head3/scale'}
    assert len(report.taken) + len(report.fresh) == len(jax.tree.leaves(variables))
    check_equal(start['params']['layer2'], trained['params']['layer2'])
    check_equal(start['batch_stats'], trained['batch_stats'])
    check_equal(start['params']['head1'], variables['params']['head1'])
    with pytest.raises(ValueError, match='baseline: none of its 1 arrays'):
        initialize_from_baseline(variables, {'params': {'other': jnp.zeros(3)}})


def test_strict_initialisation_takes_a_whole_baseline_or_none(network):
    model, variables, images = network
    baseline = bj.models.without_branches(model)
    trained = jax.tree.map(lambda x: x + 1, baseline.init(jax.random.key(9), images))
    start, report = initialize_from_baseline(variables, trained, strict=True)
    assert {path.split('/')[1] for path in report.fresh} == {'head1', 'head2'}
    check_equal(start['params']['head3'], trained['params']['head3'])

    def changed(module, **arrays):
        return {**trained, 'params': {**trained['params'], module: {**trained['params'].get(module, {}), **arrays}}}

    for bad, message in [
        (changed('head9', kernel=jnp.zeros(2)), r'1 of its \d+ arrays found no place .*params/head9/kernel \(2,\)\)'),
        (changed('layer2', kernel=jnp.zeros((8, 9))), r'params/layer2/kernel \(8, 9\)'),
        ({'params': trained['params']}, 'baseline: lacks batch_stats/norm1/mean, batch_stats/norm1/var, though'),
    ]:
        initialize_from_baseline(variables, bad)
        with pytest.raises(ValueError, match=message):
            initialize_from_baseline(variables, bad, strict=True)


def test_baseline_of_another_precision_gets_the_network_s_own(network):
    _, variables, _ = network
    start, _ = initialize_from_baseline(variables, jax.tree.map(lambda x: (x + 1).astype(jnp.float16), variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype('float32')}
    np.testing.assert_allclose(start['params']['layer2']['kernel'], variables['params']['layer2']['kernel'] + 1, 1e-3)


def test_given_variables_survive_donation(network, batch, getkey):
    model, variables, _ = network
    mine = jax.tree.map(jnp.copy, variables)
    train_step(create_train_state(model, mine), batch, jnp.ones(3), getkey())
    check_equal(mine, variables)


def test_adam_is_the_papers(network):
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


def test_epoch_order_is_pure_and_visits_everything_once():
    key = jax.random.key(0)
    first, again, other = (np.asarray(epoch_order(key, epoch, 20, 6)) for epoch in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (3, 6)
    assert len(np.unique(first)) == 18
    with pytest.raises(ValueError, match='batch_size: got 21, but there are only 20'):
        epoch_order(key, 0, 20, 21)


def test_bfloat16_computation_trains_float32_parameters(batch, getkey):
    dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)
    model = bj.BranchyNet(
        stages=((bj.models.layers.flatten, dense(16), nn.relu), dense(16)), exits=(dense(3), dense(3))
    )
    state = create_train_state(model, model.init(getkey(), batch.image), optax.adam(0.02))
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, batch, jnp.ones(2), getkey())
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.7 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_bad_batches_are_refused(network, batch, getkey):
    model, variables, _ = network
    state = create_train_state(model, variables, SGD)
    with pytest.raises(ValueError, match='exit_weights: expected one weight for each of the 3 exits'):
        train_step(state, batch, jnp.ones(2), getkey())
    with pytest.raises(ValueError, match='labels: expected integers'):
        train_step(state, batch.replace(label=batch.image[:, 0, 0, 0]), jnp.ones(3), getkey())
    with pytest.raises(ValueError, match='images: expected a float dtype'):
        train_step(state, batch.replace(image=batch.image.astype(jnp.uint8)), jnp.ones(3), getkey())


def test_small_steps_accumulate_into_one_update(network, batch, getkey):
    """Two steps of eight are one of sixteen, but for BatchNorm, which sees eight at a time: here it is frozen."""
    model, variables, _ = network
    frozen = functools.partial(create_train_state, model, variables, frozen_trunk=True)
    whole, _ = train_step(frozen(SGD), batch, jnp.ones(3), getkey())
    state = frozen(optax.MultiSteps(SGD, 2).gradient_transformation())
    for rows in (slice(8), slice(8, None)):
        before = state.params['head1']['kernel'].copy()
        state, _ = train_step(state, jax.tree.map(lambda x, rows=rows: x[rows], batch), jnp.ones(3), getkey())
        assert (before == state.params['head1']['kernel']).all() == (rows == slice(8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, whole.params)


@pytest.mark.parametrize('placement', ['text', 'tuned'])
def test_a_grown_network_answers_as_before(placement):
    """Of 20 layers to 32; every exit, after as many blocks of the deeper network's stages, gives the same logits."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 8, 8, 3)).astype(np.float32)
    shallow, deep = (
        bj.models.create('b-resnet110', depth=depth, placement=placement, image_shape=(8, 8, 3)) for depth in (20, 32)
    )

    def variables(model, vectors):  # as if initialised or trained, without a program to compile
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        scale = {1: vectors, 2: 0.1, 4: 0.1}
        return jax.tree.map(lambda x: (scale[x.ndim] * generator.uniform(0.5, 1, x.shape)).astype(x.dtype), shapes)

    trained, fresh = variables(shallow, 1.0), variables(deep, 0.0)
    grown = bj.training.initialize_from_shallower(deep, fresh, shallow, trained)
    answers = (jax.jit(model.apply)(given, images) for model, given in ((deep, grown), (shallow, trained)))
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    blocks = [name for name in grown['params'] if name.startswith('block')]
    identities = [name for name in blocks if not grown['params'][name]['norm2']['scale'].any()]
    assert (len(blocks), len(identities)) == (15, 6)
    with pytest.raises(ValueError, match='it is the deeper'):
        bj.training.initialize_from_shallower(shallow, trained, deep, fresh)
    with pytest.raises(ValueError, match='shallower: has 1 exits, the network'):
        bj.training.initialize_from_shallower(deep, fresh, bj.models.without_branches(shallow), trained)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'epochs': -1}, 'epochs: got -1'),
        ({'epochs': float('nan')}, 'epochs: got nan'),
        ({'batch_size': 0}, 'batch_size: got 0'),
        ({'batch_size': 2.5}, 'batch_size: got 2.5'),
    ],
)
def test_impossible_settings_are_refused(network, train, options, message):
    model, variables, _ = network
    with pytest.raises(ValueError, match=message):
        train(create_train_state(model, variables, SGD), **{'epochs': 1, **options})


def test_impossible_batches_and_learning_rates_are_refused(getkey):
    with pytest.raises(ValueError, match='batch_size: got 0'):
        bj.training.epoch_order(getkey(), 0, 8, 0)
    for bad in (-1, float('nan')):
        with pytest.raises(ValueError, match='learning_rate: got'):
            bj.training.paper_adam(bad)
    assert bj.training.paper_adam(optax.constant_schedule(0.1)).init is not None


def test_labels_without_a_class_are_refused(network, train, small_data):
    model, variables, _ = network
    state = create_train_state(model, variables, SGD)
    bad = small_data.replace(label=small_data.label + 1)
    with pytest.raises(ValueError, match=r'labels: expected classes in \[0, 3\), got 1 to 3'):
        train(state, data=bad, epochs=1)
    smoothed = functools.partial(bj.losses.cross_entropy_per_exit, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r'labels: expected classes in \[0, 3\), got 1 to 3'):
        train(state, data=bad, epochs=1, loss=smoothed)


def test_other_tasks_bring_their_loss_and_their_metrics(network, batch, getkey):
    """Squared error against real targets: the gradient is that of the formula, the figures are those asked for."""
    model, variables, _ = network
    targets = jax.random.normal(getkey(), (16, 3))

    def squared_error(logits, targets):
        return jnp.stack([jnp.mean((z - targets) ** 2) for z in logits])

    state = create_train_state(model, variables, SGD)
    state, metrics = bj.training.train_step(
        state,
        bj.Batch(batch.image, targets),
        jnp.ones(3),
        getkey(),
        loss=squared_error,
        metrics=lambda logits, targets: {'exit_error': squared_error(logits, targets) ** 0.5},
    )
    assert set(metrics) == {'loss', 'exit_loss', 'exit_error'}
    np.testing.assert_allclose(metrics['exit_error'], np.sqrt(metrics['exit_loss']), rtol=1e-6)
