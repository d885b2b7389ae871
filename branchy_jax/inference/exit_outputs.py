"""All exits over a whole data set, cached: what thresholds are chosen from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from branchy_jax.criteria import Criterion, entropy
from branchy_jax.inference.steps import Step, at_rows, build_steps, run_steps
from branchy_jax.models.branchy import BranchyNet
from branchy_jax.sharding import replicate, replicated, shard
from branchy_jax.types import Array, Batch, Variables


@struct.dataclass
class ExitOutputs:
    """Every exit's answer to every input.

    Attributes:
        logits: ``[N, M, …, K]`` answer logits, as the criterion gives them.
        uncertainty: ``[N, M]``.
    """

    logits: np.ndarray
    uncertainty: np.ndarray


@struct.dataclass
class ExitStatistics:
    """What every exit's answer to every input adds to a metric.

    Attributes:
        statistics: ``[N, M, S]``.
        uncertainty: ``[N, M]``.
    """

    statistics: np.ndarray
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
    steps, anywhere = build_steps(model, criterion), jnp.zeros(model.num_exits - 1)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def run(variables: Variables, images: Array) -> ExitOutputs:
        return ExitOutputs(*_all_answers(run_steps(steps, variables, prepare(images), anywhere)))

    return _in_batches(run, variables, images, batch_size, mesh)


def exit_statistics(
    model: BranchyNet,
    variables: Variables,
    data: Batch,
    statistics: Callable[[Array, Array], Array],
    *,
    criterion: Criterion = entropy,
    batch_size: int = 256,
    prepare: Callable[[Array], Array] = lambda images: images,
    mesh: Mesh | None = None,
) -> ExitStatistics:
    """Runs all exits over a labelled data set and keeps what choosing thresholds needs, not the logits.

    The logits of every pixel at every exit would fill the memory; their statistics are a few numbers an image.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        data: images as ``prepare`` takes them, with their labels; may stay on the host.
        statistics: ``(answer logits [N, B, …, K], labels [B, …]) → [N, B, S]``, such as
            `branchy_jax.thresholds.iou_statistics`; applied inside jit.
        criterion: how unsure an exit is.
        batch_size: images per dispatch; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit.
        mesh: devices to share the batches out to.

    Returns:
        `ExitStatistics` as NumPy arrays.

    Raises:
        ValueError: no images, images that the network refuses, or labels of another shape than its answers.

    Example:
        >>> import branchy_jax as bj
        >>> model, data = bj.models.create('b-lenet'), bj.Batch(jnp.ones((5, 28, 28, 1)), jnp.zeros(5, jnp.int32))
        >>> variables = model.init(jax.random.key(0), data.image)
        >>> exit_statistics(model, variables, data, bj.thresholds.accuracy_statistics).statistics.shape
        (2, 5, 1)
    """
    steps, anywhere = build_steps(model, criterion), jnp.zeros(model.num_exits - 1)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def run(variables: Variables, data: Batch) -> ExitStatistics:
        answers, uncertainty = _all_answers(run_steps(steps, variables, prepare(data.image), anywhere))
        return ExitStatistics(statistics(answers, data.label), uncertainty)

    return _in_batches(run, variables, data, batch_size, mesh)


def _all_answers(steps: Sequence[Step]) -> tuple[Array, Array]:
    """Returns logits ``[N, B, …, K]`` and uncertainty ``[N, B]``."""
    answers = [step.prediction for step in steps]
    return jnp.stack([answer.logits for answer in answers]), jnp.stack([answer.uncertainty for answer in answers])


def _in_batches(
    run: Callable[[Variables, Any], Any], variables: Variables, data: Any, batch_size: int, mesh: Mesh | None
) -> Any:
    """Runs over rows of ``data`` in batches of one size; what comes back has the rows on axis 1."""
    count = len(jax.tree.leaves(data)[0])
    if count == 0:
        raise ValueError('images: got none; at least one is needed')
    if batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected at least 1')
    batch_size = min(batch_size, count)
    if mesh is not None:
        batch_size, variables = -(-batch_size // mesh.size) * mesh.size, replicate(mesh, variables)
    batches = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = at_rows(data, rows)
        batches.append(jax.tree.map(np.asarray, run(variables, batch if mesh is None else shard(mesh, batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :count], *batches)
