"""Exact rewriting of a trained network before inference: same contract, fewer and faster operations."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from branchy_jax.inference.rewriting.forms import Forms
from branchy_jax.inference.rewriting.known import Constant, Known, ancestry, from_stored
from branchy_jax.inference.rewriting.rewrite import run
from branchy_jax.models.attached.program import trace
from branchy_jax.models.branchy import BranchyNet, check_model, run_segment
from branchy_jax.types import Array, Variables, input_specs

# Measured inside LeNet, AlexNet and ResNet at batch 1: up to 200 pairs 1.1 to 4 times faster, from 256 on slower.
_MOST_CHANNEL_PAIRS_ON_CPU = 200
# Likewise up to 16 channels and features 1.1 to 2 times faster on one core, and on two with `ALL_CORES` or `ONE_CORE`.
# Compiled with neither, XLA shares the last of them among several cores as they are written, but not when wider.
_MOST_PAIRS_TOGETHER_ON_CPU = 256
# Each argument of a compiled program costs about a microsecond on a CPU, which batch 1 feels; compiling large constants
# costs memory and time.
_MOST_EMBEDDED_BYTES_ON_CPU = 2**24

# What is computed alike at two sizes does not depend on the batch size; a batch of one image is often traced otherwise,
# since its arrays need no spreading.
_TRACED_BATCH_SIZES = (2, 3)


def default_forms(dtype: Any = None, *, platform: str | None = None) -> Forms:
    """Returns the forms that a platform runs fastest; by default this process's backend."""
    if (platform or jax.default_backend()) != 'cpu':
        return Forms(dtype=dtype)
    return Forms(
        _MOST_PAIRS_TOGETHER_ON_CPU,
        _MOST_CHANNEL_PAIRS_ON_CPU,
        sliced_pooling=True,
        transposed_weights=True,
        dtype=dtype,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A stage or a head of the original network, and how to rewrite it.

    Attributes:
        function: ``(variables, hidden) → hidden``, retraced at each new batch size.
        shapes: of its variables.
        forms: which forms it is emitted in.
        embedded: the constants themselves where they are to be part of the compiled program.
        traced: programs by what they were traced for; tracing a deep network takes longer than all else here.
    """

    function: Callable[[Variables, Any], Any]
    shapes: Any
    forms: Forms
    embedded: Mapping[str, Array] | None = None
    traced: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def evaluate(self, known: Any, hidden: Any, constant: Constant) -> Any:
        """Runs the rewritten program with variables known and ``constant`` handing out what it needs of them."""
        jaxpr, structure = self._trace(hidden)
        leaves = run(jaxpr, jax.tree.leaves(known), jax.tree.leaves(hidden), constant, self.forms)
        return jax.tree.unflatten(structure, leaves)

    def _trace(self, hidden: Any) -> Any:
        leaves, structure = jax.tree.flatten(hidden)
        if not all(isinstance(size, int) for leaf in leaves for size in leaf.shape):  # an export's symbolic size
            return trace(self.function, self.shapes, hidden)
        # What a context of the caller's may change in the program.
        config: Any = jax.config
        settings = config.jax_default_matmul_precision, config.jax_enable_x64
        key = structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, 'weak_type', False)) for leaf in leaves), settings
        if key not in self.traced:
            self.traced[key] = trace(self.function, self.shapes, hidden)
        return self.traced[key]

    def constants(self, variables: Variables, hidden: Sequence[Any]) -> dict[str, Array]:
        """Computes what the rewritten program needs of the variables, by the keys it asks for.

        That is all that a single image needs, and of what other batch sizes need the values that do not depend on the
        size, and what the others are computed from.

        Args:
            variables: of the network.
            hidden: at each of the batch sizes that are traced.
        """
        alone, *batches = (self._asked(variables, one) for one in hidden)
        alike = frozenset.intersection(*(frozenset(ancestry(asked)) for asked in batches))
        origins = ancestry(itertools.chain(*batches), enough=alike).items()
        kept = {known.key: known for known in alone} | {k: v for k, v in origins if k in alike or not v.inputs}
        return {key: known.value for key, known in kept.items()}

    def _asked(self, variables: Variables, hidden: Any) -> list[Known]:
        asked: list[Known] = []

        def record(known: Known) -> Array:
            asked.append(known)
            return jnp.zeros(known.shape, known.dtype)

        known = self._known(lambda n: lambda: jax.tree.leaves(variables)[n])
        jax.eval_shape(lambda hidden: self.evaluate(known, hidden, record), hidden)
        return asked

    def replay(self, constants: Mapping[str, Array], hidden: Any) -> Any:
        """Runs the rewritten program on constants computed before."""
        return self.evaluate(self._known(lambda n: _unavailable), hidden, from_stored(constants))

    def _known(self, function: Callable[[int], Callable[[], Array]]) -> list[Known]:
        return [Known(function(n), (), spec, 'variable', n) for n, spec in enumerate(jax.tree.leaves(self.shapes))]


class RewrittenLayer(nn.Module):
    """A rewritten segment as a Flax module whose parameters are the segment's constants.

    Attributes:
        segment: what to run.
        constants: their keys and shapes.
    """

    segment: Segment
    constants: tuple[tuple[str, jax.ShapeDtypeStruct], ...]

    @nn.compact
    def __call__(self, hidden: Any) -> Any:
        """Runs the rewritten segment."""
        if self.segment.embedded is not None:
            return self.segment.replay(self.segment.embedded, hidden)
        values = {
            name: self.param(f'constant{n}', lambda key, spec=spec: jnp.zeros(spec.shape, spec.dtype))
            for n, (name, spec) in enumerate(self.constants)
        }
        return self.segment.replay(values, hidden)


def optimize(
    model: BranchyNet,
    variables: Variables,
    *,
    dtype: Any = None,
    forms: Forms | None = None,
    embed: bool | None = None,
    batch_sizes: tuple[int, int] | None = None,
) -> tuple[BranchyNet, Variables]:
    """Rewrites a trained network for inference, exactly up to rounding.

    Everything that depends on variables alone is computed now; what depends on the batch size too, at each. BatchNorms
    and biases are folded into the convolutions and matrix products before them. On a CPU, convolutions with few
    channels compute several pixels together or become products with a banded matrix, and max pooling becomes maxima of
    slices. Works on any network, since it works on the jaxpr.

    Args:
        model: a network with N exits.
        variables: trained.
        dtype: ``jnp.bfloat16`` multiplies in bfloat16 and accumulates in float32; not exact.
        forms: to override what suits the backend.
        embed: compiles the weights into the program as constants, and returns empty variables. By default on a CPU,
            for networks of up to 16 MiB.
        batch_sizes: two sizes above 1 that it will run at, which saves tracing it there again; it runs at any.

    Returns:
        A `BranchyNet` with the same stages and exits, for inference only, and its variables. Logits agree within
        1e-4 in float32.

    Raises:
        ValueError: the network has no ``image_shape``, or these are not its variables.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> fast_model, fast_variables = optimize(model, variables)
        >>> first, same = model.apply(variables, images)[0], fast_model.apply(fast_variables, images)[0]
        >>> bool(jnp.allclose(first, same, atol=1e-4))
        True
    """
    check_model(model)
    forms = default_forms(dtype) if forms is None else forms
    if model.image_shape is None:
        raise ValueError('model: has no image_shape, which optimize needs to trace it; build it with image_shape=…')
    hidden = [input_specs(model.image_shape, size) for size in (1, *(batch_sizes or _TRACED_BATCH_SIZES))]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    segments, constants = {}, {}
    for n, kind in itertools.product(range(model.num_exits), ('stage', 'exit')):
        segment = Segment(functools.partial(run_segment, model, kind, n), shapes, forms)
        segments[kind, n], constants[kind, n] = segment, segment.constants(variables, hidden)
        if kind == 'stage':
            hidden = [jax.eval_shape(segment.function, variables, one) for one in hidden]
    if embed is None:
        total = sum(value.nbytes for value in itertools.chain(*(values.values() for values in constants.values())))
        embed = jax.default_backend() == 'cpu' and total <= _MOST_EMBEDDED_BYTES_ON_CPU
    layers = {place: _layer(segments[place], constants[place], place, embed=embed) for place in segments}
    rewritten = BranchyNet(
        stages=tuple(layer for (kind, _), layer in layers.items() if kind == 'stage'),
        exits=tuple(layer for (kind, _), layer in layers.items() if kind == 'exit'),
        image_shape=model.image_shape,
    )
    if embed:
        return rewritten, {}
    params = {
        _name(place): {f'constant{i}': value for i, value in enumerate(values.values())}
        for place, values in constants.items()
        if values
    }
    return rewritten, {'params': params}


def _layer(segment: Segment, constants: dict[str, Array], place: tuple[str, int], *, embed: bool) -> RewrittenLayer:
    if embed:
        segment = dataclasses.replace(segment, embedded=constants)
    specs = tuple((key, jax.ShapeDtypeStruct(value.shape, value.dtype)) for key, value in constants.items())
    return RewrittenLayer(segment, specs, name=_name(place))


def _name(place: tuple[str, int]) -> str:
    kind, n = place
    return f'{kind}{n + 1}'


def _unavailable() -> Array:
    raise ValueError(
        'images: a batch of this size needs weights that the batches for which the network was rewritten do not; run '
        'the network as it was before optimize'
    )
