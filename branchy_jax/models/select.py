"""Some of a network's exits: the same trunk, the same names of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from branchy_jax import calling, program
from branchy_jax.types import Variables, num_rows

Keys = tuple[str, ...]
"""The names that lead to a leaf of the variables."""


@dataclasses.dataclass(frozen=True)
class SelectedExits:
    """A model with some of its exits.

    Attributes:
        model: the model with all exits.
        indices: the exits that stay; ``None`` for the last one alone.
    """

    model: Any
    indices: tuple[int, ...] | None

    def init(self, key: Any, *inputs: Any) -> Variables:
        """Returns fresh variables: the leaves that the chosen exits read, as ``model.init`` would make them."""
        given = calling.one_input(inputs)
        variables = calling.init(self.model, key, given)
        _, needed = self._needed(variables, given)
        return _filtered(variables, needed)

    def apply(self, variables: Variables, *inputs: Any, mutable: Any = False, **mode: Any) -> Any:
        """Computes the logits of the chosen exits.

        Args:
            variables: those that `init` returns, or a larger tree, such as that of all exits. Leaves that no chosen
                exit reads are filled with zeros; their updates are dropped.
            *inputs: of the model.
            mutable: collections to update.
            **mode: ``train``, ``frozen_trunk`` and ``rngs``, as for `branchy_jax.calling.apply`.

        Raises:
            ValueError: ``variables`` lacks a leaf that a chosen exit reads.
        """
        given = calling.one_input(inputs)
        complete, num_exits = self._complete(variables, given)
        result = calling.apply(self.model, complete, given, mutable=mutable, **mode)
        chosen = self._indices(num_exits)
        if mutable is False:
            return tuple(result[n] for n in chosen)
        logits, updates = result
        return tuple(logits[n] for n in chosen), _filtered(updates, traverse_util.flatten_dict(variables))

    def _complete(self, variables: Variables, inputs: Any) -> tuple[Variables, int]:
        """Returns variables with zeros for the leaves that are missing, and N of the whole model."""
        try:
            return variables, len(program.trace(self.model, variables, inputs).outputs)
        except ValueError:  # leaves are missing, or the variables or inputs do not fit, which shows below
            shapes = _init_shapes(self.model, inputs)
        num_exits, needed = self._needed(shapes, inputs)
        with calling.explained_variables(variables):
            return _completed(variables, shapes, needed), num_exits

    def without_weights(self) -> SelectedExits:
        """Returns the model without arrays: executors keep this."""
        return dataclasses.replace(self, model=calling.without_weights(self.model))

    def _indices(self, num_exits: int) -> tuple[int, ...]:
        return (num_exits - 1,) if self.indices is None else calling.check_exits('indices', self.indices, num_exits)

    def _needed(self, variables: Any, inputs: Any) -> tuple[int, set[Keys]]:
        """Returns N of the whole model, and which leaves the chosen exits read."""
        num_exits = len(program.trace(self.model, variables, inputs).outputs)
        read = program.leaves_read(self.model, variables, inputs, self._indices(num_exits))
        return num_exits, {keys for keys in traverse_util.flatten_dict(variables) if _path(keys) in read}


def select_exits(model: Any, indices: Sequence[int]) -> SelectedExits:
    """Returns the same network with some of its exits; weights keep their names.

    Args:
        model: the network.
        indices: the exits that stay, ascending, the last among them.

    Returns:
        An object with ``init`` and ``apply``, which goes wherever a model goes. ``init`` returns the leaves that the
        chosen exits read; ``apply`` accepts larger trees, such as the variables of ``model``.

    Raises:
        ValueError: ``indices`` is not ascending, or negative; when the model is first called, ``indices`` is out of
            range or leaves out the last exit.

    Example:
        >>> import branchy_jax as bj
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> fewer = select_exits(bj.models.create('b-alexnet'), [0, 2])
        >>> len(fewer.apply(fewer.init(jax.random.key(0), images), images))
        2
    """
    calling.check_model(model)
    chosen = calling.check_exits('indices', indices, indices[-1] + 1 if len(indices) else 0)
    return SelectedExits(model, chosen)


def without_branches(model: Any) -> SelectedExits:
    """Returns the one-exit baseline: the same trunk with the last exit alone; weights keep their names.

    Example:
        >>> import branchy_jax as bj
        >>> images = jnp.ones((1, 28, 28, 1))
        >>> baseline = without_branches(bj.models.create('b-lenet'))
        >>> sorted(baseline.init(jax.random.key(0), images)['params'])
        ['conv1', 'conv2', 'conv3', 'fc1', 'fc2']
    """
    calling.check_model(model)
    return SelectedExits(model, None)


def _init_shapes(model: Any, inputs: Any) -> Any:
    shapes = calling.with_batch(inputs, num_rows(inputs))
    return _initialized.trace(program.Reference(model), jax.random.key(0), shapes).out_info


@jax.jit
def _initialized(model: Any, key: jax.Array, inputs: Any) -> Variables:
    return calling.init(model(), key, inputs)


def _path(keys: Keys) -> str:
    return ''.join(f'[{key!r}]' for key in keys)


def _filtered(tree: Any, wanted: Collection[Keys]) -> Any:
    """Returns a nested dictionary with only some of its leaves; empty dictionaries go."""
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({keys: value for keys, value in flat.items() if keys in wanted})


def _completed(variables: Variables, shapes: Any, needed: set[Keys]) -> Variables:
    given = traverse_util.flatten_dict(dict(variables))
    for keys, spec in traverse_util.flatten_dict(shapes).items():
        if keys in given:
            continue
        if keys in needed:
            raise ValueError(
                f'variables: have no {"/".join(keys)}, which a chosen exit reads; give what init returned, whole'
            )
        given[keys] = jnp.zeros(spec.shape, spec.dtype)
    return traverse_util.unflatten_dict(given)
