"""Draws images that leave at the exits in given shares, the same images for every runtime.

Weights are random, since time does not depend on them. The logits of new heads hardly differ between images, so
rounding would decide which images leave. Heads are therefore rescaled, and images are drawn again until none is so
close to a threshold that the rounding of another runtime could move it to the other side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments.peers.job import Job
from experiments.study.cells import images_needed, random_variables, table_of

# Standard deviation of a logit over images: entropies then spread over a good part of [0, ln 10].
_SPREAD = 2.0
# Far above what another order of summation changes in an entropy, about 1e-6; below most gaps between 256 of them.
_MARGIN = 1e-4
_POOL, _MOST_DRAWS = 128, 100


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


def random_network(name: str) -> tuple[Any, Variables]:
    """Returns a network whose logits differ between images, and its variables as NumPy arrays.

    Args:
        name: of a network whose heads end in dense layers called ``exit1_fc``, …, and ``fc``, ``fc2`` or ``fc3``.
    """
    model = bj.models.create(name)
    images = np.random.default_rng(0).standard_normal((_POOL, *model.image_shape), np.float32)
    variables = jax.tree.map(np.array, random_variables(model, images))
    params, every = variables['params'], _logits(model, variables, images)
    last = max(layer for layer in params if layer.startswith('fc'))
    for n, logits in enumerate(every, 1):
        mean = logits.mean(axis=0)
        scale = _SPREAD / (logits - mean).std()
        dense = params[last if n == len(every) else f'exit{n}_fc']
        dense['kernel'] *= scale
        dense['bias'] = (dense['bias'] - mean) * scale
    return model, variables


def force(name: str, model: Any, variables: Variables, shares: Sequence[float], batch: int, *, cores: int) -> Forced:
    """Draws images, and thresholds at which they leave in given shares, rounded to whole images.

    Args:
        name: of the network.
        model: it.
        variables: of `random_network`.
        shares: ``[N]``.
        batch: images in a call.
        cores: to work with.

    Raises:
        ValueError: shares that do not fit, or at which rounding would decide.
    """
    for seed in range(1, 1 + _MOST_DRAWS):
        shape = images_needed(batch), *model.image_shape
        images = np.random.default_rng(seed).standard_normal(shape, np.float32)
        logits = _logits(model, variables, images)
        uncertainty, num_exits = np.asarray(bj.criteria.entropy.uncertainty_of(logits)), len(logits)
        table = table_of(uncertainty)
        policy = table.for_shares(shares)
        thresholds, exits = np.asarray(policy.thresholds), np.asarray(table.answering_exits(policy))
        asked = exits >= np.arange(num_exits - 1)[:, None]
        if (np.abs(uncertainty[:-1] - thresholds[:, None])[asked] > _MARGIN).all():
            return Forced(Job(name, variables, images, batch, tuple(thresholds.tolist()), cores), exits, logits)
    raise ValueError(f'shares: got {list(shares)}; of {_MOST_DRAWS} draws of images none left so without close calls')


def _logits(model: Any, variables: Variables, images: np.ndarray) -> np.ndarray:
    return np.asarray(bj.inference.exit_outputs(model, variables, images, batch_size=min(64, len(images))).logits)
