"""Every exit computed: selected by a policy, which saves nothing and is the oracle, or cached to choose one from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from branchy_jax.costs import StageCosts, count_macs
from branchy_jax.criteria import entropy
from branchy_jax.criteria.criterion import Criterion, check_criterion
from branchy_jax.inference.steps import Executor, asked_exits, at_rows, build_steps, compiled_once, guarded, run_steps
from branchy_jax.models.branchy import BranchyNet, check_model, naming_variables
from branchy_jax.sharding import replicate, replicated, shard
from branchy_jax.thresholds import ExitTable, accuracy_statistics, iou_statistics, mean_of_statistic
from branchy_jax.thresholds.statistics import Metric, Statistics
from branchy_jax.types import (
    Array,
    Batch,
    ExitPolicy,
    ExitPrediction,
    Variables,
    check_labels,
    num_rows,
)


def dense(model: BranchyNet, *, exits: Sequence[int] | None = None) -> Executor:
    """Builds the oracle executor: runs all stages and heads on the whole batch and selects the first confident exit.

    For finite images all executors agree with it on label and exit. Where NaN reaches the logits of every exit, the
    last one answers and its uncertainty is NaN, in all executors. But a layer may drop NaN, as XLA's max pooling does
    on a CPU, and ``optimize`` may then keep it: refuse images that are not finite before they get here.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf. With
            ``[N - 1]`` this is the network without its branches.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction``; a bare array of thresholds ``[N - 1]`` is a
        policy of entropy. Works under `jax.jit` and `jax.vmap` (over policies, say). Raises ValueError on a policy
        that does not fit, NaN, or bad images.

    Raises:
        ValueError: impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> dense(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0]

    References:
        BranchyNet, 2016, Figure 2.
    """
    return _dense(model, asked_exits(model, exits))


@compiled_once
def _dense(model: BranchyNet, asked: tuple[int, ...]) -> Executor:
    steps = build_steps(model, asked)

    @jax.jit
    def run(variables: Variables, images: Array, policy: ExitPolicy) -> ExitPrediction:
        *earlier, last = run_steps(steps, variables, images, policy)
        chosen = last.prediction
        for step in reversed(earlier):
            chosen = jax.tree.map(functools.partial(_select, step.confident), step.prediction, chosen)
        return chosen

    return guarded(run, model)


def _select(mask: Array, yes: Array, no: Array) -> Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)


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
    prepare: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
) -> ExitOutputs:
    """Runs all exits over a data set, batch by batch, with one compilation.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]`` as ``prepare`` takes them; may stay on the host.
        criterion: how unsure an exit is.
        batch_size: images per dispatch; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
        mesh: the devices that share every batch; each process gets all answers.

    Returns:
        `ExitOutputs` as NumPy arrays.

    Raises:
        ValueError: no images, images the network refuses, a name instead of a network or criterion, or variables of
            another network.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> exit_outputs(model, variables, images, batch_size=2).logits.shape
        (2, 5, 10)
    """
    check_model(model)
    check_criterion(criterion, model.num_exits)
    run = functools.partial(_outputs(model, mesh), criterion=criterion, prepare=_as_pytree(prepare))
    return _in_batches(run, variables, images, batch_size, mesh)


def exit_table(
    model: BranchyNet,
    variables: Variables,
    data: Batch,
    *,
    criterion: Criterion = entropy,
    statistics: Statistics = accuracy_statistics,
    metric: Metric = mean_of_statistic,
    costs: StageCosts | None = None,
    split: str = 'validation',
    batch_size: int = 256,
    prepare: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
) -> ExitTable:
    """Runs all exits over a labelled data set and keeps what choosing a policy needs, not the logits.

    The logits of every pixel at every exit would fill the memory; their statistics are a few numbers an image.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        data: images as ``prepare`` takes them, with their labels; may stay on the host.
        criterion: how unsure an exit is.
        statistics: ``(answer logits [N, B, …, K], labels [B, …]) → [N, B, S]``, such as
            `branchy_jax.thresholds.iou_statistics`; applied inside jit.
        metric: turns summed statistics into the figure to maximise.
        costs: per stage and head; by default the multiply-accumulates of ``model``.
        split: name of the data.
        batch_size: images per dispatch; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
        mesh: devices to share the batches out to.

    Returns:
        `branchy_jax.thresholds.ExitTable`.

    Raises:
        ValueError: no images, images that the network refuses, another number of labels than images, labels of
            another shape than its answers, or, with the library's statistics, of classes that it does not have; a
            name instead of a network or criterion, or variables of another network.

    Example:
        >>> import branchy_jax as bj
        >>> model, data = bj.models.create('b-lenet'), bj.Batch(jnp.ones((5, 28, 28, 1)), jnp.zeros(5, jnp.int32))
        >>> variables = model.init(jax.random.key(0), data.image)
        >>> table = exit_table(model, variables, data)
        >>> table.statistics.shape, table.screen().for_accuracy(0.0).policy.criterion.name
        ((2, 5, 1), 'entropy')
    """
    check_model(model)
    check_criterion(criterion, model.num_exits)
    if num_rows(data.image) != len(data.label):
        raise ValueError(
            f'data: got {num_rows(data.image)} images and {len(data.label)} labels; give one label per image'
        )
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), data.image)
    fed = jax.eval_shape(_as_pytree(prepare), one)
    if statistics in (accuracy_statistics, iou_statistics):  # others may take any target
        with naming_variables(variables):
            check_labels(data.label, jax.eval_shape(model.apply, variables, fed)[-1].shape[-1])
    if costs is None:
        costs = count_macs(model, jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), fed))
    run = functools.partial(_statistics(model, mesh, statistics), criterion=criterion, prepare=_as_pytree(prepare))
    found, uncertainty = _in_batches(run, variables, data, batch_size, mesh)
    return ExitTable(
        uncertainty=uncertainty, statistics=found, costs=costs, criterion=criterion, metric=metric, split=split
    )


@compiled_once
def _outputs(model: BranchyNet, mesh: Mesh | None) -> Callable[..., ExitOutputs]:
    steps = build_steps(model, asked_exits(model, None))

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def run(variables: Variables, images: Array, criterion: Criterion, prepare: Callable[..., Array]) -> ExitOutputs:
        policy = ExitPolicy(criterion, jnp.zeros(model.num_exits - 1))
        answers = [step.prediction for step in run_steps(steps, variables, prepare(images), policy)]
        of_all = jax.tree.map(lambda *values: jnp.stack(values), *answers)
        return ExitOutputs(logits=of_all.logits, uncertainty=of_all.uncertainty)

    return run


@compiled_once
def _statistics(model: BranchyNet, mesh: Mesh | None, statistics: Statistics) -> Callable[..., tuple[Array, Array]]:
    answer = _outputs(model, None)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def run(
        variables: Variables, data: Batch, criterion: Criterion, prepare: Callable[..., Array]
    ) -> tuple[Array, Array]:
        outputs = answer(variables, data.image, criterion=criterion, prepare=prepare)
        return statistics(outputs.logits, data.label), outputs.uncertainty

    return run


def _as_they_are(images: Array) -> Array:
    return images


def _as_pytree(prepare: Callable[[Array], Array] | None) -> Callable[[Array], Array]:
    """Returns what `jax.jit` takes as an argument: the arrays of a normalisation are no constants of the program."""
    prepare = _as_they_are if prepare is None else prepare
    if all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(prepare)):
        return prepare
    try:
        hash(prepare)
    except TypeError:  # a method of something with arrays: compiles anew
        return jax.tree_util.Partial(lambda images: prepare(images))
    return jax.tree_util.Partial(prepare)


def _in_batches(
    run: Callable[[Variables, Any], Any], variables: Variables, data: Any, batch_size: int, mesh: Mesh | None
) -> Any:
    """Runs over rows of ``data`` in batches of one size; what comes back has the rows on axis 1."""
    count = num_rows(data)
    if count == 0:
        raise ValueError('images: got none; at least one is needed')
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected an integer, at least 1')
    batch_size = min(batch_size, count)
    if mesh is not None:
        batch_size, variables = -(-batch_size // mesh.size) * mesh.size, replicate(mesh, variables)
    batches = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = at_rows(data, rows)
        batches.append(jax.tree.map(np.asarray, run(variables, batch if mesh is None else shard(mesh, batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :count], *batches)
