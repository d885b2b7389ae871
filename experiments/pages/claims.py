"""The page of the claims: verdicts first, then the figures they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import branchy_jax as bj
from experiments.pages.paper import JPEG_NOTE
from experiments.study.verdicts import interval, sentence


def page(record: Mapping[str, Any]) -> str:
    """Lays out a record of `experiments.claims` in Markdown."""
    settings = record['settings']
    rows = []
    for name, variant in record['variants'].items():
        test, train = np.array(variant['test_accuracy']), np.array(variant['train_accuracy'])
        rows.append(
            [
                name,
                ', '.join(_with_interval(values) for values in 100 * test.T),
                _with_interval(100 * (train - test)[:, -1]),
                f'{variant["seconds"]:.0f}',
            ]
        )
    columns = ['variant', 'test accuracy of each exit, %', 'train − test of the last', 'seconds']
    note = f'\n\n{JPEG_NOTE}' if settings['dataset'] == 'cifar10' else ''
    return f"""# The paper's claims on {settings['network']}, {settings['dataset']}

`{record['command']}`

{record['device']}. {settings['train']:,} training and {settings['test']:,} test images, {settings['epochs']} epochs,
{settings['seeds']} seeds, {record['seconds'] / 60:.0f} minutes of training. Figures are means with 95 % confidence
intervals (Student's t); questions are answered by differences paired by seed.{note}

## Verdicts

{verdicts(record)}

## Figures

{bj.report.markdown_table(columns, rows)}
"""


def verdicts(record: Mapping[str, Any]) -> str:
    """Lays out the answers to every claim."""
    return '\n\n'.join(f'**{claim["claim"]}.**\n{bullets(claim["answers"])}' for claim in record['claims'])


def bullets(answers: Sequence[Mapping[str, Any]]) -> str:
    """Lays out answers, one a line."""
    return '\n'.join(f'- {sentence(answer)}' for answer in answers)


def _with_interval(values: np.ndarray) -> str:
    found = interval(values)
    return f'{found["mean"]:.2f} ± {found["high"] - found["mean"]:.2f}'
