"""Every exit computed: selected by a policy, which saves nothing and is the oracle, or cached to choose one from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from branchy_jax.costs import StageCosts, count_macs
from branchy_jax.criteria import entropy
from branchy_jax.criteria.criterion import Criterion, check_criterion
from branchy_jax.inference.any_batch import AnyBatch, any_batch, sizes_up_to
from branchy_jax.inference.compiler_options import Options, in_order
from branchy_jax.inference.steps import (
    Executor,
    asked_exits,
    at_rows,
    build_steps,
    compiled_once,
    guarded,
    jit_predicting,
    run_steps,
)
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
    input_specs,
    num_rows,
)

OnProgress = Callable[[int, int | None], None]
"""``(images done, of how many)``."""


def dense(
    model: BranchyNet,
    *,
    exits: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
) -> Executor:
    """Builds the oracle executor: runs all stages and heads on the whole batch and selects the first confident exit.

    For finite images all executors agree with it on label and exit. Where NaN reaches the logits of every exit, the
    last one answers and its uncertainty is NaN, in all executors. But a layer may drop NaN, as XLA's max pooling does
    on a CPU, and ``optimize`` may then keep it: refuse images that are not finite before they get here.

    Args:
        model: a network with N exits.
        exits: the exits to ask, ascending, the last among them; the others as if their thresholds were −inf. With
            ``[N - 1]`` this is the network without its branches.
        compiler_options: for `jax.jit`, such as `branchy_jax.inference.ALL_CORES` on a CPU. With any it cannot be
            traced.
        max_batch: compiles at this size and at a few smaller ones, and answers batches of any size with those, in
            pieces where they are larger; an `AnyBatch`, whose ``warm_up`` compiles them all. By default every new size
            compiles.

    Returns:
        ``(variables, images [B, H, W, C], policy) → ExitPrediction``; a bare array of thresholds ``[N - 1]`` is a
        policy of entropy. Works under `jax.jit` and `jax.vmap` (over policies, say). Raises ValueError on a policy
        that does not fit, NaN, or bad images.

    Raises:
        ValueError: impossible ``exits`` or ``max_batch``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> dense(model)(variables, images, [float('inf')]).exit_index.tolist()
        [0, 0]

    References:
        BranchyNet, 2016, Figure 2.
    """
    asked, options = asked_exits(model, exits), in_order(compiler_options)
    if max_batch is None:
        return _dense(model, asked, options)
    return _dense_of_any_batch(model, asked, options, sizes_up_to(max_batch))


@compiled_once
def _dense(model: BranchyNet, asked: tuple[int, ...], options: Options) -> Executor:
    return guarded(dense_program(model, asked, options), model)


@compiled_once
def _dense_of_any_batch(
    model: BranchyNet, asked: tuple[int, ...], options: Options, sizes: tuple[int, ...]
) -> AnyBatch:
    program = dense_program(model, asked, options)
    return any_batch(lambda variables, images, policy, _: program(variables, images, policy), program, model, sizes)


@compiled_once
def dense_program(model: BranchyNet, asked: tuple[int, ...], options: Options = ()) -> Executor:
    """Returns the jitted program of `dense`, without a door."""
    steps = build_steps(model, asked)

    @jit_predicting(options)
    def run(variables: Variables, images: Array, policy: ExitPolicy) -> ExitPrediction:
        *earlier, last = run_steps(steps, variables, images, policy)
        chosen = last.prediction
        for step in reversed(earlier):
            chosen = jax.tree.map(functools.partial(_select, step.confident), step.prediction, chosen)
        return chosen

    return run


def _select(mask: Array, yes: Array, no: Array) -> Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)


@struct.dataclass
class ExitOutputs:
    """Every exit's answer to every input.

    Attributes:
        logits: ``[N, M, …, K]`` answer logits, as the criterion gives them; ``None`` if they were not to be kept.
        uncertainty: ``[N, M]``.
    """

    logits: np.ndarray | None
    uncertainty: np.ndarray


def exit_outputs(
    model: BranchyNet,
    variables: Variables,
    images: Array | Iterable[Array],
    *,
    criterion: Criterion = entropy,
    batch_size: int = 256,
    prepare: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
    keep_logits: bool = True,
    on_progress: OnProgress | None = None,
) -> ExitOutputs:
    """Runs all exits over a data set, batch by batch, with one compilation.

    What does not fit into memory comes as an iterable of batches, such as a generator or a grain loader. The logits of
    every pixel would not fit either: leave them out, or let `exit_table` keep statistics.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        images: ``[M, H, W, C]`` as ``prepare`` takes them; may stay on the host. Or an iterable of such batches, of any
            sizes, which is read once; what it raises is raised here. (A tuple or list of arrays is one input of a
            network without ``image_shape``, which may take such.)
        criterion: how unsure an exit is.
        batch_size: images per dispatch, at most as many as the first batch has; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
        mesh: the devices that share every batch; each process gets all answers.
        keep_logits: whether to keep the logits, too, not the uncertainties alone.
        on_progress: called after every dispatch with the number of images done, and of how many, ``None`` if nobody
            knows.

    Returns:
        `ExitOutputs` as NumPy arrays.

    Raises:
        ValueError: no images, images the network refuses, batches that are not alike, a name instead of a network or
            criterion, or variables of another network.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((5, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> exit_outputs(model, variables, images, batch_size=2).logits.shape
        (2, 5, 10)
    """
    check_model(model)
    check_criterion(criterion, model.num_exits)
    answer = functools.partial(_outputs(model, mesh), criterion=criterion, prepare=_as_pytree(prepare))

    def run(variables: Variables, batch: Array) -> ExitOutputs:
        outputs = answer(variables, batch)
        return outputs if keep_logits else outputs.replace(logits=None)

    supplied = _is_supply(images, model.image_shape)
    return _in_batches(run, variables, images, batch_size, mesh, supplied=supplied, on_progress=on_progress)


def exit_table(
    model: BranchyNet,
    variables: Variables,
    data: Batch | Iterable[Batch],
    *,
    criterion: Criterion = entropy,
    statistics: Statistics = accuracy_statistics,
    metric: Metric = mean_of_statistic,
    costs: StageCosts | None = None,
    split: str = 'validation',
    batch_size: int = 256,
    prepare: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> ExitTable:
    """Runs all exits over a labelled data set and keeps what choosing a policy needs, not the logits.

    The logits of every pixel at every exit would fill the memory; their statistics are a few numbers an image.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        data: images as ``prepare`` takes them, with their labels; may stay on the host. Or an iterable of such batches,
            of any sizes, which is read once; what it raises is raised here.
        criterion: how unsure an exit is.
        statistics: ``(answer logits [N, B, …, K], labels [B, …]) → [N, B, S]``, such as
            `branchy_jax.thresholds.iou_statistics`; applied inside jit.
        metric: turns summed statistics into the figure to maximise.
        costs: per stage and head; by default the multiply-accumulates of ``model``.
        split: name of the data.
        batch_size: images per dispatch, at most as many as the first batch has; the last batch is padded.
        prepare: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
        mesh: devices to share the batches out to.
        on_progress: as for `exit_outputs`.

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
    supplied = not isinstance(data, Batch)
    if supplied and not isinstance(data, Iterable):
        raise ValueError(f'data: got {type(data).__name__}; give a branchy_jax.Batch, or an iterable of them')
    source: Any = data if supplied else [data]
    batches = iter(source)
    first = next(batches, None)
    if first is None:
        raise ValueError('data: got no batches; at least one is needed')
    check = functools.partial(_check_labelled, num_classes=None)
    check(first)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), first.image)
    fed = jax.eval_shape(_as_pytree(prepare), one)
    if statistics in (accuracy_statistics, iou_statistics):  # others may take any target
        with naming_variables(variables):
            num_classes = jax.eval_shape(model.apply, variables, fed)[-1].shape[-1]
        check = functools.partial(_check_labelled, num_classes=num_classes)
    if costs is None:
        costs = count_macs(model, jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), fed))
    run = functools.partial(_statistics(model, mesh, statistics), criterion=criterion, prepare=_as_pytree(prepare))
    checked = (check(batch) for batch in itertools.chain([first], batches))
    found, uncertainty = _in_batches(
        run,
        variables,
        checked if supplied else next(checked),
        batch_size,
        mesh,
        supplied=supplied,
        on_progress=on_progress,
    )
    return ExitTable(
        uncertainty=uncertainty, statistics=found, costs=costs, criterion=criterion, metric=metric, split=split
    )


def _check_labelled(batch: Batch, num_classes: int | None) -> Batch:
    """Returns a batch that has one label for each image, each of one of the classes, if their number is given."""
    if not isinstance(batch, Batch):
        raise ValueError(f'data: got {type(batch).__name__}; give a branchy_jax.Batch, or an iterable of them')
    if num_rows(batch.image) != len(batch.label):
        raise ValueError(
            f'data: got {num_rows(batch.image)} images and {len(batch.label)} labels; give one label per image'
        )
    if num_classes is not None:
        check_labels(batch.label, num_classes)
    return batch


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


def _is_supply(images: Any, image_shape: Any) -> bool:
    """Tells an iterable of batches from one batch, which may be a pytree of arrays, a tuple or list among them."""
    if hasattr(images, 'shape') or isinstance(images, Mapping):
        return False
    if isinstance(images, (tuple, list)):
        one = None if image_shape is None else jax.tree.structure(input_specs(image_shape, 1))
        return one is not None and jax.tree.structure(images) != one
    return isinstance(images, Iterable)


def _in_batches(
    run: Callable[[Variables, Any], Any],
    variables: Variables,
    data: Any,
    batch_size: int,
    mesh: Mesh | None,
    *,
    supplied: bool,
    on_progress: OnProgress | None,
) -> Any:
    """Runs over rows of ``data``, or of all it yields, in batches of one size; results have the rows on axis 1."""
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected an integer, at least 1')
    variables = variables if mesh is None else replicate(mesh, variables)
    total, done, results = None if supplied else num_rows(data), 0, []
    batches = (jax.tree.map(np.asarray, batch) for batch in data) if supplied else iter([data])
    for batch, count in _of_one_size(batches, batch_size, mesh):
        found = run(variables, batch if mesh is None else shard(mesh, batch))
        results.append(jax.tree.map(lambda values, count=count: np.asarray(values)[:, :count], found))
        done += count
        if on_progress is not None:
            on_progress(done, total)
    if not results:
        raise ValueError('images: got none; at least one is needed')
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *results)


def _of_one_size(batches: Iterator[Any], batch_size: int, mesh: Mesh | None) -> Iterator[tuple[Any, int]]:
    """Cuts and fills up batches to the size of the first: yields one, and how many of its rows are data."""
    size, first = 0, None
    for batch in batches:
        count = num_rows(batch)
        if not count:
            continue
        kind = jax.tree.map(lambda leaf: (np.shape(leaf)[1:], str(leaf.dtype)), batch)
        if first is None:
            size, first = min(batch_size, count), kind
            size = size if mesh is None else -(-size // mesh.size) * mesh.size
        if kind != first:
            raise ValueError(f'images: all batches are to be alike; the first held {first}, another one {kind}')
        for start in range(0, count, size):
            if count == size:
                yield batch, count
                break
            rows = np.minimum(np.arange(start, start + size), count - 1)
            yield at_rows(batch, rows), min(size, count - start)
