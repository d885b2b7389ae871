"""One optimiser step on all exits, pure and jitted."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from branchy_jax import calling, modes
from branchy_jax.losses import Loss, MetricsOf, accuracy_per_exit, cross_entropy_per_exit
from branchy_jax.training.state import TrainState
from branchy_jax.types import Array, Batch

Metrics = Mapping[str, Array]
"""``loss`` scalar, ``exit_loss`` [N], and further metrics, by default ``exit_accuracy`` [N]."""


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

    Pure and jitted. ``state`` is donated: use the returned state afterwards. Steps with equal ``loss`` and ``metrics``
    compile once. A lambda is equal only to itself, so a new lambda at every step compiles every step.

    Args:
        state: the state before the step.
        batch: images ``[B, H, W, C]`` float, ready for the network, or other inputs; with labels ``[B, …]`` or other
            targets.
        exit_weights: ``[N]``. The paper's best setting for two exits is 1.0 and 0.3: early exits regularise.
        key: for every random stream that the network asks for, such as ``dropout``.
        loss: ``(logits, labels) → [N]``; see `branchy_jax.losses`.
        metrics: ``(logits, labels) → metrics by name``.

    Returns:
        The next state, and metrics of this batch before the step: ``loss`` scalar, ``exit_loss`` [N], and those of
        ``metrics``, by default ``exit_accuracy`` [N].

    Raises:
        ValueError: if images, labels or weights have a wrong shape or dtype.

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

    def objective(params: Any) -> tuple[Array, tuple[Any, Array, tuple[Array, ...]]]:
        logits, model_state = run_in_training(state.replace(params=params), batch.image, key)
        exit_loss = loss(logits, batch.label)
        weights = jnp.asarray(exit_weights, exit_loss.dtype)
        check_exit_weights(weights, len(exit_loss))
        return jnp.sum(weights * exit_loss), (model_state, exit_loss, logits)

    (total, (model_state, exit_loss, logits)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    _check_statistics(state, model_state)
    arguments = gradients, state.opt_state, state.params, lambda params: objective(params)[0], total
    updates, opt_state = optimizer_update(state.optimizer, *arguments)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
    return state, {'loss': total, 'exit_loss': exit_loss, **metrics(logits, batch.label)}


def check_exit_weights(exit_weights: Array, num_exits: int) -> None:
    """Refuses another number of weights than exits."""
    if exit_weights.shape != (num_exits,):
        raise ValueError(f'exit_weights: expected one for each of {num_exits} exits, got {exit_weights.shape}')


def run_in_training(state: TrainState, inputs: Any, key: Array) -> tuple[tuple[Array, ...], Any]:
    """Runs the network in training mode, with a key for each random stream that it asks for.

    Args:
        state: before the step.
        inputs: of the network.
        key: of the step.

    Returns:
        The logits of every exit, and the updated collections.
    """
    # Flax draws from `params` for a stream of any other name.
    rngs, collections = {'dropout': key, 'params': jax.random.fold_in(key, 0)}, list(state.model_state)
    mode: dict[str, Any] = {'train': True, 'frozen_trunk': state.frozen_trunk, 'rngs': rngs}
    return calling.apply(state.model, state.variables, inputs, **mode, mutable=collections)


def optimizer_update(
    optimizer: optax.GradientTransformation,
    gradients: Any,
    opt_state: Any,
    params: Any,
    value_of: Callable[[Any], Array],
    value: Array | float = 0.0,
) -> tuple[Any, Any]:
    """Calls the update of any optax transformation, with those of optax's further arguments that it asks for.

    Args:
        optimizer: the transformation.
        gradients: of the loss.
        opt_state: before the step.
        params: before the step.
        value_of: the loss as a function of the parameters, for line searches.
        value: the loss before the step.

    Returns:
        The updates and the next state.
    """
    further = {
        'value': value,
        'grad': gradients,
        'value_fn': value_of,
        'grad_fn': lambda params, step: jax.grad(value_of)(params),
    }
    asked = inspect.signature(optimizer.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked.values())
    named = set(asked) | {'value', 'grad', 'value_fn'} if takes_all else set(asked)  # `sam` alone takes grad_fn
    further = {name: argument for name, argument in further.items() if name in named}
    return optimizer.update(gradients, opt_state, params, **further)


def _check_statistics(state: TrainState, model_state: Any) -> None:
    """Warns, when a step is traced, of statistics of BatchNorm that the step does not change."""
    before, after = (
        jax.tree.leaves_with_path(tree.get('batch_stats', {})) for tree in (state.model_state, model_state)
    )
    same = [path for (path, old), (_, new) in zip(before, after, strict=True) if old is new]
    if same and not state.frozen_trunk:
        layers = dict.fromkeys(jax.tree_util.keystr(path[:-1], simple=True, separator='/') for path in same)
        listed = ', '.join(map(repr, list(layers)[:3])) + (', …' if len(layers) > 3 else '')
        warnings.warn(
            f'model: this training step does not change the statistics of {listed}. {modes.UNLESS_MEANT}', stacklevel=2
        )
