"""Files: orbax for resuming a run, safetensors for weights that others load. Never pickle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from branchy_jax.types import Variables

State = TypeVar('State')


def save(directory: Path | str, step: int, state: State) -> None:
    """Writes a checkpoint, then drops the older ones; a kill at any moment leaves one that is whole.

    Args:
        directory: where this run's checkpoints live.
        step: number of the checkpoint, ascending.
        state: any pytree of arrays.
    """
    import orbax.checkpoint as ocp

    with _manager(directory) as manager:
        manager.save(step, args=ocp.args.StandardSave(_arrays(state)))


def restore(directory: Path | str, like: State) -> tuple[int, State] | None:
    """Reads the newest checkpoint.

    Args:
        directory: as given to `save`.
        like: a pytree of the same structure, shapes and dtypes; its static fields are kept. What is read is laid on
            the devices that its arrays lie on, however many had written it.

    Returns:
        The number of the checkpoint and the state, or ``None`` if there is none.

    Raises:
        ValueError: the checkpoint cannot be read, or holds something else than ``like``.
    """
    import orbax.checkpoint as ocp

    if not Path(directory).is_dir():
        return None
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(_where_it_lies, _arrays(like))
        try:
            arrays = manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many kinds; all mean: not this state
            raise ValueError(
                f'directory: cannot resume from checkpoint {step} in {directory}: it is damaged, or of another '
                f'network, optimiser or version ({type(error).__name__}: {str(error)[:300]}); '
                'delete the directory to start over'
            ) from error
    leaves, structure = jax.tree.flatten(like)
    restored = [arrays[str(n)] for n in range(len(leaves))]
    # Copies: buffers that orbax allocated may not be donated on every backend.
    return step, jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in restored])


def _where_it_lies(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None))


def _arrays(state: State) -> dict[str, jax.Array]:
    return {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}


def _manager(directory: Path | str):  # noqa: ANN202 - orbax is imported on use
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save_weights(path: Path | str, variables: Variables, metadata: dict[str, str] | None = None) -> None:
    """Writes variables as a safetensors file, atomically.

    Args:
        path: the file to write; its folder is made if missing.
        variables: nested dicts of arrays; stored under names such as ``params/conv1/kernel``.
        metadata: text stored in the file's header.
    """
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(dict(variables), sep='/')
    arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
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
