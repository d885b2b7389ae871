"""A training resumes where it stopped, to the bit and from any moment, and refuses checkpoints of another training."""

import functools
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import augment, check_equal

import branchy_jax as bj
from branchy_jax.training import create_train_state

SGD = optax.sgd(0.1)


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt: no handler may catch it."""


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('moment', ['before a save', 'in a save', 'after a save'])
def test_interrupted_run_ends_where_an_uninterrupted_one_does(network, train, tmp_path, monkeypatch, moment, scan):
    """Without scan the run is killed within an epoch of five steps, at step 6 of 20; every third step is saved."""
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables, SGD)
    train = functools.partial(train, epochs=4, scan=scan)
    expected = train(new())
    save, numbers, every = bj.checkpoint.save, [], 5 if scan else 3

    def interrupted(directory, step, state, **options):
        numbers.append(step)
        assert step == int(state.step)
        if step == 2 * every and len(numbers) == 2:
            if moment == 'in a save':
                (tmp_path / f'{step}.orbax-checkpoint-tmp').mkdir()
            if moment == 'after a save':
                save(directory, step, state, **options)
            raise Killed
        save(directory, step, state, **options)

    monkeypatch.setattr(bj.checkpoint, 'save', interrupted)
    options = {'directory': tmp_path, 'save_every': every}
    with pytest.raises(Killed):
        train(new(), **options)
    resumed = train(new(), **options)
    planned = [*range(every, 21, every)] + ([] if scan else [20])
    assert numbers == planned if moment == 'after a save' else planned[:2] + planned[1:]
    for part in ('params', 'opt_state', 'model_state', 'step'):
        check_equal(getattr(resumed, part), getattr(expected, part))


@pytest.mark.parametrize(('every', 'planned'), [(3, [5, 10, 15, 20]), (8, [10, 20])])
def test_scanned_epochs_are_saved_as_soon_as_they_are_due(network, train, tmp_path, monkeypatch, every, planned):
    model, variables, _ = network
    numbers = []
    monkeypatch.setattr(bj.checkpoint, 'save', lambda directory, step, state, **options: numbers.append(step))
    state = create_train_state(model, variables, SGD)
    train(state, epochs=4, scan=True, directory=tmp_path, save_every=every)
    assert numbers == planned


def test_long_epochs_are_saved_by_the_clock(network, train, tmp_path, monkeypatch):
    model, variables, _ = network
    numbers, clock = [], iter(range(0, 10**6, 100))
    monkeypatch.setattr('time.monotonic', lambda: next(clock))  # every call is 100 seconds later
    monkeypatch.setattr(bj.checkpoint, 'save', lambda directory, step, state, **options: numbers.append(step))
    train(create_train_state(model, variables, SGD), epochs=2, scan=False, directory=tmp_path)
    assert numbers == [3, 5, 8, 10]  # the end of an epoch, and more than four minutes after the last


def test_phases_share_a_directory(network, train, tmp_path):
    """Each call starts where the one before ended, and a finished run trains no further."""
    model, variables, _ = network

    def darker(key, batch):
        return batch.replace(image=augment(key, batch).image / 2)

    def both(**options):
        state = train(create_train_state(model, variables, SGD), epochs=1.4, **options)
        return train(state, epochs=2, augment=darker, **options)

    whole, steps = both(), []
    assert int(whole.step) == 10
    for expected in ([6, 7, 8, 9, 10], []):
        steps.clear()
        resumed = both(directory=tmp_path, scan=False, on_step=lambda epoch, n, *_: steps.append(5 * epoch + n))
        assert steps[-len(expected) :] == expected or not expected
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resumed.params, whole.params)
    assert not steps


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'batch_size': 8}, 'batch_size: 16 in the checkpoint, 8 given'),
        ({'key': jax.random.key(8)}, 'key: '),
        ({'exit_weights': jnp.zeros(3)}, 'exit_weights: '),
    ],
)
def test_checkpoints_of_another_recipe_are_refused(network, train, tmp_path, change, message):
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables, SGD)
    train(new(), epochs=1, directory=tmp_path)
    with pytest.raises(ValueError, match=f'cannot resume from checkpoint 5 .* of another recipe.*{message}'):
        train(new(), epochs=2, directory=tmp_path, **change)
    assert int(train(new(), epochs=2, directory=tmp_path).step) == 10


def test_checkpoints_of_another_optimiser_or_version_are_refused(network, train, tmp_path):
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables)
    state = train(new(optax.sgd(0.1, momentum=0.9)), epochs=1, directory=tmp_path / 'momentum')
    with pytest.raises(ValueError, match='directory: cannot resume from checkpoint 5'):
        train(new(optax.rmsprop(0.1)), epochs=2, directory=tmp_path / 'momentum')
    bj.checkpoint.save(tmp_path / 'epochs', 1, state)
    with pytest.raises(ValueError, match='directory: .* is of version 0.1, which numbered checkpoints by epochs'):
        train(new(optax.sgd(0.1, momentum=0.9)), epochs=2, directory=tmp_path / 'epochs')


LOCK = """
    import sys, time
    from branchy_jax.checkpoint import locked

    with locked(sys.argv[1]):
        print('locked', flush=True)
        time.sleep(60)
"""


def python(script, *arguments, **options):
    command = [sys.executable, '-c', textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, **options)


def test_a_folder_in_use_is_refused(network, train, tmp_path):
    model, variables, _ = network
    other = python(LOCK, tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'locked\n'
        with pytest.raises(ValueError, match=f'is in use by process {other.pid}'):
            train(create_train_state(model, variables, SGD), epochs=1, directory=tmp_path)
    finally:
        other.kill()
        other.communicate()
    train(create_train_state(model, variables, SGD), epochs=1, directory=tmp_path)


def test_a_full_disk_loses_nothing(network, train, tmp_path):
    """The system refuses files beyond a few bytes, as a full disk would; with space again, the same call resumes."""
    model, variables, _ = network
    new = functools.partial(create_train_state, model, variables, SGD)
    train(new(), epochs=1, directory=tmp_path)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match='cannot write checkpoint 10'):
            train(new(), epochs=2, directory=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    started = []
    resumed = train(new(), epochs=2, directory=tmp_path, on_epoch=lambda epoch, *_: started.append(epoch))
    assert started == [2]
    check_equal(resumed.params, train(new(), epochs=2).params)


SCRIPT = """
    import sys, jax, jax.numpy as jnp, flax.linen as nn
    import branchy_jax as bj

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            return nn.Dense(4)(x), nn.Dense(4)(nn.Dense(6)(x))

    directory, result, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    images = jax.random.randint(jax.random.key(0), (32, 4), 0, 256).astype(jnp.uint8)
    data = bj.Batch(images, images.argmax(-1))
    state = bj.training.create_train_state(Net(), Net().init(jax.random.key(1), images / 255.0))
    state = bj.training.fit(
        state, data, jnp.ones(2), jax.random.key(2), epochs=epochs, directory=directory, batch_size=8,
        augment=lambda key, batch: batch.replace(image=batch.image / 255.0),
    )
    bj.checkpoint.save_weights(result, state.variables)
"""


def test_run_killed_by_the_system_resumes(tmp_path):
    """SIGKILL at an arbitrary moment, then the same command again."""

    def start(name):
        environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
        return python(SCRIPT, tmp_path / name, tmp_path / f'{name}.st', 60, env=environment)

    untouched, victim = start('untouched'), start('victim')
    deadline = time.monotonic() + 120
    while not list((tmp_path / 'victim').glob('[1-9]*')) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, 'the run ended before it could be killed'
    assert not (tmp_path / 'victim.st').exists()
    assert start('victim').wait(120) == 0
    assert untouched.wait(120) == 0
    check_equal(*(bj.checkpoint.load_weights(tmp_path / f'{name}.st')[0] for name in ('untouched', 'victim')))
