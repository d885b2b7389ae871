"""Thresholds that adapt while they run: hold a target as the data drift, and notice that they drift.

The paper proposes thresholds that adapt at run time to hold a latency or an accuracy; here they move along a path of
settings, from leaving most to never leaving. Everything is a pure function of a state and works under `jax.jit`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from branchy_jax.types import Array

_FEWEST_EXPECTED = 5.0


@struct.dataclass
class Controller:
    """Where the thresholds stand, and what holds them there.

    Attributes:
        path: ``[G, N - 1]`` finite settings from leaving most to leaving least.
        position: in ``[0, 1]`` along the path.
        target: mean that the observed values are to have.
        scale: how much the observed mean rises from one end of the path to the other, roughly.
        horizon: images after which an error has shrunk to a third.
        largest_step: the most that the position moves in one update.
    """

    path: Array
    position: Array
    target: Array
    scale: Array
    horizon: Array
    largest_step: Array


def create_controller(
    path: Array,
    *,
    target: float,
    scale: float,
    position: float = 0.5,
    horizon: float = 300.0,
    largest_step: float = 0.1,
) -> Controller:
    """Creates a controller that has seen nothing yet.

    Args:
        path: ``[G, N - 1]`` settings from leaving most to leaving least, best evenly spaced in what is held
            (`path_by_shares`; turn a `branchy_jax.thresholds.threshold_path` round); infinities are replaced by the
            nearest finite threshold of their exit.
        target: mean to hold: of cost or milliseconds per image, or of a label-free proxy of accuracy such as one minus
            a calibrated or learned uncertainty. Whatever is held must rise along the path.
        scale: rise of that mean along the path, roughly.
        position: to start at.
        horizon: images after which an error has shrunk to a third; short ones follow faster and scatter more. Well
            above the batch size, see `update`.
        largest_step: the most that the position moves in one update, however wild the observations.

    Raises:
        ValueError: numbers out of range, a path without two settings, or one that begins at its leaving least.

    Example:
        >>> controller = create_controller([[0.1], [0.0]], target=5.0, scale=10.0)
        >>> controller = update(controller, jnp.array([9.0, 9.0]))   # too dear: leave earlier
        >>> bool(thresholds_of(controller)[0] > 0.05)
        True
    """
    path = _finite(np.asarray(path, np.float32))
    if not (np.isfinite(target) and scale > 0 and horizon > 0 and 0 < largest_step <= 1 and 0 <= position <= 1):
        raise ValueError(
            'target, scale, horizon, largest_step, position: expected a finite target, scale and horizon above 0, '
            f'largest_step in (0, 1], position in [0, 1]; got {target}, {scale}, {horizon}, {largest_step}, {position}'
        )
    numbers = (position, target, scale, horizon, largest_step)
    return Controller(jnp.asarray(path), *(jnp.float32(number) for number in numbers))


def _finite(path: np.ndarray) -> np.ndarray:
    if path.ndim != 2 or len(path) < 2 or np.isnan(path).any() or not np.isfinite(path).any(axis=0).all():
        raise ValueError(f'path: expected [G, N - 1] with G at least 2 and finite settings, got shape {path.shape}')
    if (path[0] < path[-1]).any():
        raise ValueError(
            'path: it must lead from leaving most to leaving least; this one leads the other way, turn it round'
        )
    with_nan = np.where(np.isfinite(path), path, np.nan)
    return np.clip(path, np.nanmin(with_nan, axis=0), np.nanmax(with_nan, axis=0))


def path_by_shares(uncertainty: Array, *, size: int = 101) -> np.ndarray:
    """Builds a path along which every exit is sure of a share of all inputs that falls evenly from all to none.

    Shares of *all* inputs, not of those that reach the exit: costs are roughly, not exactly, even along it.

    Args:
        uncertainty: ``[N, B]`` on validation data.
        size: G.

    Returns:
        ``[G, N - 1]``.
    """
    uncertainty = np.asarray(uncertainty, np.float32)
    path = np.quantile(uncertainty[:-1], np.linspace(1, 0, size), axis=1).astype(np.float32)
    path[0] = np.nextafter(path[0], np.float32(np.inf))  # the comparison is strict: now all are sure
    return path


def thresholds_of(controller: Controller) -> Array:
    """Returns ``[N - 1]`` thresholds, interpolated between the two nearest settings of the path."""
    place = controller.position * (len(controller.path) - 1)
    below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, len(controller.path) - 2)
    share = place - below
    return controller.path[below] * (1 - share) + controller.path[below + 1] * share


def update(controller: Controller, observed: Array) -> Controller:
    r"""Moves the thresholds after some images were answered at `thresholds_of`.

    .. math:: p \leftarrow \operatorname{clip}_{[0, 1]}\left(p +
        \operatorname{clip}_{\pm s}\left(\frac{1}{h} \sum_b \frac{t - o_b}{r}\right)\right)

    An integral controller on a plant without memory. Where the observed mean rises along the path by k times the given
    scale, it settles without overshoot while k times the batch size is below the horizon, and settles at all below
    twice that.

    Args:
        controller: its state.
        observed: ``[B]`` cost, milliseconds or proxy of each image answered.

    Returns:
        The state after. Values that are not finite are left out.
    """
    observed = jnp.asarray(observed, jnp.float32)
    errors = jnp.where(jnp.isfinite(observed), controller.target - observed, 0.0) / controller.scale
    step = jnp.clip(errors.sum() / controller.horizon, -controller.largest_step, controller.largest_step)
    return controller.replace(position=jnp.clip(controller.position + step, 0.0, 1.0))


@struct.dataclass
class Monitor:
    """Which exits answer lately, against how it should be.

    Attributes:
        expected: ``[N]`` shares on reference data.
        shares: ``[N]`` moving average.
        seen: how many images it has averaged, counted up to the memory.
        memory: images that the moving average reaches back.
    """

    expected: Array
    shares: Array
    seen: Array
    memory: Array


def create_monitor(expected: Array, *, memory: float = 1000.0) -> Monitor:
    """Creates a monitor that has seen nothing yet.

    Args:
        expected: ``[N]`` exit shares on reference data, summing to 1.
        memory: images that the moving average reaches back.

    Raises:
        ValueError: shares that do not sum to 1, or a memory below 1.
    """
    expected = np.asarray(expected, np.float32)
    if expected.ndim != 1 or abs(expected.sum() - 1) > 1e-4 or (expected < 0).any() or memory < 1:
        raise ValueError(f'expected: got {expected.tolist()}, memory {memory}; give shares summing to 1, memory ≥ 1')
    return Monitor(jnp.asarray(expected), jnp.asarray(expected), jnp.float32(0.0), jnp.float32(memory))


def observe(monitor: Monitor, exit_index: Array) -> Monitor:
    """Counts a batch of answers.

    Args:
        monitor: its state.
        exit_index: ``[B]`` as executors return it; B may be 0.
    """
    exit_index = jnp.atleast_1d(exit_index)
    if len(exit_index) == 0:
        return monitor
    found = jax.nn.one_hot(exit_index, len(monitor.expected)).mean(axis=0)
    seen = jnp.minimum(monitor.seen + len(exit_index), jnp.maximum(monitor.memory, len(exit_index)))
    weight = len(exit_index) / seen
    return monitor.replace(shares=(1 - weight) * monitor.shares + weight * found, seen=seen)


def drift(monitor: Monitor) -> Array:
    r"""Returns how far the shares are from those expected, in standard deviations of chance.

    .. math:: \sqrt{\frac{\chi^2}{N - 1}}, \quad
        \chi^2 = m \sum_n \frac{(\hat f_n - f_n)^2}{f_n}

    with m the images that the moving average is worth: twice its memory once it is full. About 1 without drift, above
    3 hardly by chance; 0 while too few images were seen to tell (five expected at the rarest exit). The shares
    expected count as exact: take them from many more images than the memory holds.
    """
    expected = jnp.maximum(monitor.expected, 1 / monitor.memory)
    worth = jnp.where(monitor.seen < monitor.memory, monitor.seen, 2 * monitor.memory)
    chi_squared = worth * jnp.sum((monitor.shares - monitor.expected) ** 2 / expected)
    enough = monitor.seen * expected.min() >= _FEWEST_EXPECTED
    return jnp.where(enough, jnp.sqrt(chi_squared / max(1, len(monitor.expected) - 1)), 0.0)
