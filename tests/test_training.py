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
from branchy_jax.training import create_train_state, initialize_from_baseline, paper_adam, train_step
from branchy_jax.training.fit import take_steps

SGD = optax.sgd(0.1)
KEY = jax.random.key(0)


def check_close(result, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, expected)


def moved(params, before):
    """Returns the names of the modules with an array that differs."""
    same = {name: jax.tree.map(np.array_equal, params[name], before[name]) for name in params}
    return {name for name, equal in same.items() if not all(jax.tree.leaves(equal))}


@pytest.fixture
def batch(small_data):
    return augment(None, jax.tree.map(lambda values: jnp.asarray(values[:16]), small_data))


@pytest.fixture
def new(network):
    """Starts a training of the network of three exits."""
    return functools.partial(create_train_state, network[0], variables=network[1], optimizer=SGD)


def test_step_is_gradient_descent_on_the_weighted_sum(network, new, batch):
    model, variables, _ = network

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        mode = {'train': True, 'rngs': {'dropout': KEY}, 'mutable': ['batch_stats']}
        logits, _ = model.apply({**variables, 'params': params}, batch.image, **mode)
        losses = [optax.softmax_cross_entropy_with_integer_labels(z, batch.label).mean() for z in logits]
        return 0.5 * losses[0] + 0.25 * losses[1] + 2.0 * losses[2]

    loss, gradients = objective(variables['params'])
    given = jax.tree.map(jnp.copy, variables)
    state, metrics = train_step(new(variables=given), batch, jnp.array([0.5, 0.25, 2.0]), KEY)
    check_equal(given, variables)  # donation leaves the caller's arrays
    check_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradients))
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    assert int(state.step) == 1
    assert metrics['exit_loss'].shape == metrics['exit_accuracy'].shape == (3,)


def test_loss_of_an_exit_leaves_later_stages_alone(network, new, batch):
    """Loss n gives a gradient to the layers before exit n and to head n, and to no other."""
    reached = {'layer1', 'norm1'}
    for n in range(3):
        state, _ = train_step(new(), batch, jnp.zeros(3).at[n].set(1.0), KEY)
        assert moved(state.params, network[1]['params']) == reached | {f'head{n + 1}'}
        reached.add(f'layer{n + 2}')


class Branches(nn.Module):
    """A module with a list field, which has no hash."""

    parts: nn.Sequential

    def __call__(self, x):
        return self.parts.layers[0](x.reshape(len(x), -1)), self.parts(x.reshape(len(x), -1))


def test_equal_models_and_optimisers_trace_once(batch):
    """JAX compares the static fields of a state. Parameters are float32 in a bfloat16 computation, and learn."""
    dense, losses = functools.partial(nn.Dense, 3, dtype=jnp.bfloat16), []
    loss = chex.assert_max_traces(n=1)(lambda logits, labels: cross_entropy_per_exit(logits, labels))
    variables = Branches(nn.Sequential([dense(), nn.relu, dense()])).init(KEY, batch.image)
    for _ in range(30):
        model = Branches(nn.Sequential([dense(), nn.relu, dense()]))
        state = create_train_state(model, variables, paper_adam(0.02))
        state, metrics = train_step(state, batch, jnp.ones(2), KEY, loss=loss)
        variables = state.variables
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.9 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_training_learns_and_metrics_go_to_any_writer_as_numbers(new, train):
    written, averages = [], []
    state = train(
        new(),
        epochs=11.4,
        on_metrics=lambda step, scalars: written.append((step, scalars)),
        on_epoch=lambda epoch, state, metrics: averages.append((epoch, metrics, state)),
    )
    assert int(state.step) == 57
    assert [step for step, _ in written] == [*range(5, 56, 5), 57]  # the fraction of an epoch at the end, too
    assert [(epoch, int(kept.step)) for epoch, _, kept in averages] == [(n, 5 * n) for n in range(1, 12)]
    assert written[-1][1]['loss'] < 0.8 * written[0][1]['loss']
    first = averages[0][1]
    assert written[0][1]['exit_loss/2'] == float(first['exit_loss'][2])
    assert set(written[0][1]) == {
        'loss',
        *(f'{name}/{n}' for name in ('exit_loss', 'exit_accuracy') for n in range(3)),
    }
    assert {type(value) for _, scalars in written for value in scalars.values()} == {float}


OPTIMIZERS = {
    'keeps the parameters': optax.contrib.prodigy(),
    'value': optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=0)),
    'value_fn': optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)),
    'grad_fn': optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optax_transformation_trains_as_by_hand(batch, optimizer):
    """Whole batches: their order does not matter."""
    model = Branches(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3)]))
    variables = model.init(KEY, batch.image)

    def value_fn(params):
        return sum(cross_entropy_per_exit(model.apply({'params': params}, batch.image), batch.label))

    @jax.jit
    def by_hand(params, opt_state):
        value, grad = jax.value_and_grad(value_fn)(params)
        further = {'value': value, 'grad': grad, 'value_fn': value_fn}
        if optimizer is OPTIMIZERS['grad_fn']:
            further = {'grad_fn': lambda params, _: jax.grad(value_fn)(params)}
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grad, opt_state, params, **further)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = variables['params'], optimizer.init(variables['params'])
    for _ in range(3):
        params, opt_state = by_hand(params, opt_state)
    state = create_train_state(model, variables, optimizer)
    assert repr(state) == 'TrainState(step=0, 63 parameters, model=Branches)'
    state = bj.training.fit(state, batch, jnp.ones(2), KEY, epochs=3, batch_size=16)
    check_close(state.params, params)


class Streams(nn.Module):
    """Logits with noise, of a stream that training provides by its name."""

    always: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3)(x.reshape(len(x), -1))
        dropped = nn.Dropout(0.5, rng_collection='own', deterministic=not train)(x)
        if train or self.always:
            x = x + jax.random.normal(self.make_rng('noise'), x.shape)
        return x, dropped


def test_every_random_stream_gets_a_key(batch):
    model = Streams()
    variables = model.init(KEY, batch.image)

    def losses(key):
        state = create_train_state(model, variables, SGD)
        return np.asarray(train_step(state, batch, jnp.ones(2), jax.random.key(key))[1]['exit_loss'])

    first, again, other = map(losses, (0, 0, 1))
    assert ((first == again) & (first != other)).all()
    bj.inference.dense(model)(variables, batch.image, [0.1])
    with pytest.raises(ValueError, match='model: .* where no key is given.* needs PRNG for "noise"'):
        bj.inference.dense(Streams(always=True))(variables, batch.image, [0.1])


@pytest.mark.parametrize('scan', [False, True])
def test_a_training_that_diverges_is_refused_and_not_saved(new, train, tmp_path, scan):
    with pytest.raises(ValueError, match=f'loss: is NaN or infinite in epoch 1, by step {5 if scan else 2}; lower'):
        train(new(optimizer=optax.sgd(1e38)), epochs=1, scan=scan, directory=tmp_path, save_every=2)
    with pytest.raises(ValueError, match='state: has parameters that are NaN or infinite in epoch 1, by step 1'):
        train(new(optimizer=optax.scale(jnp.nan)), epochs=0.2, scan=scan)
    assert bj.checkpoint.restore(tmp_path, new()) is None


def test_scanned_epochs_are_epochs_step_by_step(new, train):
    calls, results = {True: [], False: []}, []
    for scan, seen in calls.items():
        results.append(train(new(), epochs=2, scan=scan, on_step=lambda *call, seen=seen: seen.append(call[:3])))
    check_close(*results)
    assert calls[True] == [(epoch, 5, 5) for epoch in range(2)]
    assert calls[False] == [(epoch, step, 5) for epoch in range(2) for step in range(1, 6)]


@pytest.mark.parametrize('steps', [1, 2])
def test_one_step_runs_in_no_loop(new, small_data, steps):
    """XLA:CPU compiles gradients of convolutions to slow code inside a loop, even one of a single turn."""
    order, keys = np.zeros((steps, 16), np.int32), jax.random.split(KEY, steps)
    options = {'mesh': None, 'augment': augment, 'exit_weights': jnp.ones(3)}
    program = take_steps.trace(new(), small_data, order, keys, **options).jaxpr
    assert any(equation.primitive.name == 'scan' for equation in program.eqns) == (steps > 1)


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


def test_a_stream_gives_an_epoch_as_many_steps_as_it_has(new, train, small_data):
    with pytest.raises(ValueError, match='data: its batches ended after 2 of 5 steps of epoch 2'):
        train(new(), data=Batches(small_data, [5, 2]), epochs=3)
    streams = [Batches(small_data, [9, 9]) for _ in range(2)]
    for stream in streams:
        assert int(train(new(), data=stream, epochs=1.4).step) == 7
    check_equal(*(stream.orders for stream in streams))  # a pure function of the key
    first, second = streams[0].orders
    assert (first[:2] != second).any()
    assert first.shape == (5, 16)
    assert np.unique(first).tolist() == list(range(80))


def test_every_step_of_every_epoch_draws_anew(new, train, small_data):
    """No parameter moves and all labels are equal: losses of exit 0 differ by augmentation, those of 2 by dropout."""
    options = {'data': bj.Batch(small_data.image, np.zeros(80, np.int32)), 'exit_weights': jnp.zeros(3), 'epochs': 2}

    def noise(key, batch):
        return batch.replace(image=jax.random.normal(key, batch.image.shape))

    def losses(augment, n):
        history = []
        train(new(), **options, augment=augment, on_step=lambda *call: history.append(float(call[-1]['exit_loss'][n])))
        return history

    for varies, n in ((noise, 0), (lambda key, batch: noise(KEY, batch), 2)):
        first = losses(varies, n)
        assert first == losses(varies, n)
        assert len(set(first)) == len(first) == 10


def test_frozen_trunk_trains_heads_only(network, new, batch):
    _, variables, images = network
    state = new(frozen_trunk=True, inputs=images)
    for _ in range(2):
        state, _ = train_step(state, batch, jnp.ones(3), KEY)
    check_equal(state.model_state, {'batch_stats': variables['batch_stats']})
    assert moved(state.params, variables['params']) == {'head1', 'head2'}
    with pytest.raises(ValueError, match='inputs: got None; frozen_trunk=True needs'):
        new(frozen_trunk=True)


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
    with_model = {'model': model, 'inputs': images}
    for options in ({}, with_model):
        start, report = initialize_from_baseline(variables, trained, strict=True, **options)
        assert {path.split('/')[1] for path in report.fresh} == {'head1', 'head2'}
        check_equal(start['batch_stats'], trained['batch_stats'])

    def changed(module, **arrays):
        return {**trained, 'params': {**trained['params'], module: {**trained['params'].get(module, {}), **arrays}}}

    without = {name: value for name, value in trained['params'].items() if name != 'layer2'}
    for bad, options, message in [
        (changed('head9', kernel=jnp.zeros(2)), {}, r'1 of its \d+ arrays match no array .*head9/kernel \(2,\), '),
        (changed('layer2', kernel=jnp.zeros((8, 9))), {}, r'params/layer2/kernel \(8, 9\)'),
        ({'params': trained['params']}, {}, 'trained: lacks batch_stats/norm1/mean, batch_stats/norm1/var, which'),
        # Only the network's program says that a whole module belongs to the trunk.
        ({**trained, 'params': without}, with_model, 'lacks params/layer2/bias, params/layer2/kernel, which belong'),
    ]:
        initialize_from_baseline(variables, bad)
        with pytest.raises(ValueError, match=message):
            initialize_from_baseline(variables, bad, strict=True, **options)


def test_adam_is_the_papers():
    params = {'w': jnp.array(1.0)}
    results = []
    for optimizer in (paper_adam(), optax.adam(1e-3, b1=0.99, b2=0.999)):
        first, state = optimizer.update({'w': 1.0}, optimizer.init(params))
        results.append((first, optimizer.update({'w': -3.0}, state)))
    check_equal(*results)
    assert (paper_adam(), hash(paper_adam())) == (paper_adam(1e-3), hash(paper_adam(1e-3)))
    assert paper_adam() != paper_adam(1e-2)
    for bad in (-1, float('nan')):
        with pytest.raises(ValueError, match='learning_rate: got'):
            paper_adam(bad)


def test_a_grown_network_answers_as_before():
    """From 14 layers to 20: every exit gives the same logits."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 8, 8, 3)).astype(np.float32)
    create = functools.partial(bj.models.create, 'b-resnet110', placement='tuned', image_shape=(8, 8, 3))
    shallow, deep = create(depth=14), create(depth=20)

    def variables(model, is_trained):  # as if initialised or trained, without a program to compile
        def value(path, leaf):
            if leaf.ndim == 1 and not is_trained:
                return np.full(leaf.shape, path[-1].key in ('scale', 'var'), np.float32)
            return np.float32(generator.uniform(0.5, 1, leaf.shape) * (1 if leaf.ndim == 1 else 0.1))

        return jax.tree_util.tree_map_with_path(value, jax.eval_shape(model.init, KEY, images))

    trained, fresh = variables(shallow, True), variables(deep, False)
    grown = bj.training.initialize_from_shallower(deep, fresh, shallow, trained)
    answers = (jax.jit(model.apply)(given, images) for model, given in ((deep, grown), (shallow, trained)))
    check_close(*answers)
    blocks = [name for name in grown['params'] if name.startswith('block')]
    identities = [name for name in blocks if not grown['params'][name]['norm2']['scale'].any()]
    assert (len(blocks), len(identities)) == (9, 3)
    for bad in (deep.clone(depth=26), shallow.clone(placement='released'), bj.models.without_branches(shallow)):
        with pytest.raises(ValueError, match='shallower: expected the same ResNet with fewer blocks'):
            bj.training.initialize_from_shallower(deep, fresh, bad, trained)
    with pytest.raises(ValueError, match='trained: has no .*/block1; give the variables of the shallower'):
        bj.training.initialize_from_shallower(deep, fresh, shallow, {'params': {}})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'epochs': float('nan')}, 'epochs: got nan'),
        ({'batch_size': 2.5}, 'batch_size: got 2.5'),
        ({'batch_size': 81}, 'batch_size: got 81 for 80 examples'),
        ({'save_every': 0}, 'save_every: got 0'),
        ({'exit_weights': jnp.ones(2)}, 'exit_weights: expected one for each of 3 exits'),
        ({'data': bj.Batch(jnp.ones((80, 4, 4, 1)), jnp.zeros(79, int))}, 'data: expected arrays that all lead with B'),
        ({'data': bj.Batch(jnp.ones((80, 4, 4, 1)), jnp.full(80, 3))}, r'labels: expected classes in \[0, 3\), got 3'),
        (
            {'data': bj.Batch(np.ones((80, 2)).tolist(), np.ones(80))},
            r'data: .* shape \(\) at data.image\[0\]\[0\] and \(\) at data.image\[0\]\[0\]; what all rows',
        ),
        *(({'data': kind(zip('ab', 'cd', strict=True))}, f'data: got {kind.__name__}') for kind in (tuple, dict, list)),
        *(({'exit_weights': jnp.array([1, 1, bad])}, 'exit_weights: got') for bad in (-0.1, jnp.nan, jnp.inf)),
    ],
)
def test_impossible_settings_are_refused(new, train, options, message):
    loss = lambda z, y: functools.partial(cross_entropy_per_exit, label_smoothing=0.1)(z, y)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        train(new(), **{'epochs': 1, 'loss': loss, **options})


def test_bad_arguments_are_refused(network, new, batch):
    _, variables, _ = network
    with pytest.raises(ValueError, match='labels: expected integers'):
        train_step(new(), batch.replace(label=batch.image[:, 0, 0, 0]), jnp.ones(3), KEY)
    _, metrics = train_step(new(), batch.replace(label=batch.label - 1), jnp.ones(3), KEY)  # under jit: no values
    assert np.isnan(metrics['exit_loss']).all()
    with pytest.raises(ValueError, match="variables: got .*'layer1'.*; give what model.init returned"):
        new(variables=variables['params'])


def test_other_tasks_bring_their_loss_and_their_metrics(new, batch):
    """Squared error against real targets, with its own metric."""

    def squared_error(logits, targets):
        return jnp.stack([jnp.mean((z - targets) ** 2) for z in logits])

    given = batch.replace(label=jax.random.normal(KEY, (16, 3)))
    metric = lambda logits, targets: {'exit_error': squared_error(logits, targets) ** 0.5}  # noqa: E731
    _, metrics = train_step(new(), given, jnp.ones(3), KEY, loss=squared_error, metrics=metric)
    assert set(metrics) == {'loss', 'exit_loss', 'exit_error'}
    np.testing.assert_allclose(metrics['exit_error'], np.sqrt(metrics['exit_loss']), rtol=1e-6)
