"""A controller that holds a cost while the test images turn noisy, clean and blurred."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

import branchy_jax as bj
from experiments.outputs import Outputs, entropy_of

_BATCH = 20
_IMAGES = 5000


def control(
    outputs_of: Callable[[np.ndarray, np.ndarray], Outputs], dataset: bj.data.Dataset, validation: Outputs,
    costs: bj.costs.StageCosts, picture: Path, title: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Holds a cost while test images turn noisy, clean and blurred."""
    images, labels = dataset.test.image[:_IMAGES], dataset.test.label[:_IMAGES]
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, 1.5, 1.5, 0)).astype(np.uint8)
    parts = {'clean': images, 'noise': noisy, 'clean again': images, 'blur': blurred}
    answers = [outputs_of(part, labels) for part in parts.values()]
    uncertainty = np.concatenate([entropy_of(part) for part in answers], axis=1)
    reference = entropy_of(validation)
    relative = costs.to_exit / costs.trunk
    target = float(relative[0] + 0.3 * (relative[-1] - relative[0]))
    controller = bj.control.create_controller(
        bj.control.path_by_shares(reference), target=target, scale=float(relative[-1] - relative[0])
    )
    update, fixed = jax.jit(bj.control.update), _thresholds_for(reference, relative, target)
    held, left_alone = [], []
    for start in range(0, uncertainty.shape[1], _BATCH):
        batch = uncertainty[:, start : start + _BATCH]
        spent = relative[bj.thresholds.answering_exits(batch, np.asarray(bj.control.thresholds_of(controller)))]
        controller = update(controller, jnp.asarray(spent))
        held.extend(spent)
        left_alone.extend(relative[bj.thresholds.answering_exits(batch, fixed)])
    averages = {
        'controlled': _moving_average(np.array(held)),
        'thresholds left alone': _moving_average(np.array(left_alone)),
    }
    length, settled = len(labels), min(2000, len(labels) // 2)
    shifts = [length * k for k in range(1, len(parts))]
    bj.plots.held(picture, averages, target, shifts, title=f'{title}: a cost held while images change')
    return [
        {
            'part': name,
            'target': target,
            'after_2000': float(np.mean(held[length * k + settled : length * (k + 1)])),
            'left_alone': float(np.mean(left_alone[length * k + settled : length * (k + 1)])),
        }
        for k, name in enumerate(parts)
    ]


def _thresholds_for(uncertainty: np.ndarray, costs: np.ndarray, target: float) -> np.ndarray:
    """Returns the setting on the controller's path whose cost on validation data is nearest to the target."""
    path = bj.control.path_by_shares(uncertainty)
    spent = [costs[bj.thresholds.answering_exits(uncertainty, setting)].mean() for setting in path]
    return path[np.abs(np.array(spent) - target).argmin()]


def _moving_average(values: np.ndarray, *, reach: int = 500) -> np.ndarray:
    """Averages every value with those before it, as many as there are up to ``reach``."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - reach)
    return (sums[ends] - sums[starts]) / (ends - starts)
