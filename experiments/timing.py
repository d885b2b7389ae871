"""Batch-1 latency of a branchy network and its baseline, interleaved in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.types import Variables

Network = tuple[bj.BranchyNet, Variables]


@dataclasses.dataclass(frozen=True)
class Timed:
    """What the clock said, as fields of the report's rows.

    Attributes:
        baseline: of the one-exit network.
        branchy: of the branchy network at its thresholds.
        exit_latency_ms: time of an image that leaves at exit n.
    """

    baseline: dict[str, Any]
    branchy: dict[str, Any]
    exit_latency_ms: list[float]


def time_networks(
    branchy: Network, baseline: Network, dataset: bj.data.Dataset, thresholds: np.ndarray, *, images: int, passes: int
) -> Timed:
    """Times both networks on the same test images, one call per image, every call waited for.

    Both run through `branchy_jax.inference.optimize`; the plain jitted baseline runs beside them.

    Args:
        branchy: network and variables.
        baseline: network and variables.
        dataset: its first test images are the inputs.
        thresholds: ``[N - 1]`` of the chosen point.
        images: inputs of a pass.
        passes: interleaved passes over the inputs.
    """
    normalized = dataset.normalization(dataset.test.image[:images])
    inputs = [jax.block_until_ready(image) for image in normalized]
    optimized, baseline_optimized = bj.inference.optimize(*branchy), bj.inference.optimize(*baseline)
    none = jnp.zeros(0)
    functions = {
        'plain': _on(baseline, none, inputs),
        'baseline': _on(baseline_optimized, none, inputs),
        'branchy': _on(optimized, jnp.asarray(thresholds), inputs),
    }
    exits, few = branchy[0].num_exits, inputs[: max(1, len(inputs) // 5)]
    for n in range(exits):  # force every image out at exit n
        forced = np.where(np.arange(exits - 1) == n, np.inf, -np.inf)
        functions[f'exit {n}'] = _on(optimized, jnp.asarray(forced, jnp.float32), few)
    seconds = bj.measure.interleaved_passes(functions, passes=passes)

    def fields(name: str) -> dict[str, Any]:
        gain = bj.measure.paired_ratio(seconds['baseline'], seconds[name])
        plain = bj.measure.paired_ratio(seconds['plain'], seconds[name])
        return {
            'batch': 1,
            'latency_images': len(inputs),
            'latency_passes': passes,
            'latency_ms': float(np.median(seconds[name])) / len(inputs) * 1e3,
            'gain': gain.median,
            'gain_low': gain.low,
            'gain_high': gain.high,
            'gain_plain': plain.median,
        }

    return Timed(
        baseline=fields('baseline'),
        branchy=fields('branchy'),
        exit_latency_ms=[float(np.median(seconds[f'exit {n}'])) / len(few) * 1e3 for n in range(exits)],
    )


def _on(network: Network, thresholds: jax.Array, inputs: list[jax.Array]) -> Callable[[], None]:
    model, variables = network
    execute = bj.inference.staged(model)
    return bj.measure.one_by_one(lambda image: execute(variables, image, thresholds), inputs)
