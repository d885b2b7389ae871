"""What a checkpoint records of its training, so that a folder serves no other training."""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from branchy_jax.losses import Loss
from branchy_jax.training.state import TrainState
from branchy_jax.training.step import optimizer_update
from branchy_jax.types import Array, Batch


def describe(
    state: TrainState, examples: Batch, key: Array, loss: Loss, logits: tuple[Any, ...], labels: Any
) -> dict[str, Any]:
    """Describes a training by the names that a refusal gives, as JSON holds it.

    A loss and an optimiser are described by their traced programs, which hold every constant, such as a learning rate.
    Other versions trace other programs, so the versions are part of the names.

    Args:
        state: of the training.
        examples: the whole training set, or one batch of a stream.
        key: of the whole training.
        loss: ``(logits, labels) → [N]``.
        logits: shapes of the logits of a batch.
        labels: shapes of the labels of a batch.
    """

    def update(params: Any) -> Any:
        return optimizer_update(state.optimizer, params, state.optimizer.init(params), params, _sum_of_squares)

    versions = f'under jax {jax.__version__} and optax {optax.__version__}'
    return {
        'seed or key': _checksum(key),
        'data': _checksum(examples.image),
        'labels': _checksum(examples.label),
        f'{versions}, loss': _program(loss, logits, labels),
        f'{versions}, optimizer or learning_rate': _program(update, state.params),
    }


def _sum_of_squares(params: Any) -> Array:
    return optax.tree.norm(params, squared=True)


def _program(function: Any, *arguments: Any) -> str:
    """Describes a function by its traced program, without addresses in memory."""
    closed = jax.make_jaxpr(function)(*arguments)
    text = re.sub('0x[0-9a-f]+', '', str(closed))
    return _checksum((np.frombuffer(text.encode(), np.uint8), closed.consts))


def _checksum(tree: Any) -> str:
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        values = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        checksum = zlib.crc32(f'{values.dtype}{values.shape}'.encode(), checksum)
        checksum = zlib.crc32(np.ravel(values).view(np.uint8).data, checksum)
    return f'checksum {checksum:08x}'
