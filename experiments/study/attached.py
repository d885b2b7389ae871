"""What exits cost on a network that is one module, beside the same network composed of stages."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import branchy_jax as bj
from branchy_jax.measure import Ratio, interleaved_passes, one_by_one, paired_ratio
from branchy_jax.models.compose import Layers, apply_layers
from branchy_jax.report import markdown_table, write_json, write_text

_IMAGES = 200


class Part(nn.Module):
    """A part of the network, so that it has a place."""

    layers: Layers

    preserve_adopted_names = True

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Applies its layers."""
        return apply_layers(self.layers, x, train=train)


class OneModule(nn.Module):
    """The trunk of a network as one module with parts."""

    parts: tuple[Layers, ...]
    head: Layers

    preserve_adopted_names = True

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns logits."""
        for n, layers in enumerate(self.parts):
            x = Part(layers, name=f'part{n}')(x, train)
        return Part(self.head, name='head')(x, train)


def attached(model: bj.BranchyNet) -> Any:
    """Returns the same network, its trunk one module, its side heads attached."""
    heads = {f'part{n}': head for n, head in enumerate(model.exits[:-1])}
    network = OneModule(model.stages, model.exits[-1])
    return bj.models.attach(network, heads, inputs=np.zeros((1, *model.image_shape), np.float32))


def latency(name: str, *, passes: int) -> list[dict[str, Any]]:
    """Times `staged` on both, image by image, for images that leave first and that leave last."""
    composed = bj.models.create(name)
    images = np.random.default_rng(0).standard_normal((_IMAGES, *composed.image_shape), np.float32)
    models = {'composed': composed, 'attached': attached(composed)}
    forms = {way: (model, jax.jit(model.init)(jax.random.key(0), images[:1])) for way, model in models.items()}
    found = []
    for rewritten in (False, True):
        if rewritten:
            forms = {way: bj.inference.optimize(*form) for way, form in forms.items()}
        for leave, threshold in (('first', np.inf), ('last', -np.inf)):
            policy = np.full(composed.num_exits - 1, threshold, np.float32)
            functions = {
                way: one_by_one(functools.partial(_answer, bj.inference.staged(model), variables, policy), images)
                for way, (model, variables) in forms.items()
            }
            seconds = interleaved_passes(functions, passes=passes)
            ratio: Ratio = paired_ratio(seconds['attached'], seconds['composed'])
            ms = {f'{way}_ms': float(np.median(values)) / _IMAGES * 1e3 for way, values in seconds.items()}
            found.append(
                {
                    'network': name,
                    'rewritten': rewritten,
                    'leave': leave,
                    **ms,
                    'attached_over_composed': ratio.median,
                    'low': ratio.low,
                    'high': ratio.high,
                }
            )
    return found


def _answer(run: Any, variables: Any, policy: Any, image: Any) -> Any:
    return run(variables, image, policy)


def tracing(name: str) -> dict[str, Any]:
    """Times what attaching costs before anything runs: seconds of this process."""
    composed = bj.models.create(name)
    start = time.perf_counter()
    model = attached(composed)
    seconds = {'attach': time.perf_counter() - start}
    specs = bj.types.input_specs(composed.image_shape, 1)
    for way, network in (('composed', composed), ('attached', model)):
        variables = jax.eval_shape(network.init, jax.random.key(0), specs)
        image = jax.ShapeDtypeStruct(composed.image_shape, np.float32)
        start = time.perf_counter()
        policy = np.zeros(composed.num_exits - 1, np.float32)
        jax.jit(bj.inference.staged(network)).lower(variables, image, policy)
        seconds[f'tracing staged, {way}'] = time.perf_counter() - start
    return {'network': name, 'exits': model.num_exits, 'seconds': seconds}


def write(workdir: Path, provenance: dict[str, str], *, passes: int) -> None:
    """Measures, and writes ``attached.json`` and ``attached.md``."""
    found, traced = latency('b-lenet', passes=passes), tracing('b-resnet110')
    write_json(workdir / 'attached.json', {**provenance, 'passes': passes, 'latency': found, 'tracing': traced})
    write_text(workdir / 'attached.md', page(found, traced, passes=passes, **provenance))


def page(found: list[dict[str, Any]], traced: dict[str, Any], *, passes: int, device: str, command: str) -> str:
    """Returns the Markdown page."""
    rows = [
        [
            row['network'],
            'yes' if row['rewritten'] else 'no',
            row['leave'],
            f'{row["composed_ms"]:.4f}',
            f'{row["attached_ms"]:.4f}',
            f'{row["attached_over_composed"]:.3f}',
            f'{row["low"]:.3f} to {row["high"]:.3f}',
        ]
        for row in found
    ]
    columns = ['network', 'rewritten', 'leave', 'composed ms', 'attached ms', 'attached ÷ composed', '95 %']
    seconds = '\n'.join(f'- {what}: {value:.1f} s' for what, value in traced['seconds'].items())
    return f"""# Exits on a network that is one module

`{command}`

{device}. `staged`, {_IMAGES} images one by one, {passes} interleaved passes; all leave at the first exit, or the last.

{markdown_table(columns, rows)}

Before anything runs, {traced['network']} with {traced['exits']} exits:

{seconds}
"""
