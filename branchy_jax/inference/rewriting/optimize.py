"""Exact rewriting of a trained network before inference: the same contract, fewer and faster operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from branchy_jax import calling, program
from branchy_jax.inference.rewriting.forms import Forms, default_forms
from branchy_jax.inference.rewriting.known import Constant, Known, from_stored, without_batch
from branchy_jax.inference.rewriting.rewrite import run
from branchy_jax.types import Array, Variables


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A network rewritten for inference: what `optimize` returns. A model whose variables are computed constants.

    Attributes:
        model: the network as it was, without weights.
        shapes: of the variables of ``model``.
        forms: which forms are emitted.
        names: the key of each constant and its name among the variables.
    """

    model: Any
    shapes: Any
    forms: Forms
    names: tuple[tuple[str, str], ...] = ()

    def init(self, key: Any, *inputs: Any) -> Variables:
        """Raises ValueError: the variables come from `optimize`."""
        raise ValueError('model: is rewritten for inference; its variables are those that optimize returned')

    def apply(
        self,
        variables: Variables,
        *inputs: Any,
        train: bool = False,
        frozen_trunk: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> tuple[Array, ...]:
        """Computes the logits of every exit, in evaluation mode alone.

        Raises:
            ValueError: training, or variables that `optimize` did not return for this network.
        """
        if train or mutable is not False:
            raise ValueError('model: is rewritten for inference and cannot train; train the network as it was before')
        params = variables.get('params', {})
        missing = sorted({name for _, name in self.names} - set(params))
        if missing:
            raise ValueError(f'variables: have no {missing[0]}; give those that optimize returned with this network')
        constants = {key: params[name] for key, name in self.names}
        known = _known_variables(self.shapes, None)
        return self.evaluate(known, calling.one_input(inputs), from_stored(constants))

    def evaluate(self, known: Sequence[Known], inputs: Any, constant: Constant) -> tuple[Array, ...]:
        """Runs the rewritten program; ``constant`` hands out what it needs of the known variables."""
        traced = program.trace(self.model, self.shapes, inputs)
        return tuple(run(traced, known, jax.tree.leaves(inputs), constant, self.forms))

    def asked(self, known: Sequence[Known], inputs: Any) -> list[Known]:
        """Returns the known values that the rewritten program needs for inputs of some shape."""
        values: list[Known] = []

        def record(known: Known) -> Array:
            values.append(known)
            return jnp.zeros(known.shape, known.dtype)

        jax.eval_shape(lambda inputs: self.evaluate(known, inputs, record), inputs)
        return values


def optimize(
    model: Any, variables: Variables, *, inputs: Any, dtype: Any = None, forms: Forms | None = None
) -> tuple[Any, Variables]:
    """Rewrites a trained network for inference, exactly up to rounding.

    Values that depend on variables alone are computed now. BatchNorms and biases are folded into the convolutions and
    matrix products before them. On a CPU, convolutions with few channels compute several pixels together or become
    products with a banded matrix, and max pooling becomes maxima of slices. Works on any network, since it works on the
    jaxpr.

    Args:
        model: a network with N exits.
        variables: trained.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`.
        dtype: ``jnp.bfloat16`` multiplies in bfloat16 and accumulates in float32; not exact.
        forms: to override what suits the backend.

    Returns:
        A model with the same exits, for inference only, and its variables. Logits agree within 1e-4 in float32. The
        model runs at any batch size; one that asks for the number of rows at those of the example and 1.

    Raises:
        ValueError: not a model, or variables of another model.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> fast_model, fast_variables = optimize(model, variables, inputs=images)
        >>> first, same = model.apply(variables, images)[0], fast_model.apply(fast_variables, images)[0]
        >>> bool(jnp.allclose(first, same, atol=1e-4))
        True
    """
    calling.check_model(model)
    forms = default_forms(dtype) if forms is None else forms
    stages = program.stages(model, variables, inputs)
    draft = Rewritten(calling.without_weights(model), calling.specs(variables), forms)
    known = _known_variables(draft.shapes, variables)
    # A single input is often traced otherwise than a batch, since its arrays need no spreading.
    batch = calling.specs(inputs) if stages.fixed_because else calling.with_batch(inputs, program.BATCH)
    asked = [*draft.asked(known, calling.with_batch(inputs, 1)), *draft.asked(known, batch)]
    constants = {value.key: value for value in without_batch(asked)}
    names = dict(zip(constants, _unique([value.name for value in constants.values()]), strict=True))
    params = {names[key]: value.value for key, value in constants.items()}
    return dataclasses.replace(draft, names=tuple(names.items())), {'params': params}


def _known_variables(shapes: Any, variables: Variables | None) -> list[Known]:
    """Returns the leaves of variables as known values; without their values where ``variables`` is ``None``."""
    paths = jax.tree.leaves_with_path(shapes)
    leaves = [None] * len(paths) if variables is None else jax.tree.leaves(variables)
    return [
        Known(_unavailable if leaf is None else lambda leaf=leaf: leaf, (), spec, 'variable', n, name=_name(path))
        for n, ((path, spec), leaf) in enumerate(zip(paths, leaves, strict=True))
    ]


def _name(path: Any) -> str:
    return '/'.join(str(getattr(part, 'key', part)) for part in path[1:])


def _unique(names: Sequence[str]) -> list[str]:
    """Numbers the names that occur several times."""
    counts: dict[str, int] = {}
    result = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        result.append(name if counts[name] == 1 else f'{name} ({counts[name]})')
    return result


def _unavailable() -> Array:
    raise ValueError(
        'inputs: a batch of this size needs weights that the batches for which the network was rewritten do not; run '
        'the network as it was before optimize'
    )
