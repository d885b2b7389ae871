"""Every exit's answers to a data set, cached: what thresholds are chosen from."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from branchy_jax import calling, program
from branchy_jax.costs import warn_if_nothing_is_saved
from branchy_jax.criteria import Criterion, as_criterion, entropy, replay
from branchy_jax.inference.steps import Network, at_rows, kind_of, network, run
from branchy_jax.sharding import replicate, replicated, shard
from branchy_jax.thresholds import ExitTable, accuracy_statistics, iou_statistics
from branchy_jax.thresholds.statistics import Metric, Statistics, mean_of_statistic
from branchy_jax.types import Array, Batch, StageCosts, Variables, check_labels, num_rows, static

OnProgress = Callable[[int, int | None], None]
"""``(images done, of how many)``."""


@struct.dataclass
class ExitOutputs:
    """Every exit's answer to every input.

    Attributes:
        logits: ``[N, M, …, K]`` answer logits, as the criterion gives them; ``None`` if they were not to be kept.
        uncertainty: ``[N, M]``.
    """

    logits: Array | None
    uncertainty: Array


def exit_outputs(
    model: Any,
    variables: Variables,
    images: Array | Iterable[Array],
    *,
    criterion: Criterion = entropy,
    batch_size: int = 256,
    preprocess: Callable[[Array], Array] | None = None,
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
        images: ``[M, H, W, C]`` as ``preprocess`` takes them, or a tuple or dictionary of arrays; may stay on the host.
            Or a list or iterator of such batches, of any sizes, which is read once; what it raises is raised here.
        criterion: how unsure an exit is.
        batch_size: images per dispatch, at most as many as the first batch has; the last batch is padded.
        preprocess: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
        mesh: the devices that share every batch; each process gets all answers.
        keep_logits: whether to keep the logits, too, not the uncertainties alone.
        on_progress: called after every dispatch with the number of images done, and of how many, if that is known.

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
    one_set = hasattr(images, 'shape') or isinstance(images, (Mapping, tuple)) or not isinstance(images, Iterable)
    sets: Any = [images] if one_set else images
    unlabelled = (Batch(part, None) for part in sets)  # type: ignore[arg-type]
    outputs_of = _outputs_of(model, _keep_logits if keep_logits else _drop_logits, criterion, preprocess, mesh)
    total = num_rows(images) if one_set else None
    return ExitOutputs(*_in_batches(outputs_of, variables, unlabelled, batch_size, total, on_progress))


def exit_table(
    model: Any,
    variables: Variables,
    data: Batch | Iterable[Batch],
    *,
    criterion: Criterion = entropy,
    statistics: Statistics = accuracy_statistics,
    metric: Metric = mean_of_statistic,
    costs: StageCosts | None = None,
    split: str = 'validation',
    batch_size: int = 256,
    preprocess: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> ExitTable:
    """Runs all exits over a labelled data set and keeps what choosing a policy needs, not the logits.

    The logits of every pixel at every exit would fill the memory; their statistics are a few numbers an image.

    Args:
        model: a network with N exits.
        variables: of ``model``.
        data: images as ``preprocess`` takes them, with their labels; may stay on the host. Or an iterable of such
            batches, of any sizes, which is read once; what it raises is raised here.
        criterion: how unsure an exit is.
        statistics: ``(answer logits [N, B, …, K], labels [B, …]) → [N, B, S]``, such as
            `branchy_jax.thresholds.iou_statistics`; applied inside jit.
        metric: turns summed statistics into the figure to maximise.
        costs: per stage and head; by default the multiply-accumulates of ``model``.
        split: name of the data.
        batch_size: images per dispatch, at most as many as the first batch has; the last batch is padded.
        preprocess: normalisation of stored images, applied inside jit; ``None`` takes them as they are.
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
    outputs = _outputs_of(model, statistics, criterion, preprocess, mesh)
    given: Iterator[Batch] = iter(data if isinstance(data, Iterable) else [data])
    first = next(given, None)
    if first is None:
        raise ValueError('data: got no batches; at least one is needed')
    shapes = outputs.shapes(_checked(first).image)
    if costs is None:
        costs = program.stages(model, variables, shapes).macs
        warn_if_nothing_is_saved(costs)
    num_classes = None
    if statistics in (accuracy_statistics, iou_statistics):  # others may take any target
        num_classes = program.trace(model, variables, shapes).outputs[-1].aval.shape[-1]
    batches = (_checked(batch, num_classes) for batch in itertools.chain([first], given))
    total = len(data) if isinstance(data, Batch) else None
    values, uncertainty = _in_batches(outputs, variables, batches, batch_size, total, on_progress)
    settings: Any = {'costs': costs, 'criterion': outputs.criterion, 'metric': metric, 'split': split}
    return ExitTable(uncertainty=uncertainty, statistics=values, **settings)


def _checked(batch: Batch, num_classes: int | None = None) -> Batch:
    """Returns a batch that has one label for each image, of one of the classes where there are such."""
    if not isinstance(batch, Batch):
        raise ValueError(f'data: got {type(batch).__name__}; give a branchy_jax.Batch, or an iterable of them')
    if (count := num_rows(batch.image)) != len(batch.label):
        raise ValueError(f'data: got {count} images and {len(batch.label)} labels; give one label per image')
    if num_classes is not None:
        check_labels(batch.label, num_classes)
    return batch


def _keep_logits(logits: Array, labels: Array) -> Array:
    return logits


def _drop_logits(logits: Array, labels: Array) -> None:
    return None


@struct.dataclass
class _Outputs:
    """What is computed of every batch.

    Attributes:
        criterion: how unsure an exit is.
        preprocess: images to inputs.
        network: the model.
        mesh: the devices that share every batch.
        statistics: ``(answer logits, labels)`` to arrays ``[N, B, …]``.
    """

    criterion: Criterion
    preprocess: Callable[[Any], Any]
    network: Network = static()
    mesh: Mesh | None = static()
    statistics: Callable[[Array, Array], Any] = static()

    def shapes(self, images: Any) -> Any:
        """Returns the shapes of the model's inputs for such images, of batch size 1."""
        return jax.eval_shape(self.preprocess, calling.with_batch(images, 1))

    def program(self, variables: Variables, batch: Batch) -> tuple[Any, Array]:
        """Computes statistics and uncertainties of a batch; to be traced."""
        inputs, model = self.preprocess(batch.image), self.network.model
        program.stages(model, variables, inputs)  # refuses rows that influence one another
        logits, uncertainty = replay(self.criterion, jnp.stack(calling.apply(model, variables, inputs)))
        result = self.statistics(logits, batch.label), uncertainty
        return result if self.mesh is None else jax.lax.with_sharding_constraint(result, replicated(self.mesh))


def _outputs_of(model: Any, statistics: Any, criterion: Any, preprocess: Any, mesh: Mesh | None) -> _Outputs:
    """Makes what outputs are computed from a value that `jax.jit` takes."""
    return _Outputs(as_criterion(criterion), _as_pytree(preprocess), network(model, None, None), mesh, statistics)


_AS_THEY_ARE = jax.tree_util.Partial(lambda images: images)


def _as_pytree(preprocess: Callable[[Array], Array] | None) -> Callable[[Array], Array]:
    """Returns what `jax.jit` takes as an argument: the arrays of a normalisation are no constants of the program."""
    if preprocess is None:
        return _AS_THEY_ARE
    if all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(preprocess)):
        return preprocess
    try:
        hash(preprocess)
    except TypeError:  # a method of something with arrays: compiles in each call
        return jax.tree_util.Partial(lambda images: preprocess(images))
    return jax.tree_util.Partial(preprocess)


def _in_batches(
    outputs_of: _Outputs,
    variables: Variables,
    batches: Iterable[Batch],
    batch_size: int,
    total: int | None,
    on_progress: OnProgress | None,
) -> tuple[Any, Array]:
    """Computes the outputs of batches, cut and filled up to one size.

    Args:
        outputs_of: what is computed.
        variables: of the model.
        batches: of any sizes.
        batch_size: the size, at most.
        total: how many images come in a single batch, which may stay on its device; ``None`` if that is unknown.
        on_progress: called after every dispatch.

    Returns:
        Statistics and uncertainties ``[N, M, …]``.
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f'batch_size: got {batch_size}; expected an integer, at least 1')
    mesh, done = outputs_of.mesh, 0
    variables = variables if mesh is None else replicate(mesh, variables)
    results: list[Any] = []
    if total is None:
        batches = (jax.tree.map(np.asarray, batch) for batch in batches)
    for batch, count in _of_one_size(batches, batch_size, 1 if mesh is None else mesh.size):
        if not results and mesh is None:
            few = at_rows(batch.image, slice(7))
            prepared = functools.partial(outputs_of.preprocess, few)
            program.check_rows_by_trial(outputs_of.network.model, variables, outputs_of.shapes(few), prepared)
        result = run(outputs_of, variables, batch if mesh is None else shard(mesh, batch))
        results.append(jax.tree.map(lambda values, count=count: np.asarray(values)[:, :count], result))
        done += count
        if on_progress is not None:
            on_progress(done, total)
    if not results:
        raise ValueError('images: got none; at least one is needed')
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *results)


def _of_one_size(batches: Iterable[Batch], batch_size: int, multiple: int) -> Iterator[tuple[Batch, int]]:
    """Cuts and fills up batches to the size of the first: yields one, and how many of its rows are data."""
    size, first = 0, None
    for batch in batches:
        count = num_rows(batch)
        if not count:
            continue
        first = kind_of(batch, first)
        size = size or -(-min(batch_size, count) // multiple) * multiple
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            yield batch if count == size else at_rows(batch, rows), min(size, count - start)
