"""What training changes, and how it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from branchy_jax.models.branchy import BranchyNet, check_model, side_head_names
from branchy_jax.types import Array, Replaceable, Variables


@struct.dataclass
class TrainState(Replaceable):
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


@dataclasses.dataclass(frozen=True)
class _PaperAdam:
    """One function of the optimiser as a value: optax's own are closures, unequal each time, and compile anew."""

    learning_rate: float | optax.Schedule
    function: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(optax.adam(self.learning_rate, b1=0.99, b2=0.999), self.function)(*arguments)


def paper_adam(learning_rate: float | optax.Schedule = 1e-3) -> optax.GradientTransformation:
    """Returns Adam as in the paper: step size 0.001, β1 0.99, β2 0.999 (BranchyNet, 2016, section IV).

    Two with equal learning rates are equal: a step compiles once for both.

    Raises:
        ValueError: a learning rate below 0, or NaN.
    """
    if not callable(learning_rate) and not isinstance(learning_rate, jax.core.Tracer) and not learning_rate >= 0:
        raise ValueError(f'learning_rate: got {learning_rate}; give a number from 0 up, or a schedule of optax')
    return optax.GradientTransformation(*(_PaperAdam(learning_rate, name) for name in ('init', 'update')))


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

    Raises:
        ValueError: a name instead of a network, or no variables with ``params``.

    Example:
        >>> import branchy_jax as bj
        >>> model = bj.models.create('b-lenet')
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> int(create_train_state(model, variables).step)
        0
    """
    check_model(model)
    if not isinstance(variables, Mapping) or 'params' not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables: got {got}; give what model.init returned, {{'params': …, …}}, not params alone")
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
