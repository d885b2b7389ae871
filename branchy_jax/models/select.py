"""Some of a network's exits: the same trunk, the same names of parameters."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from branchy_jax import calling, program
from branchy_jax.types import Variables, num_rows


@dataclasses.dataclass(frozen=True)
class SelectedExits(calling.Model):
    """A model with some of its exits.

    ``init`` returns the leaves that the chosen exits read, as the whole model would make them. ``apply`` accepts larger
    trees, such as the variables of all exits. It fills leaves that no chosen exit reads with zeros, drops their
    updates, and raises ValueError where ``variables`` lacks a leaf that a chosen exit reads.

    Attributes:
        model: the model with all exits.
        indices: the exits that stay; ``None`` for the last one alone.
    """

    model: Any
    indices: tuple[int, ...] | None

    def __repr__(self) -> str:
        return f'SelectedExits({calling.name_of(self.model)}, {self.indices or "the last"})'

    def without_weights(self) -> 'SelectedExits':
        """Returns the model without arrays: executors keep this."""
        return dataclasses.replace(self, model=calling.without_weights(self.model))

    def _init(self, key: Any, inputs: Any) -> Variables:
        variables = calling.init(self.model, key, inputs)
        return _filtered(variables, self._read(variables, inputs))

    def _run(self, variables: Variables, inputs: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        options = {**vars(mode), 'mutable': mode.mutable or False}
        result = calling.apply(self.model, self._completed(variables, inputs), inputs, **options)
        logits, updates = result if mode.mutable else (result, {})
        return [logits[n] for n in self._chosen(len(logits))], _filtered(updates, _by_path(variables).keys())

    def _completed(self, variables: Variables, inputs: Any) -> Variables:
        """Returns variables with zeros for the leaves that are missing."""
        try:
            program.trace(self.model, variables, inputs)
            return variables
        except ValueError:  # leaves are missing, or the variables or inputs do not fit, which shows below
            if not isinstance(variables, Mapping):
                raise
        shapes = _initialized.trace(program.Reference(self.model), jax.random.key(0), calling.specs(inputs)).out_info
        given, read = _by_path(variables), self._read(shapes, inputs)

        def complete(path: Any, spec: Any) -> Any:
            name = jax.tree_util.keystr(path)
            if name not in given and name in read:
                missing = jax.tree_util.keystr(path, simple=True, separator='/')
                raise ValueError(f'variables: have no {missing}, which a chosen exit reads; give all that init made')
            return given[name] if name in given else jnp.zeros(spec.shape, spec.dtype)

        return jax.tree_util.tree_map_with_path(complete, shapes)

    def _chosen(self, num_exits: int) -> tuple[int, ...]:
        return (num_exits - 1,) if self.indices is None else calling.check_exits('indices', self.indices, num_exits)

    def _read(self, variables: Any, inputs: Any) -> Set[str]:
        """Returns the paths of the leaves that the chosen exits read."""
        num_exits = len(program.trace(self.model, variables, inputs).outputs)
        return program.leaves_read(self.model, variables, inputs, self._chosen(num_exits))


def select_exits(model: Any, indices: Sequence[int]) -> SelectedExits:
    """Returns the same network with some of its exits; weights keep their names.

    Args:
        model: the network.
        indices: the exits that stay, ascending, the last among them.

    Returns:
        An object with ``init`` and ``apply``, accepted wherever a model is. ``init`` returns the leaves that the chosen
        exits read; ``apply`` accepts larger trees, such as the variables of ``model``.

    Raises:
        ValueError: ``indices`` is not ascending, or negative; when the model is first called, ``indices`` is out of
            range or leaves out the last exit.

    Example:
        >>> import branchy_jax as bj
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> fewer = select_exits(bj.models.create('b-alexnet'), [0, 2])
        >>> bj.costs.count_macs(fewer, inputs=images).stages.shape
        (2,)
    """
    calling.check_model(model)
    return SelectedExits(model, calling.check_exits('indices', indices))


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


@dataclasses.dataclass(frozen=True)
class RemainingStages(calling.Model):
    """The stages of a model after one of them: what `remaining_stages` returns. A model with ``init`` and ``apply``.

    Attributes:
        model: the whole model.
        after: the stage before these.
        inputs: shapes and dtypes of one set of the whole model's inputs.
    """

    model: Any
    after: int
    inputs: Any

    def without_weights(self) -> 'RemainingStages':
        """Returns the model without arrays: executors keep this."""
        return dataclasses.replace(self, model=calling.without_weights(self.model))

    def _init(self, key: Any, hidden: Any) -> Variables:
        return calling.init(self.model, key, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.inputs))

    def _run(self, variables: Variables, hidden: Any, mode: calling.Mode) -> tuple[Any, Variables]:
        stages = program.stages(self.model, variables, self.inputs)
        if not 0 <= self.after < stages.num_exits - 1:
            raise ValueError(f'after: got {self.after}; the stages before the last are 0 to {stages.num_exits - 2}')
        parts = stages.at(variables, num_rows(hidden), derivatives=True)
        given, expected = jax.tree.leaves(hidden), [v.aval for v in parts.carried[self.after]]
        rows = [np.delete(aval.shape, axis) for aval, axis in zip(expected, parts.axes[self.after], strict=True)]
        if [value.shape[1:] for value in given] != [tuple(shape) for shape in rows]:
            shapes = ', '.join(f'[B, {", ".join(map(str, shape))}]' for shape in rows)
            raise ValueError(f'inputs: do not fit; give what stage {self.after} hands on, batch first: {shapes}')
        hidden = [value.astype(aval.dtype) for value, aval in zip(given, expected, strict=True)]
        logits = []
        for n in range(self.after, stages.num_exits):
            hidden = parts.run_stage(n, hidden) if n > self.after else hidden
            logits.append(parts.run_exit(n, hidden))
        # Statistics stay; as new values, since a step of training warns where it finds the old ones.
        return logits, jax.tree.map(lax.stop_gradient, {name: variables.get(name, {}) for name in mode.mutable})


def remaining_stages(model: Any, after: int, *, inputs: Any) -> RemainingStages:
    """Returns the stages and heads from an exit on, as a model of what the stage of that exit hands on.

    A network is fine-tuned without its first stages, which are frozen: what they hand on is computed once for each
    example (``program.stages(…).run_stage``) and trained on by `branchy_jax.training.fit`. Variables are those of the
    whole model; leaves that only earlier stages read get no gradient. Layers run in evaluation mode, in training too:
    BatchNorm uses its statistics, dropout drops nothing.

    Args:
        model: the whole network.
        after: the exit whose stage is the last frozen one; its head is the first that trains.
        inputs: an example of the network's inputs, or their shapes.

    Returns:
        A model whose inputs are the arrays that the stage hands on, batch first, of any float dtype; it returns the
        logits of the exits from ``after`` on.

    Raises:
        ValueError: when the model is first called: ``after`` is no stage before the last, or the stage hands on other
            arrays than the inputs.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-alexnet'), jnp.ones((2, 32, 32, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> features = bj.program.stages(model, variables, images).run_stage(0, variables, images)
        >>> [logits.shape for logits in remaining_stages(model, 0, inputs=images).apply(variables, features)]
        [(2, 10), (2, 10), (2, 10)]
    """
    calling.check_model(model)
    return RemainingStages(model, after, calling.with_batch(inputs, 1))


@jax.jit
def _initialized(model: Any, key: jax.Array, inputs: Any) -> Variables:
    return calling.init(model(), key, inputs)


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _filtered(tree: Any, paths: Set[str]) -> Any:
    """Returns a nested dictionary with the leaves at some paths; empty dictionaries go."""
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {k: leaf for k, leaf in flat.items() if ''.join(f'[{n!r}]' for n in k) in paths}
    )
