"""Files: orbax for resuming a run, safetensors for weights that others load. Never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from branchy_jax.types import Variables

__all__ = ['load_weights', 'save_weights']

State = TypeVar('State')

_RECIPE = 'recipe.json'


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Locks a folder against other processes of this machine, until the block or the process ends.

    Of several processes that share one run, the first one locks the folder for all.

    Raises:
        ValueError: if another process has locked the folder.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if jax.process_index() > 0 or os.name == 'nt':  # Windows has no fcntl, so folders are not locked there
        yield
        return
    import fcntl

    with (path / '.lock').open('a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            process = lock.read().strip() or '?'
            raise ValueError(f'directory: {path} is in use by process {process}; wait, or choose another') from error
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield


def save(directory: Path | str, step: int, state: State, *, recipe: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint and removes older ones. A kill or a full disk at any moment leaves one complete checkpoint.

    Args:
        directory: the folder of this run's checkpoints.
        step: number of the checkpoint, above the numbers of earlier ones.
        state: any pytree of arrays.
        recipe: JSON-able settings that `restore` compares.

    Raises:
        OSError: if the checkpoint cannot be written; the earlier one is still complete.
        ValueError: if the folder holds a checkpoint of this or a later number, or ``recipe`` is not JSON-able.
    """
    import orbax.checkpoint as ocp

    path = Path(directory)
    try:
        text = json.dumps(dict(recipe or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f'recipe: {error}; give numbers, text, and lists or dicts of them') from error
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for partial in path.glob('*.orbax-checkpoint-tmp*'):  # left by a kill or a full disk
                shutil.rmtree(partial, ignore_errors=True)
        with _manager(path) as manager:
            newest = manager.latest_step()
            if newest is None or newest < step:  # otherwise orbax would silently write nothing
                if recipe is not None:
                    write_atomically(path / _RECIPE, lambda temporary: temporary.write_text(text))
                manager.save(step, args=ocp.args.StandardSave(_arrays(state)))
    except Exception as error:  # orbax and tensorstore wrap system errors in many classes
        message = f'directory: cannot write checkpoint {step} to {path} ({error!r:.300}); the earlier one is complete'
        raise OSError(f'{message}: free some space and run the same command to resume') from error
    if newest is not None and newest >= step:
        raise ValueError(f'step: got {step}, but {path} holds checkpoint {newest}; give a higher number')


def restore(directory: Path | str, like: State, *, recipe: Mapping[str, Any] | None = None) -> tuple[int, State] | None:
    """Reads the newest checkpoint.

    Args:
        directory: as given to `save`.
        like: a pytree of the same structure, shapes and dtypes, which also gives the static fields of the result. Each
            array is put on the devices of its counterpart in ``like``, however many devices wrote it.
        recipe: the settings that the checkpoint must have been saved with.

    Returns:
        The number of the checkpoint and the state, or ``None`` if there is none.

    Raises:
        ValueError: if the checkpoint cannot be read, does not match ``like``, or was saved with another recipe.
    """
    import orbax.checkpoint as ocp

    path = Path(directory)
    if not path.is_dir():
        return None
    with _manager(path) as manager:
        if (step := manager.latest_step()) is None:
            return None
        try:
            if recipe is not None and (path / _RECIPE).exists():
                _check_equal(json.loads((path / _RECIPE).read_text()), recipe)
            target = jax.tree.map(_spec, _arrays(like))
            _check_equal(*(jax.tree.map(_kind, dict(tree)) for tree in (manager.item_metadata(step).tree, target)))
            arrays = manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many classes
            reasons = 'it is damaged, or of another recipe, network, optimiser or version'
            message = f'directory: cannot resume from checkpoint {step} in {path}, because {reasons} ({error!r:.300})'
            raise ValueError(f'{message}; give those that wrote it, or another directory') from error
    # Copies: buffers that orbax allocated may not be donated on every backend.
    return step, jax.tree.unflatten(jax.tree.structure(like), [jnp.array(arrays[name]) for name in _arrays(like)])


def _check_equal(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in sorted({*stored, *given}):
        if stored.get(name) != given.get(name):
            raise ValueError(f'{name}: {stored.get(name)} in the checkpoint, {given.get(name)} given')


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None))


def _kind(leaf: Any) -> str:
    """Returns dtype and shape, which must be equal: orbax would cast to another dtype."""
    return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _arrays(state: State) -> dict[str, jax.Array]:
    """Returns the arrays by path, which also records their structure."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _manager(path: Path):  # noqa: ANN202 - orbax is imported on use
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler())


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
        ValueError: if the file is missing, truncated or no safetensors file.
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
    """Calls ``write`` with a temporary path beside ``path``, then renames the file: readers never see a partial file.

    Args:
        path: the file to write.
        write: writes a whole file at its argument.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}-{uuid.uuid4().hex}{path.suffix}')
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
