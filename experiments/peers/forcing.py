"""Draws images that leave at the exits in given shares, the same images for every runtime.

Weights are random, since time does not depend on them. Images are drawn again until none is so close to a threshold
that the rounding of another runtime could move it to the other side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.peers.job import Job
from experiments.study.cells import images_needed, logits_of, table_of

# Far above what another order of summation changes in an entropy, about 1e-6; below most gaps between 256 of them.
_MARGIN = 1e-4
_MOST_DRAWS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Forced:
    """A job, and the right answers.

    Attributes:
        job: with thresholds.
        exits: ``[M]`` where each image leaves.
        logits: ``[N, M, K]`` of every exit.
    """

    job: Job
    exits: np.ndarray
    logits: np.ndarray

    def labels(self, exits: np.ndarray) -> np.ndarray:
        """Returns the labels ``[M]`` that those exits answer."""
        return self.logits[exits, np.arange(len(exits))].argmax(-1)


def force(name: str, model: Any, variables: Variables, shares: Sequence[float], batch: int, *, cores: int) -> Forced:
    """Draws images, and thresholds at which they leave in given shares, rounded to whole images.

    Args:
        name: of the network.
        model: it.
        variables: of `experiments.study.cells.random_network`.
        shares: ``[N]``.
        batch: images in a call.
        cores: to work with.

    Raises:
        ValueError: shares that do not fit, or at which rounding would decide.
    """
    for seed in range(1, 1 + _MOST_DRAWS):
        shape = images_needed(batch), *model.image_shape
        images = np.random.default_rng(seed).standard_normal(shape, np.float32)
        logits = logits_of(model, variables, images)
        uncertainty, num_exits = np.asarray(bj.criteria.entropy.uncertainty_of(logits)), len(logits)
        table = table_of(uncertainty)
        policy = table.for_shares(shares)
        thresholds, exits = np.asarray(policy.thresholds), np.asarray(table.answering_exits(policy))
        asked = exits >= np.arange(num_exits - 1)[:, None]
        if (np.abs(uncertainty[:-1] - thresholds[:, None])[asked] > _MARGIN).all():
            return Forced(Job(name, variables, images, batch, tuple(thresholds.tolist()), cores), exits, logits)
    raise ValueError(f'shares: got {list(shares)}; of {_MOST_DRAWS} draws of images none left so without close calls')
