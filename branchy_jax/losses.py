"""One loss per exit, and their weighted sum."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from branchy_jax.types import Array


def cross_entropy_per_exit(logits: tuple[Array, ...], labels: Array) -> Array:
    r"""Computes the mean cross-entropy of every exit.

    .. math:: L_n = -\frac{1}{B} \sum_b \ln \operatorname{softmax}(z_{n, b})_{y_b}

    Args:
        logits: N arrays ``[B, …, K]``.
        labels: ``[B, …]`` integers in ``[0, K)``.

    Returns:
        ``[N]`` float32.

    Raises:
        ValueError: labels that are not integers or whose shape does not match the logits.

    Example:
        >>> losses = cross_entropy_per_exit((jnp.zeros((2, 10)), jnp.zeros((2, 10))), jnp.array([3, 7]))
        >>> bool(jnp.allclose(losses, jnp.log(10.0)))
        True

    References:
        BranchyNet, 2016, section III-B.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f'labels: expected integers in [0, K), got dtype {labels.dtype}; one-hot labels need argmax')
    for n, exit_logits in enumerate(logits):
        if exit_logits.shape[:-1] != labels.shape:
            raise ValueError(
                f'labels: exit {n} gives logits of shape {exit_logits.shape}, so labels must have shape '
                f'{exit_logits.shape[:-1]}; got {labels.shape}'
            )
    return jnp.stack([optax.softmax_cross_entropy_with_integer_labels(z, labels).mean() for z in logits])


def weighted_exit_loss(exit_losses: Array, exit_weights: Array) -> Array:
    r"""Sums the exits' losses with their weights: :math:`L = \sum_n w_n L_n`.

    Args:
        exit_losses: ``[N]``.
        exit_weights: ``[N]``. The paper's best setting for two exits is 1.0 and 0.3: early exits regularise.

    Returns:
        Scalar.

    Raises:
        ValueError: not one weight per exit.

    Example:
        >>> float(weighted_exit_loss(jnp.array([2.0, 1.0]), jnp.array([1.0, 0.5])))
        2.5
    """
    exit_weights = jnp.asarray(exit_weights, exit_losses.dtype)
    if exit_weights.shape != exit_losses.shape:
        raise ValueError(
            f'exit_weights: expected one weight for each of the {exit_losses.shape[0]} exits, '
            f'got shape {exit_weights.shape}'
        )
    return jnp.sum(exit_weights * exit_losses)
