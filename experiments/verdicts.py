"""From figures per seed to a verdict in words, by a confidence interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(values: np.ndarray) -> dict[str, float]:
    """Returns the mean of independent values with its 95 % confidence interval (Student's t).

    Example:
        >>> interval(np.array([1.0, 2.0, 3.0]))['mean']
        2.0
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return {'mean': mean, 'low': mean, 'high': mean, 'seeds': len(values)}
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values))
    return {'mean': mean, 'low': float(low), 'high': float(high), 'seeds': len(values)}


def judge(
    question: str, differences: np.ndarray, *, unit: str, scale: float = 1.0, neutral: float = 0.0
) -> dict[str, Any]:
    """Answers a question by paired differences, one a seed, positive where the claim holds.

    Yes, if the whole interval is above ``neutral``; no, the opposite, if it is all below; otherwise these seeds do not
    show it.

    Args:
        question: that a yes affirms.
        differences: ``[S]``.
        unit: of the differences, after scaling.
        scale: to show them in that unit.
        neutral: the value that means no effect, such as 1 for ratios.

    Example:
        >>> judge('Is it larger?', np.array([1.0, 1.1, 0.9]), unit='points')['verdict']
        'yes'
    """
    found = interval(np.asarray(differences) * scale)
    if found['seeds'] < 2:
        verdict = 'one seed cannot say'
    elif found['low'] > neutral:
        verdict = 'yes'
    elif found['high'] < neutral:
        verdict = 'no, the opposite'
    else:
        verdict = 'no: not shown, the interval holds ' + f'{neutral:g}'
    return {'question': question, 'verdict': verdict, 'unit': unit, **found}


def sentence(judged: Mapping[str, Any]) -> str:
    """Returns a verdict as a sentence with its figures."""
    return (
        f'{judged["question"]} **{judged["verdict"].capitalize()}**: {judged["mean"]:.3g} {judged["unit"]} '
        f'[{judged["low"]:.3g}, {judged["high"]:.3g}], {judged["seeds"]} seeds.'
    )
