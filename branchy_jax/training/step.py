"""One optimiser step on all exits, pure and jitted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import optax

from branchy_jax.losses import Loss, MetricsOf, accuracy_per_exit, cross_entropy_per_exit, weighted_exit_loss
from branchy_jax.training.state import TrainState
from branchy_jax.types import Array, Batch

Metrics = Mapping[str, Array]
"""``loss`` scalar, ``exit_loss`` [N], and other figures, by default ``exit_accuracy`` [N]."""


def take_step(
    state: TrainState, batch: Batch, exit_weights: Array, key: jax.Array, *, loss: Loss, metrics: MetricsOf
) -> tuple[TrainState, Metrics]:
    """Does what `train_step` does, for callers that jit more than one step."""

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
    _check_statistics(state, model_state)
    updates, opt_state = state.optimizer.update(gradients, state.opt_state, state.params)
    found = {'loss': weighted_exit_loss(exit_loss, exit_weights), 'exit_loss': exit_loss}
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
    )
    return state, {**found, **metrics(logits, batch.label)}


def _check_statistics(state: TrainState, model_state: Any) -> None:
    """Warns, when a step is traced, where it leaves all statistics of BatchNorm as they were."""
    before, after = (jax.tree.leaves(tree.get('batch_stats', {})) for tree in (state.model_state, model_state))
    if before and not state.frozen_trunk and all(a is b for a, b in zip(before, after, strict=True)):
        warnings.warn(
            'model: has statistics of BatchNorm, which this training step leaves as they are. If they are to be '
            'learned, the network is told that it trains by none of the names train, training, is_train, is_training, '
            'deterministic, inference, use_running_average: give the flag one of these',
            stacklevel=2,
        )


@functools.partial(jax.jit, static_argnames=('loss', 'metrics'), donate_argnames='state')
def train_step(
    state: TrainState,
    batch: Batch,
    exit_weights: Array,
    key: jax.Array,
    *,
    loss: Loss = cross_entropy_per_exit,
    metrics: MetricsOf = accuracy_per_exit,
) -> tuple[TrainState, Metrics]:
    r"""Takes one optimiser step on the weighted sum of the exits' losses.

    .. math:: \min_\theta \sum_n w_n L_n(\theta)

    Pure and jitted; ``state`` is donated, so keep the returned one and forget the old. ``loss`` and ``metrics``
    compile once if they are equal: define each function once, since a new lambda at every step is compiled at every
    step.

    Args:
        state: where training stands.
        batch: images ``[B, H, W, C]`` float, ready for the network, and labels ``[B, …]`` or other targets.
        exit_weights: ``[N]``.
        key: for dropout.
        loss: ``(logits, labels) → [N]``; see `branchy_jax.losses`.
        metrics: ``(logits, labels) → figures by name``, for other tasks than classification.

    Returns:
        The next state, and metrics of this batch before the step: ``loss`` scalar, ``exit_loss`` [N], and the
        figures of ``metrics``, by default ``exit_accuracy`` [N].

    Raises:
        ValueError: images, labels or weights of the wrong shape or dtype.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> state = bj.training.create_train_state(model, model.init(jax.random.key(0), images))
        >>> batch = bj.Batch(images, jnp.array([3, 7]))
        >>> state, metrics = train_step(state, batch, jnp.ones(2), jax.random.key(1))
        >>> int(state.step), metrics['exit_loss'].shape
        (1, (2,))

    References:
        BranchyNet, 2016, section III-B.
    """
    return take_step(state, batch, exit_weights, key, loss=loss, metrics=metrics)
