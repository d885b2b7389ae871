"""P-values for "the risk is above ε", valid for any sample size; losses lie in [0, 1] and are independent draws."""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def binomial(losses: np.ndarray, epsilon: float) -> np.ndarray:
    r"""Computes exact p-values for losses that are 0 or 1: :math:`P(\operatorname{Bin}(n, \epsilon) \le \sum_i L_i)`.

    Args:
        losses: ``[…, n]`` zeros and ones.
        epsilon: risk to be refuted.

    Returns:
        ``[…]``.

    Raises:
        ValueError: losses other than 0 and 1.

    Example:
        >>> float(binomial(np.zeros(2), 0.5))
        0.25

    References:
        Clopper and Pearson, 1934. Angelopoulos et al., Learn then Test, 2021.
    """
    losses = np.asarray(losses)
    if not np.isin(losses, (0, 1)).all():
        raise ValueError('losses: the exact binomial test is for losses of 0 and 1; use hoeffding_bentkus or betting')
    return stats.binom.cdf(losses.sum(axis=-1), losses.shape[-1], epsilon)


def hoeffding_bentkus(losses: np.ndarray, epsilon: float) -> np.ndarray:
    r"""Computes p-values for losses in [0, 1] from their mean alone: the smaller of Hoeffding's and Bentkus's.

    .. math:: \min\left(e^{-n\, h(\min(\hat R, \epsilon), \epsilon)},\;
        e\, P(\operatorname{Bin}(n, \epsilon) \le \lceil n \hat R \rceil)\right), \quad
        h(a, b) = a \ln\tfrac ab + (1 - a) \ln\tfrac{1 - a}{1 - b}

    Args:
        losses: ``[…, n]`` in [0, 1].
        epsilon: risk to be refuted.

    Returns:
        ``[…]``, at most 1.

    References:
        Bates et al., Distribution-Free, Risk-Controlling Prediction Sets, 2021, section 3.1.
    """
    losses = np.asarray(losses, np.float64)
    count, risk = losses.shape[-1], losses.mean(axis=-1)
    below = np.minimum(risk, epsilon)
    divergence = special.rel_entr(below, epsilon) + special.rel_entr(1 - below, 1 - epsilon)
    # The sum of losses is a float: 3.0000000001 is 3, not 4.
    bentkus = np.e * stats.binom.cdf(np.ceil(count * risk - 1e-9), count, epsilon)
    return np.minimum(1.0, np.minimum(np.exp(-count * divergence), bentkus))


def betting(losses: np.ndarray, epsilon: float, *, delta: float = 0.1) -> np.ndarray:
    r"""Computes p-values for losses in [0, 1] by betting on their falling below ε, one after the other.

    .. math:: p = \left(\max_i \prod_{j \le i} (1 - \nu_j (L_j - \epsilon))\right)^{-1}

    with bets :math:`\nu_j` that depend on earlier losses only. Uses the variance: much the best where losses are small
    but not 0 or 1. Refuting at δ is the same as the Waudby-Smith–Ramdas upper confidence bound lying below ε.

    Args:
        losses: ``[…, n]`` in [0, 1], in an order that does not depend on them.
        epsilon: risk to be refuted.
        delta: level that the bets are tuned for; any is valid.

    Returns:
        ``[…]``, at most 1.

    References:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2020. Bates et al., 2021,
        section 3.1.3.
    """
    losses = np.asarray(losses, np.float64)
    count = losses.shape[-1]
    numbers = np.arange(1, count + 1)
    mean = (0.5 + np.cumsum(losses, axis=-1)) / (1 + numbers)
    variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=-1)) / (1 + numbers)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], axis=-1)
    bets = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (count * before)))
    wealth = np.cumsum(np.log1p(-bets * (losses - epsilon)), axis=-1)
    return np.exp(-np.maximum(0.0, wealth.max(axis=-1)))
