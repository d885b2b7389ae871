"""From figures per seed to verdicts in words, by confidence intervals; and what the paper's claims come down to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
DEPTHS = (0, 1, 2, 3, 4)
_POSITIONS = {'lenet': (1, 2, 3), 'alexnet': (1, 2, 3, 4)}


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


def judge(question: str, differences: np.ndarray, *, unit: str, scale: float = 1.0) -> dict[str, Any]:
    """Answers a question by paired differences, one a seed, positive where the claim holds.

    Yes, if the whole interval is above 0; no, the opposite, if it is all below; otherwise these seeds do not show it.

    Args:
        question: that a yes affirms.
        differences: ``[S]``.
        unit: of the differences, after scaling.
        scale: to show them in that unit.

    Example:
        >>> judge('Is it larger?', np.array([1.0, 1.1, 0.9]), unit='points')['verdict']
        'yes'
    """
    found = interval(np.asarray(differences) * scale)
    if found['seeds'] < 2:
        verdict = 'one seed cannot say'
    elif found['low'] > 0:
        verdict = 'yes'
    elif found['high'] < 0:
        verdict = 'no, the opposite'
    else:
        verdict = 'no: not shown, the interval holds 0'
    return {'question': question, 'verdict': verdict, 'unit': unit, **found}


def sentence(judged: Mapping[str, Any]) -> str:
    """Returns a verdict as a sentence with its figures."""
    return (
        f'{judged["question"]} **{judged["verdict"].capitalize()}**: {judged["mean"]:.3g} {judged["unit"]} '
        f'[{judged["low"]:.3g}, {judged["high"]:.3g}], {judged["seeds"]} seeds.'
    )


def depth_name(depth: int) -> str:
    """Names the variant whose branch, after the first layer, has so many convolutions."""
    return f'branch of {depth} convolutions'


def position_name(position: int) -> str:
    """Names the variant whose branch, of one convolution, leaves after so many layers."""
    return depth_name(1) if position == 1 else f'branch after layer {position}'  # the same network


def positions(network: str) -> tuple[int, ...]:
    """Returns after how many layers the branches of a network's variants leave."""
    trunk = network[2:]
    if trunk in _POSITIONS:
        return _POSITIONS[trunk]
    blocks = (int(trunk.removeprefix('resnet')) - 2) // 6  # after the first block, then at each third
    return tuple(dict.fromkeys((2, 1 + blocks, 1 + 2 * blocks)))


def judge_all(variants: Mapping[str, Any], network: str) -> list[dict[str, Any]]:
    """Answers every claim from the accuracies of its variants; a question that lacks a variant is left out."""
    accuracies, found = _Accuracies(variants), []
    for claim, questions in _questions(network).items():
        answers = [
            judge(question, differences(accuracies), unit='points', scale=100.0)
            for needed, question, differences in questions
            if set(needed) <= set(variants)
        ]
        if answers:
            found.append({'claim': claim, 'answers': answers})
    return found


@dataclasses.dataclass(frozen=True)
class _Accuracies:
    """What variants reach, one figure a seed."""

    variants: Mapping[str, Any]

    def last(self, name: str, part: str = 'test_accuracy') -> np.ndarray:
        return np.array(self.variants[name][part])[:, -1]

    def first(self, name: str) -> np.ndarray:
        return np.array(self.variants[name]['test_accuracy'])[:, 0]

    def gap(self, name: str) -> np.ndarray:
        return self.last(name, 'train_accuracy') - self.last(name)


_Question = tuple[Sequence[str], str, Callable[[_Accuracies], np.ndarray]]
"""Variants needed, the question, and the differences that answer it, positive where the claim holds."""


def _questions(network: str) -> dict[str, list[_Question]]:
    joint, falling = 'joint', 'joint, first exit 1.0 to last 0.3'
    start, longer = 'joint, from the baseline', 'joint, twice as long'
    depths, places = [depth_name(depth) for depth in DEPTHS], [position_name(place) for place in positions(network)]
    return {
        'Joint training regularises': [
            (
                [joint, 'baseline'],
                'Is the last exit more accurate on test data than the baseline trained on its own?',
                lambda of: of.last(joint) - of.last('baseline'),
            ),
            (
                [joint, 'baseline'],
                'Is its gap between training and test accuracy smaller?',
                lambda of: of.gap('baseline') - of.gap(joint),
            ),
        ],
        'Starting from the trained baseline is better than from random': [
            (
                [start, joint],
                'Is the last exit more accurate, after as many joint epochs?',
                lambda of: of.last(start) - of.last(joint),
            ),
            (
                [start, longer],
                "And after as many epochs in all, the baseline's counted?",
                lambda of: of.last(start) - of.last(longer),
            ),
        ],
        'A larger weight on early exits helps later ones': [
            (
                [falling, joint],
                'Do weights from 1.0 on the first to 0.3 on the last exit make the last more accurate than equal ones?',
                lambda of: of.last(falling) - of.last(joint),
            ),
            ([falling, joint], 'And the first exit?', lambda of: of.first(falling) - of.first(joint)),
        ],
        'Deeper branches (Figure 5)': [
            (
                depths,
                'Does the last exit gain by each convolution in branch 1?',
                lambda of: _slopes([of.last(name) for name in depths]),
            ),
            (depths, "Does the branch's own exit?", lambda of: _slopes([of.first(name) for name in depths])),
        ],
        'Later branches': [
            (
                places,
                "Is the branch's own exit more accurate, each place later?",
                lambda of: _slopes([of.first(name) for name in places]),
            ),
            (
                places,
                'Does the last exit gain by a later branch, each place?',
                lambda of: _slopes([of.last(name) for name in places]),
            ),
        ],
    }


def _slopes(accuracies: Sequence[np.ndarray]) -> np.ndarray:
    """Returns for every seed the slope of accuracy over place, by least squares."""
    return np.polyfit(np.arange(len(accuracies)), np.array(accuracies), 1)[0]
