"""All exits over a whole data set, cached: what thresholds are chosen from."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.steps import build_steps, run_steps
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.sharding import replicate, replicated, shard
from branchy_jax.types import Array, Variables


@struct.dataclass
class ExitOutputs:
    """Every exit's answer to every input.

    Attributes:
        logits: ``[N, M, …, K]`` answer logits, as the criterion gives them.
        uncertainty: ``[N, M]``.
    """

    logits: np.ndarray
    uncertainty: np.ndarray


def exit_outputs(
    model: BranchyNet,
    variables: Variables,
    images: Array,
    *,
    criterion: Criterion = entropy,
    batch_size: int = 256,
    prepare: Callable[[Array], Array] = lambda images: images,
    mesh: Mesh | None = None,
) -> ExitOutputs:
    """Runs all exits over a data set, batch by batch, with one compilation.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]`` as ``prepare`` takes them; may stay on the host.
        criterion: how unsure an exit is.
        batch_size: images per dispatch; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit.
        mesh: the devices that share every batch; each process gets all answers.

    Returns:
        `ExitOutputs` as NumPy arrays.

    Raises:
        ValueError: no images, or images the network refuses.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> exit_outputs(model, variables, images, batch_size=2).logits.shape
        (2, 5, 10)
    """
    count = len(images)
    if count == 0:
        raise ValueError('images: got none; exit_outputs needs at least one')
    if batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected at least 1')

    steps, anywhere = build_steps(model, criterion), jnp.zeros(model.num_exits - 1)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def run(variables: Variables, images: Array) -> ExitOutputs:
        answers = [step.prediction for step in run_steps(steps, variables, prepare(images), anywhere)]
        return ExitOutputs(
            logits=jnp.stack([answer.logits for answer in answers]),
            uncertainty=jnp.stack([answer.uncertainty for answer in answers]),
        )

    batch_size = min(batch_size, count)
    if mesh is not None:
        batch_size, variables = -(-batch_size // mesh.size) * mesh.size, replicate(mesh, variables)
    batches = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = images[rows] if mesh is None else shard(mesh, images[rows])
        batches.append(jax.tree.map(np.asarray, run(variables, batch)))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :count], *batches)
