"""Joint training of all exits: a pure, jitted step, and loops around it that survive being killed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax import lax

from branchy_jax import checkpoint
from branchy_jax.losses import cross_entropy_per_exit, weighted_exit_loss
from branchy_jax.models.branchy import BranchyNet, side_head_names
from branchy_jax.types import Array, Batch, Variables

Loss = Callable[[tuple[Array, ...], Array], Array]
"""``(logits of N exits, labels) → losses [N]``."""

Prepare = Callable[[Array, Array], Array]
"""``(key, images as stored) → images as fed to the network``: normalisation and augmentation, traced inside jit."""

Metrics = dict[str, Array]
"""``loss`` scalar, ``exit_loss`` [N], ``exit_accuracy`` [N]."""


@struct.dataclass
class TrainState:
    """Everything that training changes, and the static things it needs.

    Attributes:
        step: number of steps taken.
        params: float32 parameters.
        model_state: the other variable collections, such as ``batch_stats``.
        opt_state: of ``optimizer``.
        model: the network.
        optimizer: the optax transformation.
        frozen_trunk: whether only the side heads train.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    model: BranchyNet = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    frozen_trunk: bool = struct.field(pytree_node=False, default=False)

    @property
    def variables(self) -> Variables:
        """What ``model.apply`` takes."""
        return {'params': self.params, **self.model_state}


@functools.cache  # one object per learning rate: jit compares optimisers by identity
def paper_adam(learning_rate: float | optax.Schedule = 1e-3) -> optax.GradientTransformation:
    """Returns Adam as in the paper: step size 0.001, β1 0.99, β2 0.999 (BranchyNet, 2016, section IV)."""
    return optax.adam(learning_rate, b1=0.99, b2=0.999)


def create_train_state(
    model: BranchyNet,
    variables: Variables,
    optimizer: optax.GradientTransformation | None = None,
    *,
    frozen_trunk: bool = False,
) -> TrainState:
    """Starts training from given variables, which are copied: `train_step` donates its state, not your arrays.

    Args:
        model: the network.
        variables: from ``model.init``, `initialize_from_baseline` or a file.
        optimizer: any optax transformation; `paper_adam` if none is given.
        frozen_trunk: trains the side heads only. All stages and the last exit keep their parameters, and their
            BatchNorm and dropout stay in evaluation mode.

    Example:
        >>> import branchy_jax as bj
        >>> model = bj.models.create('b-lenet')
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> int(create_train_state(model, variables).step)
        0
    """
    optimizer = paper_adam() if optimizer is None else optimizer
    collections = jax.tree.map(jnp.array, dict(variables))
    params = collections.pop('params')
    if frozen_trunk:
        heads = side_head_names(model)
        labels = {name: 'head' if name in heads else 'trunk' for name in params}
        optimizer = optax.multi_transform({'head': optimizer, 'trunk': optax.set_to_zero()}, labels)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=collections,
        opt_state=optimizer.init(params),
        model=model,
        optimizer=optimizer,
        frozen_trunk=frozen_trunk,
    )


@struct.dataclass
class Initialization:
    """What a branchy network took from its baseline, as parameter paths such as ``params/conv1/kernel``.

    Attributes:
        taken: arrays copied from the baseline.
        fresh: arrays of the branchy network that the baseline does not have; they keep their own values.
        left: arrays of the baseline that found no place.
    """

    taken: tuple[str, ...] = struct.field(pytree_node=False)
    fresh: tuple[str, ...] = struct.field(pytree_node=False)
    left: tuple[str, ...] = struct.field(pytree_node=False)


def initialize_from_baseline(variables: Variables, baseline: Variables) -> tuple[Variables, Initialization]:
    """Copies the trained baseline's arrays into a branchy network, matched by name and shape.

    Args:
        variables: of the branchy network, freshly initialised.
        baseline: of the trained one-exit network.

    Returns:
        The variables to start from, and what was taken, what stayed fresh, and what was left.

    Raises:
        ValueError: nothing at all matched; the two are not the same trunk.

    Example:
        >>> ours = {'params': {'conv1': jnp.zeros(3), 'exit1': jnp.zeros(2)}}
        >>> start, report = initialize_from_baseline(ours, {'params': {'conv1': jnp.ones(3)}})
        >>> report.taken, report.fresh
        (('params/conv1',), ('params/exit1',))

    References:
        BranchyNet, 2016, section III-B: "several percent" better than a random start.
    """
    ours = traverse_util.flatten_dict(dict(variables), sep='/')
    theirs = traverse_util.flatten_dict(dict(baseline), sep='/')
    taken = [path for path in ours if path in theirs and ours[path].shape == theirs[path].shape]
    if not taken:
        raise ValueError(
            f'baseline: none of its {len(theirs)} arrays ({", ".join(list(theirs)[:3])}, …) has the name and shape '
            f"of one of the network ({', '.join(list(ours)[:3])}, …); name the trunk's layers alike in both"
        )
    merged = {path: theirs[path] if path in taken else ours[path] for path in ours}
    report = Initialization(
        taken=tuple(taken),
        fresh=tuple(path for path in ours if path not in taken),
        left=tuple(path for path in theirs if path not in taken),
    )
    return traverse_util.unflatten_dict(merged, sep='/'), report


def _step(
    state: TrainState, batch: Batch, exit_weights: Array, key: Array, *, loss: Loss
) -> tuple[TrainState, Metrics]:
    def objective(params: Any) -> tuple[Array, tuple[Any, Array, tuple[Array, ...]]]:
        logits, model_state = state.model.apply(
            {'params': params, **state.model_state},
            batch.image,
            train=True,
            frozen_trunk=state.frozen_trunk,
            rngs={'dropout': key},
            mutable=list(state.model_state),
        )
        exit_loss = loss(logits, batch.label)
        return weighted_exit_loss(exit_loss, exit_weights), (model_state, exit_loss, logits)

    gradients, (model_state, exit_loss, logits) = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = state.optimizer.update(gradients, state.opt_state, state.params)
    metrics = {
        'loss': weighted_exit_loss(exit_loss, exit_weights),
        'exit_loss': exit_loss,
        'exit_accuracy': jnp.stack([jnp.mean(z.argmax(-1) == batch.label) for z in logits]),
    }
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
    )
    return state, metrics


@functools.partial(jax.jit, static_argnames='loss', donate_argnames='state')
def train_step(
    state: TrainState, batch: Batch, exit_weights: Array, key: Array, *, loss: Loss = cross_entropy_per_exit
) -> tuple[TrainState, Metrics]:
    r"""Takes one optimiser step on the weighted sum of the exits' losses.

    .. math:: \min_\theta \sum_n w_n L_n(\theta)

    Pure and jitted; ``state`` is donated, so keep the returned one and forget the old.

    Args:
        state: where training stands.
        batch: images ``[B, H, W, C]`` float, ready for the network, and labels ``[B, …]``.
        exit_weights: ``[N]``.
        key: for dropout.
        loss: ``(logits, labels) → [N]``.

    Returns:
        The next state, and metrics of this batch before the step: ``loss`` scalar, ``exit_loss`` [N],
        ``exit_accuracy`` [N].

    Raises:
        ValueError: images, labels or weights of the wrong shape or dtype.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> state = create_train_state(model, model.init(jax.random.key(0), images))
        >>> batch = bj.Batch(images, jnp.array([3, 7]))
        >>> state, metrics = train_step(state, batch, jnp.ones(2), jax.random.key(1))
        >>> int(state.step), metrics['exit_loss'].shape
        (1, (2,))

    References:
        BranchyNet, 2016, section III-B.
    """
    return _step(state, batch, exit_weights, key, loss=loss)


def epoch_order(key: Array, epoch: int, num_examples: int, batch_size: int) -> Array:
    """Returns which examples make up each batch of an epoch: a pure function of its arguments.

    Args:
        key: of the whole training.
        epoch: 0, 1, …; every epoch is another permutation.
        num_examples: size of the training set.
        batch_size: examples in a batch; a remainder that does not fill one sits this epoch out.

    Returns:
        ``[steps, batch_size]`` integers.

    Raises:
        ValueError: the training set does not fill one batch.
    """
    steps = num_examples // batch_size
    if steps < 1:
        raise ValueError(f'batch_size: got {batch_size}, but there are only {num_examples} training examples')
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def _step_on_rows(
    state: TrainState, data: Batch, rows: Array, key: Array, exit_weights: Array, *, prepare: Prepare, loss: Loss
) -> tuple[TrainState, Metrics]:
    prepare_key, dropout_key = jax.random.split(key)
    batch = Batch(image=prepare(prepare_key, data.image[rows]), label=data.label[rows])
    return _step(state, batch, exit_weights, dropout_key, loss=loss)


_jitted_step_on_rows = jax.jit(_step_on_rows, static_argnames=('prepare', 'loss'), donate_argnames='state')


@functools.partial(jax.jit, static_argnames=('prepare', 'loss'), donate_argnames='state')
def _scan_epoch(
    state: TrainState, data: Batch, order: Array, keys: Array, exit_weights: Array, *, prepare: Prepare, loss: Loss
) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, step: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        return _step_on_rows(state, data, *step, exit_weights, prepare=prepare, loss=loss)

    return lax.scan(body, state, (order, keys))


def train_epoch(
    state: TrainState,
    data: Batch,
    exit_weights: Array,
    key: Array,
    *,
    epoch: int,
    batch_size: int,
    prepare: Prepare,
    loss: Loss = cross_entropy_per_exit,
    scan: bool = True,
    on_step: Callable[[int, int, int, Metrics], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes the steps of one epoch over data that fits on the device.

    Args:
        state: donated.
        data: the whole training set as stored, ``image [M, H, W, C]`` uint8.
        exit_weights: ``[N]``.
        key: of the whole training; order, augmentation and dropout derive from it and ``epoch``.
        epoch: 0, 1, ….
        batch_size: examples in a step.
        prepare: ``(key, stored images) → network inputs``; runs inside jit.
        loss: ``(logits, labels) → [N]``.
        scan: the epoch is one program, a `jax.lax.scan`; otherwise one dispatch per step, which is slower for small
            networks but reports progress within the epoch. Both end with the same parameters up to rounding.
        on_step: called as ``on_step(epoch, steps done, steps, metrics)`` after every step, or once per epoch with
            ``scan``.

    Returns:
        The next state, and the metrics averaged over the epoch.
    """
    order = epoch_order(key, epoch, len(data), batch_size)
    steps = len(order)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, epoch), 1), steps)
    exit_weights = jnp.asarray(exit_weights, jnp.float32)
    if scan:
        state, history = _scan_epoch(state, data, order, keys, exit_weights, prepare=prepare, loss=loss)
        metrics = jax.tree.map(lambda values: values.mean(0), history)
        if on_step is not None:
            on_step(epoch, steps, steps, metrics)
        return state, metrics
    history = []
    for step in range(steps):
        state, metrics = _jitted_step_on_rows(
            state, data, order[step], keys[step], exit_weights, prepare=prepare, loss=loss
        )
        history.append(metrics)
        if on_step is not None:
            on_step(epoch, step + 1, steps, metrics)
    return state, jax.tree.map(lambda *values: jnp.stack(values).mean(0), *history)


def fit(
    state: TrainState,
    data: Batch,
    exit_weights: Array,
    key: Array,
    *,
    epochs: int,
    directory: Path | str | None = None,
    on_epoch: Callable[[int, TrainState, Metrics], None] | None = None,
    **options: Any,
) -> TrainState:
    """Trains for a number of epochs, resuming from ``directory`` if it holds a checkpoint.

    A run killed at any moment and started again with the same arguments ends with the same parameters as one never
    killed: every epoch is a pure function of the state before it, ``key`` and its number.

    Args:
        state: donated; also tells the shapes of what a checkpoint holds.
        data: the whole training set as stored.
        exit_weights: ``[N]``.
        key: of the whole training.
        epochs: how many in all, those before a resume included.
        directory: where to keep one checkpoint per epoch (only the newest stays); ``None`` keeps none.
        on_epoch: called as ``on_epoch(epochs done, state, metrics)`` after every epoch.
        **options: of `train_epoch`: ``batch_size``, ``prepare``, ``loss``, ``scan``, ``on_step``.

    Returns:
        The trained state.

    Raises:
        ValueError: the directory holds a checkpoint of another network or optimiser, or an unreadable one.
    """
    start = 0
    if directory is not None and (found := checkpoint.restore(directory, state)) is not None:
        start, state = found
    for epoch in range(start, epochs):
        state, metrics = train_epoch(state, data, exit_weights, key, epoch=epoch, **options)
        if directory is not None:
            checkpoint.save(directory, epoch + 1, state)
        if on_epoch is not None:
            on_epoch(epoch + 1, state, metrics)
    return state
