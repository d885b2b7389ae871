"""Flax NNX modules as stages and heads, through their functional form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from branchy_jax.models.compose import Functional, Hidden
from branchy_jax.types import Array


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], *, name: str | None = None) -> Functional:
    """Builds a layer of a `BranchyNet` from an NNX module.

    Args:
        build: makes the module from its random streams; called again for each initialisation.
        name: of the layer, and of its parameters.

    Raises:
        ValueError: the module keeps state beside its parameters, such as BatchNorm's statistics or dropout's stream;
            `branchy_jax.models.attach` takes networks of those.

    Example:
        >>> import branchy_jax as bj, jax.numpy as jnp
        >>> model = bj.BranchyNet(
        ...     stages=(from_nnx(lambda rngs: nnx.Linear(4, 8, rngs=rngs)), nnx.relu),
        ...     exits=(from_nnx(lambda rngs: nnx.Linear(8, 3, rngs=rngs)),) * 2,
        ... )
        >>> [logits.shape for logits in model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0]]
        [(2, 3), (2, 3)]
    """

    def split(key: jax.Array) -> tuple[nnx.GraphDef, Any]:
        definition, *states = nnx.split(build(nnx.Rngs(key)), nnx.Param, ...)
        parameters, rest = states
        variables = jax.tree.leaves(rest, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        kinds = sorted({type(variable).__name__ for variable in variables})
        if kinds:
            raise ValueError(
                f'build: the module keeps state beside its parameters ({", ".join(kinds)}), which this form does not '
                'carry; branchy_jax.models.attach takes whole networks of such modules'
            )
        return definition, nnx.to_pure_dict(parameters)

    definition, shapes = nnx.eval_shape(lambda: split(jax.random.key(0)))
    structure, names = jax.tree.structure(shapes), _names(shapes)

    def initialize(key: Any) -> dict[str, Array]:
        return dict(zip(names, jax.tree.leaves(split(key)[1]), strict=True))

    def function(parameters: dict[str, Array], hidden: Hidden) -> Hidden:
        state = jax.tree.unflatten(structure, [parameters[name] for name in names])
        return nnx.merge(definition, state)(hidden)

    return Functional(function, initialize, name=name)


def _names(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in jax.tree.leaves_with_path(tree)]
