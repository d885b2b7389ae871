"""Files: orbax for resuming a run, safetensors for weights that others load. Never pickle."""

import contextlib
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
from flax.core import meta

from branchy_jax.types import Variables

__all__ = ['load_weights', 'save_weights']

State = TypeVar('State')


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Locks a folder against other processes of this machine, until the block or the process ends.

    Of several processes that share one run, the first one locks the folder for all.

    Raises:
        ValueError: if another process has locked the folder.
    """
    path = Path(directory) / '.lock'
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() > 0 or os.name == 'nt':  # Windows has no fcntl, so folders are not locked there
        yield
        return
    import fcntl

    with path.open('a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            process = path.read_text().strip() or '?'
            raise ValueError(f'directory: {directory} is in use by process {process}; wait, or give another') from error
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
        ValueError: if the folder holds a checkpoint of this or a later number.
    """
    import orbax.checkpoint as ocp

    try:
        with _manager(directory) as manager:
            newest = manager.latest_step()
            arrays = ocp.args.StandardSave(_arrays(state))
            saved = manager.save(step, args=arrays, custom_metadata=dict(recipe or {}))
    except Exception as error:  # orbax and tensorstore wrap system errors in many classes
        message = f'directory: cannot write checkpoint {step} to {directory} ({error!r:.300})'
        advice = 'the earlier one is complete: free some space and run the same command to resume'
        raise OSError(f'{message}; {advice}') from error
    if not saved:
        raise ValueError(f'step: got {step}, but {directory} holds checkpoint {newest}; give a higher number')


def restore(
    directory: Path | str, like: State, *, recipe: Mapping[str, Any] | None = None
) -> tuple[int, State, Mapping[str, Any]] | None:
    """Reads the newest checkpoint.

    Args:
        directory: as given to `save`.
        like: a pytree of the same structure, shapes and dtypes, which also gives the static fields of the result. Each
            array is put on the devices of its counterpart in ``like``, however many devices wrote it.
        recipe: settings that must be equal where the checkpoint was saved with one of the same name.

    Returns:
        The number of the checkpoint, the state and the stored recipe, or ``None`` if there is none.

    Raises:
        ValueError: if the checkpoint cannot be read, does not match ``like``, or was saved with another recipe or by
            version 0.2.
    """
    import orbax.checkpoint as ocp

    if not Path(directory).is_dir():
        return None
    if (Path(directory) / 'recipe.json').exists():
        raise ValueError(f'directory: {directory} holds checkpoints of version 0.2; give another directory')
    with _manager(directory) as manager:
        if (step := manager.latest_step()) is None:
            return None
        try:
            stored, target = manager.metadata(step), _arrays(like)
            saved: Mapping[str, Any] = stored.custom_metadata or {}
            common = [name for name in recipe or {} if name in saved]
            _check_equal(*({name: settings[name] for name in common} for settings in (saved, recipe or {})))
            _check_equal(*(jax.tree.map(_kind, dict(tree)) for tree in (stored.item_metadata.tree, target)))
            arrays = manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many classes
            reasons = 'it is damaged, or of another recipe, network, optimiser or version'
            message = f'directory: cannot resume from checkpoint {step} in {directory}, because {reasons}'
            raise ValueError(f'{message} ({error!r:.300}); give those that wrote it, or another directory') from error
    # Copies: buffers that orbax allocated may not be donated on every backend.
    leaves = [jnp.array(arrays[name]) for name in _arrays(like)]
    return step, jax.tree.unflatten(jax.tree.structure(like), leaves), saved


def _check_equal(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*given, *stored]):
        if stored.get(name) != given.get(name):
            raise ValueError(f'{name}: {stored.get(name)} in the checkpoint, {given.get(name)} given')


def _kind(leaf: Any) -> str:
    """Returns dtype and shape, which must be equal: orbax would cast to another dtype."""
    return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _arrays(state: State) -> dict[str, jax.Array]:
    """Returns the arrays by path, which also records their structure."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _manager(directory: Path | str):  # noqa: ANN202 - orbax is imported on use
    import orbax.checkpoint as ocp

    rules = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(Path(directory).absolute(), options=rules, item_handlers=handler)


def save_weights(path: Path | str, variables: Variables, metadata: dict[str, str] | None = None) -> None:
    """Writes variables as a safetensors file, atomically.

    Args:
        path: the file to write; its folder is made if missing.
        variables: nested dicts of arrays, boxes of Flax removed; stored under names such as ``params/conv1/kernel``.
        metadata: text stored in the file's header.
    """
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(dict(meta.unbox(variables)), sep='/')
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
    """Calls ``write`` with a temporary path beside ``path``, then renames it: readers never see a part of the result.

    Args:
        path: the file to write, or a new folder.
        write: writes the whole file or folder at its argument.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}-{uuid.uuid4().hex}{path.suffix}')
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
