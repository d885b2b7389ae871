"""Times of a network and its baseline at a batch size, under given policies or at forced exit shares."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.costs import StageCosts
from branchy_jax.thresholds import ExitTable
from branchy_jax.types import Variables
from experiments.run.networks import Networks
from experiments.run.report import Row
from experiments.run.timing import Policies, time_run

SHARES = {2: '94/6,70/30,0/100,100/0', 3: '70/20/10,100/0/0,40/30/30,0/0/100'}
"""Shares of the exits in percent by the number of exits; the first are about those of the paper."""

_BATCH_1_IMAGES = 100
# Standard deviation of a logit over images: entropies then spread over a good part of [0, ln 10].
_SPREAD, _POOL = 2.0, 128
# Residual branches so weak that a hundred of them do not overflow where no BatchNorm knows the images.
_KERNEL_SCALE = 0.3


def random_variables(model: Any, images: np.ndarray) -> Variables:
    """Makes random variables without compiling an initialisation, since time does not depend on them."""
    generator = np.random.default_rng(0)

    def leaf(path: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind == 'kernel':
            scale = _KERNEL_SCALE * np.sqrt(2 / np.prod(spec.shape[:-1]))
            return generator.standard_normal(spec.shape, np.float32) * np.float32(scale)
        return np.full(spec.shape, float(kind in ('scale', 'var')), np.float32)

    specs = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, specs))


def random_network(name: str) -> tuple[Any, Variables]:
    """Returns a network whose logits differ between images, and its variables as NumPy arrays.

    The logits of new heads hardly differ between images, so rounding would decide which images leave. Heads are
    therefore rescaled.

    Args:
        name: of a network whose heads end in dense layers called ``exit1_fc``, …, and ``fc``, ``fc2`` or ``fc3``.
    """
    model = bj.models.create(name)
    images = np.random.default_rng(0).standard_normal((_POOL, *model.image_shape), np.float32)
    variables = jax.tree.map(np.array, random_variables(model, images))
    params, every = variables['params'], logits_of(model, variables, images)
    last = max(layer for layer in params if layer.startswith('fc'))
    for n, logits in enumerate(every, 1):
        mean = logits.mean(axis=0)
        scale = _SPREAD / (logits - mean).std()
        dense = params[last if n == len(every) else f'exit{n}_fc']
        dense['kernel'] *= scale
        dense['bias'] = (dense['bias'] - mean) * scale
    return model, variables


def logits_of(model: Any, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Returns the logits ``[N, M, K]`` of every exit."""
    return np.asarray(bj.inference.exit_outputs(model, variables, images, batch_size=min(64, len(images))).logits)


def random_networks(name: str, images: np.ndarray, **options: Any) -> Networks:
    """Returns a branchy network with these options and its baseline, with the same random weights."""
    model, variables = random_network(name)
    variables, channels = jax.device_put(variables), images.shape[-1]
    nothing = bj.Normalization(mean=jnp.zeros(channels), deviation=jnp.ones(channels))
    return Networks(name, {'image_shape': model.image_shape, **options}, variables, variables, nothing)


def images_needed(batch: int) -> int:
    """Returns the number of images that a cell is measured on."""
    return _BATCH_1_IMAGES if batch == 1 else batch


def table_of(uncertainty: np.ndarray) -> ExitTable:
    """Returns a table to force shares by; it holds no statistics or costs, since shares depend on neither."""
    exits = len(uncertainty)
    costs, statistics = StageCosts(stages=np.ones(exits), exits=np.zeros(exits)), np.zeros((*uncertainty.shape, 1))
    fields = {'costs': costs, 'statistics': statistics, 'criterion': bj.criteria.entropy, 'split': 'random images'}
    return ExitTable(uncertainty=uncertainty, **fields)


def force(networks: Networks, images: np.ndarray, shares: Mapping[str, Sequence[float]]) -> dict[str, bj.ExitPolicy]:
    """Returns policies under which these images leave in given shares, by name."""
    outputs = bj.inference.exit_outputs(*networks.fast, images, batch_size=min(256, len(images)))
    table = table_of(outputs.uncertainty)
    return {name: table.for_shares(own) for name, own in shares.items()}


def measure(networks: Networks, images: np.ndarray, policies: Policies, batch: int, *, passes: int) -> list[Row]:
    """Times both networks at a batch size, under each policy, beside the limit of what exits can gain.

    Args:
        networks: both.
        images: ``[M, H, W, C]`` normalised; whole batches of them are used.
        policies: by name, all of one criterion.
        batch: images in a call.
        passes: interleaved passes.

    Returns:
        A row per policy: its clock (`time_run`); ``time_limit_ms``, the expected time of stages and heads, each
        measured alone at its best batch size, in ONNX Runtime of images that all leave at one exit; and ``realised``,
        that limit ÷ ``latency_ms``.
    """
    images = images[: len(images) // batch * batch]
    clocks = time_run(networks, images, images, policies, batch=batch, passes=passes)
    criterion = next(iter(policies.values())).criterion
    sizes = sorted({1, min(64, len(images)), batch})
    engines = {name: clock['executor'].startswith('ONNX') for name, clock in clocks['points'].items()}
    if not all(engines.values()):
        times = bj.inference.segment_times(*networks.fast, images, batch_sizes=sizes, criterion=criterion).best()
    outputs = bj.inference.exit_outputs(*networks.fast, images, criterion=criterion, batch_size=min(256, len(images)))
    table = table_of(outputs.uncertainty)
    costs, rows = bj.costs.count_macs(networks.model, inputs=networks.inputs), []
    for name, policy in policies.items():
        fractions = np.bincount(table.answering_exits(policy.thresholds), minlength=table.num_exits) / len(images)
        clock = clocks['points'][name]
        limit = fractions @ clocks['exit_latency_ms'] if engines[name] else bj.costs.expected_cost(times, fractions)
        row = {'operating_point': name, 'thresholds': np.asarray(policy.thresholds).tolist()}
        row |= {'exit_fractions': fractions.tolist(), **clock, 'baseline_ms': clocks['baseline']['latency_ms']}
        row |= {'mac_limit': float(bj.costs.mac_limit(costs, fractions)), 'time_limit_ms': float(limit)}
        rows.append({**row, 'realised': float(limit) / clock['latency_ms']})
    return rows
