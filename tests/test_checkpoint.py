import jax
import jax.numpy as jnp
import numpy as np
import pytest

from branchy_jax import checkpoint
from branchy_jax.checkpoint import write_atomically


@pytest.fixture
def state():
    return {'weights': jnp.arange(6.0).reshape(2, 3), 'step': jnp.int32(4)}


def check_same(result, expected):
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(lambda x: x.dtype, expected)


def test_newest_checkpoint_comes_back(tmp_path, state):
    state['many'] = [jnp.float32(n) for n in range(11)]  # their paths sort in another order
    assert checkpoint.restore(tmp_path / 'never', state) is None
    assert not (tmp_path / 'never').exists()
    checkpoint.save(tmp_path, 1, jax.tree.map(jnp.zeros_like, state))
    (tmp_path / '2.orbax-checkpoint-tmp').mkdir()  # what a kill in the middle of a save leaves
    assert checkpoint.restore(tmp_path, state)[0] == 1
    checkpoint.save(tmp_path, 3, state)
    step, result, _ = checkpoint.restore(tmp_path, state)
    assert step == 3
    check_same(result, state)
    assert [path.name for path in tmp_path.iterdir()] == ['3']  # otherwise a full disk would stay full


def test_another_structure_shape_or_dtype_is_refused(tmp_path, state):
    checkpoint.save(tmp_path, 1, state)
    for other, message in (
        ({**state, 'weights': jnp.zeros((5, 3))}, r'float32\[2, 3\] in the checkpoint'),
        ({**state, 'weights': state['weights'].astype(jnp.bfloat16)}, 'float32.*checkpoint, .*bfloat16'),
        ({**state, 'step': jnp.float32(4)}, 'int32.* in the checkpoint, .*float32'),
        ({'kernel': state['weights'], 'step': state['step']}, 'kernel'),
        ([state['step'], state['weights']], r'\[0\]'),
    ):
        with pytest.raises(ValueError, match=f'directory: cannot resume.*{message}'):
            checkpoint.restore(tmp_path, other)


def test_an_earlier_number_is_refused_and_leaves_the_checkpoint(tmp_path, state):
    checkpoint.save(tmp_path, 5, state, recipe={'key': 1})
    for step in (3, 5):
        with pytest.raises(ValueError, match=f'step: got {step}, but .* holds checkpoint 5'):
            checkpoint.save(tmp_path, step, jax.tree.map(jnp.zeros_like, state), recipe={'key': 2})
    check_same(checkpoint.restore(tmp_path, state, recipe={'key': 1})[1], state)
    with pytest.raises(ValueError, match='key: 1 in the checkpoint, 2 given'):
        checkpoint.restore(tmp_path, state, recipe={'key': 2})


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # orbax drops coroutines when it fails
def test_damaged_checkpoint_is_refused(tmp_path, state):
    checkpoint.save(tmp_path, 1, state)
    for path in (tmp_path / '1').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    with pytest.raises(ValueError, match='damaged'):
        checkpoint.restore(tmp_path, state)


def test_weights_round_trip_and_a_damaged_file_is_refused(tmp_path, state):
    variables = {'params': {'conv': {'kernel': state['weights'].T}}, 'batch_stats': {'mean': jnp.ones(3, jnp.bfloat16)}}
    variables['params'].update(scale=jnp.float32(3), nothing=jnp.zeros((0, 2)))
    path = tmp_path / 'new' / 'w.safetensors'
    checkpoint.save_weights(path, variables, {'network': 'b-lenet'})
    result, metadata = checkpoint.load_weights(path)
    check_same(result, variables)
    assert metadata == {'network': 'b-lenet'}
    path.write_bytes(path.read_bytes()[:-5])
    for bad in (path, tmp_path / 'missing.safetensors', tmp_path):
        with pytest.raises(ValueError, match='path: cannot read weights'):
            checkpoint.load_weights(bad)


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / 'report.txt'
    path.write_text('old')

    def half_a_file(temporary):
        temporary.write_text('half')
        raise OSError(28, 'No space left on device')

    def half_a_folder(temporary):
        temporary.mkdir()
        half_a_file(temporary / 'inner')

    for fail in (half_a_file, half_a_folder):
        with pytest.raises(OSError, match='No space'):
            write_atomically(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [('report.txt', 'old')]
