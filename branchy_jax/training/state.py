"""The state of a training, and how it starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from branchy_jax import calling, program
from branchy_jax.types import Array, Variables


class TrainState(struct.PyTreeNode):
    """Everything that training changes, with the model and the optimiser, which are static.

    JAX compares the static fields: equal models and optimisers compile once, and neither needs a hash.

    Attributes:
        step: number of steps taken.
        params: float32 parameters.
        model_state: the other variable collections, such as ``batch_stats``.
        opt_state: of ``optimizer``.
        model: a Flax module that returns the logits of every exit, or an object with ``init`` and ``apply``.
        optimizer: the optax transformation.
        frozen_trunk: whether only the side heads train.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    model: Any = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    frozen_trunk: bool = struct.field(pytree_node=False, default=False)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f'TrainState(step={self.step}, {size:,} parameters, model={calling.name_of(self.model)})'

    @property
    def variables(self) -> Variables:
        """The variables that the model takes."""
        return {'params': self.params, **self.model_state}


@dataclasses.dataclass(frozen=True)
class _PaperAdam:
    """One function of the optimiser, compared by value: optax's own are closures, which compile each time."""

    learning_rate: float | optax.Schedule
    function: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(optax.adam(self.learning_rate, b1=0.99, b2=0.999), self.function)(*arguments)


def paper_adam(learning_rate: float | optax.Schedule = 1e-3) -> optax.GradientTransformation:
    """Returns Adam as in the paper: step size 0.001, β1 0.99, β2 0.999 (BranchyNet, 2016, section IV).

    Two with equal learning rates are equal: a step compiles once for both.

    Raises:
        ValueError: if ``learning_rate`` is below 0, or NaN.
    """
    if not callable(learning_rate) and not isinstance(learning_rate, jax.core.Tracer) and not learning_rate >= 0:
        raise ValueError(f'learning_rate: got {learning_rate}; give a number of at least 0, or a schedule of optax')
    return optax.GradientTransformation(*(_PaperAdam(learning_rate, name) for name in ('init', 'update')))


def create_train_state(
    model: Any,
    variables: Variables,
    optimizer: optax.GradientTransformation | None = None,
    *,
    frozen_trunk: bool = False,
    inputs: Any = None,
) -> TrainState:
    """Starts training from given variables, which are copied: `train_step` donates its state, not the caller's arrays.

    Args:
        model: a Flax module that returns the logits of every exit, or an object with ``init`` and ``apply``.
        variables: from ``model.init``, `initialize_from_baseline` or a file.
        optimizer: any optax transformation; `paper_adam` by default.
        frozen_trunk: trains the side heads only: parameters that the last exit reads do not change. A module with an
            argument ``frozen_trunk`` gets it; any other module runs in evaluation mode.
        inputs: needed with ``frozen_trunk``: an example of the model's inputs, or `jax.ShapeDtypeStruct` of them.

    Raises:
        ValueError: if ``model`` is no model, ``variables`` have no ``params``, or ``inputs`` are missing.

    Example:
        >>> import branchy_jax as bj
        >>> model = bj.models.create('b-lenet')
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> int(create_train_state(model, variables).step)
        0
    """
    calling.check_model(model)
    if not isinstance(variables, Mapping) or 'params' not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables: got {got}; give what model.init returned, {{'params': …, …}}, not params alone")
    optimizer, collections = optimizer or paper_adam(), jax.tree.map(jnp.array, dict(variables))
    params = collections.pop('params')
    if frozen_trunk:
        if inputs is None:
            raise ValueError('inputs: got None; frozen_trunk=True needs an example of the inputs, or their shapes')
        trunk = program.leaves_read(model, variables, inputs, [-1])
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: 'trunk' if f"['params']{jax.tree_util.keystr(path)}" in trunk else 'head', params
        )
        optimizer = optax.multi_transform({'head': optimizer, 'trunk': optax.set_to_zero()}, labels)
    opt_state = jax.tree.map(jnp.array, optimizer.init(params))  # some keep the parameters: no buffer is donated twice
    return TrainState(jnp.zeros((), jnp.int32), params, collections, opt_state, model, optimizer, frozen_trunk)
