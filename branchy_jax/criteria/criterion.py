"""What a criterion is, the one comparison that decides whether an exit answers, and how pixels become an image."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import jax.numpy as jnp
from flax import struct

from branchy_jax.types import Array, ByValue

Kind = TypeVar('Kind')
Carry = Any
"""What a criterion remembers from exit to exit: any pytree whose leaves lead with B."""

Pool = Callable[[Array], Array]
"""``uncertainty [B, …] → [B]``; an uncertainty that is ``[B]`` already stays as it is."""


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(struct.field,))
def value(kind: type[Kind]) -> type[Kind]:
    """Makes a class of criteria a frozen pytree; `Criterion` compares values."""
    return struct.dataclass(kind, eq=False, repr=False)


def is_confident(uncertainty: Array, threshold: Array) -> Array:
    """Decides whether an exit answers: ``uncertainty < threshold``, strictly.

    The one rule of the library; searches and planners that work on arrays follow it. ``-inf`` never
    exits, ``+inf`` exits on any finite uncertainty, and an uncertainty that is NaN goes on to the next exit: no early
    exit answers with NaN, and NaN in the last exit's uncertainty tells that the answer is worth nothing.
    """
    return uncertainty < threshold


def most_likely_class(logits: Array) -> Array:
    """Returns the label of logits ``[B, …, K]``: their argmax ``[B, …]`` int32."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def check_classes(logits: Array) -> None:
    """Refuses one logit where probabilities of classes are compared: its softmax is 1, and every input would be sure.

    Raises:
        ValueError: K is below 2.
    """
    if logits.shape[-1] < 2:
        raise ValueError(
            f'logits: got shape {tuple(logits.shape)}, of which a softmax is sure whatever the input; give heads that '
            'end in two classes or more, or a criterion of your own (criteria.from_logits)'
        )


class Criterion(ByValue, abc.ABC):
    """A measure of uncertainty that may look back at the exits before: a frozen pytree, compared by value.

    Executors call ``carry = init(logits)`` with the first exit's logits, then, at exit n,
    ``answer, uncertainty, carry = update(logits, carry, n)``. What a criterion has learned (a temperature, a small
    network) are its leaves; its kind is static. Subclasses are `flax.struct.dataclass` with ``eq=False``; most need no
    class: see `from_logits`.

    Attributes:
        name: how reports refer to it.
    """

    if TYPE_CHECKING:  # an attribute of some kinds, a property of others

        @property
        def name(self) -> str:
            """How reports refer to it."""
            ...

    def __repr__(self) -> str:
        return f'<criterion {self.name}>'

    @property
    def num_exits(self) -> int | None:
        """N of the networks that it has learned something for; ``None`` fits any."""
        return None

    def init(self, logits: Array) -> Carry:
        """Returns what is remembered before the first exit, given its logits ``[B, …, K]``."""
        return ()

    @abc.abstractmethod
    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        """Looks at exit ``n``, a Python int.

        Args:
            logits: ``[B, …, K]`` of its head.
            carry: what was remembered.
            n: number of the exit.

        Returns:
            The answer's logits ``[B, …, K]``, the uncertainty ``[B]``, and what is remembered.
        """

    def decide(self, logits: Array) -> Array:
        """Returns the label of an answer's logits: `most_likely_class`, unless the task is another."""
        return most_likely_class(logits)


def mean_over_pixels(uncertainty: Array) -> Array:
    """Averages over all pixels: blind to a small part that is wrong, where most of an image is easy.

    Example:
        >>> mean_over_pixels(jnp.array([[[0.0, 1.0], [0.0, 0.0]]])).tolist()
        [0.25]
    """
    return flat_pixels(uncertainty).mean(axis=-1)


def flat_pixels(values: Array) -> Array:
    """Returns ``[B, …]`` as ``[B, M]``, also for B = 0."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def unless_nan(uncertainty: Array, answer: Array) -> Array:
    """Makes an uncertainty ``[B]`` that does not come from all values of an answer's logits NaN where these are."""
    return jnp.where(jnp.isnan(answer).any(axis=tuple(range(1, answer.ndim))), jnp.nan, uncertainty)


def pooled(uncertainty_of: Callable[[Array], Array], pool: Pool, answer: Array) -> Array:
    """Returns the uncertainty ``[B]`` of an answer's logits ``[B, …, K]``; NaN where these are NaN."""
    uncertainty = uncertainty_of(answer)
    # One that is not of every pixel, such as `EveryOther`, has not seen them all.
    sees_all = uncertainty.shape == answer.shape[:-1]
    return pool(uncertainty) if sees_all else unless_nan(pool(uncertainty), answer)


@value
class _FromLogits(Criterion):
    uncertainty_of: Callable[[Array], Array] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    pool: Pool = struct.field(pytree_node=False, default=mean_over_pixels)
    # A field in place of the method:
    decide: Callable[[Array], Array] = struct.field(pytree_node=False, default=most_likely_class)  # type: ignore[assignment]

    def update(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        return logits, pooled(self.uncertainty_of, self.pool, logits), carry


def from_logits(
    uncertainty_of: Callable[[Array], Array],
    *,
    name: str,
    pool: Pool = mean_over_pixels,
    decide: Callable[[Array], Array] = most_likely_class,
) -> Criterion:
    """Builds the criterion that looks at one exit's logits alone.

    Two of them are equal, and compile once, if they are given equal functions: define each function once.

    Args:
        uncertainty_of: ``logits [B, …, K] → uncertainty [B, …]``.
        name: the criterion's name in reports.
        pool: ``uncertainty [B, …] → [B]``, where an exit answers for many pixels.
        decide: ``logits → label``; for regression, say, ``lambda outputs: outputs[..., 0]``.

    Example:
        >>> spread = from_logits(lambda logits: -jnp.ptp(logits, axis=-1), name='range')
        >>> answer, uncertainty, _ = spread.update(jnp.array([[0.0, 3.0]]), (), 0)
        >>> float(uncertainty[0])
        -3.0
    """
    return _FromLogits(uncertainty_of, name, pool, decide)


def check_exit_number(n: int, count: int, argument: str) -> None:
    """Refuses an exit for which a criterion has nothing of its own.

    Raises:
        ValueError: n is beyond the last.
    """
    if not 0 <= n < count:
        raise ValueError(f'{argument}: there are {count}, one per exit, but the network asks for exit {n + 1}')


def check_criterion(criterion: Any, num_exits: int) -> None:
    """Refuses what is no criterion, or one that was learned for another number of exits.

    Raises:
        ValueError: a criterion's name instead of a criterion, or one of another network.
    """
    if not isinstance(criterion, Criterion):
        raise ValueError(
            f'criterion: got {criterion!r}; give a value such as branchy_jax.criteria.entropy, not its name'
        )
    if criterion.num_exits not in (None, num_exits):
        raise ValueError(
            f'criterion: {criterion.name!r} was learned for {criterion.num_exits} exits, not for {num_exits}; fit it '
            'on the outputs of this network'
        )


def replay(criterion: Criterion, logits: Array) -> tuple[Array, Array]:
    """Runs a criterion over cached logits of every exit, instead of over the network again.

    Args:
        criterion: how unsure an exit is.
        logits: ``[N, B, …, K]`` as the heads gave them.

    Returns:
        Answer logits ``[N, B, …, K]`` and uncertainty ``[N, B]``.

    Example:
        >>> from branchy_jax.criteria import entropy
        >>> replay(entropy, jnp.zeros((2, 3, 4)))[1].shape
        (2, 3)
    """
    logits = jnp.asarray(logits)
    carry, answers, uncertainties = criterion.init(logits[0]), [], []
    for n, one in enumerate(logits):
        answer, uncertainty, carry = criterion.update(one, carry, n)
        answers.append(answer)
        uncertainties.append(uncertainty)
    return jnp.stack(answers), jnp.stack(uncertainties)


@dataclasses.dataclass(frozen=True)
class QuantileOverPixels:
    """Pool that returns a quantile of the pixels' uncertainty.

    Attributes:
        quantile: in [0, 1]; 0.95 asks how unsure the worst twentieth of the image is at least, which is the 5 %
            quantile of its confidence.

    Raises:
        ValueError: a quantile outside [0, 1].

    Example:
        >>> QuantileOverPixels(1.0)(jnp.array([[[0.0, 1.0], [0.0, 0.5]]])).tolist()
        [1.0]
    """

    quantile: float

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)

    def __call__(self, uncertainty: Array) -> Array:
        """Maps ``[B, …]`` to ``[B]``."""
        return jnp.quantile(flat_pixels(uncertainty), self.quantile, axis=-1)


@dataclasses.dataclass(frozen=True)
class QuantileOverPatches:
    """Pool that averages within square patches and returns a quantile of the patches.

    A patch that is unsure as a whole counts; a lone unsure pixel, as there are along every edge, does not.

    Attributes:
        quantile: in [0, 1], of the patches; 1 is the most unsure patch.
        size: side of a patch in pixels. Patches do not overlap; one that the border cuts averages what it has.

    Raises:
        ValueError: quantile outside [0, 1], size below 1; when applied, uncertainty that is not ``[B, H, W]``.

    Example:
        >>> QuantileOverPatches(1.0, size=2)(jnp.array([[[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]]])).tolist()
        [0.5]
    """

    quantile: float
    size: int

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)
        if self.size < 1:
            raise ValueError(f'size: got {self.size}; a patch is at least one pixel wide')

    def __call__(self, uncertainty: Array) -> Array:
        """Maps ``[B, H, W]`` to ``[B]``."""
        if uncertainty.ndim != 3:
            raise ValueError(f'uncertainty: patches need [B, H, W], got shape {uncertainty.shape}')
        edges = [(0, 0), *((0, -length % self.size) for length in uncertainty.shape[1:])]
        # Sums and counts of the same padded patches, so that padding counts for nothing.
        total, count = (_sum_patches(jnp.pad(x, edges), self.size) for x in (uncertainty, jnp.ones_like(uncertainty)))
        return jnp.quantile(flat_pixels(total / count), self.quantile, axis=-1)


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """Measure that looks at every so many pixels along each side only.

    The softmax of every pixel costs as much as a small convolution; an image is as unsure as a sample of its pixels.

    Attributes:
        uncertainty_of: ``logits [B, H, W, K] → [B, H, W]``.
        stride: 2 looks at a quarter of the pixels.

    Raises:
        ValueError: a stride below 1.

    Example:
        >>> EveryOther(lambda logits: logits[..., 0], stride=2)(jnp.arange(9.0).reshape(1, 3, 3, 1)).tolist()
        [[[0.0, 2.0], [6.0, 8.0]]]
    """

    uncertainty_of: Callable[[Array], Array]
    stride: int = 2

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f'stride: got {self.stride}; expected at least 1')

    def __call__(self, logits: Array) -> Array:
        """Maps ``[B, H, W, K]`` to uncertainty of some pixels."""
        return self.uncertainty_of(logits[:, :: self.stride, :: self.stride])


def _sum_patches(values: Array, size: int) -> Array:
    batch, height, width = values.shape
    return values.reshape(batch, height // size, size, width // size, size).sum(axis=(2, 4))


def _check_quantile(quantile: float) -> None:
    if not 0 <= quantile <= 1:
        raise ValueError(f'quantile: got {quantile}; expected a share in [0, 1]')
