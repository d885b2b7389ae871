"""Answers the paper's claims from figures per seed, by confidence intervals."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.run.report import Row

CONFIDENCE = 0.95
DEPTHS = (0, 1, 2, 3, 4)
_POSITIONS = {'lenet': (1, 2, 3), 'alexnet': (1, 2, 3, 4)}


def interval(values: np.ndarray) -> dict[str, float]:
    """Returns the mean of independent values with its 95 % confidence interval (Student's t)."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return {'mean': mean, 'low': mean, 'high': mean, 'seeds': len(values)}
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values))
    return {'mean': mean, 'low': float(low), 'high': float(high), 'seeds': len(values)}


def judge(question: str, differences: np.ndarray, *, unit: str, claim: str = '') -> Row:
    """Answers a question by paired differences, one for each seed, positive if the claim holds.

    Yes, if the whole interval is above 0; no, the opposite, if it is all below; otherwise these seeds do not show it.

    Args:
        question: that a yes affirms.
        differences: ``[S]``.
        unit: of the differences.
        claim: that the question belongs to.
    """
    values = interval(differences)
    if values['seeds'] < 2:
        verdict = 'one seed cannot say'
    elif values['low'] > 0:
        verdict = 'yes'
    elif values['high'] < 0:
        verdict = 'no, the opposite'
    else:
        verdict = 'no: not shown, the interval holds 0'
    return {'claim': claim, 'question': question, 'verdict': verdict, 'unit': unit, **values}


def bullets(answers: Sequence[Row]) -> str:
    """Lays out answers, one a line, below their claim."""
    lines = []
    for claim in dict.fromkeys(answer['claim'] for answer in answers):
        lines.append(f'\n**{claim}.**')
        for own in (answer for answer in answers if answer['claim'] == claim):
            figures = f'{own["mean"]:.3g} {own["unit"]} [{own["low"]:.3g}, {own["high"]:.3g}], {own["seeds"]} seeds'
            lines.append(f'- {own["question"]} **{own["verdict"].capitalize()}**: {figures}.')
    return '\n'.join(lines).strip()


def depth_name(depth: int) -> str:
    """Names the variant whose branch after the first layer has this number of convolutions."""
    return f'branch of {depth} convolutions'


def position_name(position: int) -> str:
    """Names the variant whose branch of one convolution leaves after this number of layers."""
    return depth_name(1) if position == 1 else f'branch after layer {position}'  # the same network


def positions(network: str) -> tuple[int, ...]:
    """Returns the numbers of layers after which the branches of a network's variants leave."""
    trunk = network[2:]
    if trunk in _POSITIONS:
        return _POSITIONS[trunk]
    blocks = (int(trunk.removeprefix('resnet')) - 2) // 6  # after the first block, then at each third
    return tuple(dict.fromkeys((2, 1 + blocks, 1 + 2 * blocks)))


def accuracies(rows: Sequence[Row], variant: str, part: str = 'test_accuracy') -> np.ndarray:
    """Returns the accuracies of the exits of a variant, ``[S, N]``, in percent."""
    return 100 * np.array([row[part] for row in rows if row['variant'] == variant])


def judge_all(rows: Sequence[Row], network: str) -> list[Row]:
    """Answers every claim from the rows of its variants; leaves out a question whose variant is missing."""
    there, answers = {row['variant'] for row in rows}, []
    for claim, question, what, names in _questions(network):
        if set(names) <= there:
            values = [_values(rows, name, what) for name in names]
            slope = names[0].startswith('branch')  # of accuracy over place, by least squares
            differences = np.polyfit(np.arange(len(values)), values, 1)[0] if slope else values[0] - values[1]
            answers.append(judge(question, differences, unit='points', claim=claim))
    return answers


def _values(rows: Sequence[Row], variant: str, what: str) -> np.ndarray:
    """Returns a figure for each seed: accuracy of the ``'first'`` or ``'last'`` exit, or test − training accuracy."""
    test = accuracies(rows, variant)
    if what == 'fit':
        return (test - accuracies(rows, variant, 'train_accuracy'))[:, -1]
    return test[:, 0 if what == 'first' else -1]


def _questions(network: str) -> list[tuple[str, str, str, Sequence[str]]]:
    """Returns claims, questions, figures and variants: the better one and another one, or several along a slope."""
    base, joint, falling = 'baseline', 'joint', 'joint, first exit 1.0 to last 0.3'
    start, longer = 'joint, from the baseline', 'joint, twice as long'
    depths, places = [depth_name(depth) for depth in DEPTHS], [position_name(place) for place in positions(network)]
    regularises, weights = 'Joint training regularises', 'A larger weight on early exits helps later ones'
    starting = 'Starting from the trained baseline is better than from random'
    deeper, later = 'Deeper branches (Figure 5)', 'Later branches'
    more_accurate = 'Is the last exit more accurate on test data than the baseline trained on its own?'
    falls = 'Do weights from 1.0 on the first to 0.3 on the last exit make the last more accurate than equal ones?'
    return [
        (regularises, more_accurate, 'last', (joint, base)),
        (regularises, 'Is its gap between training and test accuracy smaller?', 'fit', (joint, base)),
        (starting, 'Is the last exit more accurate, after as many joint epochs?', 'last', (start, joint)),
        (starting, "And after as many epochs in all, the baseline's counted?", 'last', (start, longer)),
        (weights, falls, 'last', (falling, joint)),
        (weights, 'And the first exit?', 'first', (falling, joint)),
        (deeper, 'Does the last exit gain by each convolution in branch 1?', 'last', depths),
        (deeper, "Does the branch's own exit?", 'first', depths),
        (later, "Is the branch's own exit more accurate, each place later?", 'first', places),
        (later, 'Does the last exit gain by a later branch, each place?', 'last', places),
    ]
