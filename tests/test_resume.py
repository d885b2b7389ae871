"""A training resumes where it stopped, to the bit and from any moment, and refuses checkpoints of another training."""

import functools
import os
import resource
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import augment, check_equal

import branchy_jax as bj
from branchy_jax.training import create_train_state

SGD = optax.sgd(0.1)


@pytest.fixture
def new(network):
    """Returns a fresh state of the same weights."""
    return lambda optimizer=SGD: create_train_state(*network[:2], optimizer)


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt: no handler may catch it."""


@pytest.mark.parametrize(
    ('moment', 'scan'),
    [('before a save', False), ('after a save', False), ('before a save', True)],
)
def test_interrupted_run_ends_where_an_uninterrupted_one_does(new, train, tmp_path, monkeypatch, moment, scan):
    """Without scan the run is killed within an epoch of five steps, at step 6 of 20; every third step is saved."""
    train = functools.partial(train, epochs=4, scan=scan)
    expected = train(new())
    save, numbers, every = bj.checkpoint.save, [], 5 if scan else 3

    def interrupted(directory, step, state, **options):
        numbers.append(step)
        assert step == int(state.step)
        if step == 2 * every and len(numbers) == 2:
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


@pytest.mark.parametrize(
    ('options', 'planned'),
    [
        ({'scan': True, 'save_every': 8}, [10, 20]),
        ({'scan': False}, [3, 5, 8, 10, 13, 15, 18, 20]),  # the end of an epoch, and after more than four minutes
    ],
)
def test_states_are_saved_as_soon_as_they_are_due(new, train, tmp_path, monkeypatch, options, planned):
    numbers, clock = [], iter(range(0, 10**6, 100))
    place = sys.modules['branchy_jax.training.fit']
    monkeypatch.setattr(place, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))  # 100 seconds a call
    monkeypatch.setattr(bj.checkpoint, 'save', lambda directory, step, state, **options: numbers.append(step))
    train(new(), epochs=4, directory=tmp_path, **options)
    assert numbers == planned


def test_phases_share_a_directory(new, train, tmp_path):
    """Each call starts where the one before ended, and a finished run trains no further."""

    def darker(key, batch):
        return batch.replace(image=augment(key, batch).image / 2)

    def both(**options):
        return train(train(new(), epochs=1.4, **options), epochs=2, augment=darker, **options)

    whole, steps = both(), []
    for expected in ([*range(1, 11)], []):
        steps.clear()
        resumed = both(directory=tmp_path, scan=False, on_step=lambda epoch, n, *_: steps.append(5 * epoch + n))
        assert steps == expected
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resumed.params, whole.params)


def test_checkpoints_of_another_recipe_or_optimiser_are_refused(new, train, small_data, tmp_path):
    train(new(), epochs=1, directory=tmp_path)
    for change, message in (
        ({'batch_size': 8}, 'batch_size: 16 in the checkpoint, 8 given'),
        ({'key': jax.random.key(8)}, 'seed or key: '),
        ({'exit_weights': jnp.zeros(3)}, 'exit_weights: '),
        ({'data': small_data.replace(image=255 - small_data.image)}, 'data: '),
        ({'data': small_data.replace(label=small_data.label[::-1])}, 'labels: '),
        ({'loss': functools.partial(bj.losses.cross_entropy_per_exit, label_smoothing=0.1)}, 'loss: '),
        ({'state': new(optax.sgd(0.2))}, 'learning_rate: '),
        ({'state': new(optax.sgd(optax.linear_schedule(0.1, 0.2, 99)))}, 'learning_rate: '),
        ({'state': new(optax.rmsprop(0.1))}, 'optimizer or learning_rate: '),
        ({'state': new(optax.adam(0.1))}, 'optimizer or learning_rate: '),
    ):
        with pytest.raises(ValueError, match=f'cannot resume from checkpoint 5 .* of another recipe.*{message}'):
            train(**{'state': new(), 'epochs': 2, 'directory': tmp_path, **change})
    alike = bj.Batch(*map(np.array, (small_data.image, small_data.label)))
    loss = lambda logits, labels: bj.losses.cross_entropy_per_exit(logits, labels)  # noqa: E731
    assert int(train(new(optax.sgd(0.1)), data=alike, loss=loss, epochs=2, directory=tmp_path).step) == 10
    with pytest.raises(ValueError, match='epochs: got 1.5, but the checkpoint in .* is of a training for 2'):
        train(new(), epochs=1.5, directory=tmp_path)
    assert int(train(new(), epochs=1, directory=tmp_path).step) == 10  # the first phase, again
    (tmp_path / 'recipe.json').write_text('{}')
    with pytest.raises(ValueError, match='directory: .* holds checkpoints of version 0.2'):
        train(new(), epochs=2, directory=tmp_path)


def test_a_folder_in_use_is_refused(new, train, tmp_path):
    with bj.checkpoint.locked(tmp_path), pytest.raises(ValueError, match=f'is in use by process {os.getpid()}'):
        train(new(), epochs=1, directory=tmp_path)
    train(new(), epochs=1, directory=tmp_path)


def test_a_full_disk_loses_nothing(new, train, tmp_path):
    """The system refuses files beyond a few bytes, as a full disk would; with space again, the same call resumes."""
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
