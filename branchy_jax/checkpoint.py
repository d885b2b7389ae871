"""Files: orbax for resuming a run, safetensors for weights that others load. Never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from branchy_jax.types import Variables

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has none; folders are not locked there
    fcntl = None

State = TypeVar('State')

_LOCK = '.lock'
_RECIPE = 'recipe.json'


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder, until the block ends or the process dies.

    Of several processes that share one run, the first one alone holds it.

    Raises:
        ValueError: another process holds the folder.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if jax.process_index() > 0 or fcntl is None:
        yield
        return
    with (path / _LOCK).open('a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise ValueError(
                f'directory: {path} is in use by process {lock.read() or "?"}; wait for it, stop it, or choose another'
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def save(directory: Path | str, step: int, state: State, *, recipe: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint, then drops the older ones; a kill or a full disk at any moment leaves one that is whole.

    Args:
        directory: where this run's checkpoints live.
        step: number of the checkpoint, above those before.
        state: any pytree of arrays.
        recipe: what `restore` is to insist on, as JSON holds it.

    Raises:
        OSError: the checkpoint cannot be written; the one before it is still there.
        ValueError: the folder holds a checkpoint of this number or a later one; a recipe that is not JSON.
    """
    import orbax.checkpoint as ocp

    path = Path(directory)
    try:
        told = json.dumps(dict(recipe or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f'recipe: {error}; give numbers, text, and lists or dicts of them') from error
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for half in path.glob('*.orbax-checkpoint-tmp*'):  # what a kill or a full disk left behind
                shutil.rmtree(half, ignore_errors=True)
        with _manager(path) as manager:
            newest = manager.latest_step()
            ascends = newest is None or newest < step
            if ascends:  # otherwise orbax would write nothing, and say nothing
                if recipe is not None:
                    write_atomically(path / _RECIPE, lambda temporary: temporary.write_text(told))
                manager.save(step, args=ocp.args.StandardSave(_arrays(state)))
    except Exception as error:  # orbax and tensorstore wrap what the system said in many kinds
        raise OSError(
            f'directory: cannot write checkpoint {step} to {path} ({type(error).__name__}: {str(error)[:300]}); the '
            'one before it is whole: make room, and the same command goes on from there'
        ) from error
    if not ascends:
        raise ValueError(f'step: got {step}, but {path} holds checkpoint {newest}; numbers ascend')


def restore(directory: Path | str, like: State, *, recipe: Mapping[str, Any] | None = None) -> tuple[int, State] | None:
    """Reads the newest checkpoint.

    Args:
        directory: as given to `save`.
        like: a pytree of the same structure, shapes and dtypes; its static fields are kept. What is read is laid on
            the devices that its arrays lie on, however many had written it.
        recipe: what the checkpoint must have been saved with.

    Returns:
        The number of the checkpoint and the state, or ``None`` if there is none.

    Raises:
        ValueError: the checkpoint cannot be read, holds something else than ``like``, or was saved with another recipe.
    """
    import orbax.checkpoint as ocp

    if not Path(directory).is_dir():
        return None
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        if recipe is not None:
            _check_recipe(Path(directory), recipe)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None))
            for name, leaf in _arrays(like).items()
        }
        try:
            _check_arrays(manager.item_metadata(step).tree, target)
            arrays = manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many kinds; all mean: not this state
            raise ValueError(
                f'directory: cannot resume from checkpoint {step} in {directory}: it is damaged, or of another '
                f'network, optimiser or version ({type(error).__name__}: {str(error)[:300]}); '
                'delete the directory to start over'
            ) from error
    # Copies: buffers that orbax allocated may not be donated on every backend.
    return step, jax.tree.unflatten(jax.tree.structure(like), [jnp.array(arrays[name]) for name in target])


def _check_recipe(directory: Path, recipe: Mapping[str, Any]) -> None:
    path = directory / _RECIPE
    if not path.exists():
        return
    found = json.loads(path.read_text())
    other = sorted(name for name in {*found, *recipe} if found.get(name) != recipe.get(name))
    if other:
        told = '; '.join(f'{name}: {found.get(name)} there, {recipe.get(name)} here' for name in other)
        raise ValueError(
            f'directory: the checkpoint in {directory} is of another recipe ({told}); give that recipe, or another '
            'directory'
        )


def _check_arrays(found: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Refuses arrays of other names, shapes or dtypes, which orbax would cast."""
    kinds = [
        {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in tree.items()}
        for tree in (found, expected)
    ]
    other = sorted(name for name in {*found, *expected} if kinds[0].get(name) != kinds[1].get(name))
    if other:
        there, here = (kind.get(other[0], 'nothing') for kind in kinds)
        raise ValueError(f'{other[0]}: {there} there, {here} here')


def _arrays(state: State) -> dict[str, jax.Array]:
    """Returns the arrays by their place, which tells the structure that holds them, too."""
    return {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _manager(directory: Path | str):  # noqa: ANN202 - orbax is imported on use
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(
        Path(directory).absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )


def save_weights(path: Path | str, variables: Variables, metadata: dict[str, str] | None = None) -> None:
    """Writes variables as a safetensors file, atomically.

    Args:
        path: the file to write; its folder is made if missing.
        variables: nested dicts of arrays; stored under names such as ``params/conv1/kernel``.
        metadata: text stored in the file's header.
    """
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(dict(variables), sep='/')
    arrays = {name: np.asarray(value, order='C') for name, value in flat.items()}
    write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))


def load_weights(path: Path | str) -> tuple[Variables, dict[str, str]]:
    """Reads variables and metadata that `save_weights` wrote.

    Raises:
        ValueError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework='numpy') as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f'path: cannot read weights from {path}: {error}; expected a safetensors file') from error
    return traverse_util.unflatten_dict({name: jnp.asarray(value) for name, value in flat.items()}, sep='/'), metadata


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, then renames: no reader ever sees half a file.

    Args:
        path: the file that results.
        write: writes a whole file at the path it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}-', suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
