"""Criteria: the base class, the one comparison that decides whether an exit answers, and those of the literature."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.types import Array, ByValue

Carry = Any
"""What a criterion remembers from exit to exit: a pytree whose leaves lead with B, or ``None``."""


def is_confident(uncertainty: Array, threshold: Array) -> Array:
    """Decides whether an exit answers: ``uncertainty < threshold``, strictly.

    The whole library follows this one rule. ``-inf`` never exits and ``+inf`` exits on any finite uncertainty. Where
    the uncertainty is NaN, the input goes on to the next exit, so no early exit answers with NaN.

    Example:
        >>> is_confident(jnp.array([0.1, 0.5, jnp.nan]), jnp.float32(0.5)).tolist()
        [True, False, False]
    """
    return uncertainty < threshold


def most_likely_class(logits: Array) -> Array:
    """Returns the label of logits ``[B, …, K]``: their argmax ``[B, …]`` int32."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def check_classes(logits: Array) -> None:
    """Raises ValueError if K is below 2: the softmax of one logit is 1, so every input would leave at once."""
    if logits.shape[-1] < 2:
        advice = 'give heads that end in two classes or more, or a criterion of your own (criteria.as_criterion)'
        raise ValueError(f'logits: got shape {tuple(logits.shape)}, whose softmax is 1 for every input; {advice}')


class Criterion(ByValue):
    """A measure of uncertainty that may use earlier exits: a frozen pytree, compared by value.

    Executors call ``answer, uncertainty, carry = criterion(logits, carry, n)`` at exit n; ``carry`` is ``None`` at the
    first one. What was learned (temperatures, a small network) are the leaves; all else is static. Most criteria need
    no class, see `as_criterion`. A criterion that uses earlier exits is a `flax.struct.dataclass` with ``eq=False``
    that subclasses this class and defines ``name`` and ``__call__``.

    Attributes:
        name: the criterion's name in reports.
        num_exits: N of the networks that the criterion was fitted for; ``None`` fits any.
    """

    name: str
    num_exits: int | None = None

    def __repr__(self) -> str:
        return f'<criterion {self.name}>'

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        """Judges exit ``n``, a Python int.

        Args:
            logits: ``[B, …, K]`` of its head.
            carry: what the exit before returned; ``None`` at the first exit.
            n: number of the exit.

        Returns:
            The answer's logits ``[B, …, K]``, the uncertainty ``[B]``, and what the next exit receives as ``carry``.
        """
        raise NotImplementedError

    def decide(self, logits: Array) -> Array:
        """Returns the label of an answer's logits, as the attribute ``criterion`` decides; else their argmax."""
        inner = getattr(self, 'criterion', None)
        return inner.decide(logits) if isinstance(inner, Criterion) else most_likely_class(logits)


def mean_over_pixels(values: Array) -> Array:
    """Averages ``[B, …]`` to ``[B]``, also for B = 0."""
    return values.mean(axis=tuple(range(1, values.ndim)))


def unless_nan(uncertainty: Array, answer: Array) -> Array:
    """Makes an uncertainty ``[B]`` NaN where any logit of the answer is NaN."""
    return jnp.where(jnp.isnan(answer).any(axis=tuple(range(1, answer.ndim))), jnp.nan, uncertainty)


class _OfLogits(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """A criterion of one exit's logits alone; `as_criterion` builds it and documents the fields."""

    uncertainty_of: Callable[[Array], Array] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    stride: int = struct.field(pytree_node=False, default=1)
    patch: int = struct.field(pytree_node=False, default=1)
    quantile: float | None = struct.field(pytree_node=False, default=None)
    # A field in place of the method:
    decide: Callable[[Array], Array] = struct.field(pytree_node=False, default=most_likely_class)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.stride < 1 or self.patch < 1:
            raise ValueError(f'stride and patch: got {self.stride} and {self.patch}; give pixels, at least 1')
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ValueError(f'quantile: got {self.quantile}; give a number in [0, 1]')

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        return logits, self.uncertainty(logits), carry

    def uncertainty(self, logits: Array) -> Array:
        """Returns the uncertainty ``[B]`` of an answer's logits ``[B, …, K]``; NaN where any of these is NaN."""
        if max(self.stride, self.patch) > 1 and logits.ndim != 4:
            raise ValueError(f'logits: got shape {tuple(logits.shape)}; stride and patch need [B, H, W, K]')
        of_pixels = self.uncertainty_of(logits[:, :: self.stride, :: self.stride] if self.stride > 1 else logits)
        of_patches = _patch_means(of_pixels, self.patch) if self.patch > 1 else of_pixels
        quantile, axes = self.quantile, tuple(range(1, of_patches.ndim))
        pooled = of_patches.mean(axes) if quantile is None else jnp.quantile(of_patches, float(quantile), axes)
        # Only an uncertainty of every pixel shows NaN in any of them.
        return pooled if of_pixels.shape == logits.shape[:-1] else unless_nan(pooled, logits)


def as_criterion(given: Any, **options: Any) -> Criterion:
    """Returns a criterion: of a function of logits, or an existing one with other options.

    A function is accepted wherever a criterion is; call this to set options. Two criteria are equal, and compile once,
    if their functions and options are equal: define each function once.

    Args:
        given: a criterion, or a function ``logits [B, …, K] → uncertainty [B, …]``, whose extra axes are pooled.
        **options: ``name``: in reports; the function's own by default.
            ``stride``: looks at every so many pixels along both sides only. The softmax of every pixel costs as much
            as a small convolution; 2 looks at a quarter of the pixels.
            ``patch``: averages the uncertainty within square patches of that many pixels first; a patch at the border
            averages the pixels that it has. Single unsure pixels, as along every edge, then hardly count.
            ``quantile``: pools pixels or patches by this quantile instead of their mean; 0.95 asks how unsure the
            worst twentieth of the image is at least.
            ``decide``: ``logits → label``; for regression, say, ``lambda outputs: outputs[..., 0]``.

    Raises:
        ValueError: neither a criterion nor a function, or an option out of range.

    Example:
        >>> spread = as_criterion(lambda logits: -jnp.ptp(logits, axis=-1), name='range')
        >>> answer, uncertainty, _ = spread(jnp.array([[0.0, 3.0]]), None, 0)
        >>> float(uncertainty[0])
        -3.0
        >>> as_criterion(entropy, quantile=0.95, patch=8, name='worst patches')
        <criterion worst patches>
    """
    if not callable(given):
        raise ValueError(f'criterion: got {given!r}; give a value such as criteria.entropy, or a function of logits')
    if not isinstance(given, Criterion):
        given = _OfLogits(given, getattr(given, '__name__', type(given).__name__))
    return given.replace(**options) if options else given


def of_logits(given: Any) -> _OfLogits:
    """Returns a criterion that judges one answer's logits, and raises ValueError for one that uses earlier exits."""
    criterion = as_criterion(given)
    if not isinstance(criterion, _OfLogits):
        raise ValueError(f'criterion: got {criterion.name!r}; give one of single logits, such as entropy')
    return criterion


def check_criterion(criterion: Criterion, num_exits: int) -> None:
    """Raises ValueError if a criterion was fitted for another number of exits."""
    if criterion.num_exits not in (None, num_exits):
        fitted = f'{criterion.name!r} was learned for {criterion.num_exits} exits, not for {num_exits}'
        raise ValueError(f'criterion: {fitted}; fit it on the outputs of this network')


def replay(criterion: Any, logits: Array) -> tuple[Array, Array]:
    """Runs a criterion over cached logits of every exit, instead of over the network again.

    Args:
        criterion: a criterion, or a function of logits.
        logits: ``[N, B, …, K]`` of the heads.

    Returns:
        Answer logits ``[N, B, …, K]`` and uncertainty ``[N, B]``.

    Raises:
        ValueError: a criterion that was fitted for another number of exits.

    Example:
        >>> replay(entropy, jnp.zeros((2, 3, 4)))[1].shape
        (2, 3)
    """
    criterion, carry, answers, uncertainties = as_criterion(criterion), None, [], []
    check_criterion(criterion, len(logits))
    for n, of_exit in enumerate(jnp.asarray(logits)):
        answer, uncertainty, carry = criterion(of_exit, carry, n)
        answers.append(answer)
        uncertainties.append(uncertainty)
    return jnp.stack(answers), jnp.stack(uncertainties)


def _patch_means(values: Array, size: int) -> Array:
    """Averages ``[B, H, W]`` in square patches; one at the border averages the pixels that it has."""
    window, padding = (size, size), [(0, -side % size) for side in values.shape[1:]]
    return nn.avg_pool(values[..., None], window, window, padding, count_include_pad=False)[..., 0]


def entropy_of_logits(logits: Array) -> Array:
    r"""Computes the entropy of the softmax, in nats.

    .. math:: e = -\sum_k \hat y_k \ln \hat y_k, \quad \hat y = \operatorname{softmax}(z)

    Computed in float32 as a sum of positive terms, so that tiny entropies keep their digits: thresholds of 1e-4 are
    common. With :math:`s = z - \max z` and :math:`m` the position of the maximum,

    .. math:: e = \ln\left(1 + \sum_{k \ne m} \exp s_k\right) - \sum_k \hat y_k s_k

    A probability of exactly 0 contributes 0.

    Args:
        logits: ``[..., K]`` with K at least 2.

    Returns:
        ``[...]`` float32 in ``[0, ln K]``.

    Example:
        >>> bool(jnp.allclose(entropy_of_logits(jnp.zeros(10)), jnp.log(10.0)))
        True

    References:
        Teerapittayanon et al., BranchyNet, 2016, section III and Figure 2.
    """
    shifted, others = _shifted(logits)
    weights, total = jnp.exp(shifted), others.sum(axis=-1)
    expected = jnp.sum(weights * jnp.where(weights > 0, shifted, 0.0), axis=-1) / (1 + total)
    return jnp.log1p(total) - expected


def max_probability_of_logits(logits: Array) -> Array:
    r"""Computes :math:`1 - \max_k \hat y_k` of ``logits [..., K]``, to full relative precision also near 0."""
    total = _shifted(logits)[1].sum(axis=-1)
    return total / (1 + total)


def margin_of_logits(logits: Array) -> Array:
    r"""Computes :math:`1 - (\hat y_{(1)} - \hat y_{(2)})` of ``logits [..., K]``, to full precision also near 0."""
    _, others = _shifted(logits)
    total = others.sum(axis=-1)
    return (total + others.max(axis=-1)) / (1 + total)


def _shifted(logits: Array) -> tuple[Array, Array]:
    """Returns float32 logits minus their maximum, and the exponentials with 0 in place of the largest."""
    check_classes(logits)
    logits = logits.astype(jnp.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    is_largest = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
    return shifted, jnp.where(is_largest, 0.0, jnp.exp(shifted))


entropy = _OfLogits(entropy_of_logits, 'entropy')
"""The paper's criterion: entropy of the exit's softmax, in nats; of any logits: ``entropy.uncertainty_of(logits)``."""

max_probability = _OfLogits(max_probability_of_logits, 'max probability')
"""One minus the largest probability."""

margin = _OfLogits(margin_of_logits, 'margin')
"""One minus the difference between the two largest probabilities."""


class _Patience(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """See `patience`; carries the label before and the number of agreements ``[B, …]``."""

    name = 'patience'

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_classes(logits)
        # NaN's argmax is some class: a later exit must not agree with it.
        label = jnp.where(jnp.isnan(logits).any(axis=-1), -1, most_likely_class(logits))
        before, count = (-1, 0.0) if carry is None else carry
        count = jnp.where((label == before) & (label >= 0), count + 1.0, 0.0)
        return logits, unless_nan(-mean_over_pixels(count), logits), (label, count)


patience = _Patience()
"""Minus the number of exits in a row that agreed with the one before: a threshold of −1.5 waits for two agreements.

References:
    Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, 2020.
"""


class _Ensemble(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """See `ensemble`; carries the sum of the exits so far ``[B, …, K]``, of probabilities or of their logarithms."""

    kind: str = struct.field(pytree_node=False)
    criterion: _OfLogits
    name: str = struct.field(pytree_node=False)

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        check_classes(logits)
        total, arithmetic = jax.nn.log_softmax(logits.astype(jnp.float32)), self.kind == 'arithmetic'
        if carry is not None:
            total = jnp.logaddexp(carry, total) if arithmetic else carry + total
        answer = total - jnp.log(n + 1.0) if arithmetic else jax.nn.log_softmax(total / (n + 1))
        return answer, self.criterion.uncertainty(answer), total


def ensemble(kind: str = 'arithmetic', criterion: Any = entropy) -> Criterion:
    r"""Builds the criterion whose answer at each exit is the mean of all exits so far.

    .. math:: \bar y_n = \frac1n \sum_{i \le n} \hat y_i \quad\text{or}\quad
        \bar y_n \propto \exp \frac1n \sum_{i \le n} \ln \hat y_i

    Args:
        kind: ``'arithmetic'`` or ``'geometric'`` mean of the probabilities.
        criterion: judges the mean: a criterion of single logits, or a function of logits.

    Raises:
        ValueError: another kind of mean, or a criterion that uses earlier exits itself.

    Example:
        >>> criterion = ensemble()
        >>> _, _, carry = criterion(jnp.log(jnp.array([[0.9, 0.1]])), None, 0)
        >>> answer, _, _ = criterion(jnp.log(jnp.array([[0.5, 0.5]])), carry, 1)
        >>> [round(float(p), 3) for p in jnp.exp(answer[0])]
        [0.7, 0.3]

    References:
        Qendro et al., Early Exit Ensembles for Uncertainty Quantification, 2021.
    """
    if kind not in ('arithmetic', 'geometric'):
        raise ValueError(f"kind: got {kind!r}; choose 'arithmetic' or 'geometric'")
    return _Ensemble(kind, of_logits(criterion), f'{kind} ensemble')


class _Calibrated(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """See `with_temperatures`."""

    temperatures: Array
    criterion: Criterion
    name: str = struct.field(pytree_node=False)
    num_exits: int = struct.field(pytree_node=False)

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        return self.criterion(logits / self.temperatures[n], carry, n)


def with_temperatures(temperatures: Any, criterion: Any = entropy) -> Criterion:
    """Builds a criterion on calibrated logits: those of exit n divided by its temperature.

    Args:
        temperatures: ``[N]`` positive, from `fit_temperatures`.
        criterion: judges the calibrated logits: a criterion, or a function of logits.

    Raises:
        ValueError: a temperature that is not positive and finite.

    Example:
        >>> calibrated = with_temperatures([2.0, 1.0])
        >>> calibrated(jnp.array([[2.0, 0.0]]), None, 0)[0].tolist()
        [[1.0, 0.0]]

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    values = np.asarray(temperatures, np.float32)
    if values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f'temperatures: got {values.tolist()}; give one positive number per exit')
    criterion = as_criterion(criterion)
    return _Calibrated(jnp.asarray(values), criterion, f'{criterion.name}, calibrated', len(values))


class _Pixelwise(Criterion, struct.PyTreeNode, eq=False, repr=False):
    """See `pixelwise`; carries the mosaic ``[B, …, K]`` and which pixels of it have answered ``[B, …]``."""

    pixel_thresholds: Array
    criterion: _OfLogits
    num_exits: int = struct.field(pytree_node=False)

    name = 'pixelwise'

    def __call__(self, logits: Array, carry: Carry, n: int) -> tuple[Array, Array, Carry]:
        mosaic, answered = (logits, jnp.zeros(logits.shape[:-1], bool)) if carry is None else carry
        answer = jnp.where(answered[..., None], mosaic, logits)
        if n < self.num_exits - 1:
            answered = answered | is_confident(self.criterion.uncertainty_of(logits), self.pixel_thresholds[n])
        return answer, unless_nan(mean_over_pixels(~answered), answer), (answer, answered)

    def pixel_exits(self, logits: Array) -> Array:
        """Returns which exit answers each pixel if no image leaves early.

        Args:
            logits: ``[N, B, …, K]`` of every exit.

        Returns:
            ``[B, …]`` int32 in ``[0, N)``.
        """
        check_criterion(self, len(logits))
        exits, carry = jnp.zeros(logits.shape[1:-1], jnp.int32), None
        for n, of_exit in enumerate(logits[:-1]):
            carry = self(of_exit, carry, n)[2]
            exits += ~carry[1]  # every exit that a pixel passes counts
        return exits


def pixelwise(pixel_thresholds: Any, criterion: Any = entropy) -> _Pixelwise:
    r"""Builds the criterion that lets each pixel answer at the first exit where it is confident.

    The answer of exit n is a mosaic: confident pixels show the logits of the exit that they left at, the others those
    of exit n. The uncertainty of the image is the share of pixels that are not confident yet: a threshold of 0.02 lets
    an image leave once less than 2 % of it would still change.

    **A confident pixel saves no time by itself:** convolutions compute whole images, and so do all executors here.
    Time is saved when an image leaves; ``pixelwise(…).pixel_exits(logits)`` says which exit answers which pixel.

    Args:
        pixel_thresholds: ``[N - 1]``, in the unit of ``criterion``; compared pixel by pixel, strictly.
        criterion: judges each pixel: a criterion of single logits, or a function ``[B, H, W, K] → [B, H, W]``.

    Raises:
        ValueError: thresholds that are not numbers in one dimension, or NaN; when run, another number of them than
            side exits.

    Example:
        >>> criterion, sure, unsure = pixelwise([0.5]), jnp.array([9.0, 0.0]), jnp.array([0.0, 0.0])
        >>> logits = jnp.stack([sure, unsure])[None, None]  # one image of 1 × 2 pixels
        >>> _, uncertainty, carry = criterion(logits, None, 0)
        >>> answer, _, _ = criterion(-logits - 1, carry, 1)
        >>> uncertainty.tolist(), answer[0, 0].tolist()
        ([0.5], [[9.0, 0.0], [-1.0, -1.0]])
        >>> criterion.pixel_exits(jnp.stack([logits, logits])).tolist()
        [[[0, 1]]]

    References:
        Liu et al., Anytime Dense Prediction with Confidence Adaptivity, 2022.
    """
    thresholds = np.asarray(pixel_thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f'pixel_thresholds: expected one number per side exit, got {thresholds.tolist()}')
    return _Pixelwise(jnp.asarray(thresholds), of_logits(criterion), len(thresholds) + 1)
